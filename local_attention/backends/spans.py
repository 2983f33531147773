"""What the backends of plain operators share: spans within documents, capped scores, and merging of partial attention.

Documents are given by two bounds for each position, the first and the last of its document, `(batch, n_k, 2)`. A
position of padding is in no document; its last is before its first.
"""
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import portable
from .native.library import INT32, INT64, custom
from .native.rows import made
from .dropout import column_hash, keep_factors, row_hash, seeded_rows

HIDDEN = -1e30  # the score of a hidden key, which weighs nothing beside a visible one
FAINT = -1e29  # a query whose highest score is not above this sees nothing
SELF_SCORE = -5e4  # upstream's score of a query's own key under shared_qk: it counts only if nothing else is seen
FAR = 2**30  # farther than any key, and still an int32 when added to a position

_real_div = ops.RealDiv()


def document_bounds(segment_ids):
    """Return `(batch, n, 2)`, int32, from ids `(batch, n)`: consecutive equal ids are a document, negative ids are
    padding."""
    fused = _fused_bounds(segment_ids.shape)
    return _found_bounds(segment_ids) if fused is None else fused(segment_ids)


class _FusedBounds(nn.Cell):
    """Finds the bounds with the native kernel's library. Outside graphs, the operators for this take as long as the
    attention."""

    def __init__(self):
        super().__init__()
        self.find = custom("document_bounds", [INT32], [INT32], [INT64, INT64])

    def construct(self, segment_ids):
        bounds = self.find(segment_ids)
        return bounds if bounds.dtype == ms.int32 else ops.cast(bounds, ms.int32)

    def bprop(self, segment_ids, out, dout):
        return (segment_ids,)


@constexpr
def _fused_bounds(shape):
    """Return the kernel as a Cell, None if it cannot run."""
    return None if None in shape or 0 in shape else made(_FusedBounds)


def _found_bounds(segment_ids):
    """Find the bounds by plain operators.

    Calls functions instead of methods and operator signs: after an import of mindtorch, those are mindtorch's, and
    accept only its own tensors.
    """
    after = ops.strided_slice(segment_ids, (0, 1), (0, 0), (1, 1), 1, 3)
    before = ops.strided_slice(segment_ids, (0, 0), (0, -1), (1, 1), 1, 1)
    changes = ops.cast(ops.not_equal(after, before), ms.int32)
    changes = ops.cat((ops.zeros((segment_ids.shape[0], 1), ms.int32), changes), 1)
    own = ops.sub(portable.cumsum(ops.ones_like(changes), 1), 1)
    first, end = portable.run_bounds(changes, own)
    padding = ops.cast(ops.less(segment_ids, 0), ms.int32)
    first = ops.add(first, ops.mul(padding, ops.sub(own, first)))
    end = ops.add(end, ops.mul(padding, ops.sub(own, end)))
    last = ops.sub(end, 1)
    return ops.stack((first, last), -1)


@constexpr
def _numbered(batch, n):
    """Return the number of each token among those of all rows, and that of its row's first."""
    number = np.arange(batch * n, dtype=np.int32)
    return Tensor(number), Tensor(number // n * n)


def cu_bounds(cu_seqlens, batch, n):
    """Return `document_bounds` of documents given by their ends, counted over the rows laid end to end."""
    ends, (number, row) = ops.cast(cu_seqlens, ms.int32), _numbered(batch, n)
    index = ops.clamp(portable.count_up_to(ends, number), 1, ends.shape[0] - 1)  # the first end after each token
    first = ops.maximum(ops.sub(ops.gather(ends, ops.sub(index, 1), 0), row), 0)
    last = ops.minimum(ops.sub(ops.sub(ops.gather(ends, index, 0), row), 1), n - 1)
    return ops.stack((first, last), -1).reshape(batch, n, 2)


def bounds_of(documents, positions):
    """Return the first and the last position of the document at each position, `(batch, len(positions))` each."""
    bounds = ops.gather(documents, positions, 1)
    return bounds[..., 0], bounds[..., 1]


def spans(spec, positions, first, last):
    """Compute `WindowSpec.span` on tensors, cut at `first` and `last` of each position's document. Buckets count from
    its first."""
    place = positions - first
    start = positions if spec.bucket == 1 else positions - portable.remainder(place, spec.bucket)
    low = portable.maximum(start - min(spec.backward, FAR), first)
    high = portable.minimum(start + min(spec.bucket - 1 + spec.forward, FAR), last)
    return low, portable.minimum(high, positions) if spec.causal else high


def in_span(spec, positions, keys, first, last):
    """Whether keys are in the span of queries at positions `(..., rows)`; keys broadcast to `(..., rows, width)`."""
    low, high = spans(spec, positions, first, last)
    return ops.logical_and(keys >= low[..., None], keys <= high[..., None])


def reach(problem):
    """Return how many keys a block of queries sees before and after itself, and the number that the block's start is a
    multiple of. With documents it is 1, because their windows start anywhere."""
    spec = problem.spec
    if not problem.has("documents"):
        return spec.backward, spec.forward, max(spec.bucket, problem.bias_period)
    return spec.backward + spec.bucket - 1, 0 if spec.causal else spec.forward + spec.bucket - 1, 1


def in_prefix(spec, positions, keys, first, last):
    """Whether keys are in the prefix of the document that a query is in."""
    end = portable.minimum(first + (min(spec.prefix, FAR) - 1), last)
    return ops.logical_and(keys >= first, keys <= (portable.minimum(end, positions) if spec.causal else end))


def bias_entries(problem, positions, keys, first, rows=None):
    """Compute `Problem.bias_index` on tensors; positions count from the first of each query's document. `rows` are the
    queries' own, for a bias that has one for each."""
    period, columns = problem.bias_period, problem.shape("bias")[-1]
    place = portable.remainder(positions - first, period)
    column = keys - (positions - place) + problem.spec.backward
    return (rows if problem.bias_rows else place) * columns + portable.clamp(column, 0, columns - 1)


def bias_at(bias, entries):
    """Return the entries `(batch or 1, m)` of a bias, `(batch or 1, heads or 1, m)`, by their index in a head's
    flattened bias."""
    if len(bias.shape) == 3:
        bias = bias.expand_dims(0)
    batch, heads, rows = bias.shape[0], bias.shape[1], entries.shape[0]
    if rows == 1:
        return ops.gather(bias.reshape(batch, heads, -1), entries.reshape(-1), 2)
    if batch == 1:
        return ops.gather(bias.reshape(heads, -1), entries.reshape(-1), 1).reshape(heads, rows, -1).swapaxes(0, 1)
    size = bias.shape[2] * bias.shape[3]
    start = portable.arange(0, batch * heads * size, size).reshape(batch, heads, 1)
    return ops.gather(bias.reshape(-1), (start + entries.expand_dims(1)).reshape(-1), 0).reshape(batch, heads, -1)


def in_order(seen, order, positions, keys):
    """Hide from what is seen, `(batch or 1, ..., rows, width)`, the keys `(..., width)` that come later in an order
    `(batch or 1, n)` than the queries at `positions (..., rows)`."""
    own = ops.gather(order, positions.reshape(-1), 1).reshape((-1,) + positions.shape)
    of_keys = ops.gather(order, keys.reshape(-1), 1).reshape((-1,) + keys.shape)
    return ops.logical_and(seen, ops.expand_dims(of_keys, -2) <= ops.expand_dims(own, -1))


def without_padding(q, mask, documents, offset):
    """Return q with zeros where queries are padding, whatever they hold, and a mask that hides padding too."""
    queries = documents[:, offset:offset + q.shape[1]]  # slices the bounds, because Ascend cannot slice bool
    q = portable.masked_fill(q, repeated(portable.logical_not(real(queries)), q.shape[0]), 0.)
    return q, merge_masks(mask, real(documents))


def real(documents):
    """Return which positions are in a document."""
    return documents[..., 0] <= documents[..., 1]


def merge_masks(mask, other):
    return other if mask is None else ops.logical_and(mask, other)


def sees_something(mask, first, after):
    """Whether there is a real key at `first` or later, but before `after`, for each query: bool `(batch, n_q)`; places
    are `(n_q,)` or `(batch, n_q)`."""
    count = portable.cumsum(ops.cast(mask, ms.float32), 1)
    count = ops.cat((ops.zeros((count.shape[0], 1), ms.float32), count), 1)
    if len(first.shape) == 1:
        return ops.gather(count, after, 1) > ops.gather(count, first, 1)
    rows = portable.arange(0, count.shape[0] * count.shape[1], count.shape[1]).reshape(-1, 1)
    count = count.reshape(-1)
    found = ops.gather(count, (rows + after).reshape(-1), 0) > ops.gather(count, (rows + first).reshape(-1), 0)
    return found.reshape(first.shape)


def repeated(x, groups):
    """Repeat `(batch, n)` as `(groups, n, 1)`."""
    return ops.tile(ops.expand_dims(x, 1), (1, groups // x.shape[0], 1)).reshape(groups, -1, 1)


def tanh(x):
    """Return tanh with a relative error up to 5e-7, near 0 as well, by the kernel's quotient of polynomials. On CPU,
    `ops.tanh` is off by up to 1e-4, and `ops.expm1` is exp(x) - 1 to the letter: 0 at 1e-8."""
    # No loops and branches, because a graph loses functions with these that both a construct and a bprop call.
    x = ops.maximum(ops.minimum(x, 9.02), -9.02)  # beyond, it is 1 or -1 in float32
    y = ops.square(x)
    above = _next(_next(_next(ops.mul(y, 1.33192639e-8), 2.05836312e-5, y), 3.49404410e-3, y), .133797261, y)
    below = _next(_next(_next(ops.mul(y, 7.76210149e-7), 3.28310815e-4, y), 2.58711099e-2, y), .467130413, y)
    return ops.mul(x, _real_div(ops.add(above, 1.), ops.add(below, 1.)))


def _next(total, factor, y):
    """Return a polynomial of one more degree, without its constant term."""
    return ops.mul(ops.add(total, factor), y)


def capped(q, k, softcap):
    """Return the products of scaled queries and keys, `(g, rows, n_k)`, capped to `-softcap … softcap` if there is
    one."""
    scores = ops.bmm(q, k.swapaxes(-1, -2))
    return scores if softcap is None else tanh(scores / softcap) * softcap


def offset_products(q, emb):
    """Return the products of queries `(..., d)` and embeddings `(offsets, d)`. A NaN in an embedding makes its own
    products NaN, but not the gradient of a query that does not use it: 0 times NaN is NaN."""
    missing = ops.stop_gradient(ops.mul(emb, 0.))  # 0, or NaN
    emb = portable.masked_fill(emb, ops.not_equal(missing, 0.), 0.)
    return ops.add(ops.matmul(q, emb.T), missing.sum(-1))


def softened(scores, seen):
    """Return the softmax of scores and their log-sum-exp; `seen` is 1. or 0. and broadcasts. Rows that see nothing get
    zeros and -inf.

    Not `ops.softmax`: outside a graph, MindSpore keeps its gradient over a single key and reuses it for other lengths.
    """
    scores = portable.masked_fill(scores, seen == 0, HIDDEN)
    top = ops.stop_gradient(ops.amax(scores, -1, keepdims=True))
    weights = ops.exp(scores - top) * seen * ops.cast(top > FAINT, ms.float32)  # a bias may hide all that is seen
    total = weights.sum(-1, keepdims=True)
    nothing = ops.cast(total == 0, ms.float32)
    lse = portable.masked_fill(top + ops.log(total + nothing), total == 0, float("-inf"))
    return weights / (total + nothing), lse[..., 0]


# ---- merging attention over some keys with attention over others


def merged(outs, lses):
    """Return the output and log-sum-exp over all keys from those of pieces of the keys: `(..., n, d)` and `(...,
    n)`."""
    top = lses[0]
    for lse in lses[1:]:
        top = ops.maximum(top, lse)
    top = ops.stop_gradient(portable.masked_fill(top, top == float("-inf"), 0.))
    shares, total = [], 0.
    for lse in lses:
        share = ops.exp(lse - top)
        shares.append(share)
        total = total + share
    nothing = ops.cast(total == 0, ms.float32)
    out = 0.
    for index in range(len(outs)):
        out = out + ops.cast(outs[index], ms.float32) * (shares[index] / (total + nothing))[..., None]
    return ops.cast(out, outs[0].dtype), portable.masked_fill(top + ops.log(total + nothing), total == 0, float("-inf"))


def finished(problem, q, k, v, out, lse, mask, tensors):
    """Add the prefix and the sinks to the result of attention to spans, `out (g, n_q, d)` and `lse (g, n_q)`. The mask
    hides padding between documents, too."""
    if problem.spec.prefix > 0:
        out, lse = with_prefix(problem, q, k, v, out, lse, mask, tensors)
    return (out, lse) if tensors["sinks"] is None else with_sinks(problem, out, lse, tensors["sinks"])


def with_prefix(problem, q, k, v, out, lse, mask, tensors):
    """Add the keys of the prefix that are outside a query's span."""
    more, more_lse = _prefix(problem, q, k, v, mask, tensors["documents"], tensors["order"], tensors["seed"])
    return merged((out, more), (lse, more_lse))


def with_sinks(problem, out, lse, sinks):
    """Add a sink for each head, or for each of its queries, as a piece whose value is 0."""
    if len(sinks.shape) == 1:
        by_head = lse.reshape(-1, problem.rows("sinks"), lse.shape[-1])
        sinks = ops.zeros_like(by_head) + sinks.reshape(1, -1, 1)
    sinks = sinks.reshape(lse.shape)
    return merged((out, portable.zeros_like(out)), (lse, sinks))


def _prefix(problem, q, k, v, mask, documents, order, seed):
    """Compute attention to the keys of the prefix that are outside a query's span, and its log-sum-exp."""
    spec, scoring, share, head_dim, width = problem.spec, problem.scoring, problem.per_key_head, problem.d, v.shape[-1]
    n_q, n_k, key_groups = q.shape[1], k.shape[1], k.shape[0]
    offset = n_k - n_q if problem.offset is None else problem.offset
    count = spec.prefix if problem.n_k is None else min(spec.prefix, problem.n_k)
    positions, first, last = portable.arange(0, n_q, 1) + offset, 0, n_k - 1
    keys = portable.arange(0, count, 1).reshape(1, 1, -1)
    if documents is not None:
        first, last = bounds_of(documents, positions)
        first, last = first.expand_dims(-1), last.expand_dims(-1)
        keys = keys + first
    positions = positions.reshape(1, -1, 1)
    low, high = spans(spec, positions, first, last)
    seen = ops.logical_and(in_prefix(spec, positions, keys, first, last), ops.logical_or(keys < low, keys > high))
    index = portable.clamp(keys, 0, n_k - 1)  # (1, 1, count), or with documents (batch, n_q, count)
    if order is not None and documents is None:
        seen = in_order(seen, order, positions.reshape(-1), index.reshape(-1))
    elif order is not None:
        own = ops.gather(order, positions.reshape(-1), 1)[..., None]
        seen = ops.logical_and(seen, _at_rows(order, index) <= own)
    if documents is None:
        k, v = ops.gather(k, index.reshape(-1), 1), ops.gather(v, index.reshape(-1), 1)
        q = q.reshape(key_groups, -1, head_dim)
        if mask is not None:
            seen = ops.logical_and(seen, ops.expand_dims(ops.gather(mask, index.reshape(-1), 1), 1))
    else:
        batch = documents.shape[0]
        rows = index[:, None] + (portable.arange(0, key_groups, 1) * n_k).reshape(batch, -1, 1, 1)
        k = ops.gather(k.reshape(-1, head_dim), rows.reshape(-1), 0).reshape(-1, count, head_dim)
        v = ops.gather(v.reshape(-1, width), rows.reshape(-1), 0).reshape(-1, count, width)
        q = q.reshape(key_groups, share, n_q, head_dim).swapaxes(1, 2).reshape(-1, share, head_dim)
        seen = ops.logical_and(seen, _at_rows(mask, index))
    scores = capped(q * scoring.scale, k, scoring.softcap)
    if documents is not None:
        scores = scores.reshape(key_groups, n_q, share, count).swapaxes(1, 2)
    groups = key_groups * share
    scores = scores.reshape(groups, n_q, count)
    if scoring.hide_self:
        scores = portable.masked_fill(scores, positions == keys, SELF_SCORE)
    seen = ops.cast(seen, ms.float32)
    seen = ops.tile(ops.expand_dims(seen, 1), (1, groups // seen.shape[0], 1, 1)).reshape(groups, n_q, count)
    weights, lse = softened(scores, seen)
    if scoring.dropout > 0:
        weights = weights * _kept(problem, keys, index, documents, seed)
    weights = weights.reshape(key_groups, -1, count)
    if documents is not None:
        weights = weights.reshape(key_groups, share, n_q, count).swapaxes(1, 2).reshape(-1, share, count)
    out = ops.bmm(weights, v)
    if documents is not None:
        out = out.reshape(key_groups, n_q, share, width).swapaxes(1, 2)
    return out.reshape(groups, n_q, width), lse


def _at_rows(x, index):
    """Return what `x (batch or 1, n)` has at the places `(batch, ...)`, each row at its own."""
    batch, n = index.shape[0], x.shape[1]
    rows = index
    if x.shape[0] > 1:
        rows = index + (portable.arange(0, batch, 1) * n).reshape((batch,) + (1,) * (len(index.shape) - 1))
    return ops.gather(x.reshape(-1), rows.reshape(-1), 0).reshape(index.shape)


def _kept(problem, keys, index, documents, seed):
    """Return the dropout factors of the weights of the prefix."""
    rows, columns = hashes(problem)
    columns = ops.gather(columns, index.reshape(-1), 0)
    if documents is None:
        columns = columns.reshape(1, 1, -1)
    else:
        batch, n_q, count = index.shape
        columns = ops.tile(columns.reshape(batch, 1, n_q, count), (1, problem.groups // batch, 1, 1))
        columns = columns.reshape(problem.groups, n_q, count)
    return keep_factors(seeded_rows(rows, seed), columns, problem.scoring.dropout)


@constexpr
def hashes(problem):
    """Return dropout's hashes of every query `(g, n_q, 1)` and of every key."""
    group, position = problem.frame.origin
    rows = row_hash(np.arange(problem.groups) + group, np.arange(problem.n_q) + problem.offset + position)
    return Tensor(rows[..., None]), Tensor(column_hash(np.arange(problem.n_k) + position))
