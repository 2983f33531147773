"""From positions to blocks and back: the constants of a problem's blocks, and the methods that reorder tensors."""
from dataclasses import replace
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ..plan import make_plan
from ..spec import WindowSpec
from . import portable
from .dropout import column_hash, row_hash, seeded_rows
from .spans import HIDDEN, SELF_SCORE, bias_entries, sees_something

SCORES_AT_ONCE = 2**21  # 8 MiB of float32: enough to keep a matmul busy, little compared with a long sequence
GATHERED_AT_ONCE = 2**24  # elements of gathered keys; all of their gradients exist before they are summed
FARTHER = 2.**100  # the cost of each place outside of a span: beyond `HIDDEN`, and exact in float32
CHUNKS = 64  # about the largest number of chunks, so that the graph of a long sequence stays small

_gather = ops.Gather()
_segment_sum = ops.UnsortedSegmentSum()
_slice = ops.Slice()
_bmm = ops.BatchMatMul()
_bmm_transpose_b = ops.BatchMatMul(transpose_b=True)
_relu = ops.ReLU()


def broadcasts(problem):
    """Whether broadcasting is cheap: adding a row to each row, or a number to each of a row."""
    return problem.device != "CPU"


def key_heads(problem):
    """Return how many key heads have query heads with different biases; 1 if all are alike."""
    return max(1, problem.heads // problem.per_key_head)


def planned(problem):
    """Return the spans that blocks are planned for. Windows of documents start anywhere. So with documents, each query
    gets a span of its own that contains its window wherever that starts; the running graph hides the rest."""
    if not problem.has("documents"):
        return replace(problem.spec, prefix=0)
    spec, forward = problem.spec, problem.spec.forward + problem.spec.bucket - 1
    return WindowSpec(1, spec.backward + spec.bucket - 1, min(forward, 0) if spec.causal else forward, spec.causal)


def schedule(problem):
    """Return the plan's runs, how many key groups are computed together, and their steps: (run, queries, keys)."""
    runs = make_plan(planned(problem), problem.n_q, problem.n_k, problem.offset, problem.bias_period)
    budget = max(SCORES_AT_ONCE, sum(run.scores for run in runs) * problem.groups // CHUNKS)
    largest = max(run.visible.size for run in runs) * problem.per_key_head
    gathered = sum(run.keys.size for run in runs) * problem.d
    alike = problem.groups // problem.per_key_head // key_heads(problem)  # groups of keys that share a bias
    entry = alike // max(1, problem.rows("documents"))  # those of them that share documents
    together = max(size for size in range(1, alike + 1)
                   if alike % size == 0 and (entry % size == 0 or size % entry == 0) and
                   (size == 1 or size * largest <= budget and size * gathered <= GATHERED_AT_ONCE))
    steps = []
    for number, run in enumerate(runs):
        blocks = max(1, budget // (together * run.visible.size * problem.per_key_head))
        steps += [(number, run.queries[start:start + blocks], run.keys[start:start + blocks])
                  for start in range(0, len(run.queries), blocks)]
    return runs, together, steps


class Step(NamedTuple):
    """Some blocks of a run, as one batched computation. An index of None takes the whole sequence, in order."""
    run: int
    rows: int
    width: int
    queries: Optional[Tensor]
    keys: Optional[Tensor]
    columns: Optional[Tensor]  # hashes of the keys, for dropout
    shift: int  # a block's first key as an offset from its first query, counted from the first that it sees


class Layout(nn.Cell):
    """The constants of a problem, and the methods that reorder: `together` groups of keys and one `Step` at a time.

    Queries of heads that share a key head are more rows of its blocks. The methods are no functions: if a function with
    a branch is called by a `construct` and by its `bprop`, a graph that is differentiated from outside of graphs loses
    one of the two ("get_return() is null"). So it does with a Cell that is called by its name.
    """

    def __init__(self, problem):
        super().__init__()
        self.problem, self.share, self.heads = problem, problem.per_key_head, key_heads(problem)
        self.softcap, self.dropout = problem.scoring.softcap, problem.scoring.dropout
        self.with_lse = (problem.frame.lse or problem.has("sinks") or problem.spec.prefix > 0
                         or problem.has("bias"))  # a bias may hide all that a query sees, which the lse shows
        self.in_documents, self.broadcasts = problem.has("documents"), broadcasts(problem)
        self.masked = problem.has("mask") and not self.in_documents  # with documents, masks depend on bounds
        self.plus_row = ops.Add() if self.broadcasts else ops.BiasAdd()  # adds one row to each
        self.runs, self.together, steps = schedule(problem)
        self.steps = tuple(self._step(*step) for step in steps)
        self.parts = problem.groups // self.share // self.together
        ends_with_query = problem.spec.causal and (problem.spec.forward >= 0 or problem.spec.bucket == 1)
        self.sides = 1 if ends_with_query else 2  # at which documents hide what `planned` shows
        self.entries = max(1, self.together * self.share * problem.rows("documents") // problem.groups)  # of a part
        self.parts_of_entry = max(1, self.parts // max(1, problem.rows("documents")))
        sizes = [run.visible.size for run in self.runs]
        self.tile_ranges = tuple(zip(np.cumsum([0] + sizes).tolist(), sizes))
        self.patterns = tuple(self._pattern(run) for run in self.runs)
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
        if problem.has("rel_pos_emb"):
            self.offsets = np.arange(-problem.spec.backward, max(1 + problem.spec.forward, 1 - problem.spec.backward))
            at = np.clip(self.offsets + problem.offset, 0, problem.n_k)
            after = np.clip(self.offsets + problem.offset + problem.n_q, 0, problem.n_k)
            after = np.where(problem.spec.causal & (self.offsets > 0), at, after)
            self.all_offsets_used = bool((at < after).all())
            self.offsets, self.offset_first, self.offset_after = _int32(self.offsets), _int32(at), _int32(after)
        if problem.has("bias"):
            self.bias_index = _int32(np.concatenate([
                problem.bias_index(run.queries[0][:, None] + problem.offset, run.keys[0]).reshape(-1)
                for run in self.runs]))
        if self.dropout > 0:  # in the order of groups that a bias needs
            groups = np.arange(problem.groups).reshape(-1, self.heads, self.share).swapaxes(0, 1).reshape(-1)
            group, position = problem.frame.origin
            queries = np.arange(problem.n_q) + problem.offset
            self.row_hash = Tensor(row_hash(groups + group, queries + position)[..., None])

    def tiles(self):
        """Return `masks`; in an export computed where it runs, because a file should hold no number for each score."""
        if not portable.exporting():
            return self.masks
        tiles = []
        for queries, first, last, keys in self.patterns:
            outside = ops.cast(ops.logical_or(ops.less(keys, first), ops.greater(keys, last)), ms.float32)
            tile = ops.mul(outside, HIDDEN)
            if self.problem.scoring.hide_self:
                tile = ops.add(tile, ops.mul(ops.cast(ops.equal(queries, keys), ms.float32), SELF_SCORE))
            tiles.append(tile.reshape(1, -1))
        return self._cat(tiles, 1)

    def bias_places(self):
        """Return `bias_index`, in an export likewise."""
        if not portable.exporting():
            return self.bias_index
        places = []
        for queries, _, _, keys in self.patterns:
            places.append(bias_entries(self.problem, queries, keys, 0).reshape(-1))
        return self._cat(places, 0)

    def _shifted(self, x, step):
        """Compute `_offsets_to_keys` of blocked.py, in an export: by an index instead of constants."""
        offsets = x.shape[-1]
        rows, columns = portable.arange(0, step.rows, 1)[:, None], portable.arange(0, step.width, 1)[None]
        index = ops.add(ops.mul(rows, offsets), portable.clamp(columns - rows + step.shift, 0, offsets - 1))
        return _gather(x.reshape(x.shape[0], -1), index.reshape(-1), 1).reshape(-1, step.rows, step.width)

    def _pattern(self, run):
        """Return positions of queries, the first and the last key of each, and keys, of a block."""
        positions = run.queries[0] + self.problem.offset
        columns = [_int32(x).reshape(-1, 1) for x in (positions, *planned(self.problem).span(positions))]
        return *columns, _int32(run.keys[0]).reshape(1, -1)

    def _mask(self, run):
        mask = np.where(run.visible, 0, HIDDEN).astype(np.float32)
        if self.problem.scoring.hide_self:
            mask[run.queries[0][:, None] + self.problem.offset == run.keys[0]] += SELF_SCORE
        return mask

    def _step(self, number, queries, keys):
        problem = self.problem
        shift = int(keys[0, 0] - queries[0, 0]) - problem.offset + problem.spec.backward
        if not self.runs[number].visible.any():  # such a block gathers any key, at any offset
            shift = 0
        columns = None
        if self.dropout > 0:
            columns = Tensor(np.tile(column_hash(keys + problem.frame.origin[1]), (self.together, 1))[:, None])
        return Step(number, queries.shape[1], keys.shape[1], None if queries.size == problem.n_q else _int32(queries),
                    None if len(keys) == 1 and keys.size == problem.n_k else _int32(keys), columns, shift)

    def used(self, emb, mask, low, high):
        """Return the embeddings with zeros for those that no query and real key have, whatever they hold. The spans of
        queries are given with documents."""
        if mask is None:
            if self.all_offsets_used:
                return emb
            used = ops.less(self.offset_first, self.offset_after)
        else:
            used = sees_something(mask, self.offset_first, self.offset_after)
            used = ops.greater(ops.amax(ops.cast(used, ms.float32), 0), 0.)
        if low is not None:
            before = ops.amax(ops.cast(ops.sub(self.positions, low), ms.float32))
            after = ops.amax(ops.cast(ops.sub(high, self.positions), ms.float32))
            offsets = ops.cast(self.offsets, ms.float32)
            used = ops.logical_and(used, ops.logical_and(offsets >= ops.neg(before), offsets <= after))
        return portable.masked_fill(emb, ops.expand_dims(portable.logical_not(used), 1), 0.)

    # ---- what documents hide: bounds of spans against places of keys, at one side of the span or at both

    def ends(self, low, high):
        """Bounds `(entries, n_q)` as `_hidden` takes them, `(sides * entries, n_q, 1 or 2)`."""
        if self.broadcasts:
            return self._sides(ops.expand_dims(low, -1), ops.expand_dims(high, -1))
        low, high = ops.cast(low, ms.float32), ops.cast(high, ms.float32)
        return self._sides(ops.stack((low, ops.ones_like(low)), -1), ops.stack((ops.neg(high), ops.ones_like(low)), -1))

    def places(self, mask):
        """Return places of keys in that form, for a mask `(entries, n_k)`: a masked key is before all others."""
        place = ops.sub(ops.mul(ops.cast(mask, ms.int32), self.after_each), 1)
        if self.broadcasts:
            return self._sides(ops.expand_dims(place, -1), ops.expand_dims(place, -1))
        place = ops.mul(ops.cast(place, ms.float32), FARTHER)
        far = ops.mul(ops.ones_like(place), FARTHER)
        return self._sides(ops.stack((far, ops.neg(place)), -1), ops.stack((far, place), -1))

    def _sides(self, before, after):
        if self.sides == 1:
            return before
        return ops.stack((before, after), 1).reshape(-1, before.shape[1], before.shape[2])

    def _of_entries(self, x, part):
        """Return the rows of the entries that a part belongs to."""
        entry = part * self.together * self.share * self.problem.rows("documents") // self.problem.groups
        return _slice(x, (self.sides * entry, 0, 0), (self.sides * self.entries, x.shape[1], x.shape[2]))

    def _hidden(self, ends, places, step):
        """Return 0 for keys that a query sees, else less than any score, `(entries * blocks, rows * width)`."""
        ends, places = self._take(ends, step.queries, step.rows), self._take(places, step.keys, step.width)
        if self.broadcasts:
            ends = ends.reshape(self.entries, self.sides, -1, step.rows, 1)
            places = places.reshape(self.entries, self.sides, -1, 1, step.width)[:, 0]
            outside = ops.less(places, ends[:, 0])
            if self.sides == 2:
                outside = ops.logical_or(outside, ops.greater(places, ends[:, 1]))
            return ops.mul(ops.cast(outside, ms.float32), HIDDEN).reshape(-1, step.rows * step.width)
        outside = _relu(_bmm_transpose_b(ends, places))  # by how far
        if self.sides == 1:
            return ops.neg(outside).reshape(-1, step.rows * step.width)
        outside = outside.reshape(self.entries, 2, -1)
        return _bmm(ops.neg(ops.ones((self.entries, 1, 2), ms.float32)), outside).reshape(-1, step.rows * step.width)

    # ---- reordering

    def _part(self, x, part, share=1):
        """Return the groups of part number `part`, which are computed together."""
        if self.parts == 1:
            return x
        count = self.together * share
        return _slice(x, (part * count, 0, 0), (count, x.shape[1], x.shape[2]))

    def _queries(self, x, step):
        """Turn positions of queries into blocks of `share * rows`."""
        x = self._take(x, step.queries, step.rows)
        if self.share > 1:
            x = x.reshape(self.together, self.share, -1, step.rows * x.shape[-1]).swapaxes(1, 2)
            x = x.reshape(-1, self.share * step.rows, x.shape[-1] // step.rows)
        return x

    def _rows_back(self, x, step):
        """Turn such blocks back into positions, a row for each group."""
        last = x.shape[-1]
        if self.share > 1:
            x = x.reshape(self.together, -1, self.share, step.rows * last).swapaxes(1, 2)
        return x.reshape(self.together * self.share, -1, last)

    def _flat(self, x):
        """Turn blocks of keys back into positions, a row for each group."""
        return x.reshape(self.together, -1, x.shape[-1])

    def _in_order(self, parts):
        x = self._cat(parts, 1)
        return x if self.order is None else _gather(x, self.order, 1)

    def _scattered(self, parts):
        """Return the sum, for each key, over all the blocks that gathered it."""
        x = self._cat(parts, 1)
        if self.scatter is None:
            return x
        x = _segment_sum(x.reshape(-1, x.shape[-1]), self.scatter, self.together * self.problem.n_k)
        return self._flat(x)

    def _tiles(self, tiles, part):
        """Return what to add to a block's scores, for each run, for the heads of a part."""
        first = part * self.heads // self.parts * self.share
        found = []
        for start, size in self.tile_ranges:
            heads = []
            for head in range(first, first + self.share):
                heads.append(_slice(tiles, (head % self.problem.heads, start), (1, size)))
            found.append(self._cat(heads, 1).reshape(-1))
        return found

    def _tiles_grad(self, tiles, dtiles):
        """Return the sum over every step of a head's parts, run by run."""
        if not self.problem.has("bias"):
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
        """Take positions of each group by index, as blocks of `length`."""
        if index is not None:
            x = _gather(x, index, 1)
        return x.reshape(-1, length, x.shape[-1])

    def _cat(self, parts, axis):
        return parts[0] if len(parts) == 1 else ops.cat(parts, axis)


def _int32(index):
    return Tensor(np.asarray(index).reshape(-1).astype(np.int32))
