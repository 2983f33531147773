"""mindone: its own tables of attentions and masks. Its tensors are MindSpore's."""
from . import huggingface, masks


def register(name):
    from mindone.transformers.masking_utils import AttentionMaskInterface
    from mindone.transformers.modeling_utils import AttentionInterface
    AttentionInterface.register(name, huggingface.attention)
    AttentionMaskInterface.register(name, masks.positions)
    huggingface.refuse_in_own_tables("mindone.transformers", name)
