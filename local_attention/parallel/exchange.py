"""What ranks send each other: flat data to the neighbours, the same call on every platform, and integers to all."""
from functools import lru_cache

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import constexpr

from .groups import only_sums, pair


class PairSums(nn.Cell):
    """The exchange where reductions are the only collectives. With each neighbour, the two sum a buffer of which each
    fills its own part. Ranks with an even number begin with the next rank, those with an odd number with the previous
    one. So no rank waits for more than one other exchange."""

    def __init__(self, group, up, down):
        super().__init__()
        self.up, self.down, self.next_first = up, down, group.rank % 2 == 0
        self.has_previous, self.has_next = group.rank > 0, group.rank < group.size - 1
        if self.has_previous:
            self.sum_with_previous = ops.AllReduce(group=pair(group.name, group.rank - 1))
        if self.has_next:
            self.sum_with_next = ops.AllReduce(group=pair(group.name, group.rank))
        self.slice, self.concat = ops.Slice(), ops.Concat(0)

    def construct(self, mine):
        if self.next_first:
            of_next = self._with_next(mine, mine)
            of_previous = self._with_previous(mine, of_next)
        else:
            of_previous = self._with_previous(mine, mine)
            of_next = self._with_next(mine, of_previous)
        if self.up == 0:
            return ops.depend(of_previous, of_next)
        if self.down == 0:
            return ops.depend(of_next, of_previous)
        return self.concat((self.slice(of_previous, (0,), (self.down,)),
                            self.slice(of_next, (self.down,), (self.up,))))

    def _with_next(self, mine, last):
        """Return what the two put in, what goes down first; without a next rank, any tensor of that shape."""
        if not self.has_next:
            return last
        if self.down == 0:
            mine = ops.depend(ops.zeros((self.up,), mine.dtype), mine)
        elif self.up > 0:
            mine = self.concat((self.slice(mine, (self.up,), (self.down,)), ops.zeros((self.up,), mine.dtype)))
        return self.sum_with_next(ops.depend(mine, last))

    def _with_previous(self, mine, last):
        if not self.has_previous:
            return last
        if self.up == 0:
            mine = ops.depend(ops.zeros((self.down,), mine.dtype), mine)
        elif self.down > 0:
            mine = self.concat((ops.zeros((self.down,), mine.dtype), self.slice(mine, (0,), (self.up,))))
        return self.sum_with_previous(ops.depend(mine, last))


class AllToAll(nn.Cell):
    """The exchange where a rank can send to only some of the others. Written for Ascend, where it has not been run;
    tested with an emulation of the operator."""

    def __init__(self, group, up, down):
        super().__init__()
        sent, received = [0] * group.size, [0] * group.size
        if group.rank > 0:
            sent[group.rank - 1], received[group.rank - 1] = up, down
        if group.rank < group.size - 1:
            sent[group.rank + 1], received[group.rank + 1] = down, up
        self.sent, self.received = tuple(sent), tuple(received)
        self.count, self.some_come = sum(sent), sum(received) > 0  # on Ascend, no graph with a bprop can sum a tuple
        self.start = 0 if group.rank > 0 else up  # a part for a rank that does not exist is not sent
        self.missing_before, self.missing_after = down - group.before(down), up - group.after(up)
        self.all_to_all = ops.AlltoAllV(group=group.name)
        self.slice, self.concat = ops.Slice(), ops.Concat(0)

    def construct(self, mine):
        if 0 < self.count < mine.shape[0]:
            mine = self.slice(mine, (self.start,), (self.count,))
        received = self.all_to_all(mine, self.sent, self.received)
        if not self.some_come:
            return ops.depend(mine, received)
        if self.missing_before > 0:
            received = self.concat((ops.zeros((self.missing_before,), mine.dtype), received))
        if self.missing_after > 0:
            received = self.concat((received, ops.zeros((self.missing_after,), mine.dtype)))
        return received


def exchange(group, up, down):
    """Return a Cell that sends data to the neighbours and returns theirs, flat and of one length on every rank.

    Its input is `up` elements for the previous rank and `down` for the next one; its output is `down` elements of the
    previous rank and `up` of the next one. Elements of a rank that does not exist must not be read.
    """
    return (PairSums if only_sums() else AllToAll)(group, up, down)


@constexpr
def sent_as(dtype):
    """Return the dtype to send: on CPU, collectives have no bfloat16."""
    return ms.float32 if dtype == ms.bfloat16 and ms.get_context("device_target") == "CPU" else dtype


# ---- integers


def digits_of(ids, dtype):
    """Return integers `(batch, n)` as their bytes `(count * batch, n)`, which every float dtype holds exactly."""
    parts = []
    for place in range(_bytes(ids.dtype)):
        parts.append(ops.bitwise_and(ops.bitwise_right_shift(ids, 8 * place), 255))
    return ops.cast(ops.cat(parts), dtype)


def number_of(digits, dtype):
    """Return the integers of the bytes that `digits_of` made. They have no gradient. Otherwise, a graph would also
    build that of the exchange, and on Ascend it does not compile for a rank that sends nothing."""
    digits = ops.stop_gradient(digits)
    parts = ops.cast(ops.cast(digits, ms.float32), dtype).reshape(_bytes(dtype), -1, digits.shape[1])
    last = parts[_bytes(dtype) - 1]
    ids = last - 256 * ops.cast(last > 127, dtype)  # it has the sign
    for place in range(_bytes(dtype) - 2, -1, -1):  # outside graphs, GPU cannot shift all numbers by one amount
        ids = ids * 256 + parts[place]
    return ids


@constexpr
def _bytes(dtype):
    return 8 if dtype == ms.int64 else 4


def every_rank(group, mine):
    """Return the integers `(1, n)` of every rank side by side, by a sum: groups on CPU have no other collective."""
    digits, n = digits_of(mine, ms.float32), mine.shape[1]
    parts = [digits]
    if group.rank > 0:
        parts = [ops.zeros((digits.shape[0], group.rank * n), ms.float32)] + parts
    if group.rank < group.size - 1:
        parts = parts + [ops.zeros((digits.shape[0], (group.size - 1 - group.rank) * n), ms.float32)]
    return number_of(_sum(group)(ops.cat(parts, 1)), mine.dtype)


_sum = constexpr(lru_cache(maxsize=64)(lambda group: ops.AllReduce(group=group.name)))
