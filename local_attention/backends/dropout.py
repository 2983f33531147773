"""Dropout of attention weights as a function of (seed, head, query, key) alone.

No mask is drawn or stored: forward, backward, every backend and both modes get the same mask from the same seed,
whatever blocks they work in. It is a 32-bit hash of counters. `x * (2x + 1)` is the mixing step of the RC6 cipher
(Rivest et al., 1998), a permutation whose high bits depend on every bit of `x`.
"""
import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.ops import constexpr

from ..cells import Float32


def row_hash(groups, queries):
    """Return int32 `(len(groups), len(queries))`, a constant for each query of each head.

    Both numbers are mixed before they meet: in a sum, one head's hashes would be those of another, some places on.
    """
    groups = _mix(np.asarray(groups).astype(np.uint32) + np.uint32(0x9E3779B9))
    queries = _mix(np.asarray(queries).astype(np.uint32) + np.uint32(0x85EBCA6B))
    return _mix(groups[:, None] ^ queries).view(np.int32)


def column_hash(keys):
    """Return int32 of the shape of `keys`, a constant for each key."""
    return _mix(np.asarray(keys).astype(np.uint32) ^ np.uint32(0x5BD1E995)).view(np.int32)


def _mix(x):
    """Mix the bits of NumPy's wrapping uint32 by a bijection of multiplications and shifts."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(15))


def seeded_rows(rows, seed):
    """Return the row hashes of one call, from the constant ones and the call's seed, int32 `(1,)`."""
    return _scramble(ops.bitwise_xor(rows, seed))


def keep_factors(rows, columns, rate):
    """Return 0 for dropped weights and `1 / (1 - rate)` for the others; the hashes broadcast to the weights' shape."""
    kept = ops.greater_equal(_scramble(ops.bitwise_xor(rows, columns)), int(rate * 2**32) - 2**31)
    return ops.mul(ops.cast(kept, ms.float32), 1 / (1 - rate))


def _scramble(x):
    x = ops.mul(x, ops.add(ops.add(x, x), 1))
    x = ops.bitwise_xor(x, _high_half()(x))
    return ops.mul(x, ops.add(ops.add(x, x), 1))


class _Shifted(Float32):
    """Computes `x >> 16` of an int32."""

    def construct(self, x):
        return ops.bitwise_right_shift(x, 16)


class _HighHalf(Float32):
    """Computes the same without a shift. It is exact, because float32 holds the high half exactly."""

    def construct(self, x):
        return ops.cast(ops.mul(ops.cast(ops.bitwise_and(x, -2**16), ms.float32), 2.**-16), ms.int32)


_shifted, _without_shift = _Shifted(), _HighHalf()


@constexpr
def _high_half():
    """On Ascend, shifts are the work of its few scalar cores. Not a branch: see `blocks.Layout`."""
    return _without_shift if ms.get_context("device_target") == "Ascend" else _shifted
