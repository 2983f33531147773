"""Attention by its definition: every score, the invisible ones hidden. O(n²); what the others are held to."""
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from .dropout import column_hash, keep_factors, row_hash, seeded_rows

HIDDEN = -1e30  # a score that no softmax row with a visible key can see
SELF_SCORE = -5e4  # upstream's score of a query on its own key under shared_qk: last, but before nothing at all


def why_not(problem):
    """None: it runs everything."""
    return None


def scores(problem):
    """How many scores are computed, and how many at once."""
    return (problem.groups * problem.n_q * problem.n_k,) * 2


def prepare(problem):
    """The problem, and its constants: who sees whom, who is oneself, where to find a bias, and hashes for dropout.

    A plain tuple: of a NamedTuple that is handed to a Cell, a graph forgets the names.
    """
    queries, keys = np.arange(problem.n_q)[:, None] + problem.offset, np.arange(problem.n_k)
    group, position = problem.origin
    return (problem, Tensor(problem.spec.visible(queries[:, 0], keys)[None].astype(np.float32)),
            Tensor((queries == keys)[None]),
            Tensor(problem.bias_index(queries, keys)) if problem.bias_shape else None,
            _offset_index(problem, queries, keys) if problem.by_offset else None,
            Tensor(row_hash(np.arange(problem.groups) + group, queries[:, 0] + position)[..., None]),
            Tensor(column_hash(keys + position)))


def _offset_index(problem, queries, keys):
    """Where among a head's scores of every query with every offset a query and a key find theirs."""
    offsets = problem.spec.backward + 1 + problem.spec.forward
    row = np.clip(keys - queries + problem.spec.backward, 0, offsets - 1)
    return Tensor((queries - problem.offset) * offsets + row)


def run(constants, q, k, v, key_mask, bias, rel_pos_emb, seed):
    """`out[i] = sum_j softmax_j(scale * q[i]·k[j] + bias[i, j]) * v[j]` over the keys `j` that query `i` sees."""
    problem, seen, is_self, bias_index, offset_index, rows, columns = constants
    if key_mask is not None:
        real = ops.tile(ops.cast(key_mask, ms.float32)[:, None], (1, problem.groups // problem.batch, 1))
        real = real.reshape(problem.groups, 1, problem.n_k)
        k, v = ops.masked_fill(k, real.swapaxes(1, 2) == 0, 0.), ops.masked_fill(v, real.swapaxes(1, 2) == 0, 0.)
        seen = seen * real
    scores = ops.bmm(q * problem.scale, k.swapaxes(1, 2))
    if bias is not None:
        bias = ops.gather(bias.reshape(bias.shape[0], -1), bias_index, 1)
        scores = scores + ops.tile(bias, (problem.groups // bias.shape[0], 1, 1))
    if rel_pos_emb is not None:
        by_offset = ops.matmul(q, rel_pos_emb.T).reshape(problem.groups, -1)
        scores = scores + ops.gather(by_offset, offset_index, 1)
    if problem.hide_self:
        scores = ops.masked_fill(scores, is_self, SELF_SCORE)
    # not ops.softmax: outside a graph its gradient over one key alone is kept and used again for other lengths
    scores = ops.masked_fill(scores, seen == 0, HIDDEN)
    weights = ops.exp(scores - ops.stop_gradient(ops.amax(scores, -1, keepdims=True))) * seen
    total = weights.sum(-1, keepdims=True)
    weights = weights / (total + ops.cast(total == 0, ms.float32))
    if problem.dropout > 0:
        weights = weights * keep_factors(seeded_rows(rows, seed), columns, problem.dropout)
    return ops.bmm(weights, v)
