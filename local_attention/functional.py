"""Attention as functions: over any window, in the terms of today's models, and over a span to the left and right."""
import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from . import checks
from .attend import Frame, attend, beside, check_backend, sinks_by_head
from .backends.any_length import unknown
from .backends.spans import cu_bounds, document_bounds
from .cells import compiling
from .spec import NO_LIMIT, Scoring, WindowSpec


@constexpr
def _seed_tensor(seed):
    return Tensor(np.array([seed % 2**32], np.uint32).view(np.int32))


def _seed(seed):
    """Return a seed as int32 `(1,)`, or None if one has to be drawn."""
    if seed is None:
        return None
    return ops.cast(seed, ms.int32).reshape(1) if isinstance(seed, Tensor) else _seed_tensor(seed)


def _check_seed(owner, seed):
    """Check a seed, an int or a Tensor as `described`."""
    if isinstance(seed, tuple):
        shape = checks.tensor(owner, "seed", seed, checks.INTEGERS)
        if shape not in ((), (1,)):
            raise checks.value_error(owner, "seed", "of one number", shape)
    elif seed is not None:
        checks.integer(owner, "seed", seed, -2**63, None)


check_seed = constexpr(_check_seed)


def _check_options(owner, scale, softcap, dropout_rate, seed, return_lse, backend):
    """Check the options that are not tensors, and a seed, an int or a Tensor as `described`."""
    if scale is not None:
        checks.scale(owner, "scale", scale)
    checks.softcap(owner, softcap)
    checks.rate(owner, "dropout_rate", dropout_rate)
    _check_seed(owner, seed)
    checks.boolean(owner, "return_lse", return_lse)
    check_backend(owner, backend)


def _check_known(owner, dropout_rate, backend, *shapes):
    """Refuse what is impossible in a graph that does not know a length."""
    if any(None in shape for shape in shapes):
        if dropout_rate > 0:
            raise checks.value_error(owner, "dropout_rate", "0 in a graph for every length", dropout_rate)
        if backend is not None:
            raise checks.value_error(owner, "backend", "None in a graph for every length", repr(backend))


@constexpr
def _numbers(spec, scale, head_dim, softcap, dropout_rate, offset, lse, placed):
    if spec.sees_everything and not placed:  # where a query stands means nothing; there may be more of them than keys
        offset = 0
    return (spec, Scoring(head_dim ** -0.5 if scale is None else float(scale),
                          None if softcap is None else float(softcap), False, float(dropout_rate)),
            Frame(offset, lse=lse))


INSTEAD = {  # names that other packages use
    "windowed_attention": {"window_size": "spec", "sliding_window": "spec", "causal": "spec", "prefix": "spec",
                           "dropout": "dropout_rate", "attn_mask": "mask"},
    "sliding_window_attention": {"window_size": "window_size_left' and 'window_size_right",
                                 "causal": "window_size_right", "dropout": "dropout_rate", "attn_mask": "mask"}}


@constexpr
def _refuse_names(owner, names):
    checks.arguments(owner, names, checks.parameters(globals()[owner]), INSTEAD[owner])


# ---- windows in general


@constexpr
def _checked_windowed(spec, q, k, v, mask, segment_ids, cu_seqlens, order, attn_bias, sinks, scale, softcap,
                      dropout_rate, seed, return_lse, backend):
    """Check the arguments of a call."""
    owner = "windowed_attention"
    if not isinstance(spec, WindowSpec):
        raise checks.type_error(owner, "spec", "a WindowSpec", spec)
    _check_options(owner, scale, softcap, dropout_rate, seed, return_lse, backend)
    shape = checks.tensor(owner, "q", q, checks.FLOATS)
    if len(shape) != 4 or 0 in shape[1:]:
        raise checks.value_error(owner, "q", "of shape (b, h, n_q, d), with h, n_q and d of at least 1", shape)
    checks.known_width(owner, shape)
    batch, heads, n_q, head_dim = shape
    k_shape = checks.tensor(owner, "k", k, (checks.dtype_name(q[1]),))
    n_k = k_shape[2] if len(k_shape) == 4 else 0
    more = None not in (n_q, n_k) and n_k < n_q
    if len(k_shape) != 4 or 0 in k_shape[1:] or checks.shared((*shape[:2], n_k, head_dim), k_shape) is None or (
            more and not spec.sees_everything):
        least = "" if spec.sees_everything else f" and n_k at least {n_q}"
        raise checks.value_error(owner, "k", f"of shape ({batch}, h_kv, n_k, {head_dim}), h_kv a divisor of {heads}"
                                 f"{least}{checks.exchanged(shape, k_shape)}", k_shape)
    checks.values(owner, v, q[1], k_shape)
    checks.known_width(owner, v[0], "v")
    if mask is not None:
        checks.tensor(owner, "mask", mask, ("Bool",), (batch, n_k), f"of shape (b, n_k), {(batch, n_k)}")
    if segment_ids is not None:
        checks.segment_ids(owner, segment_ids, batch, n_k)
    if cu_seqlens is not None:
        checks.together(owner, ("cu_seqlens", True), ("segment_ids", segment_ids is not None))
        if len(checks.tensor(owner, "cu_seqlens", cu_seqlens, ("Int32", "Int64"))) != 1 or cu_seqlens[0][0] == 1:
            raise checks.value_error(owner, "cu_seqlens", "of shape (m,), 0 and the end of each document",
                                     cu_seqlens[0])
        if n_q != n_k:
            raise checks.value_error(owner, "cu_seqlens", "None where q and k have different lengths", (n_q, n_k))
        if None in (batch, n_k, *cu_seqlens[0]):
            raise checks.value_error(owner, "cu_seqlens", "None in a graph for every length", cu_seqlens[0])
    if order is not None:
        checks.order(owner, order, batch, n_k, spec)
    if more:
        checks.together(owner, ("more queries than keys", True), ("order", order is not None))
        checks.together(owner, ("more queries than keys", True), ("segment_ids", segment_ids is not None))
    if attn_bias is not None:
        _check_bias(owner, attn_bias, spec, batch, heads, n_q)
    if sinks is not None:
        checks.sinks(owner, sinks, heads, (batch, heads, n_q))
    _check_known(owner, dropout_rate, backend, shape, k_shape)


def _check_bias(owner, got, spec, batch, heads, n_q):
    """Check a bias, as `described`, of a call: with a row for each place in a bucket, or for each query."""
    checks.together(owner, ("attn_bias", True), ("a prefix of 'spec'", spec.prefix))
    shape = checks.tensor(owner, "attn_bias", got, checks.FLOATS)
    if NO_LIMIT in (spec.backward, spec.forward):
        raise checks.value_error(owner, "attn_bias", "None where 'spec' has no limit", shape)
    columns = spec.backward + spec.bucket + spec.forward
    of_queries = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (n_q, columns)
    if shape != (heads, spec.bucket, columns) and not of_queries:
        raise checks.value_error(
            owner, "attn_bias", f"of shape (h, bucket, backward + bucket + forward), {(heads, spec.bucket, columns)}, "
            f"or (b or 1, h or 1, n_q, backward + bucket + forward), {(batch, heads, n_q, columns)}", shape)


def _check_ends(cu_seqlens, batch, n):
    """Check the values of the ends of documents, which a graph does not know."""
    ends = cu_seqlens.asnumpy()
    if ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] != batch * n or set(range(0, batch * n, n)) - set(ends):
        raise checks.value_error("windowed_attention", "cu_seqlens", f"0 and then, in order, the end of each document, "
                                 f"with that of each of the {batch} rows of {n} tokens among them",
                                 checks.shown(ends.tolist()))


def windowed_attention(q, k, v, spec=None, *, mask=None, segment_ids=None, cu_seqlens=None, order=None, attn_bias=None,
                       sinks=None, scale=None, softcap=None, dropout_rate=0., seed=None, return_lse=False,
                       backend=None, **unknown):
    r"""
    Attention in which every query sees the keys that a `WindowSpec` shows it, in the terms of today's models.

    Cost and memory are linear in the sequence if the window does not grow with it. All options can be combined, except
    where an error says so.

    Args:
        q (Tensor): `(b, h, n_q, d)`, float32, float16 or bfloat16. The queries stand at the last `n_q`
            positions of the keys, as with a cache: `n_q <= n_k`. Only if `spec` has no limit to either side and
            is not causal (cross-attention) do positions mean nothing, and `n_q` may be larger.
        k (Tensor): `(b, h_kv, n_k, d)` of the same dtype. `h_kv` divides `h`: query head
            `i` reads key head `i // (h / h_kv)`. Keys and values are not repeated in
            memory.
        v (Tensor): `(b, h_kv, n_k, d_v)` of the same dtype, of any width `d_v` (DeepSeek's MLA).
        spec (WindowSpec): Which keys a query sees. It has no default.
        mask (Tensor): Padding mask, bool `(b, n_k)`, True = a real key. Default: ``None`` .
        segment_ids (Tensor): int `(b, n_k)`. Consecutive tokens with the same id are a document. The result is
            that of a separate call on each document: windows, rows of the bias and the prefix start anew. A negative
            id is padding: it sees nothing, and no query sees it. Default: ``None`` .
        cu_seqlens (Tensor): int `(m,)`, the same documents in flash-attention's words: 0, then the end of each
            document, counted over the rows laid end to end. The end of each row is one of them. A number may be
            repeated, so that `m` can stay the same. Needs `n_q = n_k`. Default: ``None`` .
        order (Tensor): int `(b, n_k)`, in place of `causal`: of its span, a query sees the keys whose number is
            at most its own. Tokens with the same number see each other: those of an image or of a diffusion block
            inside a causal row, or of a prompt (prefix LM). A permutation is XLNet's order. Default: ``None`` .
        attn_bias (Tensor): `(h, bucket, backward + bucket + forward)`, added to the scores. The row is the place
            of the query in its bucket, the column the place of the key in what the bucket sees. With a bucket of 1,
            there is a number for each offset. Or with a row for each query,
            `(b or 1, h or 1, n_q, backward + bucket + forward)`. -inf, anything below -1e29 and
            the lowest number of its dtype hide the key: no weight, no gradient. Default: ``None`` .
        sinks (Tensor): `(h,)`, for each head a score that joins the softmax of all its queries and has no value
            (gpt-oss); or one for each query, `(b, h, n_q)`. -inf is no sink. Default: ``None`` .
        scale (float): Multiplies the products of queries and keys; ``None`` is `d ** -0.5`. Default: ``None`` .
        softcap (float): Scaled products become `softcap * tanh(x / softcap)`, before bias and masks
            (Gemma 2). From 1e-30 to 1e30. Default: ``None`` .
        dropout_rate (float): Rate in [0, 1) at which attention weights are dropped. Default: ``0.`` .
        seed (Union[int, Tensor]): Determines which weights are dropped; ``None`` draws a seed from MindSpore's global
            one. Default: ``None`` .
        return_lse (bool): Whether the log-sum-exp is returned too. Default: ``False`` .
        backend (str): The name of a backend; ``None`` is the fastest one that can run the call. Default: ``None`` .

    Returns:
        Tensor `(b, h, n_q, d_v)` of the dtype of `q`. A query that sees no key gets zeros with zero gradient,
        also with a sink.

        With `return_lse`, a tuple of this and the log-sum-exp of the scores in the softmax, including the sink, float32
        `(b, h, n_q)`. It is a natural logarithm, it is -inf for an empty softmax, and it has a gradient.

    Raises:
        TypeError: If an argument is of another type or dtype, or has a name not known here.
        ValueError: If an argument is out of its range, shapes do not agree, a bias comes with a prefix or a span
            without limit, an order with a causal `spec`, or `cu_seqlens` with `segment_ids`.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import WindowSpec, windowed_attention
        >>> q, k, v = ops.randn((1, 8, 1000, 64)), ops.randn((1, 2, 1000, 64)), ops.randn((1, 2, 1000, 64))
        >>> print(windowed_attention(q, k, v, WindowSpec.from_sliding_window(256), softcap=50.).shape)
        (1, 8, 1000, 64)
    """
    def got(x):  # a function within, so that MindSpore's O1 leaves this one as it is (see `cells`)
        return checks.described(x)
    if len(unknown) > 0:
        _refuse_names("windowed_attention", tuple(unknown.keys()))
    _checked_windowed(spec, got(q), got(k), got(v), got(mask), got(segment_ids), got(cu_seqlens), got(order),
                      got(attn_bias), got(sinks), scale, softcap, dropout_rate, got(seed), return_lse, backend)
    spec, scoring, frame = _numbers(spec, scale, q.shape[-1], softcap, dropout_rate, None, return_lse,
                                    segment_ids is not None or order is not None)
    documents = None if segment_ids is None else document_bounds(segment_ids)
    if cu_seqlens is not None:
        if not compiling():
            _check_ends(cu_seqlens, q.shape[0], q.shape[2])
        documents = cu_bounds(cu_seqlens, q.shape[0], q.shape[2])
    order = None if order is None else ops.cast(order, ms.int32)
    tensors = beside(mask=mask, documents=documents, cu_seqlens=cu_seqlens, order=order, bias=attn_bias, sinks=sinks,
                     seed=_seed(seed))
    return attend(q, k, v, spec, scoring, tensors, frame, backend)


# ---- a span to the left and the right


@constexpr
def _checked_sliding(q, k, v, mask, rel_pos_emb, rel_pos_query, left, right, dropout_rate, seed, scale, softcap, sinks,
                     segment_ids, return_lse, backend):
    """Check the arguments; return the number of groups, the span within the sequence, the mask's shape and tiling."""
    owner = "sliding_window_attention"
    checks.non_negative_int(owner, "window_size_left", left)
    checks.non_negative_int(owner, "window_size_right", right)
    _check_options(owner, scale, softcap, dropout_rate, seed, return_lse, backend)
    shape, share = checks.alike(owner, q, k, v)
    checks.known_width(owner, shape)
    checks.known_width(owner, v[0], "v")
    *leading, n, head_dim = shape
    _check_known(owner, dropout_rate, backend, shape)
    groups = None if None in leading else math.prod(leading)
    if mask is not None:
        mask = _mask_shape(owner, checks.tensor(owner, "mask", mask, ("Bool",)), leading, n, share)
    if rel_pos_emb is not None:
        checks.tensor(owner, "rel_pos_emb", rel_pos_emb, checks.FLOATS, (left + right, head_dim),
                      f"of shape (window_size_left + window_size_right, d), {(left + right, head_dim)}")
    if rel_pos_query is not None:
        got = checks.tensor(owner, "rel_pos_query", rel_pos_query, (checks.dtype_name(q[1]),), shape,
                            f"of q's shape {shape}")
        if rel_pos_emb is None:
            raise checks.value_error(owner, "rel_pos_query", "None without 'rel_pos_emb'", got)
    if sinks is not None:
        checks.sinks(owner, sinks, leading[-1] if leading else 1, shape[:-1])
    if segment_ids is not None:
        batch, _ = checks.segment_ids(owner, segment_ids, None, n)
        if groups is not None and groups // share % batch:
            raise checks.value_error(owner, "segment_ids", f"of shape (b, {n}), b a divisor of {groups // share}",
                                     segment_ids[0])
        if mask is not None and groups is not None and math.prod(mask[0]) * math.prod(mask[1]) != batch * n:
            raise checks.value_error(owner, "segment_ids", "of as many rows as 'mask'", segment_ids[0])
    if n is not None:
        left, right = min(left, n), min(right, n)
    return groups, left, right, mask


def _mask_shape(owner, got, leading, n, share):
    """Return a mask's shape without the leading axes in which all of its rows are the same, and how often to repeat
    each remaining axis, so that the number of rows divides the groups."""
    groups, wanted = None if None in leading else math.prod(leading), (*leading, n)
    if len(got) == 1 and got[0] == n:
        return (1, n), (1, 1)
    if len(got) == 2 and got[1] == n:
        batches = [math.prod(leading[:axes]) for axes in range(len(leading))] if groups is not None else []
        fits = groups is None or (got[0] > 0 and groups // share % got[0] == 0)
        if not fits or (len(leading) > 1 and groups is not None and got[0] not in (*batches, groups)):
            raise checks.value_error(owner, "mask", f"of shape (b, {n}) for a batch as q's, {wanted[:-1]}", got)
        return got, (1, 1)
    if len(got) != len(wanted) or any(a not in (1, b) for a, b in zip(got, wanted)):
        raise checks.value_error(owner, "mask", f"broadcastable to {wanted}", got)
    if None in got:
        raise checks.value_error(owner, "mask", "of shape (b, n) in a graph for every length", got)
    rows = len(leading)
    while rows > 0 and got[rows - 1] == 1:  # the same along the last leading axis: one row for all of it
        rows -= 1
    count = math.prod(leading[:rows])
    if share > 1 and groups // share % count:
        raise checks.value_error(owner, "mask", "the same for the heads that share one of k", got)
    as_given = (*got[:rows], got[-1])
    return as_given, tuple(b // a for a, b in zip(as_given, (*leading[:rows], n)))


def _repeated(mask, shape, repeats):
    """Return a mask as `(rows, n)`."""
    if unknown(shape):
        return mask
    mask = mask.reshape(shape)
    if max(repeats) > 1:
        mask = ops.tile(mask, repeats)
    return mask.reshape(-1, mask.shape[-1])


@constexpr
def _span(left, right):
    return WindowSpec(bucket=1, backward=left, forward=right - 1, causal=False)


def sliding_window_attention(q, k, v, mask=None, rel_pos_emb=None, window_size_left=128, window_size_right=128,
                             dropout_rate=0., seed=None, *, rel_pos_query=None, scale=None, softcap=None, sinks=None,
                             segment_ids=None, return_lse=False, backend=None, **unknown):
    r"""
    Attention in which query `i` sees the keys `i - left` to `i + right - 1`, both included.

    That is `window_size_left + window_size_right` keys. The query's own key is the first of the right ones: a
    `window_size_right` of 1 is causal, and with 0 the query does not see itself. `left=2, right=2` on 5 tokens:

    .. code-block::

        ■ ■ · · ·
        ■ ■ ■ · ·
        ■ ■ ■ ■ ·
        · ■ ■ ■ ■
        · · ■ ■ ■

    Cost and memory are linear in the sequence.

    Args:
        q, k, v (Tensor): `(..., n, d)` of one shape and dtype: float32, float16 or bfloat16. k and v may have
            fewer heads, a divisor of q's, and v another width. The softmax is computed in float32.
        mask (Tensor): Padding mask, bool, True = a real key. Its shape is `(n)`; or `(b, n)`, where `b`
            divides the product of q's leading axes; or it has one axis less than q and broadcasts to `(..., n)`.
            Default: ``None`` .
        rel_pos_emb (Tensor): `(left + right, d)`. The product of row `r` and the unscaled query is added to
            the score of the key at offset `r - left` from the query. Default: ``None`` .
        window_size_left (int): Keys seen before the query. Default: ``128`` .
        window_size_right (int): Keys seen from the query on, including its own. Default: ``128`` .
        dropout_rate (float): Rate in [0, 1) at which attention weights are dropped. Default: ``0.`` .
        seed (Union[int, Tensor]): Determines which weights are dropped; ``None`` draws a seed from MindSpore's global
            one. Default: ``None`` .
        rel_pos_query (Tensor): Of q's shape and dtype, multiplied by `rel_pos_emb` in q's place, without a scale:
            Transformer-XL and Conformer score `q + u` against keys and `q + v` against offsets. Default:
            ``None`` .
        scale (float): Multiplies the products of queries and keys; ``None`` is `d ** -0.5`. Default: ``None`` .
        softcap (float): As in `windowed_attention`. Default: ``None`` .
        sinks (Tensor): `(h,)`, as there; `h` is the third axis of q from the end. Or one for each query,
            `(..., n)`. Default: ``None`` .
        segment_ids (Tensor): int `(b, n)`, as there. Default: ``None`` .
        return_lse (bool): Whether the log-sum-exp is returned too. Default: ``False`` .
        backend (str): The name of a backend; ``None`` is the fastest one that can run the call. Default: ``None`` .

    Returns:
        Tensor of the shape of `q`, with the width of `v`, and of q's dtype. A query that sees no real key gets zeros,
        with zero gradient. With `return_lse`, a tuple of this and the log-sum-exp, float32 `(..., n)`.

    Raises:
        TypeError: If an argument is of another type or dtype, or has a name not known here.
        ValueError: If an argument is out of its range or shapes do not agree.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import sliding_window_attention
        >>> q, k, v = (ops.randn((2, 8, 1000, 64)) for _ in range(3))
        >>> print(sliding_window_attention(q, k, v, window_size_left=127, window_size_right=1).shape)
        (2, 8, 1000, 64)
    """
    def got(x):  # see `windowed_attention`
        return checks.described(x)
    if len(unknown) > 0:
        _refuse_names("sliding_window_attention", tuple(unknown.keys()))
    groups, left, right, mask_shape = _checked_sliding(
        got(q), got(k), got(v), got(mask), got(rel_pos_emb), got(rel_pos_query), window_size_left, window_size_right,
        dropout_rate, got(seed), scale, softcap, got(sinks), got(segment_ids), return_lse, backend)
    if groups == 0:
        out = ops.zeros(q.shape[:-1] + v.shape[-1:], q.dtype)
        return (out, ops.zeros(q.shape[:-1], ms.float32)) if return_lse else out
    if mask is not None:
        mask = _repeated(mask, *mask_shape)
    if rel_pos_emb is not None:  # embeddings of offsets that no key of this sequence has do nothing
        rel_pos_emb = rel_pos_emb[window_size_left - left:window_size_left + right]
    spec, scoring, frame = _numbers(_span(left, right), scale, q.shape[-1], softcap, dropout_rate, 0, return_lse,
                                    True)
    documents = None if segment_ids is None else document_bounds(segment_ids)
    tensors = beside(mask=mask, documents=documents, sinks=sinks_by_head(sinks, q), rel_pos_emb=rel_pos_emb,
                     rel_pos_query=rel_pos_query, seed=_seed(seed))
    return attend(q, k, v, spec, scoring, tensors, frame, backend)
