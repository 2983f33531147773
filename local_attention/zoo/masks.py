"""Reads masks: what a mask function shows, and what masks of two axes and, as older models make them, of four say."""
import math
from dataclasses import replace
from functools import partial

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from .. import checks
from ..spec import NO_LIMIT, WindowSpec
from .shown import Pairs, Shown, of_one_query
from .words import OWNER, compiling

HIDDEN, UNUSED = -1, -2
BOTH_WAYS = WindowSpec.from_flash(-1)
EVERYWHERE = "one window, and blocks whose tokens see each other"
LAYERS = "causal, the layer's window and padding"
# What reaches `positions` and says nothing that the mask function and the layers do not say, and why
HARMLESS = {
    "allow_is_bidirectional_skip": "whether None may stand for a mask without hidden keys",
    "allow_torch_fix": "about queries that see nothing: these get zeros",
    "config": "each layer has it",
    "device": "where a mask of floats would be",
    "dtype": "what a mask of floats would be of",
    "local_size": "each layer has its window",
    "use_vmap": "how a mask function would be called",
}
ROWS = 128  # rows of a mask that are compared at once


def positions(batch_size, cache_position=None, kv_length=None, kv_offset=0, mask_function=None, attention_mask=None,
              allow_is_causal_skip=True, q_length=None, q_offset=0, **kwargs):
    """The entry of a zoo's table of masks. In place of an n² mask, return the position of each key among its row's real
    tokens, `(b, kv_length)`.

    It is `HIDDEN` for padding and `UNUSED` for places of a cache that are not filled yet. With packed documents, the
    shape is `(b, 2, kv_length)`, and the second row has the number of each key's document. With it goes what the mask
    function shows, as `_shown_by_mask`. Return None if each position is the key's index and there is nothing else.

    The queries are those at `cache_position` up to transformers 4.57, and `q_length` from `q_offset` on in 5.
    """
    for name, given in kwargs.items():
        if given is not None and name not in HARMLESS:
            raise checks.value_error(OWNER, name, "None: what it means for a mask is not known here", "one")
    n_q = q_length if cache_position is None else cache_position.shape[0]
    kv_length, kv_offset = int(kv_length), int(kv_offset)
    if allow_is_causal_skip and attention_mask is None and kv_length == n_q and compiling():
        return None  # a graph cannot ask
    keys = kv_offset + np.arange(kv_length)
    read = mask_function is not None and not allow_is_causal_skip
    used, documents, shown = kv_length, None, None
    if cache_position is None:
        queries, mask = int(q_offset) + np.arange(n_q), _read_together(attention_mask)[0]
    elif read or kv_length != n_q:
        queries, mask = _read_together(cache_position, attention_mask)
    else:
        queries, mask = keys, _read_together(attention_mask)[0]
    real, first = _padding(mask, batch_size, keys)
    if read or kv_length > n_q:
        used = min(kv_length, int(queries[-1]) + 1 - kv_offset)
    if mask_function is not None:
        real, used, documents, shown = _as_shown(partial(_shown, mask_function, batch_size), queries, keys, real, used,
                                                 read, kwargs.get("config"))
    if documents is None and kv_offset == 0 and used == kv_length and real.all() and shown is None:
        return None
    places = np.where(real, keys - first, HIDDEN)
    places[:, used:] = UNUSED
    made = (places if documents is None else np.stack([places, documents], 1)).astype(np.int32)
    mask = Tensor(made)
    mask._made_by_local_attention, mask._shown_by_mask = made, shown  # no layer has to read it
    return mask


def _read_together(*tensors):
    """Return the values of tensors of whole numbers or bool, or None for None, in one round trip to the device."""
    given = [one for one in tensors if one is not None]
    if len(given) > 1:  # by primitives: mindnlp replaces methods of tensors by those of tensors with a device
        flat = [ops.Reshape()(ops.Cast()(one, ms.int64), (-1,)) for one in given]
        parts = np.split(ops.Concat()(flat).asnumpy(), np.cumsum([math.prod(one.shape) for one in given])[:-1])
        given = [part.reshape(one.shape) for part, one in zip(parts, given)]
    else:
        given = [one.asnumpy() for one in given]
    return [None if one is None else given.pop(0) for one in tensors]


def _padding(mask, batch, keys):
    """Read a padding mask of all tokens. Return which keys are real, `(b, len(keys))`, and the first token of each row
    that is, `(b, 1)`."""
    if mask is None:
        return np.ones((batch, len(keys)), bool), np.zeros((batch, 1), int)
    real = mask.astype(bool)
    first = real.argmax(1)[:, None]
    return np.pad(real, ((0, 0), (0, max(0, keys[-1] + 1 - real.shape[1]))))[:, keys], first


def _as_shown(show, queries, keys, real, used, read, config):
    """Ask a mask function about some pairs. Return which keys are real, how many are in use, the number of each key's
    document or None, and what it shows beside that.

    The keys after the queries are in use if they are seen: then they are an encoder's, and all queries see the same.
    Without `read`, there is neither padding nor a document that the mask function alone knows of.
    """
    if len(queries) == 1:
        seen = real & show(queries, keys)
        if seen[:, used:].any():
            return seen, len(keys), None, Shown(BOTH_WAYS)
        return seen, used, None, of_one_query(seen[:, :used], real[:, :used])
    if read:
        if not np.array_equal(queries, keys):
            of_encoder = _of_an_encoder(show, queries, keys, real, used)
            if of_encoder is not None:
                return of_encoder, len(keys), None, Shown(BOTH_WAYS)
        real = real.copy()
        real[:, :used] &= show(keys[:used], keys[:used])  # a key that its own query does not see is padding
    documents, ahead = None, np.zeros((len(real), used), bool)
    if read:
        starts, ahead = _starts(show, keys[:used], real[:, :used])
        documents = np.pad(np.cumsum(starts, 1), ((0, 0), (0, len(keys) - used)), "edge") if starts.any() else None
    pairs = Pairs(lambda q, k: show(keys[q], keys[k]), used - len(queries), real[:, :used],
                  None if documents is None else documents[:, :used], ahead)
    shown, wrong = pairs.read()
    if wrong is not None and not read:  # chunks are documents, too
        return _as_shown(show, queries, keys, real, used, True, config)
    if wrong is not None:
        row, query, key, sees = wrong
        raise _refused(EVERYWHERE, f"one that shows {shown.spec}, and in which, in row {row}, query {keys[query]} "
                       f"{'sees' if sees else 'does not see'} key {keys[0] + key}; the config's sliding_window is "
                       f"{getattr(config, 'sliding_window', None)}")
    return real, used, documents, shown


def _of_an_encoder(show, queries, keys, real, used):
    """Return which keys are real if all queries see the same ones, some of them after the first query or none where the
    queries are. Return None if the keys are the queries' own and those before them."""
    first, last = show(queries[:1], keys) & real, show(queries[-1:], keys) & real
    outside = keys[-1] < queries[-1]
    if not outside and not first[:, keys > queries[0]].any():
        return None
    differ = np.argwhere(first != last)
    if not len(differ):
        return first
    if outside or (first | last)[:, used:].any():
        raise _refused(EVERYWHERE, f"one in which one of the queries {queries[0]} and {queries[-1]} sees key "
                       f"{keys[differ[0, 1]]} and the other does not")
    return None


def _starts(show, queries, real):
    """Return whether a document starts at a query, `(b, n_q)`: there, a real query does not see the real key before it.
    Return, too, whether that key's query sees this one."""
    index = np.where(real, np.arange(len(queries)), -1)
    before = np.pad(np.maximum.accumulate(index, 1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    pairs = real & (before >= 0)
    before = queries[np.where(pairs, before, np.arange(len(queries)))]
    return pairs & ~show(queries, before), pairs & show(before, queries)


def _shown(mask_function, batch, queries, keys):
    """Return whether each query sees the key at its place, `(b, n)`, from one call of a mask function. Both are NumPy
    arrays of positions that broadcast to `(b, n)`."""
    queries, keys, rows = np.broadcast_arrays(queries, keys, np.arange(batch)[:, None])
    rows, heads, queries, keys = (Tensor(x.reshape(-1), ms.int64) for x in (rows, rows * 0, queries, keys))
    found = mask_function(rows, heads, queries, keys)
    found = np.atleast_2d(found.asnumpy() if isinstance(found, Tensor) else found)
    if found.shape[0] == batch > 1:  # mindnlp returns all rows, whichever is asked for
        return np.broadcast_to(found, (batch, rows.shape[0])).reshape(batch, batch, -1)[range(batch), range(batch)]
    return np.broadcast_to(found, (1, rows.shape[0])).reshape(batch, -1)


def places_of(values):
    """Return the positions of keys and the numbers of their documents or None, from what `positions` returned, or from
    a model's own padding mask of 0 and 1."""
    if values.ndim == 3 and values.shape[1] == 2:
        return values[:, 0], values[:, 1]
    if values.ndim != 2:
        raise checks.value_error(OWNER, "attention_mask", "of 2 or 4 axes", f"one of shape {values.shape}")
    if values.dtype.kind == "i" and ((values > 1) | (values < 0)).any():
        return values, None
    real = values.astype(bool)
    return np.where(real, np.arange(real.shape[1]) - real.argmax(1)[:, None], HIDDEN), None


# ---- masks of four axes


def four_axes(mask, spec, n_q, n_k, configured=None):
    """Read a mask `(b, 1, n_q, n_k)`, a NumPy array; return the position of each key among its row's real keys,
    `(b, n_k)`, and what it shows beside padding.

    A position is -1 for padding and -2 for places of a cache that are not filled yet. The WindowSpec is `spec`, and
    causal if `spec` is not but no query sees the key after its own. It is `configured`, the window of the model's
    config, if the layer has no window and the mask shows that one. A mask may hold causality, the layer's window,
    padding, and blocks whose tokens see each other; any other raises a ValueError.
    """
    try:
        return _window_alone(mask, spec, n_q, n_k, configured)
    except ValueError:
        found = _with_blocks(mask, spec) if spec.causal and mask.shape[1:] == (1, n_q, n_q) and n_q == n_k else None
        if found is None:
            raise
        return found


def _with_blocks(mask, spec):
    """Return what `four_axes` does if a mask is of blocks in a causal row, else None."""
    seen = _Seen(mask[:, 0])
    batch, n, _ = seen.values.shape
    rows, places = np.arange(batch)[:, None], np.arange(n)
    real = seen[:, places, places]
    ahead = np.pad(seen[:, places[:-1], places[1:]], ((0, 0), (1, 0)))
    shown, wrong = Pairs(lambda q, k: seen[rows, q, k], 0, real, None, ahead).read()
    if wrong is not None or shown.order is None or shown.spec.backward > spec.backward and shown.bias is None:
        return None
    for start in range(0, n, ROWS):
        part = places[start:start + ROWS]
        if ((seen[:, part] != (shown.visible(part, n) & real[:, None])) & real[:, part, None]).any():
            return None
    return np.where(real, places - real.argmax(1)[:, None], HIDDEN), shown


def _window_alone(mask, spec, n_q, n_k, configured):
    """Return what `four_axes` does, of a mask without blocks."""
    if mask.shape[1] != 1 or mask.shape[2] != n_q or mask.shape[3] < n_k:
        raise _refused(LAYERS, f"one of shape {mask.shape} for {n_q} queries and {n_k} keys")
    seen = _Seen(mask[:, 0, :, :n_k])
    rows, used, both = np.arange(n_q), n_k, not spec.causal and n_q != n_k
    if not spec.causal and n_q == n_k and not seen[:, rows[:-1], rows[1:]].any():  # as in CLIP's model of texts
        spec = replace(spec, forward=0, causal=True)
    causal = spec.causal
    if causal and n_q < n_k and seen[:, -1].any():
        used = int(np.flatnonzero(seen[:, -1].any(0))[-1]) + 1
    offset = used - n_q
    if offset < 0 and causal:
        raise _refused(LAYERS, f"one whose last query sees nothing after key {used - 1} of {n_k}")
    # a key before all queries is real if the first query sees it; any other is real if the query at its position does
    real = np.zeros((len(seen.values), n_k), bool)
    real[:, :n_k if both else offset] = seen[:, 0, :n_k if both else offset]
    if not both:
        real[:, offset:used] = seen[:, rows, rows + offset]
    if causal:  # many models let padding see every key: a query that sees the key after its own is padding
        real[:, offset:used - 1] &= ~seen[:, rows[:-1], rows[:-1] + offset + 1]
    shown = _matched(seen, real, spec, configured, offset)
    places = np.where(real, np.arange(n_k) - real.argmax(1)[:, None], -1)
    places[:, used:] = -2
    return places, Shown(shown)


class _Seen:
    """Indexes a mask: True where it lets a key be seen."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, part):
        values = self.values[part]
        if values.dtype == bool:
            return values
        hidden = values <= -1e4
        if not (hidden | (values == 0)).all():
            bias = values[~(hidden | (values == 0))][0]
            raise _refused(LAYERS, f"one that adds {bias:.4g} to a score")
        return ~hidden


def _matched(seen, real, spec, configured, offset):
    """Compare a mask, ROWS rows at a time, with what it may be: padding, with the layer's window or without a window.
    Return the layer's WindowSpec."""
    batch, n_q, n_k = seen.values.shape
    wide = WindowSpec(1, NO_LIMIT, 0 if spec.causal else NO_LIMIT, spec.causal)
    wanted, wrong = [spec, wide], None
    if configured is not None and spec == wide:
        wanted = [wide, configured]
    own = offset + np.arange(n_q)
    for start in range(0, n_q, ROWS):
        part = own[start:start + ROWS]
        got = seen[:, start:start + ROWS]
        # what a query of padding sees does not matter
        there = real[:, part] if spec.causal or n_q == n_k else np.ones((batch, len(part)), bool)
        left = []
        for one in wanted:
            differs = (got != (one.visible(part, np.arange(n_k)) & real[:, None])) & there[:, :, None]
            if differs.any():
                row, query, key = np.argwhere(differs)[0]
                sees = "sees" if got[row, query, key] else "does not see"
                wrong = f"one in which, in row {row}, query {start + query} {sees} key {key}"
            else:
                left.append(one)
        wanted = left
        if not wanted:
            raise _refused(LAYERS, wrong)
    return configured if wanted == [configured] else spec


def _refused(rule, got):
    return checks.value_error(OWNER, "attention_mask", rule, got)
