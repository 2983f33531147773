"""Blocks of queries against the keys that they can see, by MindSpore's own operators: on CPU, GPU and Ascend.

Memory is linear in the sequence: the forward pass keeps its inputs and its output, and the backward pass computes the
weights of each block again. On CPU, broadcasting is slow and matrix products are fast. So there, two things are part of
the products. The key mask is one more entry of every key, multiplied by a 1 in every query. The row sums that the
gradient of softmax subtracts are one more entry of `dout`, multiplied by a 1 in every value. On GPU and Ascend,
broadcasting is cheap and dimensions should be multiples of 16, so there both are added (`broadcasts`).
"""
import mindspore as ms
from mindspore import ops

from ..cells import InFloat32, compiling, given
from . import PLAIN, Backend, any_length, portable
from .blocks import Layout, key_heads, schedule
from .dropout import keep_factors
from .spans import FAINT, HIDDEN, bounds_of, finished, merge_masks, real, repeated, sees_something, spans, tanh

_bmm = ops.BatchMatMul()
_bmm_transpose_a = ops.BatchMatMul(transpose_a=True)
_bmm_transpose_b = ops.BatchMatMul(transpose_b=True)
_matmul = ops.MatMul()
_matmul_transpose_a = ops.MatMul(transpose_a=True)
_matmul_transpose_b = ops.MatMul(transpose_b=True)
_softmax = ops.Softmax(-1)
_gather = ops.Gather()
_slice = ops.Slice()
_concat = ops.Concat(-1)


def why_not(problem):
    """Return why it cannot run a problem, None if it can."""
    return "plans blocks by lengths, which a graph does not know here" if problem.any_length else None


def scores(problem):
    """Return how many scores are computed in all, and how many at once."""
    if without_plan(problem):
        return any_length.scores(problem)
    runs, together, steps = schedule(problem)
    return (problem.groups * (sum(run.scores for run in runs) + problem.n_q * problem.spec.prefix),
            together * problem.per_key_head * max(queries.size * keys.shape[1] for _, queries, keys in steps))


def without_plan(problem):
    """Whether `any_length` runs it, since what is added to scores differs from block to block."""
    return (problem.has("documents") and problem.has("bias") or problem.bias_rows or problem.has("order")
            or problem.has("rel_pos_query"))


def prepare(problem):
    """Return the problem, and the Cell with its constants and the one that gives its result gradients in a graph, or
    the constants of `any_length`."""
    if without_plan(problem):
        return problem, None, None, any_length.prepare(problem)
    blocks = Blocks(problem)
    return problem, blocks, Linked(blocks), None


def run(constants, q, k, v, tensors):
    """Run the blocks, and around them the steps that are cheap enough for automatic differentiation."""
    problem, blocks, linked, others = constants
    if blocks is None:
        return any_length.run(others, q, k, v, tensors)
    mask, documents, bias = tensors["mask"], tensors["documents"], tensors["bias"]
    low, high = None, None
    tiles, emb, veil = blocks.tiles(), ops.zeros((1, q.shape[-1]), ms.float32), ops.zeros((1,), ms.float32)
    ends, places, first, after = veil, veil, blocks.first, blocks.after
    if documents is not None:
        queries = documents[:, problem.offset:problem.offset + problem.n_q]
        q = _zeroed(q, _everywhere(repeated(portable.logical_not(real(queries)), q.shape[0]), q))
        mask = merge_masks(mask, real(documents))
        low, high = spans(problem.spec, blocks.positions, *bounds_of(documents, blocks.positions))
        ends, places = blocks.ends(low, high), blocks.places(mask)
        first, after = low, portable.maximum(ops.add(high, 1), low)
    if mask is not None:  # masked keys become zeros, whatever they hold, and get a score that hides them
        hidden = repeated(portable.logical_not(mask), k.shape[0])
        everywhere = _everywhere(hidden, k)
        k, v = _zeroed(k, everywhere), _zeroed(v, everywhere if v.shape == k.shape else _everywhere(hidden, v))
    if tensors["rel_pos_emb"] is None:
        block_q, block_k, block_v = ops.mul(q, problem.scoring.scale), k, v
    else:  # they meet the queries without a scale
        block_q, block_k, block_v = q, ops.mul(k, problem.scoring.scale), v
        emb = blocks.used(tensors["rel_pos_emb"], mask, low, high)
    if mask is not None and blocks.masked:
        hidden = repeated(portable.logical_not(mask), k.shape[0])
        veil = ops.mul(ops.cast(hidden, ms.float32), HIDDEN)
        if not blocks.broadcasts:
            block_q = ops.cat((block_q, ops.ones(q.shape[:-1] + (1,), ms.float32)), -1)
            block_k = ops.cat((block_k, veil), -1)
            emb = ops.cat((emb, ops.zeros((emb.shape[0], 1), ms.float32)), -1)
    by_head = key_heads(problem)
    if bias is not None:
        bias = _gather(bias.reshape(problem.heads, -1), blocks.bias_places(), 1)
        tiles = blocks.plus_row(bias, tiles.reshape(-1))
        outer = k.shape[0] // by_head
        block_q, block_k = _swap(block_q, outer, by_head), _swap(block_k, outer, by_head)
        block_v = _swap(block_v, outer, by_head)
        if blocks.masked:
            veil = _swap(veil, outer, by_head)
    ends, places, seed = ops.stop_gradient(ends), ops.stop_gradient(places), given(tensors["seed"], ms.int32)
    out, lse = blocks(block_q, block_k, block_v, tiles, emb, veil, ends, places, seed)
    if compiling():
        out, lse = linked(block_q, block_k, block_v, tiles, emb, veil, ends, places, seed, ops.stop_gradient(out),
                          ops.stop_gradient(lse))
    if bias is not None:
        out = _swap(out, by_head, k.shape[0] // by_head)
        lse = _swap(lse, by_head, k.shape[0] // by_head)
    seen = None
    if blocks.with_lse:
        seen = ops.cast(ops.greater(lse, FAINT), ms.float32)
    elif mask is not None:
        seen = sees_something(mask, first, after)
        seen = repeated(ops.cast(seen, ms.float32), problem.groups)
    elif not blocks.all_see_something:
        seen = ops.cast(blocks.first < blocks.after, ms.float32).reshape(1, -1, 1)
    if seen is not None:
        out = _times(out, ops.stop_gradient(seen))
    if not blocks.with_lse:
        return out, None
    lse = portable.masked_fill(lse, seen == 0, float("-inf"))
    return finished(problem, q, k, v, out, lse[..., 0], mask, tensors)


class _Zeroed(InFloat32):
    """Zeros where something is hidden, by a mask of the same shape: to broadcast one, CPU keeps 16 bytes a number.
    MindSpore's own gradient has one of the zero, too."""

    def construct(self, x, hidden):
        return portable.masked_fill(x, hidden, 0.)

    def bprop(self, x, hidden, out, dout):
        return ops.masked_fill(dout, hidden, 0.), hidden


class _Times(InFloat32):
    """A product with what has no gradient."""

    def construct(self, x, factor):
        return ops.mul(x, factor)

    def bprop(self, x, factor, out, dout):
        return ops.mul(dout, factor), factor


_zeroed, _times = _Zeroed(), _Times()


def _everywhere(hidden, x):
    # without a gradient: to k's would be added v's, and GPU adds no bool
    return ops.stop_gradient(ops.tile(hidden, (1, 1, x.shape[-1])))


def _swap(x, outer, inner):
    """Reorder groups from (outer, inner, ...) to (inner, outer, ...)."""
    return x.reshape(outer, inner, -1).swapaxes(0, 1).reshape(x.shape)


class Blocks(Layout):
    """Attention of queries to keys, one of them scaled, one `Step` at a time. The log-sum-exp is computed only if it is
    needed."""

    def construct(self, q, k, v, tiles, emb, veil, ends, places, seed):
        outs, lses, added = [], [], []
        for part in range(self.parts):
            added = self._added(added, self._tiles(tiles, part), ends, places, part)
            rows = self._rows(seed, part)
            part_q, part_k, part_v = self._part(q, part, self.share), self._part(k, part), self._part(v, part)
            out, lse = [], []
            for index in range(len(self.steps)):
                step, row = self.steps[index], added[index]
                query, key = self._queries(part_q, step), self._take(part_k, step.keys, step.width)
                scores, _ = self._scores(step, query, key, row, emb, self._veil(veil, part, step))
                weights = _softmax(scores)
                if self.with_lse:
                    lse.append(self._rows_back(_largest(scores) - ops.log(_largest(weights)), step))
                if self.dropout > 0:
                    weights = ops.mul(weights, self._keep(step, rows))
                out.append(self._rows_back(_bmm(weights, self._take(part_v, step.keys, step.width)), step))
            outs.append(self._in_order(out))
            if self.with_lse:
                lses.append(self._in_order(lse))
        return self._cat(outs, 0), self._cat(lses, 0) if self.with_lse else ops.zeros((1,), ms.float32)

    def bprop(self, q, k, v, tiles, emb, veil, ends, places, seed, out, dout):
        return self.gradients(q, k, v, tiles, emb, veil, ends, places, seed, out[0], dout[0], dout[1])

    def gradients(self, q, k, v, tiles, emb, veil, ends, places, seed, out, dout, dlse):
        problem = self.problem
        row_sums = ops.matmul(ops.mul(out, dout), ops.neg(ops.ones((v.shape[-1], 1), ms.float32)))
        if self.with_lse:
            row_sums = ops.add(row_sums, dlse)
        if not self.broadcasts:
            dout, v = ops.cat((dout, row_sums), -1), ops.cat((v, ops.ones(v.shape[:-1] + (1,), ms.float32)), -1)
        dqs, dks, dvs, dtiles, added = [], [], [], [], []
        demb = ops.zeros(emb.shape, ms.float32)
        for part in range(self.parts):
            added = self._added(added, self._tiles(tiles, part), ends, places, part)
            rows = self._rows(seed, part)
            part_q, part_k, part_v = self._part(q, part, self.share), self._part(k, part), self._part(v, part)
            part_dout = self._part(dout, part, self.share)
            dq, dk, dv, dtile = [], [], [], []
            for index in range(len(self.steps)):
                step, row = self.steps[index], added[index]
                query, key = self._queries(part_q, step), self._take(part_k, step.keys, step.width)
                grad, value = self._queries(part_dout, step), self._take(part_v, step.keys, step.width)
                scores, slope = self._scores(step, query, key, row, emb, self._veil(veil, part, step))
                weights = _softmax(scores)
                dweights = _bmm_transpose_b(grad, value)
                keep = self._keep(step, rows) if self.dropout > 0 else None
                if self.broadcasts:
                    sums = self._queries(self._part(row_sums, part, self.share), step)
                    dweights = ops.add(dweights if keep is None else ops.mul(keep, dweights), sums)
                elif keep is not None:
                    only_sums = ops.cat((ops.zeros(value.shape[:-1] + (out.shape[-1],), ms.float32),
                                         ops.ones(value.shape[:-1] + (1,), ms.float32)), -1)
                    sums = _bmm_transpose_b(grad, only_sums)
                    dweights = ops.add(ops.mul(keep, ops.sub(dweights, sums)), sums)
                dscores = ops.mul(weights, dweights)
                if keep is not None:
                    weights = ops.mul(weights, keep)
                dproducts = dscores if self.softcap is None else ops.mul(dscores, slope)
                dquery = _bmm(dproducts, key)
                if problem.has("rel_pos_emb"):
                    by_offset = _keys_to_offsets(self._by_head(dscores, step), step, emb.shape[0])
                    by_offset = by_offset.reshape(-1, emb.shape[0])
                    dquery = ops.add(dquery, _matmul(by_offset, emb).reshape(dquery.shape))
                    demb = ops.add(demb, _matmul_transpose_a(by_offset, query.reshape(-1, query.shape[-1])))
                dq.append(self._rows_back(dquery, step))
                dk.append(self._flat(_bmm_transpose_a(dproducts, query)))
                dv.append(self._flat(_bmm_transpose_a(weights, grad)))
                if problem.has("bias"):
                    dscores = dscores.reshape(-1, self.share * step.rows * step.width)
                    dtile.append(ops.matmul(ops.ones((1, dscores.shape[0]), ms.float32), dscores))
            dqs.append(self._in_order(dq))
            dks.append(self._scattered(dk))
            dvs.append(self._scattered(dv))
            dtiles.append(dtile)
        dv = self._cat(dvs, 0)
        return (self._cat(dqs, 0), self._cat(dks, 0), dv if self.broadcasts else dv[..., :-1],
                self._tiles_grad(tiles, dtiles), demb, veil, ends, places, seed)

    def _added(self, known, tile, ends, places, part):
        """What to add to scores, for each step: one row to all its blocks, or, in documents, to each of an entry's
        blocks its own. These are made once for the parts of an entry: `known` are those of the part before."""
        if not self.in_documents:
            return [tile[step.run] for step in self.steps]
        if part % self.parts_of_entry > 0:
            return known
        ends, places = self._of_entries(ends, part), self._of_entries(places, part)
        found = []
        for step in self.steps:
            row = self._hidden(ends, places, step)
            if self.share > 1:
                row = ops.cat((row,) * self.share, -1)
            found.append(self.plus_row(row, tile[step.run]))
        return found

    def _veil(self, veil, part, step):
        """Return what hides the masked keys of a step's blocks, `(blocks, 1, width)`, if it is added to scores."""
        if not (self.masked and self.broadcasts):
            return None
        return self._take(self._part(veil, part), step.keys, step.width).reshape(-1, 1, step.width)

    def _scores(self, step, query, key, row, emb, veil):
        """Return scores `(blocks, share * rows, width)`, and their derivative by the products, None if it is 1."""
        slope = None
        if self.softcap is None:
            scores = _bmm_transpose_b(query, key)
        elif self.masked and not self.broadcasts:  # the score that hides a key is not capped
            d = self.problem.d
            share = tanh(ops.mul(_bmm_transpose_b(query[..., :d], key[..., :d]), 1 / self.softcap))
            slope = ops.sub(1., ops.square(share))
            scores = ops.add(ops.mul(share, self.softcap), _bmm_transpose_b(query[..., d:], key[..., d:]))
        else:
            share = tanh(ops.mul(_bmm_transpose_b(query, key), 1 / self.softcap))
            slope, scores = ops.sub(1., ops.square(share)), ops.mul(share, self.softcap)
        if self.problem.has("rel_pos_emb"):
            by_offset = _matmul_transpose_b(query.reshape(-1, query.shape[-1]), emb)
            by_offset = by_offset.reshape(-1, step.rows, emb.shape[0])
            by_offset = self._shifted(by_offset, step) if portable.exporting() else _offsets_to_keys(by_offset, step)
            scores = ops.add(scores, by_offset.reshape(scores.shape))
        scores = self._plus(scores, row)
        return scores if veil is None else ops.add(scores, veil), slope

    def _plus(self, scores, row):
        """Add a row to each block or, with documents, to each group the row of its entry."""
        if not self.in_documents:
            return self.plus_row(scores.reshape(scores.shape[0], -1), row).reshape(scores.shape)
        by_group = scores.reshape(self.together, -1)
        if self.entries == 1:
            return self.plus_row(by_group, row.reshape(-1)).reshape(scores.shape)
        row = ops.tile(row.reshape(self.entries, 1, -1), (1, self.together // self.entries, 1))
        return ops.add(by_group, row.reshape(by_group.shape)).reshape(scores.shape)

    def _by_head(self, x, step):
        """Turn the rows of heads that share a key head into blocks of their own."""
        return x.reshape(-1, step.rows, x.shape[-1])

    def _keep(self, step, rows):
        """Return the dropout factors `(blocks, share * rows, width)`."""
        return keep_factors(self._queries(rows, step), step.columns, self.dropout)


class Linked(InFloat32):
    """Gives the output and the log-sum-exp of `Blocks` their gradients (see `cells.compiling`)."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def construct(self, q, k, v, tiles, emb, veil, ends, places, seed, out, lse):
        return out, lse

    def bprop(self, q, k, v, tiles, emb, veil, ends, places, seed, out, lse, outs, dout):
        return self.blocks.gradients(q, k, v, tiles, emb, veil, ends, places, seed, out, dout[0], dout[1]) + (out, lse)


def _offsets_to_keys(x, step):
    """Turn scores `(blocks, rows, offsets)` into `(blocks, rows, width)`: each row moves one place further than the
    last.

    If a matrix is read with rows one shorter than they were written, each row moves by one more place: no index is
    needed.
    """
    blocks, rows, offsets = x.shape
    x = _concat((x, ops.zeros((blocks, rows, rows), ms.float32))).reshape(blocks, -1)
    x = _slice(x, (0, 0), (blocks, x.shape[1] - rows)).reshape(blocks, rows, offsets + rows - 1)
    return _slice(x, (0, 0, step.shift), (blocks, rows, step.width))


def _keys_to_offsets(x, step, offsets):
    """Compute the transpose of `_offsets_to_keys`."""
    blocks, rows, width = x.shape
    after = offsets + rows - 1 - step.shift - width
    if step.shift > 0:
        x = _concat((ops.zeros((blocks, rows, step.shift), ms.float32), x))
    if after > 0:
        x = _concat((x, ops.zeros((blocks, rows, after), ms.float32)))
    x = _concat((x.reshape(blocks, -1), ops.zeros((blocks, rows), ms.float32))).reshape(blocks, rows, offsets + rows)
    return _slice(x, (0, 0, 0), (blocks, rows, offsets))


def _largest(x):
    return ops.amax(x, -1, keepdims=True)



BLOCKED = Backend(
    "blocked", PLAIN, why_not, scores, prepare, run, shielded=True)
