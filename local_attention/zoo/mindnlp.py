"""mindnlp: the tables of the original `transformers`, for which mindnlp replaces `torch`, and its own table of masks.

Every tensor of mindnlp has a `_device`. A tensor that MindSpore made has none.
"""
import importlib

from . import huggingface, masks


def attention(module, query, *args, **kwargs):
    out, weights = huggingface.attention(module, query, *args, **kwargs)
    return _on(query._device, out), weights


def positions(batch_size, cache_position=None, *args, mask_function=None, **kwargs):
    device = kwargs.get("device") if cache_position is None else cache_position._device

    def shown(*indices):
        return mask_function(*(_on(device, index) for index in indices))
    places = masks.positions(batch_size, cache_position, *args, **kwargs,
                             mask_function=None if mask_function is None else shown)
    return _on(device, places)


def _on(device, tensor):
    if tensor is not None:
        tensor._device = device
    return tensor


def register(name):
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, positions)
    # `import ... as` would return the module of transformers: mindnlp.transformers forwards attributes to it
    own = importlib.import_module("mindnlp.transformers.masking_utils")
    own.ALL_MASK_ATTENTION_FUNCTIONS[name] = positions
    huggingface.refuse_in_own_tables("transformers", name)
