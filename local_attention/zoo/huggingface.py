"""Translates the calls of Hugging Face's models, which the zoos follow, into calls of `windowed_attention`.

A model calls the mask function of one table once in each forward pass, and the attention function of another table once
in each layer. What `masks.positions` returns to the model reaches `attention` as its `attention_mask`.
"""
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from .. import checks
from ..functional import windowed_attention
from ..spec import NO_LIMIT, WindowSpec
from .masks import HIDDEN, UNUSED, four_axes, places_of
from .shown import Shown
from .words import OWNER, Layer, compiling, in_graph, once, values


# What reaches a layer and changes neither a score nor a mask, and why. Other names that are not known raise an error.
HARMLESS = {
    "adapter_names": "which adapter the projections use",
    "cache_position": "the mask says which keys are in use",
    "enable_gqa": "query heads share key heads in any case",
    "ignore_index": "a number of the loss",
    "labels": "for the loss",
    "layer_idx": "also an attribute of the layer",
    "layer_past": "the cache is in the keys and values",
    "logits_to_keep": "which logits are made after the layers",
    "max_length_k": "the length of the longest document of cu_seq_lens_k",
    "max_length_q": "the length of the longest document of cu_seq_lens_q",
    "num_items_in_batch": "a number of the loss",
    "num_logits_to_keep": "which logits are made after the layers",
    "output_hidden_states": "what the model returns",
    "output_router_logits": "what the model returns",
    "past_key_value": "the cache is in the keys and values",
    "past_key_values": "the cache is in the keys and values",
    "position_embeddings": "queries and keys are rotated already",
    "return_dict": "what the model returns",
    "shift_labels": "for the loss",
    "sliding_window": "read by `window`",
    "training": "the rate of dropout says it",
    "use_cache": "the cache is in the keys and values",
}


def attention(module, query, key, value, attention_mask=None, dropout=0., scaling=None, softcap=None, s_aux=None,
              position_ids=None, is_causal=None, head_mask=None, output_attentions=None, cu_seq_lens_q=None,
              cu_seq_lens_k=None, position_bias=None, sinks=None, **kwargs):
    """The entry of a zoo's table of attentions. Return the output `(b, n_q, h, d)`, and None for the weights."""
    _check(output_attentions, head_mask is not None, _given(kwargs))
    _check_graph(attention_mask is not None, cu_seq_lens_q is not None, cu_seq_lens_k is not None)
    layer = _layer(module, getattr(module, "layer_idx", None), is_causal, "sliding_window" in kwargs,
                   kwargs.get("sliding_window", None), scaling, softcap, dropout)
    spec, n_q, n_k = layer.spec, query.shape[2], key.shape[2]
    mask = segment_ids = order = bias = None
    if compiling():
        segment_ids = _documents_in_graph(position_ids, query.shape[0], n_q, n_k)
    else:
        shown, used, mask, segment_ids = _hidden(module, spec, query.shape[0], n_q, n_k, attention_mask, position_ids,
                                                 cu_seq_lens_q, cu_seq_lens_k)
        spec, order, bias = shown.spec, _tensor(shown.order), _tensor(shown.bias)
        if used < n_k:  # the queries belong to the last keys in use
            key, value = key[:, :, :used], value[:, :, :used]
    if position_bias is not None:
        added = _bias_of_queries(position_bias, _columns(spec, position_bias.shape, query.shape, n_k, key.shape[2]))
        bias = added if bias is None else added + bias
    out = windowed_attention(query, key, value, spec, mask=mask, segment_ids=segment_ids, order=order, attn_bias=bias,
                             sinks=_sinks(s_aux, sinks, query.shape), scale=layer.scale, softcap=layer.softcap,
                             dropout_rate=layer.dropout_rate)
    return ops.transpose(out, (0, 2, 1, 3)), None


def _given(kwargs):
    """Return the names of arguments that are given; None and False are what a layer does without."""
    return [name for name, one in kwargs.items() if one is not None and not (isinstance(one, bool) and not one)]


@constexpr
def _check(output_attentions, has_head_mask, given):
    """Refuse what cannot be had and what is not known."""
    if output_attentions:
        raise checks.value_error(OWNER, "output_attentions", "False: the weights are never all there", True)
    if has_head_mask:
        raise checks.value_error(OWNER, "head_mask", "None", "one")
    for name in given:
        if name not in HARMLESS:
            raise checks.value_error(OWNER, name, "None: what it means for scores or masks is not known here", "one")


@constexpr
def _check_graph(*has_values):
    """Refuse, in a graph, what has to be read."""
    if in_graph():
        for name, there in zip(("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k"), has_values):
            if there:
                raise checks.value_error(OWNER, name, "None in a compiled function, where it cannot be read", "one")


@constexpr
def _layer(module, index, is_causal, given, sliding_window, scaling, softcap, dropout):
    """Return what the layer says. Two layers of a graph differ in their index, if in nothing else."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    spec = window(module, causal, dict(sliding_window=sliding_window) if given else {})
    return Layer(spec, scaling, softcap, float(dropout))


def refuse_in_own_tables(package, name):
    """Give a clear error to models that take attention from a table of their own, where a missing name ends in a
    KeyError. Only modules that are imported are reached."""
    for module in [one for path, one in sys.modules.items() if path.startswith(f"{package}.models.")]:
        for label, own in vars(module).items():
            if type(own) is dict and "eager" in own:
                own.setdefault(name, _refusal(label, list(own), name))


def _refusal(label, known, name):
    def refused(*args, **kwargs):
        rule = f"one of {known}, as this model takes attention from a table of its own, {label}"
        raise checks.value_error(OWNER, "attn_implementation", rule, checks.shown(name))
    return refused


# ---- biases and sinks of each query


@constexpr
def _columns(spec, shape, queries, n_k, used):
    """Return, of a bias with a column for each of `n_k` keys, the columns in what each query sees, end to end for all
    queries, as an int Tensor. Only the first `used` keys are in use."""
    batch, heads, n_q, _ = queries
    if NO_LIMIT in (spec.backward, spec.forward) or spec.bucket > 1:
        raise checks.value_error(OWNER, "position_bias", "None in a layer without a window around each query", shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2:] != (n_q, n_k):
        raise checks.value_error(OWNER, "position_bias", f"of shape (b or 1, h or 1, n_q, n_k), "
                                 f"{(batch, heads, n_q, n_k)}", shape)
    rows = np.arange(n_q)[:, None]
    keys = used - n_q + rows + np.arange(-spec.backward, spec.forward + 1)
    return Tensor((rows * n_k + keys.clip(0, n_k - 1)).reshape(-1), ms.int32)  # what does not exist is never seen


def _bias_of_queries(bias, columns):
    batch, heads, n_q, n_k = bias.shape
    return ops.gather(bias.reshape(batch, heads, n_q * n_k), columns, 2).reshape(batch, heads, n_q, -1)


def _sinks(s_aux, sinks, shape):
    """Return the sinks of heads, or those of queries `(b, h, n_q)`, which some models have as `(b, h, n_q, 1)`."""
    if sinks is None:
        return s_aux
    _check_sinks(s_aux is not None, sinks.shape, shape[:3])
    return sinks.reshape(sinks.shape[:3])


@constexpr
def _check_sinks(two, got, shape):
    checks.together(OWNER, ("sinks", True), ("s_aux", two))
    if tuple(got) not in ((shape[1],), tuple(shape), (*shape, 1)):
        raise checks.value_error(OWNER, "sinks", f"of shape (h,), (b, h, n_q) or (b, h, n_q, 1), {(*shape, 1)}", got)


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


# ---- what is hidden


def _hidden(module, spec, batch, n_q, n_k, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k):
    """Return what the layer or its mask shows, the number of keys in use, and the `mask` and the `segment_ids` of the
    call."""
    shown, places, documents = Shown(spec), None, None
    if attention_mask is not None:
        shown, places, documents = _read(module, attention_mask, spec, n_q, n_k)
        spec = shown.spec
        n_k = int((places != UNUSED).any(0).sum())
        places, documents = places[:, :n_k], None if documents is None else documents[:, :n_k]
    real = None if places is None or (places >= 0).all() else places >= 0
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        documents = _of_lengths(module, batch, n_q, n_k, cu_seq_lens_q, cu_seq_lens_k)
    elif documents is None:
        documents = _of_positions(module, position_ids, real, batch, n_q, n_k)
    if documents is None and spec == WindowSpec.from_chunks(spec.bucket) and spec.bucket > 1 and places is not None:
        documents = places // spec.bucket  # chunks begin at a row's first real token, not at its first key
    if documents is None:
        return shown, n_k, None if real is None else Tensor(real), None
    return shown, n_k, None, Tensor(np.where(True if real is None else real, documents, HIDDEN).astype(np.int32))


def _tensor(array):
    return None if array is None else Tensor(array if array.dtype == np.float32 else array.astype(np.int32))


def _read(module, mask, spec, n_q, n_k):
    """Read a mask of any source. Return what it shows, the position of each key, and the numbers of documents or None;
    the last two are NumPy arrays."""
    made = getattr(mask, "_made_by_local_attention", None)
    if made is not None:
        places, documents = (made, None) if made.ndim == 2 else (made[:, 0], made[:, 1])
        return mask._shown_by_mask or Shown(spec), places[:, -n_k:], documents
    found = once(mask, module)
    made = values(mask, found)
    if made.ndim != 4:
        places, documents = places_of(made)
        return Shown(spec), places[:, -n_k:], documents
    size = getattr(getattr(module, "config", None), "sliding_window", None)
    configured = WindowSpec.from_sliding_window(int(size)) if spec.causal and size else None
    asked = spec, configured, n_q, n_k
    if asked not in found:
        found[asked] = four_axes(made, spec, n_q, n_k, configured)
    places, shown = found[asked]
    return shown, places, None


def _of_positions(module, position_ids, real, batch, n_q, n_k):
    """Return the number of each token's document, or None if there is one: the next starts wherever the `position_ids`
    of a row start again."""
    if position_ids is None or n_q == 1 or tuple(position_ids.shape[1:]) != (n_q,) or n_q != n_k:
        return None
    ids = values(position_ids, once(position_ids, module))
    starts = np.zeros((batch, n_q), bool)
    starts[:, 1:] = ids[:, 1:] <= ids[:, :-1]
    if real is not None:
        starts &= real
    first = np.arange(n_q) == (0 if real is None else real.argmax(1)[:, None])
    return np.cumsum(starts, 1) if (starts & ~first).any() else None


def _of_lengths(module, batch, n_q, n_k, cu_seq_lens_q, cu_seq_lens_k):
    """Return the number of each token's document, `(b, n)`, or None if there is one. A document starts at each of
    `cu_seq_lens`, which count the tokens of all rows, one row after the other."""
    one, other = (cu_seq_lens_k, None) if cu_seq_lens_q is None else (cu_seq_lens_q, cu_seq_lens_k)
    name, starts = "cu_seq_lens_k" if cu_seq_lens_q is None else "cu_seq_lens_q", _array(one, module)
    if other is not None and other is not one and not np.array_equal(starts, _array(other, module)):
        raise checks.value_error(OWNER, "cu_seq_lens_k", f"cu_seq_lens_q, {starts.tolist()}",
                                 _array(other, module).tolist())
    n, rows = batch * n_k, np.arange(batch) * n_k
    if starts.ndim != 1 or n_q != n_k or starts[0] != 0 or starts[-1] != n or (
            np.diff(starts) < 0).any() or not np.isin(rows, starts).all():
        raise checks.value_error(OWNER, name, f"from 0 to {n}, the number of tokens, with each row's start, in a call "
                                 "without a cache", f"{starts.tolist()} for {n_q} queries and {n_k} keys")
    documents = np.repeat(np.arange(len(starts) - 1), np.diff(starts)).reshape(batch, n_k)
    return documents if (documents != documents[:, :1]).any() else None


def _array(given, module):
    return values(given, once(given, module)) if isinstance(given, Tensor) else np.asarray(given)


def _documents_in_graph(position_ids, batch, n_q, n_k):
    """Return what `_of_positions` does where nothing can be read: numbers of documents, also where there is one."""
    if position_ids is None or n_q == 1 or position_ids.shape[1:] != (n_q,) or n_q != n_k:
        return None
    starts = ops.cast(position_ids[:, 1:] <= position_ids[:, :-1], ms.int32)
    documents = ops.cumsum(ops.cat((ops.zeros((position_ids.shape[0], 1), ms.int32), starts), 1), 1)
    return ops.broadcast_to(documents, (batch, documents.shape[1]))
