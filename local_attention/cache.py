"""Decoding: the keys and values of the last tokens, of one shape whatever was fed, and attention of new tokens to them.

A cache is a tuple of the last `backward + bucket` keys and values `(groups, capacity, d)`, oldest first, and of how
many tokens were fed, int32 `(1,)`; new tokens enter on the right and old ones leave on the left. Keys are kept as
attention takes them: normalised under `shared_qk`, and rotated by their positions, but not by xpos, whose scales would
overflow. What is compiled for one step serves all positions, as a position is a tensor. Into a compiled function a
cache goes as `ms.mutable(cache)`: any other tuple is a constant there.

`generate` keeps the same keys and values in place, as rings: a cache that goes in and out is written anew at each step,
which takes longer than the attention to it.
"""
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import checks
from .attend import Frame, attend, beside
from .cells import Float32
from .backends import native
from .backends.spans import HIDDEN
from .local_attention import l2norm
from .spec import Scoring, WindowSpec


_slice, _update = ops.Slice(), ops.ScatterNdUpdate()


def capacity(windows):
    """How many tokens are kept."""
    return windows.backward + windows.spec.bucket


@constexpr
def checked_cache(owner, cache, groups, windows, head_dim, dtype):
    """The rules of a cache that is handed in, as `described` by its keys."""
    wanted = (groups, capacity(windows), head_dim)
    if not isinstance(cache, tuple) or cache != (wanted, dtype):
        raise checks.value_error(owner, "cache", f"one of keys {wanted} of {checks.dtype_name(dtype).lower()}, "
                                 "from a call of this block with this batch size", cache)


@constexpr
def _range(start, stop, step=1):
    return Tensor(np.arange(start, stop, step, dtype=np.int32))


def rotated(attn, x, position):
    """Queries or keys from a position on as attention takes them, but for xpos."""
    if attn.rel_pos is None or attn.use_xpos:
        return x
    return ops.cast(attn.rel_pos.rotate_at(ops.cast(x, ms.float32), position), x.dtype)


def as_kept(attn, k, position):
    """Keys from a position on as attention takes them and as they are kept."""
    return rotated(attn, l2norm(k) if attn.shared_qk else k, position)


def first_cache(attn, k, v):
    """The cache after a first call on `k, v (groups, n, d)`."""
    groups, n, head_dim = k.shape
    kept = capacity(attn.windows)
    stay = min(n, kept)
    if n > kept:
        last = _range(n - kept, n)
        k, v = ops.gather(k, last, 1), ops.gather(v, last, 1)  # in PyNative, forty times as fast as a slice
    k = as_kept(attn, k, n - stay)
    if n < kept:
        empty = ops.zeros((groups, kept - n, head_dim), k.dtype)
        k, v = ops.cat((empty, k), 1), ops.cat((empty, v), 1)
    return k, v, ops.full((1,), n, dtype=ms.int32)


class Rings(nn.Cell):
    """Each block's cache as two Parameters `(groups, capacity, d)`, the token at position p in place p % capacity."""

    def __init__(self, caches):
        super().__init__()
        self.keys = ms.ParameterTuple([_ring(f"key{number}", cache[0]) for number, cache in enumerate(caches)])
        self.values = ms.ParameterTuple([_ring(f"value{number}", cache[1]) for number, cache in enumerate(caches)])

    def construct(self, fed, *caches):
        """Takes over keys and values, a cache's after the other's, after so many tokens as were `fed` to them."""
        kept = self.keys[0].shape[1]
        order = (_range(kept, 2 * kept) - fed % kept) % kept  # the last token, last in a cache, is fed - 1
        for number in range(len(self.keys)):
            ops.assign(self.keys[number], ops.gather(caches[2 * number], order, 1))
            ops.assign(self.values[number], ops.gather(caches[2 * number + 1], order, 1))
        return fed


def _ring(name, like):
    return ms.Parameter(ops.zeros(like.shape, like.dtype), name=name, requires_grad=False)


class _Entry(Float32):
    """Writes the key and the value of a token, projected as `qkv (b, 1, 3 * heads * d)`, to a ring, and gives its query
    `(g, 1, d)`: the native kernel, whose output, the query, is what attention to the ring waits for."""

    def __init__(self, frequencies):
        super().__init__()
        self.numbers = native.row_numbers(0, *frequencies)
        self.enter = native.custom("enter_rings", [*3 * [native.FLOATS], native.INT32, native.INT64], [native.FLOATS])

    def construct(self, qkv, keys, values, position):
        return self.enter(qkv, keys, values, position, self.numbers)


@constexpr
def _fused_entry(frequencies, dtype):
    """The kernel, None where it cannot run."""
    return native.made(_Entry, frequencies) if checks.dtype_name(dtype) == "Float32" else None


def fused_entry(attn, dtype):
    """What writes a token to a ring as it is projected, None where `entered` is to."""
    if attn.shared_qk or attn.use_xpos:
        return None
    return _fused_entry(() if attn.rel_pos is None else attn.rel_pos.frequencies, dtype)


def entered(attn, q, k, v, ring):
    """The query and the ring `(keys, values, position, place)` once a token `q, k, v (g, 1, d)` is written to it."""
    keys, values, position, place = ring
    q, k = rotated(attn, q, position), as_kept(attn, k, position)
    keys, values = _update(keys, place, k.reshape(-1, k.shape[2])), _update(values, place, v.reshape(-1, v.shape[2]))
    return q, (keys, values, position, place)


def attend_in_place(attn, q, ring, attn_bias=None):
    """What `attend_cached` gives for one new token, whose key and value are in the ring."""
    keys, values, position, _ = ring
    kept = keys.shape[1]
    if attn.shared_qk or attn.use_xpos:  # these depend on where a key is
        order = (position + 1 + _range(0, kept)) % kept
        return _next_token(attn, q, ops.gather(keys, order, 1), ops.gather(values, order, 1), position, attn_bias)
    return _next_token(attn, q, keys, values, position, attn_bias, (position + kept - _range(0, kept)) % kept)


def place_in_rings(position, groups, kept):
    """Where the token at a position `(1,)` is in a ring, for each group: `(groups, 2)`."""
    return ops.stack((_range(0, groups), ops.tile(position % kept, (groups,))), 1)


def attend_cached(attn, q, k, v, cache, attn_bias=None):
    """What `attn`, a causal LocalAttention, gives for new tokens `q, k, v (groups, m, d)`, and the next cache."""
    groups, m, head_dim = q.shape
    kept = capacity(attn.windows)
    old_k, old_v, position = cache
    q, k = rotated(attn, q, position), as_kept(attn, k, position)
    if m == 1:
        first, rest = (0, 1, 0), (groups, kept - 1, head_dim)
        k, v = ops.cat((_slice(old_k, first, rest), k), 1), ops.cat((_slice(old_v, first, rest), v), 1)
        return _next_token(attn, q, k, v, position, attn_bias), (k, v, position + 1)
    k, v = ops.cat((old_k, k), 1), ops.cat((old_v, v), 1)
    out = _next_tokens(attn, q, k, v, position, attn_bias)
    first, last = (0, m, 0), (groups, kept, head_dim)
    return out, (_slice(k, first, last), _slice(v, first, last), position + m)


def _next_token(attn, q, k, v, position, attn_bias, ages=None):
    """One query against the whole cache, its own key the last unless the keys' `ages` in tokens are given. What it does
    not see is hidden by a bias and not by a mask: a mask would also erase what masked keys hold, in case it is NaN, and
    here that is tokens out of sight or zeros."""
    windows = attn.windows
    dtype, last = q.dtype, capacity(windows) - 1
    ages = _range(last, -1, -1) if ages is None else ages
    place = position % windows.size  # of the query in its window
    unseen = ages > ops.minimum(position, last if windows.exact else windows.backward + place)
    if attn.use_xpos:
        q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
        q = attn.rel_pos.rotate(q, last, (last - last // 2, 1))
        k = attn.rel_pos.rotate(k, 0, (last // 2, -1))
    if attn_bias is not None:
        columns = ops.clamp(place + windows.backward - ages, 0, windows.span - 1)
        attn_bias = ops.gather(ops.gather(attn_bias, place, 1), columns, 2)
    spec, scoring, frame = _one_query(last, q.shape[-1] ** -0.5 if attn.scale is None else attn.scale, attn.shared_qk,
                                      attn.dropout if attn.training else 0., dtype, attn_bias is None)
    out = attend(q, k, v, spec, scoring, beside(bias=_hide(unseen, attn_bias)), frame, attn.backend)
    return ops.cast(out, dtype)


class _Hide(Float32):
    """A bias `(heads, 1, n)` that hides the unseen of n keys, added to another."""

    def construct(self, unseen, attn_bias):
        bias = ops.mul(ops.cast(unseen, ms.float32), HIDDEN).reshape(1, 1, -1)
        return bias if attn_bias is None else ops.add(bias, attn_bias)


_hide = _Hide()


@constexpr
def _one_query(last, scale, hide_self, dropout, dtype, bias_is_constant):
    """The numbers of a call of one query that sees all keys, its own the last."""
    return (WindowSpec(bucket=1, backward=last, forward=0, causal=True), Scoring(scale, None, hide_self, dropout),
            Frame(last, dtype=dtype, bias_is_constant=bias_is_constant))


def _next_tokens(attn, q, k, v, position, attn_bias):
    """Several queries after what is kept: the sequence from the start of a window on, as long as it can be, through
    what a call on all of it goes through."""
    windows, m = attn.windows, q.shape[1]
    dtype, kept = q.dtype, k.shape[1] - m
    place = position % windows.size
    index = _range(0, windows.backward + windows.size - 1 + m)
    own = windows.backward + place  # where the first new token stands
    real = ops.logical_and(index >= own - ops.clamp(position, 0, kept), index < own + m)
    keys = ops.clamp(index + (kept - own), 0, k.shape[1] - 1)
    q, k, v = ops.gather(q, ops.clamp(index - own, 0, m - 1), 1), ops.gather(k, keys, 1), ops.gather(v, keys, 1)
    if attn.use_xpos:
        q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
    out = attn.attend_prepared(q, k, v, windows, beside(real[None], bias=attn_bias), dtype=dtype)
    return ops.cast(ops.gather(out, own + _range(0, m), 1), dtype)
