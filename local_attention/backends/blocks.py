"""From positions to blocks and back: the constants of a problem's blocks, and what moves tensors into their order."""
from dataclasses import replace
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ..plan import make_plan
from ..spec import WindowSpec
from .dropout import column_hash, row_hash, seeded_rows
from .spans import HIDDEN, SELF_SCORE, reach

SCORES_AT_ONCE = 2**21  # 8 MiB of float32: enough to keep a matmul busy, little beside a long sequence
GATHERED_AT_ONCE = 2**24  # elements of gathered keys, whose gradients stand side by side before they are summed
FARTHER = 2.**100  # what a place outside of a span counts: beyond `HIDDEN`, and exact in float32
CHUNKS = 64  # about as many at most, so that the graph of a long sequence stays small

_gather = ops.Gather()
_segment_sum = ops.UnsortedSegmentSum()
_slice = ops.Slice()
_bmm = ops.BatchMatMul()
_bmm_transpose_b = ops.BatchMatMul(transpose_b=True)
_relu = ops.ReLU()


def broadcasts():
    """Whether adding a row to each, or a number to each of a row, costs little."""
    return ms.get_context("device_target") != "CPU"


def key_heads(problem):
    """How many key heads differ in more than their tensors: in the bias of the heads that share them."""
    return max(1, problem.heads // problem.share)


def planned(problem):
    """The spans that blocks are planned for. Windows of documents start anew anywhere, so there each query gets a span
    of its own that holds them wherever they start; what of it is too much is hidden in the running graph."""
    if problem.documents == 0:
        return replace(problem.spec, prefix=0)
    backward, forward, _ = reach(problem)
    return WindowSpec(1, backward, forward, problem.spec.causal)


def schedule(problem):
    """The plan's runs, how many groups of keys are worked on together, and the steps of that: (run, queries, keys)."""
    runs = make_plan(planned(problem), problem.n_q, problem.n_k, problem.offset, problem.bias_period)
    budget = max(SCORES_AT_ONCE, sum(run.scores for run in runs) * problem.groups // CHUNKS)
    largest = max(run.visible.size for run in runs) * problem.share
    gathered = sum(run.keys.size for run in runs) * problem.head_dim
    alike = problem.groups // problem.share // key_heads(problem)  # groups of keys that share a bias
    entry = alike // max(1, problem.documents)  # of these those that share documents
    together = max(size for size in range(1, alike + 1)
                   if alike % size == 0 and (entry % size == 0 or size % entry == 0) and
                   (size == 1 or size * largest <= budget and size * gathered <= GATHERED_AT_ONCE))
    steps = []
    for number, run in enumerate(runs):
        blocks = max(1, budget // (together * run.visible.size * problem.share))
        steps += [(number, run.queries[start:start + blocks], run.keys[start:start + blocks])
                  for start in range(0, len(run.queries), blocks)]
    return runs, together, steps


class Step(NamedTuple):
    """Some blocks of a run, as one batched computation. An index of None takes the sequence as it stands."""
    run: int
    rows: int
    width: int
    queries: Optional[Tensor]
    keys: Optional[Tensor]
    columns: Optional[Tensor]  # hashes of the keys, where dropout needs them
    shift: int  # a block's first key as an offset from its first query, counted from the first that it sees


class Layout(nn.Cell):
    """The constants that a problem takes, and moves between orders: `together` groups of keys and one `Step` at a time.

    Queries of heads that share a key head are further rows of its blocks. What moves them are methods: of a function
    that has a branch and is called by a `construct` and by its `bprop`, a graph that is differentiated from outside of
    graphs loses one of the two ("get_return() is null"); of a Cell too that is called by its name.
    """

    def __init__(self, problem):
        super().__init__()
        self.problem, self.share, self.heads = problem, problem.share, key_heads(problem)
        self.softcap, self.dropout = problem.scoring.softcap, problem.scoring.dropout
        self.with_lse = problem.lse or problem.sinks > 0 or problem.spec.prefix > 0
        self.in_documents, self.broadcasts = problem.documents > 0, broadcasts()
        self.masked = problem.batch > 0 and not self.in_documents  # there the bounds of spans have a part in masks
        self.plus_row = ops.Add() if self.broadcasts else ops.BiasAdd()  # one row to each
        self.runs, self.together, steps = schedule(problem)
        self.steps = tuple(self._step(*step) for step in steps)
        self.parts = problem.groups // self.share // self.together
        self.entries = max(1, self.together * self.share * problem.documents // problem.groups)  # of a part
        sizes = [run.visible.size for run in self.runs]
        self.tile_ranges = tuple(zip(np.cumsum([0] + sizes).tolist(), sizes))
        self.masks = Tensor(np.concatenate([self._mask(run).reshape(-1) for run in self.runs])[None])

        order = np.concatenate([run.queries.reshape(-1) for run in self.runs])
        self.order = None if (np.diff(order) == 1).all() else _int32(np.argsort(order))
        keys = np.concatenate([run.keys.reshape(-1) for run in self.runs])
        self.scatter = None
        if len(keys) != problem.n_k or (keys != np.arange(problem.n_k)).any():
            self.scatter = _int32(np.arange(self.together)[:, None] * problem.n_k + keys)
        first, last = problem.spec.span(np.arange(problem.n_q) + problem.offset)
        first, after = np.clip(first, 0, problem.n_k), np.clip(last + 1, 0, problem.n_k)
        self.first, self.after, self.all_see_something = _int32(first), _int32(after), bool((first < after).all())
        self.positions = _int32(np.arange(problem.n_q) + problem.offset)
        self.after_each = _int32(np.arange(problem.n_k) + 1)
        if problem.bias_shape:
            self.bias_index = _int32(np.concatenate([
                problem.bias_index(run.queries[0][:, None] + problem.offset, run.keys[0]).reshape(-1)
                for run in self.runs]))
        if self.dropout > 0:  # in the order that a bias has groups in
            groups = np.arange(problem.groups).reshape(-1, self.heads, self.share).swapaxes(0, 1).reshape(-1)
            group, position = problem.origin
            queries = np.arange(problem.n_q) + problem.offset
            self.row_hash = Tensor(row_hash(groups + group, queries + position)[..., None])

    def _mask(self, run):
        mask = np.where(run.visible, 0, HIDDEN).astype(np.float32)
        if self.problem.scoring.hide_self:
            mask[run.queries[0][:, None] + self.problem.offset == run.keys[0]] += SELF_SCORE
        return mask

    def _step(self, number, queries, keys):
        problem = self.problem
        shift = int(keys[0, 0] - queries[0, 0]) - problem.offset + problem.spec.backward
        if not self.runs[number].visible.any():  # such a block gathers some key, whatever its offset
            shift = 0
        columns = None
        if self.dropout > 0:
            columns = Tensor(np.tile(column_hash(keys + problem.origin[1]), (self.together, 1))[:, None])
        return Step(number, queries.shape[1], keys.shape[1], None if queries.size == problem.n_q else _int32(queries),
                    None if len(keys) == 1 and keys.size == problem.n_k else _int32(keys), columns, shift)

    # ---- what documents hide: bounds of spans and places of keys, the two sides of a span one after the other

    def ends(self, low, high):
        """Bounds `(entries, n_q)` as `_hidden` takes them, `(2 * entries, n_q, 1 or 2)`."""
        if self.broadcasts:
            return ops.stack((low, high), 1).reshape(-1, self.problem.n_q, 1)
        low, high = ops.cast(low, ms.float32), ops.cast(high, ms.float32)
        ones = ops.ones_like(low)
        return ops.stack((ops.stack((low, ones), -1), ops.stack((ops.neg(high), ones), -1)), 1).reshape(
            -1, self.problem.n_q, 2)

    def places(self, mask):
        """Places of keys likewise, of a mask `(entries, n_k)`: a masked key is before them all."""
        place = ops.sub(ops.mul(ops.cast(mask, ms.int32), self.after_each), 1)
        if self.broadcasts:
            return ops.tile(ops.expand_dims(place, 1), (1, 2, 1)).reshape(-1, self.problem.n_k, 1)
        place = ops.mul(ops.cast(place, ms.float32), FARTHER)
        far = ops.mul(ops.ones_like(place), FARTHER)
        return ops.stack((ops.stack((far, ops.neg(place)), -1), ops.stack((far, place), -1)), 1).reshape(
            -1, self.problem.n_k, 2)

    def _of_entries(self, x, part):
        """Rows of the entries that a part is of."""
        entry = part * self.together * self.share * self.problem.documents // self.problem.groups
        return _slice(x, (2 * entry, 0, 0), (2 * self.entries, x.shape[1], x.shape[2]))

    def _hidden(self, ends, places, step):
        """0 where a query sees a key and far below any score where it does not, `(entries * blocks, rows * width)`."""
        ends, places = self._take(ends, step.queries, step.rows), self._take(places, step.keys, step.width)
        if self.broadcasts:
            ends = ends.reshape(self.entries, 2, -1, step.rows, 1)
            places = places.reshape(self.entries, 2, -1, 1, step.width)[:, 0]
            outside = ops.logical_or(ops.less(places, ends[:, 0]), ops.greater(places, ends[:, 1]))
            return ops.mul(ops.cast(outside, ms.float32), HIDDEN).reshape(-1, step.rows * step.width)
        outside = _relu(_bmm_transpose_b(ends, places)).reshape(self.entries, 2, -1)  # by how far, at each end
        both = ops.neg(ops.ones((self.entries, 1, 2), ms.float32))
        return _bmm(both, outside).reshape(-1, step.rows * step.width)

    # ---- orders

    def _part(self, x, part, share=1):
        """The groups that are worked on together as part number `part`."""
        if self.parts == 1:
            return x
        count = self.together * share
        return _slice(x, (part * count, 0, 0), (count, x.shape[1], x.shape[2]))

    def _queries(self, x, step):
        """Positions of queries as blocks of `share * rows`."""
        x = self._take(x, step.queries, step.rows)
        if self.share > 1:
            x = x.reshape(self.together, self.share, -1, step.rows * x.shape[-1]).swapaxes(1, 2)
            x = x.reshape(-1, self.share * step.rows, x.shape[-1] // step.rows)
        return x

    def _rows_back(self, x, step):
        """Those blocks back to positions, a row for each group."""
        last = x.shape[-1]
        if self.share > 1:
            x = x.reshape(self.together, -1, self.share, step.rows * last).swapaxes(1, 2)
        return x.reshape(self.together * self.share, -1, last)

    def _flat(self, x):
        """Blocks of keys back to positions, a row for each group."""
        return x.reshape(self.together, -1, x.shape[-1])

    def _in_order(self, parts):
        x = self._cat(parts, 1)
        return x if self.order is None else _gather(x, self.order, 1)

    def _scattered(self, parts):
        """The sum, for each key, over all the blocks that gathered it."""
        x = self._cat(parts, 1)
        if self.scatter is None:
            return x
        x = _segment_sum(x.reshape(-1, x.shape[-1]), self.scatter, self.together * self.problem.n_k)
        return self._flat(x)

    def _tiles(self, tiles, part):
        """What to add to a block's scores, for each run, by the heads that a part belongs to."""
        first = part * self.heads // self.parts * self.share
        found = []
        for start, size in self.tile_ranges:
            heads = []
            for head in range(first, first + self.share):
                heads.append(_slice(tiles, (head % self.problem.heads, start), (1, size)))
            found.append(self._cat(heads, 1).reshape(-1))
        return found

    def _tiles_grad(self, tiles, dtiles):
        """The sum over every step of a head's parts, run by run."""
        if self.problem.bias_shape is None:
            return ops.zeros(tiles.shape, ms.float32)
        heads = []
        for head in range(self.problem.heads):
            runs = []
            for number in range(len(self.runs)):
                size = self.tile_ranges[number][1]
                total = ops.zeros((1, size), ms.float32)
                for part in range(self.parts):
                    first = part * self.heads // self.parts * self.share
                    for index in range(len(self.steps)):
                        for place in range(self.share):
                            if (first + place) % self.problem.heads == head and self.steps[index].run == number:
                                total = ops.add(total, _slice(dtiles[part][index], (0, place * size), (1, size)))
                runs.append(total)
            heads.append(self._cat(runs, 1))
        return self._cat(heads, 0)

    def _rows(self, seed, part):
        if self.dropout == 0:
            return seed
        return seeded_rows(self._part(self.row_hash, part, self.share), seed)

    def _take(self, x, index, length):
        """Positions of each group by index, as blocks of `length`."""
        if index is not None:
            x = _gather(x, index, 1)
        return x.reshape(-1, length, x.shape[-1])

    def _cat(self, parts, axis):
        return parts[0] if len(parts) == 1 else ops.cat(parts, axis)


def _int32(index):
    return Tensor(np.asarray(index).reshape(-1).astype(np.int32))
