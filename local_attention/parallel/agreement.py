"""The agreement of the ranks before the first exchange of a call.

Collectives of ranks whose calls differ end in MindSpore's errors on some ranks and in wrong numbers on others. So the
ranks first tell each other what they call: four numbers each, in one sum.
"""
import zlib
from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from .. import checks


def agreed(group, owner, x, n, inputs, beside):
    """Return x, once it is known that the calls of all ranks are alike.

    Args:
        group (Group): The ranks.
        owner (str): Whose call it is.
        x (Tensor): What the first exchange of the call depends on.
        n (int): The number of tokens.
        inputs (tuple): Every input as `checks.described`, None for the absent ones.
        beside (tuple): The names of those that a call may have or not: the last ones of `inputs`.

    Raises:
        ValueError: On every rank, if they differ.
    """
    return x if group.size == 1 else _agreement(group, owner, n, inputs, beside)(x)


@constexpr
def _agreement(group, owner, n, inputs, beside):
    given = tuple(name for name, got in zip(beside, inputs[-len(beside):]) if got is not None and got is not False)
    text = repr([got if got is None or isinstance(got, bool) else (got[0], checks.dtype_name(got[1]))
                 for got in inputs])
    return _made(group, owner, n, given, beside, zlib.crc32(text.encode()) % 2 ** 24)


class _Agreement(nn.Cell):
    """Compares four numbers of each rank: tokens (two numbers), which optional inputs there are, and a checksum of all
    shapes and dtypes. Each is exact in float32, which every platform can sum."""

    def __init__(self, group, owner, n, given, beside, checksum):
        super().__init__()
        self.owner, self.beside = owner, beside
        mine = np.zeros((group.size, 4), np.float32)
        mine[group.rank] = n // 2 ** 20, n % 2 ** 20, sum(1 << beside.index(name) for name in given), checksum
        self.mine = Tensor(mine)
        self.sum = ops.AllReduce(group=group.name)
        self.compare = None  # no graph on a device can raise an error of its own
        if ms.get_context("device_target") == "CPU":
            self.compare = ops.Custom(self._compared, _same, _same, func_type="pyfunc")

    def __call__(self, x):
        """Outside a graph, compare at once: an error in a queue of operators would come after the exchange."""
        self._compared(self.sum(self.mine).asnumpy())
        return x

    def construct(self, x):
        if self.compare is None:
            return x
        return ops.depend(x, self.compare(self.sum(ops.depend(self.mine, x))))

    def bprop(self, x, out, dout):
        return (dout,)

    def _compared(self, every):
        other = np.flatnonzero((every != every[0]).any(1))
        if len(other):
            of_first, of_other = self._words(every[0]), self._words(every[other[0]])
            if of_first == of_other:
                of_other += " of other shapes or dtypes"
            raise ValueError(f"For '{self.owner}', a call with 'sequence_parallel' must be the same on every rank, but "
                             f"got {of_first} on rank 0 and {of_other} on rank {other[0]}.")
        return every

    def _words(self, numbers):
        high, low, given, checksum = map(int, numbers)
        names = [f"'{name}'" for place, name in enumerate(self.beside) if given >> place & 1]
        return f"{high * 2 ** 20 + low} tokens {'with ' + ', '.join(names) if names else 'alone'}"


def _same(given):
    return given


_made = lru_cache(maxsize=64)(_Agreement)
