"""Blocks of queries by plain operators and without a plan, for lengths that a graph does not know.

All blocks have one size, and each has its own keys. The running graph computes the masks. The weights of all blocks are
kept for the backward pass: memory is linear in the sequence, but grows with the span.
"""
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from . import PLAIN, Backend, portable
from .dropout import keep_factors, seeded_rows
from .spans import (FAINT, SELF_SCORE, bias_at, bias_entries, bounds_of, capped, finished, hashes, in_order, in_span,
                    offset_products, reach, repeated, softened, without_padding)

ROWS = 128  # the smallest number of queries in a block
WIDEST = 2**16  # a span that reaches farther, before and after together, makes one block with all keys


@constexpr
def unknown(shape):
    """Whether a shape has an axis that is unknown when a graph is compiled."""
    return None in shape


def why_not(problem):
    """Return why it cannot run a problem, None if it can."""
    if not problem.any_length:
        return "is for lengths that are not known where a graph is compiled"
    if problem.scoring.dropout > 0:
        return "drops no weights of a sequence whose length a graph does not know"
    return None


def layout(problem):
    """Return the number of queries in a block, the place of its first key relative to its first query, its number of
    keys, and the number that its start is a multiple of; None if all keys are in one block."""
    backward, forward, unit = reach(problem)
    if problem.n_k is not None:
        backward, forward = min(backward, problem.n_k), min(forward, problem.n_k)
    if max(backward + forward, unit) > WIDEST:
        return None
    rows = unit * max(1, max(ROWS, (backward + problem.spec.bucket + forward) // 2) // unit)
    return rows, -backward, rows + backward + forward, unit


def scores(problem):
    """Return how many scores are computed in all, and how many at once."""
    whole = layout(problem)
    if whole is None:
        return (problem.groups * problem.n_q * problem.n_k,) * 2
    rows, _, width, unit = whole
    blocks = -(-(problem.offset % unit + problem.n_q) // rows)
    return (problem.groups * blocks * rows * (width + problem.spec.prefix),) * 2


def prepare(problem):
    """Return the problem, a block's size, and the places of its queries and keys relative to its start."""
    found = layout(problem)
    if found is None:
        return problem, None, None, None, None
    rows, first, width, unit = found
    return problem, rows, unit, _int32(np.arange(rows)), _int32(np.arange(width) + first)


def _int32(index):
    return Tensor(index.astype(np.int32))


def run(constants, q, k, v, tensors):
    """Compute every block against its keys, then add the prefix and the sinks."""
    problem, rows, unit, queries, keys = constants
    mask, documents, bias = tensors["mask"], tensors["documents"], tensors["bias"]
    rel_pos_emb, asks = tensors["rel_pos_emb"], tensors["rel_pos_query"]
    spec, scoring, share, head_dim = problem.spec, problem.scoring, problem.per_key_head, problem.d
    v_width = v.shape[-1]
    n_q, n_k, key_groups = q.shape[1], k.shape[1], k.shape[0]
    groups = key_groups * share
    offset = n_k - n_q if problem.offset is None else problem.offset
    if documents is not None:
        if asks is not None:
            asks, _ = without_padding(asks, mask, documents, offset)
        q, mask = without_padding(q, mask, documents, offset)
    if mask is not None:
        hidden = repeated(portable.logical_not(mask), key_groups)
        k, v = portable.masked_fill(k, hidden, 0.), portable.masked_fill(v, hidden, 0.)

    base = 0
    if rows is None:
        rows, blocks = offset + n_q, 1
        queries, keys = portable.arange(0, offset + n_q, 1), portable.arange(0, n_k, 1)
    else:
        base = offset // unit * unit
        blocks = (offset - base + n_q + rows - 1) // rows
    starts = base + portable.arange(0, blocks * rows, rows).reshape(-1, 1)
    positions, places = starts + queries[None], starts + keys[None]  # (blocks, rows) and (blocks, width)
    width = keys.shape[0]
    taken = portable.clamp(positions - offset, 0, n_q - 1).reshape(-1)
    key_index = portable.clamp(places, 0, n_k - 1).reshape(-1)

    first, last = 0, n_k - 1
    if documents is not None:
        first, last = bounds_of(documents, portable.clamp(positions, 0, n_k - 1).reshape(-1))
        first, last = first.reshape(-1, blocks, rows), last.reshape(-1, blocks, rows)
    seen = in_span(spec, positions[None], places[None, :, None], first, last)
    if tensors["order"] is not None:
        seen = in_order(seen, tensors["order"], portable.clamp(positions, 0, n_k - 1),
                        portable.clamp(places, 0, n_k - 1))
    if mask is not None:
        seen = ops.logical_and(seen, ops.gather(mask, key_index, 1).reshape(-1, blocks, 1, width))
    seen = ops.cast(seen, ms.float32)  # (batch, blocks, rows, width)

    blocked_q = _blocked(q, taken, share, blocks)
    blocked_k = ops.gather(k, key_index, 1).reshape(-1, width, head_dim)
    blocked_v = ops.gather(v, key_index, 1).reshape(-1, width, v_width)
    scores = capped(blocked_q * scoring.scale, blocked_k, scoring.softcap)
    if bias is not None:
        scores = _with_bias(problem, scores, bias, queries, keys, positions, places, first, offset)
    if rel_pos_emb is not None:
        offsets = rel_pos_emb.shape[0]
        apart = portable.clamp(keys[None] - queries[:, None] + spec.backward, 0, offsets - 1)
        index = (queries[:, None] * offsets + apart).reshape(-1)
        asks = blocked_q if asks is None else _blocked(asks, taken, share, blocks)
        by_offset = offset_products(asks.reshape(-1, head_dim), rel_pos_emb).reshape(-1, rows * offsets)
        scores = scores + ops.gather(by_offset, index, 1).reshape(-1, share * rows, width)
    if scoring.hide_self:
        scores = scores.reshape(-1, rows, width)
        own = ops.logical_and(queries[:, None] == keys[None], scores > FAINT)
        scores = portable.masked_fill(scores, own, SELF_SCORE)
    seen = seen.reshape(-1, 1, blocks, 1, rows, width)
    weights, lse = softened(scores.reshape(seen.shape[0], -1, blocks, share, rows, width), seen)
    if scoring.dropout > 0:
        weights = weights * _kept(problem, tensors["seed"], taken, key_index, blocks, rows).reshape(weights.shape)
    out = ops.bmm(weights.reshape(-1, share * rows, width), blocked_v)
    back = portable.arange(0, n_q, 1) + (offset - base)
    out = _in_order(out.reshape(key_groups, blocks, share, rows * v_width), share, groups, v_width, back)
    lse = _in_order(lse.reshape(key_groups, blocks, share, rows), share, groups, 1, back)[..., 0]
    return finished(problem, q, k, v, out, lse, mask, tensors)


def _blocked(q, taken, share, blocks):
    """Return blocks of queries, `(key groups * blocks, share * rows, d)`: heads that share a key head become more rows
    of its blocks."""
    groups, head_dim = q.shape[0], q.shape[2]
    q = ops.gather(q, taken, 1)
    if share > 1:
        q = q.reshape(groups // share, share, blocks, -1).swapaxes(1, 2)
        return q.reshape(groups // share * blocks, -1, head_dim)
    return q.reshape(groups * blocks, -1, head_dim)


def _with_bias(problem, scores, bias, queries, keys, positions, places, first, offset):
    """Add a bias to scores `(key groups * blocks, share * rows, width)`."""
    share, blocks, rows, width = problem.per_key_head, positions.shape[0], queries.shape[0], keys.shape[0]
    if problem.bias_rows:
        row = portable.clamp(positions - offset, 0, bias.shape[2] - 1)[None, ..., None]
        first = 0 if not problem.has("documents") else first[..., None]
        entries = bias_entries(problem, positions[None, ..., None], places[None, :, None], first, row)
        entries = entries.reshape(-1, blocks * rows * width)
    elif problem.has("documents"):
        entries = bias_entries(problem, positions[None, ..., None], places[None, :, None], first[..., None])
        entries = entries.reshape(-1, blocks * rows * width)
    else:  # the same in every block
        blocks, entries = 1, bias_entries(problem, queries[:, None], keys[None], 0).reshape(1, -1)
    found = bias_at(bias, entries)
    heads = bias.shape[-3]
    if 1 < heads < share:
        found, heads = ops.tile(found, (1, share // heads, 1)), share
    sharing = min(heads, share)  # of the heads with a bias of their own, those that share a key head
    found = found.reshape(found.shape[0], 1, heads // sharing, sharing, blocks, rows * width).swapaxes(3, 4)
    shape = found.shape[0], -1, heads // sharing, positions.shape[0], share, rows * width
    return (scores.reshape(shape) + found).reshape(-1, share * rows, width)


def _in_order(x, share, groups, width, back):
    """Put blocks back into the order of positions, and heads that share a key head apart: `(g, n_q, width)`."""
    if share > 1:
        x = x.swapaxes(1, 2)
    return ops.gather(x.reshape(groups, -1, width), back, 1)


def _kept(problem, seed, taken, key_index, blocks, rows):
    """Return the dropout factors, in the order of the blocks' scores."""
    row_hashes, column_hashes = hashes(problem)
    share = problem.per_key_head
    row_hashes = ops.gather(seeded_rows(row_hashes, seed), taken, 1)
    row_hashes = row_hashes.reshape(-1, share, blocks, rows).swapaxes(1, 2).reshape(-1, blocks, share, rows, 1)
    columns = ops.gather(column_hashes, key_index, 0).reshape(1, blocks, 1, 1, -1)
    return keep_factors(row_hashes, columns, problem.scoring.dropout)


ANY_LENGTH = Backend(
    "any_length", PLAIN, why_not, scores, prepare, run, shielded=True)
