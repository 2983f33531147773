"""mindone: its own tables of attentions and masks. Its tensors are MindSpore's."""
from . import translation


def register(name):
    from mindone.transformers.masking_utils import AttentionMaskInterface
    from mindone.transformers.modeling_utils import AttentionInterface
    AttentionInterface.register(name, translation.attention)
    AttentionMaskInterface.register(name, translation.positions)
