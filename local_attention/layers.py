"""The layers of a model beside attention, by the kernel of backends/native where it can run."""
import math
from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import checks
from .attend import draw_seed, new_salt
from .backends import portable
from .backends.native.library import FLOATS, INT32, INT64, custom
from .backends.native.rows import made, row_numbers
from .backends.any_length import unknown
from .backends.dropout import column_hash, keep_factors, row_hash, seeded_rows
from .cells import InFloat32, last

EPSILON = 1e-5  # LayerNorm's, as in PyTorch


class _Reorder(nn.Cell):
    """Takes the rows of a matrix, which are numbered along the axes of `shape`, in the order of the given `axes`.

    It replaces a transpose and a split of whole rows. On CPU, outside a graph, MindSpore copies a strided view thirty
    times slower than it gathers rows.
    """

    def __init__(self, shape, axes):
        super().__init__()
        order = np.arange(math.prod(shape), dtype=np.int32).reshape(shape).transpose(axes).reshape(-1)
        self.order, self.back = Tensor(order), Tensor(np.argsort(order).astype(np.int32))
        self.as_it_is = bool((np.diff(order) == 1).all())  # true for one token
        self.gather = ops.Gather()

    def construct(self, rows):
        return rows if self.as_it_is else self.gather(rows, self.order, 0)

    def bprop(self, rows, out, dout):
        return (dout if self.as_it_is else self.gather(dout, self.back, 0),)


reorder = constexpr(lru_cache(maxsize=64)(_Reorder))


class _Take(nn.Cell):
    """Takes rows in this order, but splits the last axis of `shape` into `sizes`; returns a tensor for each part."""

    def __init__(self, shape, sizes, axes):
        super().__init__()
        rows = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
        orders = [part.transpose(axes).reshape(-1) for part in np.split(rows, np.cumsum(sizes)[:-1], -1)]
        self.orders = tuple(Tensor(order) for order in orders)
        self.back = Tensor(np.argsort(np.concatenate(orders)).astype(np.int32))
        self.gather, self.concat = ops.Gather(), ops.Concat(0)

    def construct(self, rows):
        parts = ()
        for order in self.orders:
            parts += (self.gather(rows, order, 0),)
        return parts

    def bprop(self, rows, out, dout):
        return (self.gather(self.concat(dout), self.back, 0),)


take = constexpr(lru_cache(maxsize=64)(_Take))


class _FusedHeads(InFloat32):
    """Splits projected heads, `(b, n, (heads + 2 * kv_heads) * d)`, into queries `(b, heads, n, d)`, keys and values,
    and rotates queries and keys if there are frequencies. The kernel does it in one pass, and its gradient in
    another."""

    def __init__(self, heads, kv_heads, first_query, frequencies):
        super().__init__()
        self.sizes = Tensor(np.zeros((heads, kv_heads), np.int32))
        self.numbers = row_numbers(first_query, *frequencies)
        self.split = custom("split_heads", [FLOATS, INT32, INT64], 3 * [FLOATS])
        self.join = custom("join_heads", [*3 * [FLOATS], INT64], [FLOATS])

    def construct(self, qkv):
        return self.split(qkv, self.sizes, self.numbers)

    def bprop(self, qkv, out, dout):
        return (self.join(last(dout[0]), last(dout[1]), last(dout[2]), self.numbers),)


@constexpr
def _fused_heads(*args):
    return made(_FusedHeads, *args)


def fused_heads(attn, heads, kv_heads):
    """Return a Cell that splits the projected heads of a LocalAttention and rotates them, so that only attention is
    left to compute. Return None if `attn` is another Cell or has hooks, if there is more to compute, or if the kernel
    cannot run."""
    if not hasattr(attn, "may_be_split") or not attn.may_be_split:
        return None
    if attn.shared_qk or attn.use_xpos or attn.group is not None or attn.backend not in (None, "native"):
        return None
    return _fused_heads(heads, kv_heads, attn.windows.forward,
                        () if attn.rel_pos is None else attn.rel_pos.frequencies)


def split_alone(heads, kv_heads):
    """Return a Cell that splits projected heads and rotates nothing, None if the kernel cannot run."""
    return _fused_heads(heads, kv_heads, 0, ())


class _FusedLayerNorm(InFloat32):
    """Runs the kernel and its gradient, float32 in and out."""

    def __init__(self, epsilon):
        super().__init__()
        self.numbers = row_numbers(epsilon)
        self.forward = custom("layer_norm_forward", [*3 * [FLOATS], INT64], [FLOATS])
        self.backward = custom("layer_norm_backward", [*2 * [FLOATS], INT64, FLOATS],
                                      3 * [FLOATS])

    def construct(self, x, gamma, beta):
        return self.forward(x, gamma, beta, self.numbers)

    def bprop(self, x, gamma, beta, out, dout):
        return self.backward(x, gamma, self.numbers, last(dout))


class _FusedGEGLU(InFloat32):
    """Runs the kernel and its gradient, float32 in and out."""

    def __init__(self):
        super().__init__()
        self.numbers = row_numbers(0.)
        self.forward = custom("geglu_forward", [FLOATS, INT64], [FLOATS])
        self.backward = custom("geglu_backward", [FLOATS, INT64, FLOATS],
                                      [FLOATS])

    def construct(self, x):
        return self.forward(x, self.numbers)

    def bprop(self, x, out, dout):
        return (self.backward(x, self.numbers, last(dout)),)


@constexpr
def _fused(name, shape, *args):
    """Return the kernel of a layer for inputs of a shape, None if plain operators have to run it."""
    cell = {"layer_norm": _FusedLayerNorm, "geglu": _FusedGEGLU}[name]
    return None if None in shape or 0 in shape else made(cell, *args)


class LayerNorm(nn.Cell):
    """MindSpore's LayerNorm over the last axis, with PyTorch's epsilon and, on CPU, a gradient twenty times as fast.

    It does not inherit from MindSpore's class, because `amp` at O1 cannot rewrite what does.
    """

    def __init__(self, dim):
        super().__init__()
        self.dim, self.epsilon = dim, EPSILON
        self.gamma = ms.Parameter(ops.ones((dim,), ms.float32), name="gamma")
        self.beta = ms.Parameter(ops.zeros((dim,), ms.float32), name="beta")
        self.plain = ops.LayerNorm(-1, -1, self.epsilon)

    def extend_repr(self):
        return f"{checks.settings(self)}, epsilon={self.epsilon}"

    def construct(self, x):
        fused = _fused("layer_norm", x.shape, self.epsilon)
        if fused is None or x.shape[-1] != self.dim:
            return self.plain(x, ops.cast(self.gamma, x.dtype), ops.cast(self.beta, x.dtype))[0]
        gamma, beta = ops.cast(self.gamma, ms.float32), ops.cast(self.beta, ms.float32)
        return ops.cast(fused(ops.cast(x, ms.float32), gamma, beta), x.dtype)


class GEGLU(nn.Cell):
    r"""
    The first half of the last axis, gated by GELU of the second: `a * GELU(g)` (Shazeer, 2020).

    Inputs:
        - **x** (Tensor) - `(..., 2 * d)`.

    Outputs:
        Tensor of shape `(..., d)`.

    Raises:
        TypeError: If `x` is not a Tensor of floats.
        ValueError: If its last axis is not even.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention.transformer import GEGLU
        >>> print(GEGLU()(ops.ones((2, 5, 6))).shape)
        (2, 5, 3)
    """

    def construct(self, x):
        shape, count, half = _halves(self.cls_name, checks.described(x))
        if unknown(shape):
            return ops.mul(x[..., :half], portable.gelu(x[..., half:]))
        fused = _fused("geglu", x.shape)
        if fused is not None:
            return ops.cast(fused(ops.cast(x, ms.float32)), x.dtype)
        x, gate = take((count, 2), (1, 1), (1, 0))(x.reshape(-1, half))
        return ops.mul(x, portable.gelu(gate)).reshape(shape)


@constexpr
def _halves(owner, x):
    """Return the shape of half of a tensor with halves side by side, its number of rows, and their length."""
    shape = checks.tensor(owner, "x", x, checks.FLOATS)
    if not shape or shape[-1] % 2 or 0 in shape:
        raise checks.value_error(owner, "x", "of an even last axis, not empty", shape)
    count = None if None in shape else math.prod(shape[:-1])
    return (*shape[:-1], shape[-1] // 2), count, shape[-1] // 2


class _Dropout(nn.Cell):
    """Dropout in training that a seed repeats. What `nn.Dropout` drops on CPU depends on its threads, too."""

    def __init__(self, rate):
        super().__init__()
        self.rate, self.salt = rate, new_salt(rate)

    def extend_repr(self):
        return checks.settings(self)

    def construct(self, x):
        if self.rate == 0 or not self.training:
            return x
        rows, columns = _hashes(x.shape)
        keep = keep_factors(seeded_rows(rows, draw_seed(self.salt)), columns, self.rate)
        return ops.mul(x, ops.cast(keep.reshape(x.shape), x.dtype))


@constexpr
def _hashes(shape):
    if None in shape:
        raise checks.value_error("FeedForward", "dropout", "0 in training in a graph for every length", "another")
    rows = row_hash([0], np.arange(math.prod(shape[:-1])))
    return Tensor(rows.reshape(-1, 1)), Tensor(column_hash(np.arange(shape[-1])))


class FeedForward(nn.SequentialCell):
    r"""
    The feed-forward half of a layer: LayerNorm, a projection to twice `int(dim * mult * 2 / 3)`, GEGLU, dropout, back.

    Args:
        dim (int): Size of the last axis.
        mult (float): How many times wider than `dim` a plain feed-forward with as many weights would be.
            Default: ``4`` .
        dropout (float): Rate in [0, 1) at which activations are dropped in training. Default: ``0.`` .

    Inputs:
        - **x** (Tensor) - `(..., dim)`.

    Outputs:
        Tensor of the shape of `x`.

    Raises:
        TypeError: If an argument is of another type, or has a name not known here.
        ValueError: If an argument is out of its range.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention.transformer import FeedForward
        >>> print(FeedForward(8)(ops.ones((2, 5, 8))).shape)
        (2, 5, 8)
    """

    def __init__(self, dim, mult=4, dropout=0., **unknown):
        owner = type(self).__name__  # before there is a `cls_name`
        checks.arguments(owner, unknown, checks.parameters(FeedForward), {"ff_mult": "mult", "ff_dropout": "dropout"})
        inner = int(checks.positive_int(owner, "dim", dim) * checks.positive_number(owner, "mult", mult) * 2 / 3)
        if inner < 1:
            raise checks.value_error(owner, "mult", "large enough for int(dim * mult * 2 / 3) to be positive", mult)
        super().__init__(LayerNorm(dim), nn.Dense(dim, inner * 2, has_bias=False), GEGLU(),
                         _Dropout(checks.rate(owner, "dropout", dropout)), nn.Dense(inner, dim, has_bias=False))
        self.dim, self.mult = dim, mult

    def extend_repr(self):
        return checks.settings(self)
