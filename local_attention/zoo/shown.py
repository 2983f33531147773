"""Reads the window of a layer, and blocks whose tokens see each other, from what a mask shows at a few pairs."""
from dataclasses import dataclass
from typing import Optional

import numpy as np

from ..spec import NO_LIMIT, WindowSpec


@dataclass(frozen=True)
class Shown:
    """What a mask shows apart from padding and documents, in the words of `windowed_attention`; arrays are NumPy's."""
    spec: WindowSpec
    order: Optional[np.ndarray] = None
    bias: Optional[np.ndarray] = None

    def visible(self, queries, n):
        """Return whether some queries see `n` keys, bool `(b or 1, len(queries), n)`, for as many queries as keys."""
        keys = np.arange(n)
        seen = self.spec.visible(queries, keys)[None]
        if self.order is not None:
            seen = seen & (self.order[:, None] <= self.order[:, queries, None])
        if self.bias is not None:
            columns = (keys - queries[:, None] + self.spec.backward).clip(0, self.bias.shape[-1] - 1)
            seen = seen & (np.take_along_axis(self.bias[:, 0, queries], columns[None], 2) == 0)
        return seen


def of_one_query(seen, real):
    """Return what the mask's row of the last key's query shows, `(b, n)`, where `real` keys could be seen."""
    hidden = (real & ~seen).any()
    return Shown(WindowSpec(1, seen.shape[1] - 1 - int(seen.any(0).argmax()) if hidden else NO_LIMIT, 0, True))


class Pairs:
    """Asks a mask about pairs of queries and keys by their places among the keys. `show(queries, keys)` takes places
    that broadcast to `(b, n)`. The queries are those from `first` on, `n` keys are in use.

    `real (b, n)` says which are not padding; `documents (b, n)` or None has the number of each key's document;
    `ahead (b, n)` whether a key is seen by the real query before it.
    """

    def __init__(self, show, first, real, documents, ahead):
        self.show, self.real, self.own = show, real, np.arange(first, real.shape[1])
        places = np.arange(real.shape[1])
        numbers = np.zeros(real.shape, int) if documents is None else documents
        numbers = np.where(real, numbers, -1)
        self.starts, self.ends = _runs(numbers)
        pairs = real & (places > self.starts)
        self.both = bool(ahead[pairs].any() and ahead[pairs].all())
        linked = ahead & pairs & (not self.both)
        self.block_starts, self.block_ends = _runs(np.cumsum(~linked, 1))
        self.longest = int((self.block_ends - self.block_starts)[:, first:].max()) + 1

    def reach(self):
        """Return how many keys a query sees before and after its own, `NO_LIMIT` where no query shows a limit."""
        own, rows = self.own, np.arange(len(self.real))[:, None]
        real, alone = self.real[:, own], self.block_starts[:, own] == own
        before, after = own - self.starts[:, own], self.ends[:, own] - own
        # what has most keys before it; the same apart from the later tokens of blocks; what has most after it
        asked = np.stack([own[np.where(may, one, -1).argmax(1)] for may, one in (
            (real, before), (real & alone, before), (real & alone, after))], 1)
        keys = np.arange(self.real.shape[1])
        seen = self.show(asked.repeat(len(keys), 1), np.tile(keys, 3)[None]).reshape(len(rows), 3, -1)
        start, end, block = (one[rows, asked] for one in (self.starts, self.ends, self.block_starts))
        seen = seen & self.real[:, None] & (keys >= start[..., None]) & (keys <= end[..., None])
        lowest = (seen & (keys <= asked[..., None])).argmax(2)
        highest = len(keys) - 1 - (seen & (keys >= asked[..., None]))[..., ::-1].argmax(2)
        limited = (lowest > start) & ((lowest != block) | (block == asked))  # not by the start of a block
        return (_least((asked - lowest)[:, :2], limited[:, :2]),
                _least((highest - asked)[:, 2], highest[:, 2] < end[:, 2]))

    def read(self):
        """Return what the mask shows, and None or a pair, `(row, query, key, seen)`, where it does not."""
        back, forward = self.reach()
        own, blocks = self.own, self.longest > 1
        lowest = np.maximum(self.starts[:, own], own - min(back, own[-1]))
        whole = False
        if blocks and self.longest - 1 > back:  # the window may cut a block that is longer, or not
            row, place = np.argwhere(self.block_ends - self.block_starts == self.longest - 1)[0]
            queries = np.zeros((len(self.real), 1), int)
            queries[row] = self.block_ends[row, place]
            whole = bool(self.show(queries, np.where(queries > 0, self.block_starts[row, place], 0))[row, 0])
        if whole:
            lowest = np.minimum(lowest, self.block_starts[:, own])
        if self.both:
            spec, highest = WindowSpec(1, back, forward, False), np.minimum(self.ends[:, own],
                                                                          own + min(forward, own[-1]))
        elif blocks:
            spec = WindowSpec(1, max(back, whole * (self.longest - 1)), self.longest - 1, False)
            highest = self.block_ends[:, own]
        else:
            spec, highest = WindowSpec(1, back, 0, True), np.broadcast_to(own, lowest.shape)
        bias = self._bias(spec, back) if whole else None
        return Shown(spec, self.block_starts if blocks else None, bias), self._wrong(lowest, highest)

    def _bias(self, spec, back):
        """Return, as a bias with a row for each query, what hides the keys that only queries of longer blocks see."""
        offsets = np.arange(-spec.backward, spec.forward + 1)
        keys = self.own[:, None] + offsets
        same = keys >= self.block_starts[:, self.own, None]  # what comes after the block is hidden by the order
        return np.where(same | (offsets >= -back), 0, -np.inf).astype(np.float32)[:, None]

    def _wrong(self, lowest, highest):
        """Return a pair at which the mask shows another edge of a query's keys than those, if there is one."""
        keys = np.concatenate([lowest, lowest - 1, highest, highest + 1], 1)
        queries = np.broadcast_to(np.tile(self.own, 4), keys.shape)
        right = np.tile(np.repeat([True, False, True, False], len(self.own)), (len(keys), 1))
        inside = np.clip(keys, 0, self.real.shape[1] - 1)
        there = (inside == keys) & np.take_along_axis(self.real, inside, 1) & self.real[:, queries[0]]
        seen = self.show(queries, inside)
        wrong = np.argwhere((seen != right) & there)
        if not len(wrong):
            return None
        row, where = wrong[0]
        return int(row), int(queries[row, where]), int(keys[row, where]), bool(seen[row, where])


def _runs(numbers):
    """Return the first and the last place of the run of equal numbers at each place of a row."""
    places = np.arange(numbers.shape[1])
    change = np.pad(numbers[:, 1:] != numbers[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = np.maximum.accumulate(np.where(change, places, 0), 1)
    last = np.pad(change[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    ends = np.minimum.accumulate(np.where(last, places, len(places) - 1)[:, ::-1], 1)[:, ::-1]
    return starts, ends


def _least(numbers, limited):
    return int(numbers[limited].min()) if limited.any() else NO_LIMIT
