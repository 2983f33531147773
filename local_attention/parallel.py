"""Sequence parallelism: every rank of a group holds one slice of the sequences, in the order of the ranks.

A slice needs from its neighbours only the halo: the keys, values, mask and ids of documents that its outermost queries
see. So the amount exchanged depends neither on the length of the sequence nor on the number of ranks. (Once in a call
of a model, each rank also sends three numbers per row, which say where documents began.) All ranks must execute
collectives in one order, and a compiler may reorder operations that do not depend on each other. So each collective
here works on data, and depends on the one before it.
"""
from dataclasses import dataclass
from functools import lru_cache, cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, nn, ops
from mindspore.ops import constexpr

from . import checks
from .backends.spans import document_bounds


@dataclass(frozen=True)
class Group:
    """The ranks that share a sequence, and this process's place among them."""
    name: str
    rank: int
    size: int

    def before(self, rows):
        """Return how many rows of the previous rank come before this rank's own: 0 if there is no previous rank."""
        return rows if self.rank > 0 else 0

    def after(self, rows):
        return rows if self.rank < self.size - 1 else 0


def group_of(owner, argument, name):
    """Return the group of a name, or of all ranks for True or None."""
    known = name if isinstance(name, str) else communication.GlobalComm.WORLD_COMM_GROUP
    if communication.GlobalComm.INITED:  # before that, MindSpore tells every process that it is the first of one
        try:
            return Group(known, communication.get_rank(known), communication.get_group_size(known))
        except (RuntimeError, ValueError):
            pass
    raise ValueError(f"For '{owner}', '{argument}' needs a communication group with this rank in it, made by "
                     f"'mindspore.communication.init()' or 'create_group()', but got {name!r}.")


def sequence_group(owner, sequence_parallel):
    """Return the group that `sequence_parallel` means: of all ranks, or the one of that name; None for no group."""
    if not isinstance(sequence_parallel, (bool, str)):
        raise checks.type_error(owner, "sequence_parallel", "a bool or the name of a communication group",
                                sequence_parallel)
    if sequence_parallel is False:
        return None
    group = group_of(owner, "sequence_parallel", sequence_parallel)
    if _platform() is _PairSums:  # by all ranks in one order, here rather than during a first call
        for first in sorted((group.rank - 1, group.rank), key=lambda first: first % 2):
            if 0 <= first < group.size - 1:
                _pair(group.name, first)
    return group


@cache
def _pair(name, first):
    """Make the group of two neighbours, once."""
    pair = f"{name}.neighbours.{first}"
    communication.create_group(pair, communication.get_process_group_ranks(name)[first:first + 2])
    return pair


# ---- the exchange with the neighbours: the same call on every platform


class _PairSums(nn.Cell):
    """The exchange where reductions are the only collectives. With each neighbour, the two sum a buffer of which each
    fills its own part. Ranks with an even number begin with the next rank, those with an odd number with the previous
    one. So no rank waits for more than one other exchange."""

    def __init__(self, group, up, down):
        super().__init__()
        self.up, self.down, self.next_first = up, down, group.rank % 2 == 0
        self.has_previous, self.has_next = group.rank > 0, group.rank < group.size - 1
        if self.has_previous:
            self.sum_with_previous = ops.AllReduce(group=_pair(group.name, group.rank - 1))
        if self.has_next:
            self.sum_with_next = ops.AllReduce(group=_pair(group.name, group.rank))
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


class _AllToAll(nn.Cell):
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


def _platform():
    return _AllToAll if ms.get_context("device_target") == "Ascend" else _PairSums


def exchange(group, up, down):
    """Return a Cell that sends data to the neighbours and returns theirs, flat and of one length on every rank.

    Its input is `up` elements for the previous rank and `down` for the next one; its output is `down` elements of the
    previous rank and `up` of the next one. Elements of a rank that does not exist must not be read.
    """
    return _platform()(group, up, down)


# ---- the halo


class _Halo(nn.Cell):
    """Adds rows of the neighbours to keys and values `(groups, n, d)` and to other data of the keys `(batch, n)`, all
    of one dtype.

    The gradients of these rows go back to the ranks that own them. Without other data, `batch` is 0, and the tensor in
    its place is returned unchanged.
    """

    def __init__(self, group, shape, batch, backward, forward):
        super().__init__()
        self.groups, self.n, self.head_dim = shape
        self.batch, self.backward, self.forward = batch, backward, forward
        self.before, self.after = group.before(backward), group.after(forward)  # rows that come, and rows
        self.first, self.last = group.before(forward), group.after(backward)  # whose gradients come back
        self.row = 2 * self.groups * self.head_dim
        self.there = exchange(group, forward * (self.row + batch), backward * (self.row + batch))
        self.back = exchange(group, backward * self.row, forward * self.row)
        self.slice, self.concat, self.join = ops.Slice(), ops.Concat(1), ops.Concat(0)

    def construct(self, k, v, more):
        received = self.there(self._edges((k, v, more) if self.batch > 0 else (k, v), self.n, self.forward,
                                          self.backward))
        k = ops.depend(k, received)
        if self.before > 0:
            other_k, other_v = self._keys(received, 0, self.before)
            k, v = self.concat((other_k, k)), self.concat((other_v, v))
            if self.batch > 0:
                more = self.concat((self._known(received, 0, self.before), more))
        if self.after > 0:
            start = self.backward * (self.row + self.batch)
            other_k, other_v = self._keys(received, start, self.after)
            k, v = self.concat((k, other_k)), self.concat((v, other_v))
            if self.batch > 0:
                more = self.concat((more, self._known(received, start, self.after)))
        return k, v, more

    def bprop(self, k, v, more, out, dout):
        dk, dv = dout[0], dout[1]
        received = self.back(self._edges((dk, dv), self.before + self.n + self.after, self.backward, self.forward))
        dk, dv = self._rows(ops.depend(dk, received), self.before, self.n), self._rows(dv, self.before, self.n)
        if self.first > 0:
            other_k, other_v = self._keys(received, 0, self.first)
            dk, dv = self._add(dk, other_k, 0), self._add(dv, other_v, 0)
        if self.last > 0:
            other_k, other_v = self._keys(received, self.forward * self.row, self.last)
            dk, dv = self._add(dk, other_k, self.n - self.last), self._add(dv, other_v, self.n - self.last)
        return dk, dv, ops.zeros(more.shape, more.dtype)

    def _edges(self, tensors, n, first, last):
        """Return the first rows of tensors of n rows, then their last ones, flat."""
        parts = []
        for start, rows in ((0, first), (n - last, last)):
            if rows > 0:
                for x in tensors:
                    parts.append(self._rows(x, start, rows).reshape(-1))
        return self.join(parts)

    def _keys(self, flat, start, rows):
        """Return the keys and values of one neighbour."""
        size, shape = self.groups * rows * self.head_dim, (self.groups, rows, self.head_dim)
        return (self.slice(flat, (start,), (size,)).reshape(shape),
                self.slice(flat, (start + size,), (size,)).reshape(shape))

    def _known(self, flat, start, rows):
        return self.slice(flat, (start + rows * self.row,), (rows * self.batch,)).reshape(self.batch, rows)

    def _rows(self, x, start, rows):
        if x.ndim == 2:
            return self.slice(x, (0, start), (x.shape[0], rows))
        return self.slice(x, (0, start, 0), (x.shape[0], rows, x.shape[2]))

    def _add(self, x, rows, start):
        """Return x with `rows` added to it from row `start` on."""
        parts, after = [rows], self.n - start - rows.shape[1]
        if start > 0:
            parts = [ops.zeros((self.groups, start, self.head_dim), x.dtype)] + parts
        if after > 0:
            parts = parts + [ops.zeros((self.groups, after, self.head_dim), x.dtype)]
        return ops.add(x, self.concat(parts))


@constexpr
def _sent_as(dtype):
    """Return the dtype to send: on CPU, collectives have no bfloat16."""
    return ms.float32 if dtype == ms.bfloat16 and ms.get_context("device_target") == "CPU" else dtype


_halo = constexpr(lru_cache(maxsize=64)(_Halo))


def _digits(ids, dtype):
    """Return integers `(batch, n)` as their bytes `(count * batch, n)`, which every float dtype holds exactly."""
    parts = []
    for place in range(_bytes(ids.dtype)):
        parts.append(ops.bitwise_and(ops.bitwise_right_shift(ids, 8 * place), 255))
    return ops.cast(ops.cat(parts), dtype)


def _number(digits, dtype):
    """Return the integers of the bytes that `_digits` made. They have no gradient. Otherwise, a graph would also build
    that of the exchange, and on Ascend it does not compile for a rank that sends nothing."""
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


def with_halo(group, k, v, mask, segment_ids, backward, forward):
    """Add the rows of the neighbours that a span reaches to `k, v (groups, n, d)`, a bool mask and ids of documents,
    `(batch, n)` each or None: `backward` rows before the own ones and `forward` after them, where that rank exists.
    Also return how many rows come before."""
    if group.size == 1 or backward + forward == 0:
        return k, v, mask, segment_ids, 0
    dtype = _sent_as(k.dtype)
    k, v = ops.cast(k, dtype), ops.cast(v, dtype)
    known, batch = [], 0
    if mask is not None:
        known.append(ops.cast(mask, dtype))
        batch = mask.shape[0]
    if segment_ids is not None:
        known.append(_digits(segment_ids, dtype))
    more = ops.cat(known) if known else ops.zeros((1, 1), dtype)
    k, v, more = _halo(group, k.shape, more.shape[0] if known else 0, backward, forward)(k, v, more)
    if mask is not None:
        mask = ops.cast(more[:batch], ms.float32) > 0.5
    if segment_ids is not None:
        segment_ids = _number(more[batch:], segment_ids.dtype)
    return k, v, mask, segment_ids, group.before(backward)


# ---- documents and the loss


def places(group, segment_ids):
    """Return each token's place in its document, for ids `(b, n)`. Documents may begin on any earlier rank."""
    b, n = segment_ids.shape
    first = document_bounds(segment_ids)[..., 0]
    own = ops.arange(0, n, 1).reshape(1, n) - first
    if group.size == 1:
        return own
    ids = ops.stop_gradient(segment_ids)
    edges = ops.stack((ids[:, 0], ids[:, n - 1], ops.cast(own[:, n - 1], ids.dtype)), 0)
    heads, tails, last = _every_rank(group, edges.reshape(1, -1)).reshape(group.size, 3, b).unbind(1)
    goes_on = ops.logical_and(heads[1:] == tails[:-1], heads[1:] >= 0)  # a document continues from the rank before
    goes_on = ops.cat((ops.zeros((1, b), ms.bool_), goes_on))
    # where the document of each rank's last token began; 0 if before that rank
    began = ops.arange(n - 1, group.size * n, n).reshape(-1, 1) - last
    began = ops.masked_fill(began, ops.logical_and(goes_on, last == n - 1), 0)
    before = group.rank * n - ops.amax(began[:max(group.rank, 1)], 0)
    before = ops.cast(ops.masked_fill(before, ops.logical_not(goes_on[group.rank]), 0), own.dtype)
    return own + ops.masked_fill(ops.broadcast_to(before.reshape(b, 1), (b, n)), first > 0, 0)


def _every_rank(group, mine):
    """Return the integers `(1, n)` of every rank side by side, by a sum: groups on CPU have no other collective."""
    digits, n = _digits(mine, ms.float32), mine.shape[1]
    parts = [digits]
    if group.rank > 0:
        parts = [ops.zeros((digits.shape[0], group.rank * n), ms.float32)] + parts
    if group.rank < group.size - 1:
        parts = parts + [ops.zeros((digits.shape[0], (group.size - 1 - group.rank) * n), ms.float32)]
    return _number(_sum(group)(ops.cat(parts, 1)), mine.dtype)


_sum = constexpr(lru_cache(maxsize=64)(lambda group: ops.AllReduce(group=group.name)))
_next_tokens = constexpr(lru_cache(maxsize=64)(lambda group, count: exchange(group, count, 0)))


def next_tokens(group, x, ignore_index):
    """Return the token, or the id, after each of `x (b, n)`: int. The last one comes from the next rank. After the last
    of the whole sequence there is none, and `ignore_index` stands there."""
    last = ops.full_like(x[:, :1], ignore_index)
    if group.size > 1:
        first = _digits(x[:, :1], ms.float32)
        received = _number(_next_tokens(group, first.size)(first.reshape(-1)).reshape(-1, 1), x.dtype)
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


# ---- gradients


class AverageGradients(nn.Cell):
    r"""
    Average gradients over the ranks of a group.

    All gradients travel in one buffer, and so in one collective, which runs after every exchange that they depend on.
    So, unlike `nn.DistributedGradReducer`, it may be compiled together with the gradients of a model with
    `sequence_parallel`. (A compiler may order independent collectives differently on each rank.)

    Args:
        group (str): The name of a communication group; ``None`` is all ranks. Default: ``None`` .

    Inputs:
        - **gradients** (tuple[Tensor]) - Of any shapes and dtypes, the same on every rank.

    Outputs:
        tuple[Tensor], of the same shapes and dtypes; the mean is computed in float32.

    Raises:
        TypeError: If `group` is not a str.
        ValueError: If there is no such group, or `mindspore.communication.init()` was not called.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> # in a script that msrun starts
        >>> from mindspore import communication
        >>> from local_attention.parallel import AverageGradients
        >>> communication.init()
        >>> gradients = AverageGradients()(gradients)
    """

    def __init__(self, group=None):
        super().__init__()
        if group is not None and not isinstance(group, str):
            raise checks.type_error("AverageGradients", "group", "None or the name of a communication group", group)
        group = group_of("AverageGradients", "group", group)
        self.size, self.sum = group.size, ops.AllReduce(group=group.name) if group.size > 1 else None
        self.slice, self.join = ops.Slice(), ops.Concat(0)

    def construct(self, gradients):
        if self.size == 1:
            return gradients
        flat = []
        for gradient in gradients:
            flat.append(ops.cast(gradient, ms.float32).reshape(-1))
        total = self.sum(self.join(flat))
        means, start = [], 0
        for gradient in gradients:
            mean = self.slice(total, (start,), (gradient.size,)).reshape(gradient.shape) / self.size
            means.append(ops.cast(mean, gradient.dtype))
            start += gradient.size
        return tuple(means)
