"""Windowed attention over given queries, keys and values."""
import math
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import checks, parallel
from .attend import Frame, Problem, attend, beside, check_backend, draw_seed, explain, new_salt
from .backends.any_length import unknown
from .backends.spans import SELF_SCORE, document_bounds
from .cells import Float32
from .rotary import SinusoidalEmbeddings, exists  # noqa: F401 - where upstream has it too
from .spec import Scoring, WindowSpec

TOKEN_SELF_ATTN_VALUE = SELF_SCORE
LARGEST = {"Float32": (2 - 2.**-23) * 2.**127, "Float16": 65504., "BFloat16": (2 - 2.**-7) * 2.**127,
           "Float64": (2 - 2.**-52) * 2.**1023}


def default(value, instead):
    """A value, or where it is None another."""
    return instead if value is None else value


@constexpr
def _lowest(got):
    checks.tensor("max_neg_value", "tensor", got, tuple(LARGEST))
    return -LARGEST[str(got[1])]


def max_neg_value(tensor):
    """The most negative finite number of a tensor's dtype."""
    return _lowest(checks.described(tensor))


def pad_to_multiple(tensor, multiple, dim=-1, value=0):
    """Pad an axis (counted from the end) at its end to a multiple: `(whether it was needed, the tensor)`."""
    missing = -tensor.shape[dim] % multiple
    if missing == 0:
        return False, tensor
    axis = dim % tensor.ndim
    padding = ops.full(tensor.shape[:axis] + (missing,) + tensor.shape[axis + 1:], value, dtype=tensor.dtype)
    return True, ops.cat((tensor, padding), axis)


def look_around(x, backward=1, forward=0, pad_value=-1, dim=2):
    """Beside each window of `x (b, windows, n, ...)` its neighbours: `(b, windows, (backward + 1 + forward) * n, ...)`.

    Windows that do not exist are filled with `pad_value`; `dim` is the axis that grows.
    """
    windows = x.shape[1]
    before, after = (ops.full(x.shape[:1] + (count,) + x.shape[2:], pad_value, dtype=x.dtype)
                     for count in (backward, forward))
    padded = ops.cat([part for part in (before, x, after) if part.shape[1] > 0], 1)
    return ops.cat([padded[:, start:start + windows] for start in range(backward + 1 + forward)], dim)


class _UnitScale(Float32):
    """Rows over their Euclidean norm times a scale for each column; a row of zeros stays one."""

    def construct(self, x, scale):
        x = ops.cast(x, ms.float32)
        squares = ops.matmul(ops.square(x), ops.ones((x.shape[1], 1), ms.float32))
        factor = ops.rsqrt(ops.maximum(squares, 1e-24))  # of PyTorch's normalize: the norm is at least 1e-12
        return ops.mul(x, ops.matmul(factor, scale.reshape(1, -1)))  # on CPU, products are faster than broadcasts


_unit_scale = _UnitScale()


def l2norm(x, scale=None):
    """x over its Euclidean norm along the last axis, computed in float32, times a `scale (d,)`."""
    if scale is None:
        scale = ops.ones((x.shape[-1],), ms.float32)
    return ops.cast(_unit_scale(x.reshape(-1, x.shape[-1]), scale).reshape(x.shape), x.dtype)


@dataclass(frozen=True)
class Windows:
    """Who sees whom in upstream's words."""
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
        """Positions in the windows that a window sees."""
        return self.backward + self.size + self.forward

    @property
    def distances(self):
        """What a bias of distances is asked for: queries, keys as far as the last of them, and keys after it."""
        rows = 1 if self.exact else self.size
        return rows, self.backward + rows, self.forward

    def bias_rule(self, shape):
        """The shapes of a bias but for its heads, in words, and whether one is of them: a row for each place in a
        window, or a single one where a span moves."""
        shapes = [(self.size, self.span)]
        if self.exact:
            shapes.append((1, self.backward + 1 + self.forward))
        return " or ".join(f"(heads, {rows}, {columns})" for rows, columns in shapes), tuple(shape) in shapes

    @property
    def spec(self):
        return WindowSpec(1 if self.exact else self.size, self.backward, self.forward, self.causal, self.prefix)

    def folded(self, n, n_k=None, offset=0):
        """The sequence as windows side by side, each with its own span of keys: indices `(windows, size)` and
        `(windows, span)`, and which of the keys exist, the first query being at key `offset` of `n_k`."""
        n_k = n if n_k is None else n_k
        starts = np.arange(0, n, self.size)[:, None]
        keys = offset + starts - self.backward + np.arange(self.span)
        return np.minimum(starts + np.arange(self.size), n - 1), np.clip(keys, 0, n_k - 1), (0 <= keys) & (keys < n_k)


@constexpr
def _checked(owner, windows, autopad, use_xpos, rotary_dim, group, dropout, backend, q, k, v, mask, attn_bias,
             segment_ids, sinks, window_size):
    """The rules of a call: how many groups it has, and its windows."""
    if window_size is not None:
        if not use_xpos:
            raise checks.value_error(owner, "window_size", "None in a call without 'use_xpos'", window_size)
        windows = replace(windows, size=checks.positive_int(owner, "window_size", window_size))
    shape, share = checks.alike(owner, q, k, v)
    *leading, n, head_dim = shape
    groups = None if None in leading else math.prod(leading)
    if rotary_dim not in (None, head_dim):
        raise checks.value_error(owner, "q", f"of head dimension {rotary_dim}, the rotary embedding's", head_dim)
    known = groups is not None and n is not None  # not in a graph that is compiled for every length
    if not known and dropout > 0:
        raise checks.value_error(owner, "dropout", "0 in training in a graph for every length", dropout)
    if not known and backend is not None:
        raise checks.value_error(owner, "backend", "None in a graph for every length", repr(backend))
    documents = "segment_ids", segment_ids is not None
    checks.together(owner, documents, ("use_xpos", use_xpos))
    checks.together(owner, ("attn_bias", attn_bias is not None), ("prefix", windows.prefix))
    if group is not None:
        # where a document began, which may be on any rank, a window that moves with its query need not know
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
    if attn_bias is not None:
        heads, *rest = checks.tensor(owner, "attn_bias", attn_bias, checks.FLOATS)
        rule, right = windows.bias_rule(rest)
        if not right or heads == 0 or (groups or 0) % heads:
            raise checks.value_error(owner, "attn_bias", f"of shape {rule}, heads a divisor of {groups}", attn_bias[0])
        if heads % share and share % heads:
            raise checks.value_error(owner, "attn_bias", f"of a multiple or a divisor of the {share} heads that share "
                                     "one of k", attn_bias[0])
    if segment_ids is not None:
        batch, _ = checks.segment_ids(owner, segment_ids, None if mask is None else mask[0][0], n)
        if known and groups // share % batch:
            raise checks.value_error(owner, "segment_ids", f"of shape (batch, {n}), batch a divisor of {groups}",
                                     segment_ids[0])
    if sinks is not None:
        checks.sinks(owner, sinks, shape[-3] if len(shape) > 2 else 1)
    return groups, windows


@constexpr
def _numbers(windows, scale, head_dim, softcap, hide_self, dropout, offset, origin, dtype):
    """A call's numbers as `attend` takes them."""
    return (windows.spec, Scoring(head_dim ** -0.5 if scale is None else scale, softcap, hide_self, dropout),
            Frame(offset, origin, dtype))


@constexpr
def _fold_indices(windows, n, n_k, offset):
    queries, keys, real = windows.folded(n, n_k, offset)
    return (len(queries), Tensor(queries.reshape(-1).astype(np.int32)), Tensor(keys.reshape(-1).astype(np.int32)),
            Tensor(real.reshape(1, -1)))


def _fold_indices_of_any_length(windows, n):
    """The same where a graph does not know the length."""
    count = (n + windows.size - 1) // windows.size
    starts = ops.arange(0, count * windows.size, windows.size).reshape(-1, 1)
    queries, keys = starts + ops.arange(0, windows.size, 1), starts - windows.backward + ops.arange(0, windows.span, 1)
    real = ops.logical_and(keys >= 0, keys < n)
    return count, ops.clamp(queries, 0, n - 1).reshape(-1), ops.clamp(keys, 0, n - 1).reshape(-1), real.reshape(1, -1)


def fold(q, k, v, mask, windows, offset=0):
    """Windows as further batch entries, for positions that are counted anew in each: q `(windows * g, size, d)`, k and
    v `(windows * g, span, d)`, and a mask of the keys that are real. The first query stands at key `offset`."""
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
    """`(g, ..., d)`, gathered, as `(count * g, n, d)`: heads stay the fastest axis of the groups."""
    groups, head_dim = x.shape[0], x.shape[2]
    return ops.gather(x, index, 1).reshape(groups, count, n, head_dim).swapaxes(0, 1).reshape(-1, n, head_dim)


def unfold(x, groups, n):
    """`(windows * g, size, d)` as `(g, n, d)`."""
    _, size, head_dim = x.shape
    return x.reshape(-1, groups, size, head_dim).swapaxes(0, 1).reshape(groups, -1, head_dim)[:, :n]


class LocalAttention(nn.Cell):
    r"""
    Attention in which each query sees the keys of its own window of the sequence and of the windows beside it.

    Query :math:`i` of window :math:`w = \lfloor i / W \rfloor` sees the keys from the start of window
    :math:`w - look\_backward` to the end of window :math:`w + look\_forward`; with `exact_windowsize`, the keys
    :math:`i - W \cdot look\_backward` to :math:`i + W \cdot look\_forward`, both included. When `causal`, none after
    :math:`i`. ``print(attn.spec.show(16))`` draws it. Cost and memory are linear in the sequence.

    The arguments and results are those of the PyTorch package `local-attention` 1.11.2 by Phil Wang.

    Args:
        window_size (int): Positions in a window, W.
        causal (bool): Whether a query sees no key after itself. Default: ``False`` .
        look_backward (int): Windows seen before the query's own. Default: ``1`` .
        look_forward (int): Windows seen after it; ``None`` is 0 when causal and 1 otherwise. Default: ``None`` .
        dropout (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        shared_qk (bool): Whether queries and keys are the same vectors: keys are L2-normalised, and a query attends
            to itself only where it has nothing else. Default: ``False`` .
        rel_pos_emb_config (tuple): Earlier form of `dim`: its first entry. Default: ``None`` .
        dim (int): Head dimension, which turns rotary position embedding on. Default: ``None`` .
        autopad (bool): Whether any sequence length is accepted, not only multiples of the window. Default: ``False`` .
        exact_windowsize (bool): Whether every query sees the same number of keys. Default: ``False`` .
        scale (float): Multiplies the products of queries and keys; ``None`` is :math:`d^{-0.5}`. Default: ``None`` .
        use_rotary_pos_emb (bool): Whether `dim` turns rotary embedding on. Default: ``True`` .
        use_xpos (bool): Whether rotary embedding, where it is on, is xpos's. Default: ``False`` .
        xpos_scale_base (float): In positions; ``None`` is :math:`\lfloor W/2 \rfloor`. Default: ``None`` .
        prefix (int): How many positions at the start of a sequence every query sees, wherever its window is; when
            `causal`, those at or after them. Default: ``0`` .
        softcap (float): Scaled products become :math:`softcap \cdot \tanh(x / softcap)`, before bias and masks
            (Gemma 2); ``None`` leaves them. Default: ``None`` .
        backend (str): What computes it, by name: ``"dense"`` , ``"blocked"`` , ``"native"`` or ``"ascend"`` ; ``None``
            is the fastest that can. Default: ``None`` .
        sequence_parallel (Union[bool, str]): Whether q, k, v, mask and output are one rank's slice of sequences that
            the ranks of a communication group hold together, in the order of their ranks: ``True`` is all ranks, a
            str the name of a group of `mindspore.communication.create_group`. Keys, values, mask and documents of the
            neighbours are exchanged as far as spans reach, of as many heads as k has, and gradients on the way back.
            Documents need `exact_windowsize` then, and go without `attn_bias`. All ranks call it with slices of
            one length `n`. It is a multiple of W, with `autopad` too, and at least :math:`W \cdot look\_backward` and
            :math:`W \cdot look\_forward`. In one compiled function, two calls of which neither depends on the other
            may be ordered differently on different ranks: put those into two. Default: ``False`` .

    Inputs:
        - **q**, **k**, **v** (Tensor) - :math:`(..., n, d)` with any leading axes, heads fastest, of one shape and
          dtype: float32, float16 or bfloat16. k and v may have fewer heads, a divisor of q's: query head `i` of `h`
          reads key head :math:`\lfloor i / (h / h_{kv}) \rfloor`. The softmax is computed in float32.
        - **mask** (Tensor) - bool :math:`(batch, n)`, True = a real key; `batch` divides the product of the leading
          axes. Default: ``None`` .
        - **input_mask** (Tensor) - Another name of `mask`, which goes before it. Default: ``None`` .
        - **attn_bias** (Tensor) - :math:`(h, W, W \cdot (1 + look\_backward + look\_forward))`, added to the scores:
          row = place of the query in its window, column = place of the key in the window's span. With
          `exact_windowsize` also :math:`(h, 1, W \cdot (look\_backward + look\_forward) + 1)`, a number for each
          offset. Default: ``None`` .
        - **window_size** (int) - W for this call; needs `use_xpos`. Default: ``None`` .
        - **segment_ids** (Tensor) - int :math:`(batch, n)`: consecutive tokens of one id are a document, and the result
          is that of a call on each by itself. A negative id is padding: seen by nobody, and it sees nothing.
          Default: ``None`` .
        - **sinks** (Tensor) - :math:`(h,)`, a score that joins the softmax of every query of its head and has no value
          (gpt-oss). Default: ``None`` .

    Outputs:
        Tensor of the shape and dtype of `q`. A query that sees no real key gets zeros, with zero gradient.

    Raises:
        TypeError: If an argument or input is of another type or dtype.
        ValueError: If an argument is out of its range, shapes do not agree, the sequence is no multiple of the window
            without `autopad`, or, with `sequence_parallel`, there is no such group or a slice is too short.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import LocalAttention
        >>> q, k, v = (ops.randn((2, 8, 1000, 64)) for _ in range(3))
        >>> attn = LocalAttention(dim=64, window_size=128, causal=True, autopad=True)
        >>> print(attn(q, k, v, mask=ops.ones((2, 1000)).bool()).shape)
        (2, 8, 1000, 64)
    """

    def __init__(self, window_size, causal=False, look_backward=1, look_forward=None, dropout=0., shared_qk=False,
                 rel_pos_emb_config=None, dim=None, autopad=False, exact_windowsize=False, scale=None,
                 use_rotary_pos_emb=True, use_xpos=False, xpos_scale_base=None, *, prefix=0, softcap=None,
                 backend=None, sequence_parallel=False):
        super().__init__()
        owner = type(self).__name__
        self.window_size = checks.positive_int(owner, "window_size", window_size)
        self.causal = checks.boolean(owner, "causal", causal)
        self.look_backward = checks.non_negative_int(owner, "look_backward", look_backward)
        if look_forward is None:
            look_forward = 0 if causal else 1
        self.look_forward = checks.non_negative_int(owner, "look_forward", look_forward)
        if causal and look_forward:
            raise checks.value_error(owner, "look_forward", "0 when causal", look_forward)
        self.exact_windowsize = checks.boolean(owner, "exact_windowsize", exact_windowsize)
        self.prefix = checks.non_negative_int(owner, "prefix", prefix)
        self.softcap = checks.softcap(owner, softcap)
        self.windows = Windows(self.window_size, self.look_backward, self.look_forward, causal, exact_windowsize,
                               self.prefix)
        self.spec = self.windows.spec
        self.dropout = checks.rate(owner, "dropout", dropout)
        self.salt = new_salt(dropout)
        self.shared_qk = checks.boolean(owner, "shared_qk", shared_qk)
        self.autopad = checks.boolean(owner, "autopad", autopad)
        self.scale = None if scale is None else checks.number(owner, "scale", scale)
        checks.boolean(owner, "use_xpos", use_xpos)
        self.backend = check_backend(owner, backend)
        self.sequence_parallel = sequence_parallel
        self.group = parallel.sequence_group(owner, sequence_parallel)

        for other in (("use_xpos", use_xpos), ("sequence_parallel", self.group)):
            checks.together(owner, ("prefix", prefix), other)

        if rel_pos_emb_config is not None:
            if not isinstance(rel_pos_emb_config, (tuple, list)) or not rel_pos_emb_config:
                raise checks.type_error(owner, "rel_pos_emb_config", "a tuple of at least the head dimension",
                                        rel_pos_emb_config)
            dim = rel_pos_emb_config[0]
        self.dim = None if dim is None else checks.positive_int(owner, "dim", dim)
        if xpos_scale_base is not None:
            checks.positive_number(owner, "xpos_scale_base", xpos_scale_base)
        self.rel_pos, self.rotary_dim = None, None
        if checks.boolean(owner, "use_rotary_pos_emb", use_rotary_pos_emb) and dim is not None:
            if dim % 2:
                raise checks.value_error(owner, "dim", "even for rotary embeddings", dim)
            if use_xpos and xpos_scale_base is None:
                xpos_scale_base = checks.positive_number(owner, "xpos_scale_base", window_size // 2)
            self.rotary_dim = dim
            self.rel_pos = SinusoidalEmbeddings(dim, scale_base=xpos_scale_base, use_xpos=use_xpos)
        self.use_rotary_pos_emb = use_rotary_pos_emb
        self.use_xpos = use_xpos and self.rel_pos is not None  # it is a kind of rotary embedding

    def extend_repr(self):
        return checks.settings(self)

    def explain(self, n, dtype=None, mask=False, attn_bias=False, *, segment_ids=False, sinks=False, share=1):
        """In words: the backend that would run a sequence of n, why no other would, and what one key head of it costs.

        Args:
            n (int): Sequence length.
            dtype (mindspore.dtype): Of q, k and v; ``None`` is float32. Default: ``None`` .
            mask (bool): Whether the call has a mask. Default: ``False`` .
            attn_bias (bool): Whether the call has a bias. Default: ``False`` .
            segment_ids (bool): Whether the call has documents; they are counted as one. Default: ``False`` .
            sinks (bool): Whether the call has sinks. Default: ``False`` .
            share (int): How many query heads share a key head. Default: ``1`` .

        Returns:
            str, a line for each backend, the options, the multiply-adds, the bytes of scores and of inputs and output,
            and what a compiled function compiles anew for.
        """
        owner = "LocalAttention.explain"
        checks.positive_int(owner, "n", n)
        checks.positive_int(owner, "share", share)
        for name, value in dict(mask=mask, attn_bias=attn_bias, segment_ids=segment_ids, sinks=sinks).items():
            checks.boolean(owner, name, value)
        if dtype is not None and (isinstance(dtype, str) or str(dtype) not in checks.FLOATS):
            raise checks.type_error(owner, "dtype", "None or MindSpore's float32, float16 or bfloat16", dtype)
        windows, head_dim = self.windows, self.rotary_dim or 64
        groups, n_q, n_k, offset, halo = share, n, n, 0, ""
        if self.group is not None:
            offset, after = self.group.before(windows.backward), self.group.after(windows.forward)
            n_k = offset + n + after
            halo = f"\nhalo: {offset + after} keys and values of other ranks, whatever n"
        if self.use_xpos:
            groups, n_q, n_k, offset = len(windows.folded(n)[0]) * share, windows.size, windows.span, windows.backward
        spec, scoring, _ = self._numbers_of(windows, head_dim)
        return explain(Problem(
            spec, scoring, groups, n_q, n_k, head_dim, checks.dtype_name(dtype or ms.float32), share,
            batch=groups // share if self.use_xpos else int(mask), documents=int(segment_ids),
            bias_shape=(share, windows.size, windows.span) if attn_bias else None, sinks=share if sinks else 0,
            offset=offset), self.backend) + halo

    def construct(self, q, k, v, mask=None, input_mask=None, attn_bias=None, window_size=None, *, segment_ids=None,
                  sinks=None):
        if mask is None:
            mask = input_mask
        groups, windows = _checked(
            "LocalAttention", self.windows, self.autopad, self.use_xpos, self.rotary_dim, self.group,
            self.dropout if self.training else 0., self.backend, checks.described(q), checks.described(k),
            checks.described(v), checks.described(mask), checks.described(attn_bias), checks.described(segment_ids),
            checks.described(sinks), window_size)
        if groups == 0:
            return q
        shape, dtype = q.shape, q.dtype
        flat = self.group is not None or self.use_xpos
        if flat:
            q, k, v = _flat(q), _flat(k), _flat(v)
        if self.shared_qk:
            k = l2norm(k)
        offset = 0
        if self.group is not None:
            k, v, mask, segment_ids, offset = parallel.with_halo(
                self.group, k, v, mask, segment_ids, windows.backward, windows.forward)
        if self.rel_pos is not None:  # a rotation is computed in float32, and what is rotated stays there
            q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
        if self.rel_pos is not None and not self.use_xpos:
            q = self.rel_pos.rotate(q, offset + windows.forward)  # the end of the span, relative to k
            k = self.rel_pos.rotate(k)
        documents = None if segment_ids is None else document_bounds(segment_ids)
        tensors = beside(mask, documents, attn_bias, sinks, seed=self.seed())
        out = ops.cast(self.attend_prepared(q, k, v, windows, tensors, offset, dtype), dtype)
        return out.reshape(shape) if flat else out

    def attend_prepared(self, q, k, v, windows, tensors, offset=0, dtype=None):
        """Attention of `q, k, v (..., n, d)` that are normalised and rotated, but for xpos's rotation in windows, which
        takes `(groups, n, d)`.

        The first query stands at key `offset`; `dtype` is the precision called for, where it is not q's.
        """
        groups, n, head_dim = q.shape[0], q.shape[-2], q.shape[-1]
        rank = 0 if self.group is None else self.group.rank
        origin = (0, rank * n - offset) if rank > 0 else (0, 0)
        if self.use_xpos:
            mask, documents, bias, sinks, rel_pos_emb, seed = tensors
            q, k, v, mask = fold(q, k, v, mask, windows, offset)
            tensors = beside(mask, documents, bias, sinks, rel_pos_emb, seed)
            origin = (rank * q.shape[0], 0) if rank > 0 else (0, 0)
            offset, middle = windows.backward, windows.span // 2
            start = windows.span - windows.size  # as upstream has it, a window's queries stand at the end of its span
            q = self.rel_pos.rotate(q, start, (start - middle, 1))
            k = self.rel_pos.rotate(k, 0, (middle, -1))
        spec, scoring, frame = self._numbers_of(windows, head_dim, offset, origin, dtype)
        out = attend(q, k, v, spec, scoring, tensors, frame, self.backend)
        return unfold(out, groups, n) if self.use_xpos else out

    def seed(self):
        """Of what a call drops, None where it drops nothing."""
        return draw_seed(self.salt) if self.training and self.dropout > 0 else None

    def _numbers_of(self, windows, head_dim, offset=0, origin=(0, 0), dtype=None):
        return _numbers(windows, self.scale, head_dim, self.softcap, self.shared_qk,
                        self.dropout if self.training else 0., offset, origin, dtype)


def _flat(x):
    return x.reshape(-1, x.shape[-2], x.shape[-1])
