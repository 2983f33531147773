"""Translates the calls of Hugging Face's models, which the zoos follow, into calls of `windowed_attention`.

A model calls the mask function of one table once in each forward pass, and the attention function of another table once
in each layer. What `positions` returns to the model reaches `attention` as its `attention_mask`.
"""
import numpy as np
from mindspore import Tensor, ops

from .. import checks
from ..functional import windowed_attention
from ..spec import WindowSpec
from .masks import four_axes

OWNER = "local_attention"
HIDDEN, UNUSED = -1, -2


def attention(module, query, key, value, attention_mask=None, dropout=0., scaling=None, softcap=None, s_aux=None,
              position_ids=None, is_causal=None, head_mask=None, output_attentions=None, **kwargs):
    """The entry of a zoo's table of attentions. Return the output `(b, n_q, h, d)`, and None for the weights."""
    if output_attentions:
        raise checks.value_error(OWNER, "output_attentions", "False: the weights are never all there", True)
    if head_mask is not None:
        raise checks.value_error(OWNER, "head_mask", "None", "one")
    n_q = query.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    spec = window(module, causal, kwargs)
    places = documents = None
    if attention_mask is not None:
        if len(attention_mask.shape) == 3 and attention_mask.shape[1] == 2:  # from `positions`
            attention_mask, documents = attention_mask[:, 0], attention_mask[:, 1].asnumpy()
        if len(attention_mask.shape) == 4:
            size = getattr(getattr(module, "config", None), "sliding_window", None)
            configured = WindowSpec.from_sliding_window(int(size)) if causal and size else None
            places, spec = four_axes(attention_mask, spec, n_q, key.shape[2], configured)
        else:
            places = _places(attention_mask, key.shape[2])
        used = int((places != UNUSED).any(0).sum())
        if used < key.shape[2]:  # the queries belong to the last keys
            key, value, places = key[:, :, :used], value[:, :, :used], places[:, :used]
    mask, segment_ids = _hidden(places, documents, spec, position_ids, query.shape[0], n_q, key.shape[2])
    out = windowed_attention(query, key, value, spec, mask=mask, segment_ids=segment_ids, sinks=s_aux, scale=scaling,
                             softcap=softcap, dropout_rate=float(dropout))
    return ops.transpose(out, (0, 2, 1, 3)), None


# ---- the window


def window(module, causal, options):
    """Return the WindowSpec of a layer, from an argument of the call, else from the layer, else from its config."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds is not None and layer is not None else None
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and (kind == "chunked_attention" or kind is None and getattr(module, "use_rope", True)):
        return WindowSpec.from_chunks(int(chunk))
    if "sliding_window" in options:
        size = options["sliding_window"]
    elif hasattr(module, "sliding_window"):
        size = module.sliding_window
    else:
        size = _configured(config, layer, kind)
    if not size:
        return WindowSpec.from_flash((-1, -1), causal=causal)
    size = checks.positive_int(OWNER, "sliding_window", size)
    return WindowSpec.from_sliding_window(size) if causal else WindowSpec.from_flash((size - 1, size - 1))


def _configured(config, layer, kind):
    """Return the `sliding_window` of a config if it is for this layer, else None."""
    if kind is not None and kind != "sliding_attention" or not getattr(config, "use_sliding_window", True):
        return None
    if kind is None and layer is not None and layer < (getattr(config, "max_window_layers", None) or 0):
        return None
    return getattr(config, "sliding_window", None)


# ---- the keys


def positions(batch_size, cache_position, kv_length, kv_offset=0, mask_function=None, attention_mask=None,
              allow_is_causal_skip=True, **kwargs):
    """The entry of a zoo's table of masks. In place of an n² mask, return the position of each key among its row's real
    tokens, `(b, kv_length)`.

    It is `HIDDEN` for padding and `UNUSED` for places of a cache that are not filled yet. With packed documents, the
    shape is `(b, 2, kv_length)`, and the second row has the number of each key's document. Return None if each position
    is the key's index and there are no documents.
    """
    kv_length, kv_offset = int(kv_length), int(kv_offset)
    n_q, documents = cache_position.shape[0], None
    if not allow_is_causal_skip and mask_function is not None and n_q > 1:
        starts = _starts(mask_function, cache_position, batch_size)
        if kv_length == n_q and starts.any():
            documents = np.cumsum(np.pad(starts, ((0, 0), (1, 0))), 1)
    used = kv_length
    if kv_length > n_q:
        used = min(kv_length, int(cache_position[-1]) + 1 - kv_offset)
    index = kv_offset + np.arange(kv_length)
    first_to_last = documents is None and kv_offset == 0 and used == kv_length
    if attention_mask is None:
        if first_to_last:
            return None
        places = np.tile(index, (batch_size, 1))
    else:
        real = attention_mask.asnumpy().astype(bool)
        if first_to_last and real[:, :kv_length].all() and real.shape[1] >= kv_length:
            return None
        first = real.argmax(1)[:, None]
        short = kv_offset + kv_length - real.shape[1]
        real = np.pad(real, ((0, 0), (0, max(0, short))))[:, kv_offset:kv_offset + kv_length]
        places = np.where(real, index - first, HIDDEN)
    places[:, used:] = UNUSED
    return Tensor((places if documents is None else np.stack([places, documents], 1)).astype(np.int32))


def _starts(mask_function, cache_position, batch_size):
    """Return whether a document starts, `(b, n - 1)`: there, a query does not see the key before its own.

    A model may add more to its mask, such as images whose tokens see each other: that raises a ValueError. It shows in
    whether a query sees the key after its own. In a model of both directions, every query does within its document; in
    a causal one, none does.
    """
    before, after = cache_position[:-1], cache_position[1:]

    def seen(query, key):
        rows = []
        for row in range(batch_size):
            found = mask_function(before * 0 + row, before * 0, query, key)
            found = np.atleast_2d(found.asnumpy() if isinstance(found, Tensor) else found)
            # mindnlp returns all rows at once
            rows.append(np.broadcast_to(found[row if len(found) == batch_size else 0], before.shape))
        return np.array(rows)
    starts, ahead = ~seen(after, before), seen(before, after)
    if ahead.any() and not (ahead | starts).all():
        where = int(np.argwhere(ahead)[0, -1])
        raise checks.value_error(OWNER, "attention_mask", "causal, or of both directions, everywhere",
                                 f"one in which query {where} sees key {where + 1} and others see none after theirs")
    return starts


def _places(mask, n_k):
    """Return the positions of keys, as `positions` does, from a mask of two axes from any source; a NumPy array."""
    if len(mask.shape) != 2:
        raise checks.value_error(OWNER, "attention_mask", "of 2 or 4 axes", f"one of shape {tuple(mask.shape)}")
    places = mask.asnumpy()
    if "int32" not in str(mask.dtype).lower():  # not from `positions`: the model passed its own padding mask
        real = places.astype(bool)
        places = np.where(real, np.arange(real.shape[1]) - real.argmax(1)[:, None], HIDDEN)
    return places[:, -n_k:]


def _hidden(places, documents, spec, position_ids, batch, n_q, n_k):
    """Return the `mask` and the `segment_ids` of a call. If the mask has no documents, one starts wherever the
    `position_ids` of a row start again."""
    real = None if places is None or (places >= 0).all() else places >= 0
    starts = None
    if documents is None and position_ids is not None and tuple(position_ids.shape[1:]) == (n_q,) == (n_k,):
        ids = position_ids.asnumpy()
        starts = np.zeros((batch, n_q), bool)
        starts[:, 1:] = ids[:, 1:] <= ids[:, :-1]
        if real is not None:
            starts &= real
        first = np.arange(n_q) == (0 if real is None else real.argmax(1)[:, None])
        starts = starts if (starts & ~first).any() else None
    if starts is not None:
        documents = np.cumsum(starts, 1)
    elif documents is None and spec == WindowSpec.from_chunks(spec.bucket) and spec.bucket > 1 and places is not None:
        documents = places // spec.bucket  # chunks begin at a row's first real token, not at its first key
    if documents is None:
        return None if real is None else Tensor(real), None
    return None, Tensor(np.where(True if real is None else real, documents, HIDDEN).astype(np.int32))
