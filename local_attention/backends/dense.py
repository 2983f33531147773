"""Attention by its definition: compute every score, hide the invisible ones. O(n²). The reference of other backends."""
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from . import PLAIN, Backend, portable
from .dropout import keep_factors, seeded_rows
from .spans import (FAINT, SELF_SCORE, bias_at, bias_entries, bounds_of, capped, hashes, in_order, in_prefix,
                    offset_products, softened, spans, with_sinks, without_padding)


def why_not(problem):
    """Return why it cannot run a problem, None if it can: everything but lengths that a graph does not know."""
    return "needs lengths that are known where a graph is compiled" if problem.any_length else None


def scores(problem):
    """Return how many scores are computed in all, and how many at once."""
    return (problem.groups * problem.n_q * problem.n_k,) * 2


def prepare(problem):
    """Return the problem and its constants: positions, visible keys, own keys, indices of bias and offsets, and hashes.

    A plain tuple, because a graph forgets the field names of a NamedTuple that is passed to a Cell.
    """
    queries, keys = np.arange(problem.n_q)[:, None] + problem.offset, np.arange(problem.n_k)
    return (problem, Tensor(queries[None].astype(np.int32)), Tensor(keys[None, None].astype(np.int32)),
            Tensor(problem.spec.visible(queries[:, 0], keys)[None].astype(np.float32)),
            Tensor((queries == keys)[None]),
            Tensor(problem.bias_index(queries, keys)[None]) if problem.has("bias") else None,
            _offset_index(problem, queries, keys) if problem.has("rel_pos_emb") else None,
            *(hashes(problem) if problem.scoring.dropout > 0 else (None, None)))


def _offset_index(problem, queries, keys):
    """Return, for each query and key, the index of theirs among a head's scores of every query and offset."""
    offsets = problem.spec.backward + 1 + problem.spec.forward
    row = np.clip(keys - queries + problem.spec.backward, 0, offsets - 1)
    return Tensor((queries - problem.offset) * offsets + row)


def _offset_places(queries, keys, spec):
    """Compute `_offset_index` on tensors; both count from the first query."""
    offsets = spec.backward + 1 + spec.forward
    return (queries * offsets + portable.clamp(keys - queries + spec.backward, 0, offsets - 1))[0]


def run(constants, q, k, v, tensors):
    """Compute `out[i] = sum_j softmax_j(score of q[i], k[j]) * v[j]` over the keys `j` that query `i` sees."""
    problem, queries, keys, seen, is_self, bias_index, offset_index, rows, columns = constants
    mask, documents, order, bias = tensors["mask"], tensors["documents"], tensors["order"], tensors["bias"]
    spec, scoring, asks = problem.spec, problem.scoring, tensors["rel_pos_query"]
    first, last, spans_are_made = 0, problem.n_k - 1, documents is not None or portable.exporting()
    if documents is not None:
        if asks is not None:
            asks, _ = without_padding(asks, mask, documents, problem.offset)
        q, mask = without_padding(q, mask, documents, problem.offset)
        first, last = bounds_of(documents, queries.reshape(-1))
        first, last = first.expand_dims(-1), last.expand_dims(-1)
    if spans_are_made:  # a file should hold no number for each pair
        low, high = spans(spec, queries, first, last)
        seen = ops.logical_and(keys >= low, keys <= high)
        if spec.prefix > 0:
            seen = ops.logical_or(seen, in_prefix(spec, queries, keys, first, last))
    if order is not None:
        seen = in_order(seen if spans_are_made else seen > 0, order, queries.reshape(-1), keys.reshape(-1))
    if spans_are_made or order is not None:
        seen = _per_group(ops.cast(seen, ms.float32), problem.groups)
    if mask is not None:
        real = ops.cast(mask, ms.float32).reshape(-1, 1, problem.n_k)
        hidden = _per_group(real, k.shape[0]).swapaxes(1, 2) == 0
        k, v = portable.masked_fill(k, hidden, 0.), portable.masked_fill(v, hidden, 0.)
        seen = seen * _per_group(real, problem.groups)
    shape = (problem.groups, problem.n_q, problem.n_k)
    scores = capped(_by_key_head(q * scoring.scale, problem), k, scoring.softcap).reshape(shape)
    if bias is not None:
        if spans_are_made:  # each batch entry has its own
            bias_index = bias_entries(problem, queries, keys, first, queries - problem.offset)
        bias = bias_at(bias, bias_index.reshape(bias_index.shape[0], -1)).expand_dims(1)
        scores = scores.reshape(bias.shape[0], -1, bias.shape[2], problem.n_q * problem.n_k)
        scores = (scores + bias).reshape(shape)
    if tensors["rel_pos_emb"] is not None:
        asks = q if asks is None else asks
        by_offset = offset_products(asks, tensors["rel_pos_emb"]).reshape(problem.groups, -1)
        if portable.exporting():
            offset_index = _offset_places(queries - problem.offset, keys - problem.offset, spec)
        scores = scores + ops.gather(by_offset, offset_index, 1)
    if scoring.hide_self:
        if portable.exporting():
            is_self = ops.equal(queries, keys)
        scores = portable.masked_fill(scores, ops.logical_and(is_self, scores > FAINT), SELF_SCORE)
    weights, lse = softened(scores, seen)
    if scoring.dropout > 0:
        weights = weights * keep_factors(seeded_rows(rows, tensors["seed"]), columns, scoring.dropout)
    out = ops.bmm(_by_key_head(weights, problem), v).reshape(problem.groups, problem.n_q, -1)
    return (out, lse) if tensors["sinks"] is None else with_sinks(problem, out, lse, tensors["sinks"])


def _by_key_head(x, problem):
    """Turn the heads that share a key head into more rows: `(groups / share, share * n_q, ...)`."""
    return x.reshape(problem.groups // problem.per_key_head, -1, x.shape[2])


def _per_group(x, groups):
    """Repeat `(batch, rows, columns)` as `(groups, rows, columns)`."""
    return ops.tile(x[:, None], (1, groups // x.shape[0], 1, 1)).reshape(groups, *x.shape[1:])


DENSE = Backend(
    "dense", PLAIN, why_not, scores, prepare, run, shielded=True, twice=True)
