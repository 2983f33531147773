"""Windows of a sequence in upstream's terms, and attention to them: how a call is checked, and what it computes."""
import math
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import checks, parallel
from .attend import Frame, attend, beside, draw_seed, sinks_by_head
from .backends import portable
from .backends.any_length import unknown
from .backends.spans import bias_at, document_bounds
from .cells import Float32
from .spec import Scoring, WindowSpec


FARTHEST_ROTATION = 2**40  # from there on, angles in float64 have errors of more than 1e-4
LONGEST_OF_ANY = 2**20  # the longest span that is filled up where a graph does not know the length


class _UnitScale(Float32):
    """Divides rows by their Euclidean norm and multiplies each column by its scale; a row of zeros stays zero."""

    def construct(self, x, scale):
        x = ops.cast(x, ms.float32)
        squares = ops.matmul(ops.square(x), ops.ones((x.shape[1], 1), ms.float32))
        factor = portable.rsqrt(ops.maximum(squares, 1e-24))  # as in PyTorch's normalize, the norm is at least 1e-12
        return ops.mul(x, ops.matmul(factor, scale.reshape(1, -1)))  # on CPU, a matmul is faster than broadcasting


_unit_scale = _UnitScale()


def l2norm(x, scale=None):
    """Divide x by its Euclidean norm along the last axis, computed in float32, and multiply it by `scale (d,)`."""
    def rows():  # a function within, so that MindSpore's O1 leaves this one as it is (see `cells`)
        return x.reshape(-1, x.shape[-1])
    if scale is None:
        scale = ops.ones((x.shape[-1],), ms.float32)
    return ops.cast(_unit_scale(rows(), scale).reshape(x.shape), x.dtype)


@dataclass(frozen=True)
class Windows:
    """Which keys a query sees, in upstream's terms."""
    size: int
    look_backward: int
    look_forward: int
    causal: bool
    exact: bool
    prefix: int = 0

    @property
    def backward(self):
        return self.size * self.look_backward

    @property
    def forward(self):
        return self.size * self.look_forward

    @property
    def span(self):
        """The number of positions in all windows that a window sees."""
        return self.backward + self.size + self.forward

    @property
    def distances(self):
        """The size of a bias of distances: queries, keys up to the last query, and keys after it."""
        rows = 1 if self.exact else self.size
        return rows, self.backward + rows, self.forward

    def bias_rule(self, shape, n=None):
        """Return the allowed shapes of a bias in words, and whether `shape` is one of them, apart from its heads: a row
        for each place in a window, a single row for a span that moves, or, if `n` is given, a row for each of n
        queries."""
        shapes = [(self.size, self.span)]
        if self.exact:
            shapes.append((1, self.backward + 1 + self.forward))
        of_queries = [] if n is None else [(n, columns) for _, columns in shapes]
        words = ([f"(heads, {rows}, {columns})" for rows, columns in shapes]
                 + [f"(batch, heads, {n}, {columns})" for _, columns in of_queries])
        return " or ".join(words), (len(shape) == 3 and tuple(shape[1:]) in shapes
                                    or len(shape) == 4 and tuple(shape[2:]) in of_queries)

    @property
    def spec(self):
        return WindowSpec(1 if self.exact else self.size, self.backward, self.forward, self.causal, self.prefix)

    def within(self, n):
        """Return windows that show the same of a sequence of n positions, with a span not much longer than it."""
        size = min(self.size, n)
        count = -(-n // size)
        return replace(self, size=size, look_backward=min(self.look_backward, count),
                       look_forward=min(self.look_forward, count))

    def folded(self, n, n_k=None, offset=0):
        """Return the sequence as windows side by side, each with its own span of keys: indices `(windows, size)` and
        `(windows, span)`, and which of the keys exist. The first query is at key `offset` of `n_k`."""
        n_k = n if n_k is None else n_k
        starts = np.arange(0, n, self.size)[:, None]
        keys = offset + starts - self.backward + np.arange(self.span)
        return np.minimum(starts + np.arange(self.size), n - 1), np.clip(keys, 0, n_k - 1), (0 <= keys) & (keys < n_k)


@constexpr
def _checked(owner, windows, autopad, use_xpos, rotary_dim, group, dropout, backend, q, k, v, mask, attn_bias,
             segment_ids, sinks, window_size, order):
    """Check the inputs of a call; return its number of groups, and its windows."""
    if window_size is not None:
        if not use_xpos:
            raise checks.value_error(owner, "window_size", "None in a call without 'use_xpos'", window_size)
        windows = replace(windows, size=checks.positive_int(owner, "window_size", window_size))
    shape, share = checks.alike(owner, q, k, v)
    *leading, n, head_dim = shape
    groups = None if None in leading else math.prod(leading)
    if rotary_dim is None:
        checks.known_width(owner, shape)
    elif head_dim not in (None, rotary_dim):
        raise checks.value_error(owner, "q", f"of head dimension {rotary_dim}, the rotary embedding's", head_dim)
    if rotary_dim is not None and windows.forward > FARTHEST_ROTATION:
        raise checks.value_error(owner, "window_size", f"at most {FARTHEST_ROTATION} together for all windows of "
                                 "'look_forward' with rotary embedding, whose angles have an end", windows.size)
    known = groups is not None and n is not None  # unknown in a graph that is compiled for any length
    if n is None and use_xpos and windows.span > LONGEST_OF_ANY:
        raise checks.value_error(owner, "window_size", f"with a span of at most {LONGEST_OF_ANY} in a graph for every "
                                 "length with 'use_xpos', which makes whole spans", windows.size)
    if not known and dropout > 0:
        raise checks.value_error(owner, "dropout", "0 in training in a graph for every length", dropout)
    if not known and backend is not None:
        raise checks.value_error(owner, "backend", "None in a graph for every length", repr(backend))
    documents = "segment_ids", segment_ids is not None
    checks.together(owner, documents, ("use_xpos", use_xpos))
    checks.together(owner, ("attn_bias", attn_bias is not None), ("prefix", windows.prefix))
    if group is not None:
        # the start of a document may be on any rank; a window that moves with its query does not need it
        checks.together(owner, documents, ("sequence_parallel' without 'exact_windowsize", not windows.exact))
        checks.together(owner, documents, ("attn_bias' with 'sequence_parallel", attn_bias is not None))
        if not known:
            raise checks.value_error(owner, "q", "of a known shape with 'sequence_parallel'", tuple(shape))
        if n % windows.size:
            raise checks.value_error(owner, "q", f"of a length that is a multiple of the window ({windows.size}) with "
                                     "'sequence_parallel'", n)
        reach = max(windows.backward, windows.forward)
        if group.size > 1 and n < reach:
            raise checks.value_error(owner, "q", f"of a length of at least {reach} on each of the {group.size} ranks, "
                                     "as no further than to the next one does 'sequence_parallel' look", n)
    if known and not autopad and n % windows.size:
        raise checks.value_error(owner, "q", f"of a length that is a multiple of the window ({windows.size}) without "
                                 "'autopad'", n)
    if mask is not None:
        batch, *rest = checks.tensor(owner, "mask", mask, ("Bool",))
        if rest != [n] or batch == 0 or (known and groups % batch):
            raise checks.value_error(owner, "mask", f"of shape (batch, {n}), batch a divisor of {groups}", mask[0])
    for name, there in (("order", order is not None), ("a bias for each query", checks.axes(attn_bias) == 4),
                        ("sinks of each query", checks.axes(sinks) > 1)):
        checks.together(owner, (name, there), ("use_xpos", use_xpos))
    for name, there in (("order", order is not None), ("a width of v that is not q's", v[0][-1] != shape[-1])):
        checks.together(owner, (name, there), ("sequence_parallel", group is not None))
    if order is not None:
        batch, _ = checks.order(owner, order, None if mask is None else mask[0][0], n, windows.spec)
        if known and groups // share % batch:
            raise checks.value_error(owner, "order", f"of shape (batch, {n}), batch a divisor of {groups}", order[0])
    if attn_bias is not None:
        got = checks.tensor(owner, "attn_bias", attn_bias, checks.FLOATS)
        rule, right = windows.bias_rule(got, n)
        batch, heads = (1, got[0]) if len(got) == 3 else got[:2] if len(got) == 4 else (0, 0)
        alone = batch == 1 or heads == 1 or batch * heads == groups
        if not right or batch * heads == 0 or not alone or known and (groups % heads or groups // share % batch):
            raise checks.value_error(owner, "attn_bias", f"of shape {rule}, heads a divisor of {groups}", got)
        if heads % share and share % heads:
            raise checks.value_error(owner, "attn_bias", f"of a multiple or a divisor of the {share} heads that share "
                                     "one of k", attn_bias[0])
    if segment_ids is not None:
        batch, _ = checks.segment_ids(owner, segment_ids, None if mask is None else mask[0][0], n)
        if known and groups // share % batch:
            raise checks.value_error(owner, "segment_ids", f"of shape (batch, {n}), batch a divisor of {groups}",
                                     segment_ids[0])
    if sinks is not None:
        checks.sinks(owner, sinks, shape[-3] if len(shape) > 2 else 1, shape[:-1])
    return groups, windows


@constexpr
def _no_order(there):
    checks.together("LocalAttention", ("order", there), ("parallel.sharded", True))


@constexpr
def _moving(windows, n):
    """Return the places of n queries in their windows, `(1, n)`, and the columns of a bias of offsets."""
    return (Tensor((np.arange(n) % windows.size)[None].astype(np.int32)),
            Tensor(np.arange(windows.backward + 1 + windows.forward, dtype=np.int32)))


def moving_bias(bias, windows, documents):
    """Return a bias with a row for each query as one of offsets, if spans move and its columns are a window's."""
    if bias is None or len(bias.shape) == 3 or not windows.exact or bias.shape[3] != windows.span or windows.size == 1:
        return bias
    n = bias.shape[2]
    places, columns = _moving(windows, n)
    if documents is not None:
        places = ops.arange(0, n, 1)[None] - documents[..., 0]
        places = portable.remainder(places, windows.size)
    rows = (ops.arange(0, n, 1) * windows.span).reshape(1, n, 1)
    entries = rows + places[..., None] + columns
    found = bias_at(bias, entries.reshape(entries.shape[0], -1))
    return found.reshape(found.shape[0], found.shape[1], n, -1)


@constexpr
def _numbers(windows, scale, head_dim, softcap, hide_self, dropout, offset, origin, dtype, tokens_first):
    """Return the numbers of a call as `attend` takes them."""
    return (windows.spec, Scoring(head_dim ** -0.5 if scale is None else scale, softcap, hide_self, dropout),
            Frame(offset, origin, dtype, tokens_first=tokens_first))


@constexpr
def _within(windows, n):
    return windows.within(n)


@constexpr
def _fold_indices(windows, n, n_k, offset):
    queries, keys, real = windows.folded(n, n_k, offset)
    return (len(queries), Tensor(queries.reshape(-1).astype(np.int32)), Tensor(keys.reshape(-1).astype(np.int32)),
            Tensor(real.reshape(1, -1)))


def _fold_indices_of_any_length(windows, n):
    """Compute `_fold_indices` where a graph does not know the length."""
    count = (n + windows.size - 1) // windows.size
    starts = ops.arange(0, count * windows.size, windows.size).reshape(-1, 1)
    queries, keys = starts + ops.arange(0, windows.size, 1), starts - windows.backward + ops.arange(0, windows.span, 1)
    real = ops.logical_and(keys >= 0, keys < n)
    return count, ops.clamp(queries, 0, n - 1).reshape(-1), ops.clamp(keys, 0, n - 1).reshape(-1), real.reshape(1, -1)


def fold(q, k, v, mask, windows, offset=0):
    """Turn windows into more batch entries, for positions that start anew in each window: q `(windows * g, size, d)`, k
    and v `(windows * g, span, d)`, and a mask of the real keys. The first query is at key `offset`."""
    if unknown(q.shape):
        count, queries, keys, real = _fold_indices_of_any_length(windows, q.shape[1])
    else:
        count, queries, keys, real = _fold_indices(windows, q.shape[1], k.shape[1], offset)
    if mask is not None:
        real = ops.logical_and(ops.gather(mask, keys, 1), real)
    real = real.reshape(-1, count, windows.span).swapaxes(0, 1).reshape(-1, windows.span)
    return (_side_by_side(q, queries, count, windows.size), _side_by_side(k, keys, count, windows.span),
            _side_by_side(v, keys, count, windows.span), real)


def _side_by_side(x, index, count, n):
    """Gather from `(g, ..., d)`: `(count * g, n, d)`. Heads stay the fastest axis of the groups."""
    groups, head_dim = x.shape[0], x.shape[2]
    return ops.gather(x, index, 1).reshape(groups, count, n, head_dim).swapaxes(0, 1).reshape(-1, n, head_dim)


def unfold(x, groups, n):
    """Turn `(windows * g, size, d)` into `(g, n, d)`."""
    _, size, head_dim = x.shape
    return x.reshape(-1, groups, size, head_dim).swapaxes(0, 1).reshape(groups, -1, head_dim)[:, :n]


def _flat(x):
    return x.reshape(-1, x.shape[-2], x.shape[-1])


def _of_width(x, width):
    """Return x with a last axis that a graph knows."""
    return x.reshape(x.shape[:-1] + (width,))


class Windowed(nn.Cell):
    """What LocalAttention does in a call. In a base class, so that MindSpore's O1 does not rewrite it (see `cells`)."""

    operator = None  # of semi-auto parallel, which takes the inputs of a call: see `parallel.sharded`

    def construct(self, q, k, v, mask=None, input_mask=None, attn_bias=None, window_size=None, *, segment_ids=None,
                  sinks=None, order=None):
        """Compute attention of q to k and v. The class describes each input, under Inputs."""
        if mask is None:
            mask = input_mask
        if self.operator is not None:
            _no_order(order is not None)
            return self.operator(q, k, v, mask, attn_bias, segment_ids, sinks)
        return self._attended(q, k, v, mask, attn_bias, segment_ids, sinks, window_size, order)

    def _attended(self, q, k, v, mask=None, attn_bias=None, segment_ids=None, sinks=None, window_size=None, order=None):
        """Compute what a call returns; with an operator of semi-auto parallel, of the slices of a rank."""
        groups, windows = self._by_the_rules(q, k, v, mask, attn_bias, segment_ids, sinks, order, window_size)
        if self.must_agree and windows.backward + windows.forward > 0:
            k = parallel.agreed(
                self.group, "LocalAttention", k, k.shape[-2], (
                    checks.described(q), checks.described(k), checks.described(v), checks.described(mask),
                    checks.described(segment_ids), checks.described(attn_bias), checks.described(sinks)),
                ("mask", "segment_ids", "attn_bias", "sinks"))
        if groups == 0:
            return q if q.shape[-1] == v.shape[-1] else ops.zeros(q.shape[:-1] + v.shape[-1:], q.dtype)
        if unknown(q.shape[-1:]):
            q, k, v = _of_width(q, self.rotary_dim), _of_width(k, self.rotary_dim), _of_width(v, self.rotary_dim)
        shape, dtype, sinks = q.shape[:-1] + v.shape[-1:], q.dtype, sinks_by_head(sinks, q)
        flat = self.group is not None or self.use_xpos
        if flat:
            q, k, v = _flat(q), _flat(k), _flat(v)
        if self.shared_qk:
            k = l2norm(k)
        offset = 0
        if self.group is not None:
            k, v, mask, segment_ids, offset = parallel.with_halo(
                self.group, k, v, mask, segment_ids, windows.backward, windows.forward)
        if self.rel_pos is not None:  # rotations are computed in float32, and their results stay in it
            q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
        if self.rel_pos is not None and not self.use_xpos:
            q = self.rel_pos.rotate(q, offset + windows.forward)  # relative to k, at the end of the span
            k = self.rel_pos.rotate(k)
        tensors = self._tensors(windows, mask, attn_bias, segment_ids, sinks, order)
        out = ops.cast(self._attend_prepared(q, k, v, windows, tensors, offset, dtype), dtype)
        return out.reshape(shape) if flat else out

    @property
    def may_be_split(self):
        """Whether a call does no more than `construct` here: `layers.fused_heads` does a part of it elsewhere."""
        return type(self).construct is Windowed.construct and self.operator is None and not (
            self._forward_pre_hook or self._forward_hook or self._backward_pre_hook or self._backward_hook
            or self._recompute_cell)

    def _tensors(self, windows, mask, attn_bias, segment_ids, sinks, order):
        documents = None if segment_ids is None else document_bounds(segment_ids)
        order = None if order is None else ops.cast(order, ms.int32)
        return beside(mask=mask, documents=documents, order=order, bias=moving_bias(attn_bias, windows, documents),
                      sinks=sinks, seed=self._seed())

    def _by_the_rules(self, q, k, v, mask, attn_bias, segment_ids, sinks, order, window_size=None):
        return _checked(
            "LocalAttention", self.windows, self.autopad, self.use_xpos, self.rotary_dim, self.group,
            self.dropout if self.training else 0., self.backend, checks.described(q), checks.described(k),
            checks.described(v), checks.described(mask), checks.described(attn_bias), checks.described(segment_ids),
            checks.described(sinks), window_size, checks.described(order))

    def _attend_split(self, q, k, v, mask, attn_bias, segment_ids, sinks, order, dtype):
        """Compute what `construct` does, for rotated heads `(b, heads, n, d)` in float32, as `(b, n, heads * d)` of
        `dtype`."""
        _, windows = self._by_the_rules(q, k, v, mask, attn_bias, segment_ids, sinks, order)
        tensors = self._tensors(windows, mask, attn_bias, segment_ids, sinks, order)
        spec, scoring, frame = self._numbers_of(windows, q.shape[-1], dtype=dtype, tokens_first=True)
        return ops.cast(attend(q, k, v, spec, scoring, tensors, frame, self.backend), dtype)

    def _attend_prepared(self, q, k, v, windows, tensors, offset=0, dtype=None):
        """Compute attention of `q, k, v (..., n, d)`, already normalised and rotated. Only xpos rotates here, in
        windows, and takes `(groups, n, d)`.

        The first query is at key `offset`; `dtype` is the precision to compute in if it is not q's.
        """
        groups, n, head_dim = q.shape[0], q.shape[-2], q.shape[-1]
        rank = 0 if self.group is None else self.group.rank
        origin = (0, rank * n - offset) if rank > 0 else (0, 0)
        if self.use_xpos:
            whole = windows
            if tensors["bias"] is None and not unknown(k.shape):  # a bias has the columns of the whole span
                windows = _within(windows, k.shape[1])
            q, k, v, mask = fold(q, k, v, tensors["mask"], windows, offset)
            tensors = beside(mask=mask, bias=tensors["bias"], sinks=tensors["sinks"], seed=tensors["seed"])
            origin = (rank * q.shape[0], 0) if rank > 0 else (0, 0)
            offset, middle = windows.backward, whole.span // 2 - (whole.backward - windows.backward)
            start = offset + whole.forward  # as in upstream, the queries of a window are at the end of its span
            q = self.rel_pos.rotate(q, start, (start - middle, 1))
            k = self.rel_pos.rotate(k, 0, (middle, -1))
        spec, scoring, frame = self._numbers_of(windows, head_dim, offset, origin, dtype)
        out = attend(q, k, v, spec, scoring, tensors, frame, self.backend)
        return unfold(out, groups, n) if self.use_xpos else out

    def _seed(self):
        """Return the seed of what a call drops, None if it drops nothing."""
        return draw_seed(self.salt) if self.training and self.dropout > 0 else None

    def _numbers_of(self, windows, head_dim, offset=0, origin=(0, 0), dtype=None, tokens_first=False):
        return _numbers(windows, self.scale, head_dim, self.softcap, self.shared_qk,
                        self.dropout if self.training else 0., offset, origin, dtype, tokens_first)
