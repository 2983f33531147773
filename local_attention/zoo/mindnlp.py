"""mindnlp: the tables of the original `transformers`, for which mindnlp replaces `torch`, and its own table of masks.

Every tensor of mindnlp has a `_device`. A tensor that MindSpore made has none.
"""
import importlib

from . import translation


def attention(module, query, *args, **kwargs):
    out, weights = translation.attention(module, query, *args, **kwargs)
    return _on_device_of(query, out), weights


def positions(batch_size, cache_position, *args, **kwargs):
    return _on_device_of(cache_position, translation.positions(batch_size, cache_position, *args, **kwargs))


def _on_device_of(other, tensor):
    if tensor is not None:
        tensor._device = other._device
    return tensor


def register(name):
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, positions)
    # `import ... as` would return the module of transformers: mindnlp.transformers forwards attributes to it
    own = importlib.import_module("mindnlp.transformers.masking_utils")
    own.ALL_MASK_ATTENTION_FUNCTIONS[name] = positions
