"""mindone: two tables of its own, over MindSpore's tensors as they are."""
from . import translation


def register(name):
    from mindone.transformers.masking_utils import AttentionMaskInterface
    from mindone.transformers.modeling_utils import AttentionInterface
    AttentionInterface.register(name, translation.attention)
    AttentionMaskInterface.register(name, translation.positions)
