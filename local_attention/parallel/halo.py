"""The halo: the rows of the neighbours that the outermost queries of a slice see, with their gradients."""
from functools import lru_cache

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import constexpr

from .exchange import digits_of, exchange, number_of, sent_as


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


_halo = constexpr(lru_cache(maxsize=64)(_Halo))


def with_halo(group, k, v, mask, segment_ids, backward, forward):
    """Add the rows of the neighbours that a span reaches to `k, v (groups, n, d)`, a bool mask and ids of documents,
    `(batch, n)` each or None: `backward` rows before the own ones and `forward` after them, where that rank exists.
    Also return how many rows come before."""
    if group.size == 1 or backward + forward == 0:
        return k, v, mask, segment_ids, 0
    dtype = sent_as(k.dtype)
    k, v = ops.cast(k, dtype), ops.cast(v, dtype)
    known, batch = [], 0
    if mask is not None:
        known.append(ops.cast(mask, dtype))
        batch = mask.shape[0]
    if segment_ids is not None:
        known.append(digits_of(segment_ids, dtype))
    more = ops.cat(known) if known else ops.zeros((1, 1), dtype)
    k, v, more = _halo(group, k.shape, more.shape[0] if known else 0, backward, forward)(k, v, more)
    if mask is not None:
        mask = ops.cast(more[:batch], ms.float32) > 0.5
    if segment_ids is not None:
        segment_ids = number_of(more[batch:], segment_ids.dtype)
    return k, v, mask, segment_ids, group.before(backward)
