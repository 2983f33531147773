"""Decoding: the cache of the last tokens' keys and values, whose shape does not depend on how much was fed, and
attention of new tokens to it.

A cache is a tuple of keys and values `(groups, capacity, d)`, and the number of tokens fed so far, int32 `(1 + b,)`: of
the longest row, and then of each of the b rows. It keeps the first `prefix` tokens, each in its own place, and behind
them the last `backward + bucket` tokens, oldest first: new tokens enter on the right, and old ones leave on the left. A
token of the prefix that is also among the last ones is seen there, and in the prefix only once no span holds it. If
rows have unequal lengths, the last token of each row is still on the right. The first number is the clock that keys are
rotated by, which is right for every row, as a rotation is relative. A call also takes the clock alone, `(1,)`, which
then is the position of all rows. Keys are kept as attention takes them: normalised under `shared_qk`, and rotated by
their positions, but not by xpos, whose scales would overflow. A position is a tensor, so one compiled step serves all
positions. Pass a cache to a compiled function as `ms.mutable(cache)`: any other tuple is a constant there.

`generate` keeps the same keys and values in place, as ring buffers. A cache that goes in and out is written anew at
each step, which takes longer than the attention to it.
"""
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from . import checks
from .attend import Frame, attend, beside
from .cells import Float32
from .backends import portable
from .backends.spans import HIDDEN
from .local_attention import l2norm
from .spec import Scoring, WindowSpec


MOST_KEPT = 2**24  # of a row: 4 GiB of keys for each head of 64
_slice = ops.Slice()


def recent(windows):
    """Return how many of the last tokens are kept."""
    return windows.backward + windows.spec.bucket


def capacity(windows):
    """Return how many tokens are kept in all."""
    return windows.prefix + recent(windows)


@constexpr
def checked_cache(owner, cache, batch, heads, windows, head_dim, dtype):
    """Check the keys, values and position of a cache that is passed in, as `form`."""
    keys, values, position, *_ = cache[1]
    wanted = (batch * heads, capacity(windows), head_dim), dtype
    rule = (f"one of keys {wanted[0]} of {checks.dtype_name(dtype).lower()}, and such values, from a call of this "
            "block with this batch size")
    for got in (keys, values):
        if got != wanted:
            raise checks.value_error(owner, "cache", rule, got)
    if len(cache[1]) == 3 and position[0] not in ((1,), (1 + batch,)):
        raise checks.value_error(owner, "cache", rule, position)


def form(cache):
    """Return what a cache, or anything in its place, consists of, as `described`."""
    if not isinstance(cache, tuple):
        return checks.described(cache)
    parts = []
    for part in cache:
        parts.append(checks.described(part))
    return "tuple", tuple(parts)


@constexpr
def check_form(owner, cache, batch, windows, attn_bias):
    """Check what is common to the caches of all blocks: keys, values and position, or only the last, or a ring. Also
    check a bias that comes with a cache."""
    rule = "what a call of this block with 'return_cache' returned, or None"
    if not isinstance(cache, tuple) or cache[0] != "tuple" or len(cache[1]) not in (1, 3, 4):
        raise checks.value_error(owner, "cache", rule, cache)
    if not all(isinstance(part, tuple) and isinstance(part[0], tuple) for part in cache[1]):
        raise checks.type_error(owner, "cache", rule, cache[1])
    shape, dtype = cache[1][0 if len(cache[1]) == 1 else 2]
    fits = len(shape) == 1 if len(cache[1]) == 3 else shape in ((1,), (1 + batch,))  # see `checked_cache`
    if not fits or checks.dtype_name(dtype) != "Int32":
        raise checks.type_error(owner, "cache", rule, cache[1])
    if attn_bias is not None:
        checks.together(owner, ("attn_bias", True), ("prefix", windows.prefix))
        shape = checks.tensor(owner, "attn_bias", attn_bias, checks.FLOATS)
        rule, right = windows.bias_rule(shape)
        if not right:
            raise checks.value_error(owner, "attn_bias", f"of shape {rule}", shape)


@constexpr
def _range(start, stop, step=1):
    return Tensor(np.arange(start, stop, step, dtype=np.int32))


def rotated(attn, x, position):
    """Rotate queries or keys, from a position on, as attention takes them, but not for xpos."""
    if attn.rel_pos is None or attn.use_xpos:
        return x
    return ops.cast(attn.rel_pos.rotate_at(ops.cast(x, ms.float32), position), x.dtype)


def as_kept(attn, k, position):
    """Return keys, from a position on, as attention takes them and as they are kept."""
    return rotated(attn, l2norm(k) if attn.shared_qk else k, position)


def first_cache(attn, k, v, batch, position=None):
    """Return the cache after a first call on `k, v (groups, n, d)`. If a `position (1 + b,)` is given, in the form of a
    cache, only that many tokens at the start of each row are real."""
    n, prefix, kept = k.shape[1], attn.windows.prefix, recent(attn.windows)
    ragged = position is not None and batch > 1
    position = ops.full((1 + batch,), n, dtype=ms.int32) if position is None else position
    pads = n - position[1:, None] if ragged else _range(0, 1)[:, None]
    if ragged:  # moves rows to the right, where all have the same clock
        index = ops.maximum(_range(0, n)[None] - pads, 0)
        k, v = _at(k, index), _at(v, index)
    k = as_kept(attn, k, 0)
    index = ops.maximum(_range(n - kept, n), 0)[None]  # for a missing token, some other one, which nobody sees
    if prefix > 0:
        index = _beside(ops.minimum(pads + _range(0, prefix)[None], n - 1), index)
    return _at(k, index), _at(v, index), position


def _at(x, index):
    """Return the tokens of `x (groups, n, d)` at the places `index`, `(1, m)`, or `(b, m)` if each row has its own. In
    PyNative, this gather is forty times as fast as a slice."""
    groups, n, head_dim = x.shape
    if index.shape[0] == 1:
        return ops.gather(x, index.reshape(-1), 1)
    index = _of_heads(index, groups) + _range(0, groups * n, n)[:, None]
    return ops.gather(x.reshape(-1, head_dim), index.reshape(-1), 0).reshape(groups, -1, head_dim)


def _beside(of_each, of_all):
    """Put values of each row, `(rows, n)`, in front of values that are the same for all, `(1, m)`."""
    return ops.cat((of_each, ops.tile(of_all, (of_each.shape[0], 1))), 1)


@constexpr
def _row_of_group(rows, groups):
    return Tensor(np.repeat(np.arange(rows, dtype=np.int32), groups // rows))


def _of_heads(x, groups):
    """Repeat values of each row, `(rows, n)`, for all of its heads: `(groups, n)`."""
    return ops.gather(x, _row_of_group(x.shape[0], groups), 0)


def clock_and_rows(position):
    """Split a cache's third part: the clock `(1,)`, and the position of each row, `(1,)` if it is the same for all."""
    rows = position.shape[0] - 1
    return (position, position) if rows == 0 else (_slice(position, (0,), (1,)), _slice(position, (1,), (rows,)))


def reorder_cache(cache, rows):
    """
    Return a cache whose row r continues row `rows[r]`, for beam search, which drops some beams and splits others. Call
    it outside compiled functions.

    Args:
        cache (tuple): The cache that a call of `LocalMHA` or `LocalTransformer` on `b` rows returned.
        rows (Tensor): int32 or int64 `(m,)`, each in [0, b), for any number `m` of rows.

    Returns:
        tuple, the cache for the next call, on `m` rows. In a global layer's part, the first axis of each Tensor must
        have the rows of the batch, or of batch and heads, or a single row for all.

    Raises:
        TypeError: If `cache` is not a tuple or `rows` not a Tensor of ints.
        ValueError: If `rows` has another shape or a row that the cache does not have, if `cache` is of another form, or
            if the call is in a compiled function.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import Tensor, ops
        >>> from local_attention import LocalMHA
        >>> from local_attention.cache import reorder_cache
        >>> mha = LocalMHA(dim=16, window_size=4, dim_head=8, heads=2, causal=True)
        >>> _, cache = mha(ops.randn((3, 5, 16)), return_cache=True)
        >>> cache = reorder_cache(cache, Tensor([2, 0, 2, 2]))
        >>> print(mha(ops.randn((4, 1, 16)), cache=cache).shape)
        (4, 1, 16)
    """
    return _reordered_cache(cache, _outside_graphs(rows))


@constexpr
def _outside_graphs(rows):
    """Return `rows`, whose values are to be read, unless a graph is compiled, which does not know them."""
    if sys._getframe(1).f_code.co_name == "__infer__":  # a compiler's frame
        raise ValueError("For 'reorder_cache', the call must be outside compiled functions, because it reads values of "
                         "'rows', but it is in a function that is being compiled.")
    return rows


def _reordered_cache(cache, rows):
    owner, rule = "reorder_cache", "a tuple from a call with 'return_cache'"
    if not isinstance(cache, tuple) or not cache:
        raise checks.type_error(owner, "cache", rule, cache)
    first = cache
    while isinstance(first[0], tuple) and first[0]:  # of a model: its first layer is a local one
        first = first[0]
    if not _is_ours(first):
        raise checks.value_error(owner, "cache", rule, form(first))
    batch = first[2].shape[0] - 1
    shape = checks.tensor(owner, "rows", checks.described(rows), checks.INTEGERS)
    if len(shape) != 1 or shape[0] == 0:
        raise checks.value_error(owner, "rows", "of shape (rows,), not empty", shape)
    smallest, largest = rows.asnumpy().min(), rows.asnumpy().max()
    if smallest < 0 or largest >= batch:
        raise checks.value_error(owner, "rows", f"of rows in [0, {batch})", f"{smallest} to {largest}")
    if first is cache:
        return _reordered(cache, rows, batch)
    return tuple(_reordered(layer, rows, batch) for layer in cache[0]), *cache[1:]


def _is_ours(parts):
    """Whether these are keys, values and position, as a block returns them."""
    return (len(parts) == 3 and all(isinstance(part, Tensor) for part in parts)
            and len(parts[2].shape) == 1 and parts[2].shape[0] > 1 and parts[2].dtype == ms.int32
            and parts[0].shape[:1] == parts[1].shape[:1] and parts[0].shape[0] % (parts[2].shape[0] - 1) == 0)


def _reordered(parts, rows, batch):
    """Reorder the parts of a layer's cache."""
    if _is_ours(parts) and parts[2].shape[0] == 1 + batch:
        clock, of_each = clock_and_rows(parts[2])
        moved = tuple(_of_rows(part, rows, batch) for part in parts[:2])
        return *moved, ops.cat((clock, ops.gather(of_each, rows, 0)))
    return tuple(part if part.shape[0] == 1 < batch else _of_rows(part, rows, batch) for part in parts)


def _of_rows(part, rows, batch):
    if part.shape[0] % batch:
        raise checks.value_error("reorder_cache", "cache", f"of layers whose first axis is a multiple of {batch} rows, "
                                 "or 1", part.shape)
    heads = part.shape[0] // batch
    return ops.gather(part, (rows[:, None] * heads + ops.arange(heads)[None]).reshape(-1), 0)


def attend_cached(attn, q, k, v, cache, attn_bias=None, sinks=None):
    """Return the output of `attn`, a causal LocalAttention, for new `q, k, v (groups, m, d)`, and the next cache."""
    m, prefix = k.shape[1], attn.windows.prefix
    old_k, old_v, position = cache
    clock, rows = clock_and_rows(position)
    q, k = rotated(attn, q, clock), as_kept(attn, k, clock)
    k, v = ops.cat((old_k, k), 1), ops.cat((old_v, v), 1)
    kept_k, kept_v = _kept(k, m, prefix, rows), _kept(v, m, prefix, rows)
    if m == 1:
        out = _next_token(attn, q, kept_k, kept_v, rows, attn_bias, sinks)
    else:
        out = _next_tokens(attn, q, k, v, clock, attn_bias, sinks)
    return out, (kept_k, kept_v, position + m)


def _kept(x, m, prefix, rows):
    """Return what is kept of the former tokens and of `m` new ones behind them."""
    groups, total, head_dim = x.shape
    if prefix == 0:
        return _slice(x, (0, m, 0), (groups, total - m, head_dim))
    return _at(x, _beside(_first_places(prefix, rows, total, m), _range(prefix + m, total)[None]))


def _first_places(prefix, fed, total, m):
    """Return where the tokens of the prefix are, `(rows, prefix)`, among those kept and `m` new ones behind them."""
    place, fed = _range(0, prefix)[None], fed[:, None]
    return ops.where(place < fed, place, portable.minimum(place - fed + (total - m), total - 1))


def attend_piece(attn, q, k, v, cache, attn_bias=None, sinks=None):
    """Compute what `attend_cached` does, for a piece of a prompt. Its cache is keys and values, oldest first; the
    position of the first token; and how many tokens of each row are real, `(b,)`. The others come last."""
    m, prefix = k.shape[1], attn.windows.prefix
    old_k, old_v, clock, counts = cache
    q, k = rotated(attn, q, clock), as_kept(attn, k, clock)
    k, v = ops.cat((old_k, k), 1), ops.cat((old_v, v), 1)
    last = _range(prefix, k.shape[1] - m)[None] + counts[:, None]
    if prefix > 0:
        last = ops.cat((_first_places(prefix, ops.tile(clock, counts.shape), k.shape[1], m), last), 1)
    if span_moves(attn) and attn_bias is None:
        out = _appended(attn, q, k, v, clock, sinks)
    else:
        out = _next_tokens(attn, q, k, v, clock, attn_bias, sinks)
    return out, (_at(k, last), _at(v, last), clock, counts)


def span_moves(attn):
    """Whether each query sees, of the kept keys, those up to a distance, and nothing else depends on their places."""
    return (attn.windows.exact or attn.sees_all) and attn.windows.prefix == 0 and not attn.use_xpos


def _appended(attn, q, k, v, position, sinks):
    """Compute attention of the last tokens to themselves and to the kept ones before them."""
    m, total, dtype = q.shape[1], k.shape[1], q.dtype
    real = _range(total - m, -m, -1)[None] <= position
    spec, scoring, frame = _moving_span(attn, recent(attn.windows) - 1, total - m, q.shape[-1], dtype, False)
    tensors = beside(mask=real, sinks=sinks, seed=attn._seed())
    return ops.cast(attend(q, k, v, spec, scoring, tensors, frame, attn.backend), dtype)


def _moving_span(attn, backward, offset, head_dim, dtype, bias_is_constant):
    return _numbers(backward, offset, head_dim ** -0.5 if attn.scale is None else attn.scale, attn.softcap,
                    attn.shared_qk, attn.dropout if attn.training else 0., dtype, bias_is_constant)


def _next_token(attn, q, k, v, position, attn_bias, sinks, ages=None):
    """Compute attention of one query of each group to the whole cache. Its own key is the last one, unless `ages` gives
    the age in tokens of each key behind the prefix. `position` is where the queries are, `(1,)` for all rows or `(b,)`
    for each. A bias, not a mask, hides the keys that a query does not see: a mask would also erase masked keys, in case
    they are NaN, and here these are only tokens out of sight."""
    windows, groups = attn.windows, q.shape[0]
    dtype, last = q.dtype, recent(windows) - 1
    ages = (_range(last, -1, -1) if ages is None else ages)[None]
    position = position[:, None]
    place = portable.remainder(position, windows.size)  # the place of the query in its window
    reach = last if windows.exact else windows.backward + place
    unseen = ages > portable.minimum(position, reach)
    if windows.prefix > 0:
        unseen = ops.cat((_range(0, windows.prefix)[None] >= position - reach, unseen), 1)
    if attn.use_xpos:
        q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
        q = attn.rel_pos.rotate(q, last, (last - last // 2, 1))
        k = attn.rel_pos.rotate(k, 0, (last // 2, -1))
    if attn_bias is not None:
        _, period, columns = attn_bias.shape
        row = portable.remainder(place, period)
        column = portable.clamp(row + windows.backward - ages, 0, columns - 1)
        attn_bias = ops.gather(attn_bias.reshape(attn_bias.shape[0], -1), row * columns + column, 1)
        attn_bias = attn_bias.swapaxes(0, 1).reshape(-1, last + 1)
    if position.shape[0] > 1 or attn_bias is not None:
        unseen = _of_heads(unseen, groups if position.shape[0] > 1 else attn_bias.shape[0])
    spec, scoring, frame = _moving_span(attn, k.shape[1] - 1, k.shape[1] - 1, q.shape[-1], dtype, attn_bias is None)
    tensors = beside(bias=_hide(unseen, attn_bias), sinks=sinks, seed=attn._seed())
    out = attend(q, k, v, spec, scoring, tensors, frame, attn.backend)
    return ops.cast(out, dtype)


class _Hide(Float32):
    """Returns a bias `(heads, 1, n)` that hides the unseen ones of n keys, `(heads, n)`, plus another bias."""

    def construct(self, unseen, attn_bias):
        bias = ops.mul(ops.cast(unseen, ms.float32), HIDDEN)
        return (bias if attn_bias is None else ops.add(bias, attn_bias))[:, None]


_hide = _Hide()


@constexpr
def _numbers(backward, offset, scale, softcap, hide_self, dropout, dtype, bias_is_constant):
    """Return the numbers of a call of queries behind `offset` keys, each of which sees itself and `backward` before."""
    return (WindowSpec(bucket=1, backward=backward, forward=0, causal=True),
            Scoring(scale, softcap, hide_self, dropout), Frame(offset, dtype=dtype, bias_is_constant=bias_is_constant))


def _next_tokens(attn, q, k, v, position, attn_bias, sinks):
    """Compute attention of several queries after the kept tokens. The sequence, from the start of a window on and as
    long as possible, goes the way of a call on all of it. The prefix is in front of it; the gap between them is
    shortened by whole windows."""
    windows, m, total = attn.windows, q.shape[1], k.shape[1]
    dtype, prefix, kept = q.dtype, windows.prefix, total - windows.prefix - m
    before = -(-prefix // windows.size) * windows.size + windows.backward
    index, place = _range(0, before + windows.size - 1 + m), portable.remainder(position, windows.size)
    own = portable.minimum(position, before + place)  # the place of the first new token
    last = index >= own - portable.minimum(portable.minimum(position, windows.backward + place), kept)
    real = index < ops.where(last, own + m, prefix)
    keys = portable.clamp(ops.where(last, index + (total - m - own), index), 0, total - 1)
    q, k, v = ops.gather(q, portable.clamp(index - own, 0, m - 1), 1), ops.gather(k, keys, 1), ops.gather(v, keys, 1)
    if attn.use_xpos:
        q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
    tensors = beside(mask=ops.expand_dims(real, 0), bias=attn_bias, sinks=sinks, seed=attn._seed())
    out = attn._attend_prepared(q, k, v, windows, tensors, dtype=dtype)
    return ops.cast(ops.gather(out, own + _range(0, m), 1), dtype)
