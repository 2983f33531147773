"""Operators that MindSpore's exporter to ONNX does not have, in forms that it has.

Each function is the operator of its name, and while its caller is being exported, the same from other operators. So
nothing else changes in value, gradient or speed. The forms are inexact by some 1e-7 at most, and need no constant that
grows faster than the sequence.
"""
import sys

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from .native import library

_sqrt, _real_div = ops.Sqrt(), ops.RealDiv()


@constexpr
def exporting():
    """Return the format that the caller is being exported to, None if it is not. Outside a graph this costs no more
    than a call."""
    return library.exporting() if sys._getframe(1).f_code.co_name == "__infer__" else None  # a compiler's frame


def logical_not(x):
    return ops.equal(x, False) if exporting() else ops.logical_not(x)


def masked_fill(x, mask, value):
    return ops.where(mask, ops.cast(value, x.dtype), x) if exporting() else ops.masked_fill(x, mask, value)


def rsqrt(x):
    return _real_div(1., _sqrt(x)) if exporting() else ops.rsqrt(x)


def remainder(x, divisor):
    """Return the remainder of integers below 2**24, not negative."""
    if not exporting():
        return x % divisor
    whole = ops.floor(_real_div(ops.cast(x, ms.float32), float(divisor)))
    return ops.sub(x, ops.mul(ops.cast(whole, x.dtype), divisor))


def maximum(x, y):
    """Return the larger of integers."""
    if not (exporting() and isinstance(x, Tensor)):
        return ops.maximum(x, y)
    y = ops.cast(y, x.dtype)
    return ops.where(ops.greater(x, y), x, y)


def minimum(x, y):
    """Return the smaller of integers."""
    if not (exporting() and isinstance(x, Tensor)):
        return ops.minimum(x, y)
    y = ops.cast(y, x.dtype)
    return ops.where(ops.less(x, y), x, y)


def clamp(x, low, high):
    """Return integers, none below `low` or above `high`."""
    return minimum(maximum(x, low), high) if exporting() else ops.clamp(x, low, high)


def arange(start, stop, step):
    """Return integers, in an export of the type of all others: ONNX compares no two types."""
    numbers = ops.arange(start, stop, step)
    return ops.cast(numbers, ms.int32) if exporting() else numbers


def count(x):
    """Return the sums of `x (b, n)`, which is 0 or 1, as a column."""
    if exporting():
        return ops.cast(ops.cast(x, ms.float32).sum(1, keepdims=True), ms.int32)
    return x.sum(1, keepdims=True)


def zeros_like(x):
    """Return zeros of x's shape, or in an export, a zero that broadcasts to it."""
    return ops.zeros((1,) * x.ndim, x.dtype) if exporting() else ops.zeros_like(x)


def gelu(x):
    """Return the exact GELU; in an export, by erfc of Abramowitz and Stegun 7.1.26, within 3e-7."""
    if not exporting():
        return ops.gelu(x)
    wide = ops.cast(x, ms.float32)
    size = ops.abs(wide)
    t = _real_div(1., ops.add(ops.mul(size, 0.3275911 * 0.5**0.5), 1.))
    below = ops.mul(ops.add(ops.mul(t, 1.061405429), -1.453152027), t)
    below = ops.mul(ops.add(ops.mul(ops.add(below, 1.421413741), t), -0.284496736), t)
    below = ops.mul(ops.mul(ops.add(below, 0.254829592), t), ops.exp(ops.mul(ops.square(size), -0.5)))
    return ops.cast(ops.sub(ops.relu(wide), ops.mul(ops.mul(size, 0.5), below)), x.dtype)


def cumsum(x, axis):
    """Return the sums of `x (b, n)` along its last axis, which must be given as 1."""
    return running(x, ops.add, 0) if exporting() and None not in x.shape else ops.cumsum(x, axis)


def run_bounds(changes, own):
    """Return the place `own (b, n)` of the first in each one's run, and one after the last. `changes` is 1 for the
    first of each run but a row's first, else 0."""
    if exporting() and None not in changes.shape:
        n = changes.shape[1]
        nothing = ops.full((changes.shape[0], 1), n, dtype=changes.dtype)
        after = ops.add(ops.mul(changes, ops.sub(own, n)), n)  # n if another one's run does not begin here
        return (running(ops.mul(changes, own), maximum, 0),
                running(ops.cat((after[:, 1:], nothing), 1), minimum, n, backward=True))
    number = ops.cumsum(changes, 1)
    first = ops.cast(ops.searchsorted(number, number), ms.int32)
    # MindSpore 2.7.0 ignores `right=True`
    return first, ops.cast(ops.searchsorted(number, ops.add(number, 1)), ms.int32)


def count_up_to(ends, places):
    """Return how many of the sorted `ends` are at most each of the places, int32."""
    if exporting():
        return ops.cast(ends.reshape(1, -1) <= places.reshape(-1, 1), ms.int32).sum(1)
    return ops.cast(ops.searchsorted(ends, ops.add(places, 1)), ms.int32)


def running(x, merge, neutral, backward=False):
    """Return, for each place of `x (b, n)`, the merged values of all places up to it, or from it on: in each step, of
    twice as many."""
    b, n = x.shape
    reach = 1
    while reach < n:
        nothing = ops.full((b, reach), neutral, dtype=x.dtype)
        others = (x[:, reach:], nothing) if backward else (nothing, x[:, :-reach])
        x = merge(x, ops.cat(others, 1))
        reach *= 2
    return x
