"""Padding on the left: where the real tokens of a row begin, so that it shifts nothing."""
from functools import lru_cache

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import constexpr

from . import checks
from .backends import portable
from .backends.spans import document_bounds
from .parallel.exchange import every_rank


def _leading(mask):
    """Return 1 for each token of `mask (b, n)` before the first real one of its row, else 0."""
    return ops.cast(portable.cumsum(ops.cast(mask, ms.int32), 1) == 0, ms.int32)


def first_real(group, mask):
    """Return the place of each row's first real token in the whole sequence, `(b, 1)`; past its end if there is
    none."""
    first = portable.count(_leading(mask))
    if group is None or group.size == 1:
        return first
    n = mask.shape[1]
    firsts = every_rank(group, first.reshape(1, -1)).reshape(group.size, -1)
    starts = ops.arange(0, group.size * n, n).reshape(-1, 1)
    places = ops.where(firsts < n, firsts + starts, group.size * n)
    return ops.cast(ops.amin(places, 0), first.dtype).reshape(-1, 1)


class _NoneLeading(nn.Cell):
    """Returns the places of the rows' first real tokens in a sequence of n, unless there is padding before one of them.
    Every rank has all of these places, and so the same error."""

    def __init__(self, owner, n):
        super().__init__()
        self.owner, self.n = owner, n
        self.check = None  # no graph on a device can raise an error of its own
        if ms.get_context("device_target") == "CPU":
            self.check = ops.Custom(self._checked, _same, _same, func_type="pyfunc")

    def __call__(self, first):
        """Outside a graph, check at once: an error in a queue of operators would come after an exchange."""
        self._checked(first.asnumpy())
        return first

    def construct(self, first):
        return first if self.check is None else ops.depend(first, self.check(first))

    def bprop(self, first, out, dout):
        return (dout,)

    def _checked(self, first):
        wrong = first[first % self.n > 0]
        if len(wrong):
            raise checks.value_error(
                self.owner, "mask", "without padding on the left with 'sequence_parallel' and without "
                "'exact_windowsize', as windows count from the first real token", f"{wrong[0]} tokens of it")
        return first


def _same(given):
    return given


none_leading = constexpr(lru_cache(maxsize=64)(_NoneLeading))


def orders(mask):
    """Return two orders of the tokens of a batch, as `moved` takes them: one moves what comes before the first real
    token of each row behind all others, and one undoes this."""
    first = portable.count(_leading(mask))
    places = portable.arange(0, mask.shape[1], 1)[None]
    starts = portable.arange(0, mask.shape[0], 1)[:, None] * mask.shape[1]
    return (portable.remainder(places + first, mask.shape[1]) + starts,
            portable.remainder(places - first, mask.shape[1]) + starts)


def moved(x, order):
    """Return `x (b, n, ...)` with the tokens of each row in another order."""
    return ops.gather(x.reshape((-1,) + x.shape[2:]), order, 0)


def without_leading(group, mask, segment_ids):
    """Return the mask, and ids of documents in which the tokens before the first real one of a document are no part of
    it: they are padding."""
    real = ops.cast(mask, ms.int32)
    seen = portable.cumsum(real, 1)
    start = document_bounds(segment_ids)[..., 0]
    seen = seen - ops.gather_elements(seen - real, 1, start)  # in the document so far
    if group is not None and group.size > 1:
        begun = _seen_before(group, segment_ids, start, seen)
        seen = seen + ops.cast(ops.logical_and(begun, start == 0), seen.dtype)
    return mask, ops.where(seen > 0, segment_ids, ops.full_like(segment_ids, -1))


def _seen_before(group, segment_ids, start, seen):
    """Return whether the document that a rank's slice begins with has a real token on an earlier rank, `(b, 1)`."""
    b, n = segment_ids.shape
    whole, real = start[:, n - 1] == 0, seen[:, n - 1] > 0  # of the document that the slice ends with
    mine = ops.stack([ops.cast(x, segment_ids.dtype) for x in (
        segment_ids[:, 0], segment_ids[:, n - 1], whole, real)], 0)
    heads, tails, wholes, reals = every_rank(group, mine.reshape(1, -1)).reshape(group.size, 4, b).unbind(1)
    goes_on = ops.logical_and(heads[1:] == tails[:-1], heads[1:] >= 0)  # from the rank before
    goes_on = ops.cat((ops.zeros((1, b), ms.bool_), goes_on))
    earlier = max(group.rank, 1)  # on the first rank, nothing goes on
    ranks = ops.arange(0, earlier, 1).reshape(-1, 1)
    linked = ops.logical_and(goes_on[:earlier], wholes[:earlier] > 0)
    began = ops.amax(ops.where(linked, ops.zeros_like(ranks), ranks), 0)  # the rank that it began on
    last = ops.amax(ops.where(reals[:earlier] > 0, ranks, ops.full_like(ranks, -1)), 0)
    return ops.logical_and(goes_on[group.rank], last >= began).reshape(b, 1)
