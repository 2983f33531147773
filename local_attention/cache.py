"""Decoding: the keys and values of the last tokens, of one shape whatever was fed, and attention of new tokens to them.

A cache is a tuple of the last `backward + bucket` keys and values `(groups, capacity, d)`, oldest first, and of how
many tokens were fed, int32 `(1,)`; new tokens enter on the right and old ones leave on the left. Positions that matter
are relative, so what is compiled for one step serves them all: only where the buckets begin, and how much of the cache
is filled yet, depends on the position, which is a tensor. Into a compiled function a cache goes as
`ms.mutable(cache)`: any other tuple is a constant there.
"""
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from . import checks
from .attend import Float32, attend
from .backends.dense import HIDDEN
from .local_attention import l2norm
from .spec import WindowSpec


def capacity(windows):
    """How many tokens are kept."""
    return windows.backward + windows.size


@constexpr
def checked_cache(owner, cache, groups, windows, head_dim, dtype):
    """The rules of a cache that is handed in, as `described` by its keys."""
    wanted = (groups, capacity(windows), head_dim)
    if not isinstance(cache, tuple) or cache != (wanted, dtype):
        raise checks.value_error(owner, "cache", f"one of keys {wanted} of {str(dtype).lower()}, from a call of this "
                                 "block with this batch size", cache)


@constexpr
def _range(start, stop):
    return Tensor(np.arange(start, stop, dtype=np.int32))


def first_cache(k, v, windows):
    """The cache after a first call on `k, v (groups, n, d)`."""
    groups, n, head_dim = k.shape
    missing = capacity(windows) - n
    if missing > 0:
        empty = ops.zeros((groups, missing, head_dim), k.dtype)
        k, v = ops.cat((empty, k), 1), ops.cat((empty, v), 1)
    last = _range(max(-missing, 0), max(-missing, 0) + capacity(windows))
    return ops.gather(k, last, 1), ops.gather(v, last, 1), ops.full((1,), n, dtype=ms.int32)


def attend_cached(attn, q, k, v, cache, attn_bias=None):
    """What `attn`, a causal LocalAttention, gives for new tokens `q, k, v (groups, m, d)`, and the next cache."""
    m = q.shape[1]
    old_k, old_v, position = cache
    k, v = ops.cat((old_k, k), 1), ops.cat((old_v, v), 1)
    attend_next = _next_token if m == 1 else _next_tokens
    out = attend_next(attn, q, k, v, position, attn_bias)
    last = _range(m, m + capacity(attn.windows))
    return out, (ops.gather(k, last, 1), ops.gather(v, last, 1), position + m)


def _next_token(attn, q, k, v, position, attn_bias):
    """One query against the whole cache. What it does not see is hidden by a bias and not by a mask: a mask would also
    erase what masked keys hold, in case it is NaN, and here that is tokens out of sight or zeros."""
    windows = attn.windows
    dtype, kept = q.dtype, capacity(windows)
    place = position % windows.size  # of the query in its window
    index = _range(0, kept + 1)
    seen = kept - (place + windows.backward if not windows.exact else windows.backward)
    unseen = index < ops.maximum(kept - position, seen)
    if attn.shared_qk:
        k = l2norm(k)
    if attn.rel_pos is not None:
        q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
        q = attn.rel_pos.rotate(q, kept, (kept - kept // 2, 1) if attn.use_xpos else None)
        k = attn.rel_pos.rotate(k, 0, (kept // 2, -1) if attn.use_xpos else None)
    if attn_bias is not None:
        columns = ops.clamp(index - kept + place + windows.backward, 0, windows.span - 1)
        attn_bias = ops.gather(ops.gather(attn_bias, place, 1), columns, 2)
    out = attend(q, k, v, _all_before(kept), q.shape[-1] ** -0.5 if attn.scale is None else attn.scale,
                 bias=_hide(unseen, attn_bias), bias_backward=kept, hide_self=attn.shared_qk,
                 dropout=attn.dropout if attn.training else 0., offset=kept, backend=attn.backend)
    return ops.cast(out, dtype)


class _Hide(Float32):
    """A bias `(heads, 1, n)` that hides the unseen of n keys, added to another."""

    def construct(self, unseen, attn_bias):
        bias = ops.mul(ops.cast(unseen, ms.float32), HIDDEN).reshape(1, 1, -1)
        return bias if attn_bias is None else ops.add(bias, attn_bias)


_hide = _Hide()


@constexpr
def _all_before(kept):
    return WindowSpec(bucket=1, backward=kept, forward=0, causal=True)


def _next_tokens(attn, q, k, v, position, attn_bias):
    """Several queries: the sequence from the start of a window on, as long as it can be, through `attn` itself."""
    windows, m = attn.windows, q.shape[1]
    place = position % windows.size
    n = windows.backward + windows.size - 1 + m
    index = _range(0, n)
    own = windows.backward + place  # where the first new token stands
    real = ops.logical_and(index >= own - position, index < own + m)
    keys = ops.clamp(index + (windows.size - place), 0, k.shape[1] - 1)
    q = ops.gather(q, ops.clamp(index - own, 0, m - 1), 1)
    out = attn(q, ops.gather(k, keys, 1), ops.gather(v, keys, 1), mask=real[None], attn_bias=attn_bias)
    return ops.gather(out, own + _range(0, m), 1)
