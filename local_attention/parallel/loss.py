"""The labels of a slice, and the mean of what the ranks hold."""
from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from .exchange import digits_of, exchange, number_of

_next_tokens = constexpr(lru_cache(maxsize=64)(lambda group, count: exchange(group, count, 0)))


def next_tokens(group, x, ignore_index):
    """Return the token, or the id, after each of `x (b, n)`: int. The last one comes from the next rank. After the last
    of the whole sequence there is none, and `ignore_index` stands there."""
    last = ops.full_like(x[:, :1], ignore_index)
    if group.size > 1:
        first = digits_of(x[:, :1], ms.float32)
        received = number_of(_next_tokens(group, first.size)(first.reshape(-1)).reshape(-1, 1), x.dtype)
        last = ops.depend(last, received) if group.rank == group.size - 1 else received
    return ops.cat((x[:, 1:], last), 1)


def without_last(group, mask, b, n):
    """Return a mask `(b, n)` that also hides the last token of the whole sequence, which a loss predicts from the
    others. Without `mask`, all other tokens are real."""
    last = _last(group, b, n)
    return last if mask is None else ops.logical_and(mask, last)


@constexpr
def _last(group, b, n):
    mask = np.ones((b, n), bool)
    mask[:, -1] = group.rank < group.size - 1
    return Tensor(mask)


class MeanOfRanks(nn.Cell):
    """Computes the mean of what the ranks of a group hold. Each rank differentiates its own part: gradients averaged
    over the ranks, as by `nn.DistributedGradReducer`, are the gradients of the mean."""

    def __init__(self, group):
        super().__init__()
        self.size, self.sum = group.size, ops.AllReduce(group=group.name) if group.size > 1 else None

    def construct(self, x):
        return x if self.size == 1 else self.sum(x) / self.size

    def bprop(self, x, out, dout):
        return (ops.depend(dout, out),)
