"""Rotary position embedding (RoFormer, Su et al., 2021) and its length-extrapolating form, xpos (Sun et al., 2022).

The functions with upstream's names return upstream's results. LocalAttention runs `SinusoidalEmbeddings.rotate`: a
rotation is relative, so each token is rotated once, by its own position, before any windowing.
"""
import math
from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import checks
from .cells import Float32, InFloat32, last
from .backends import portable
from .backends.native.library import FLOATS, INT32, INT64, custom
from .backends.native.rows import made, row_numbers
from .backends.any_length import unknown

ELEMENTS_AT_ONCE = 2**22  # in a table: products of equal shapes are fast, but a table as large as q wastes memory


def exists(value):
    """Whether a value is not None."""
    return value is not None


def rotate_half(x):
    """Return `(-second, first)` of the two halves of the last axis."""
    first, second = ops.split(x, x.shape[-1] // 2, -1)
    return ops.cat((ops.neg(second), first), -1)


def apply_rotary_pos_emb(q, k, freqs, scale=1):
    """Rotate k by the angles `freqs (n, d)`, in radians, and q by the last `q.shape[-2]` of them.

    Args:
        q (Tensor): `(..., n_q, d)`.
        k (Tensor): `(..., n, d)`, `n >= n_q`.
        freqs (Tensor): `(n, d)`, as `SinusoidalEmbeddings` returns them.
        scale (Union[Tensor, float]): xpos's factors `(n, d)`, which multiply the queries and divide the keys; without
            xpos, a scalar or a tensor of one element. Default: ``1``.

    Returns:
        Tuple of the rotated q and k.
    """
    n_q = q.shape[-2]
    scale = scale if isinstance(scale, Tensor) else ops.full((1,), scale, dtype=ms.float32)
    q_freqs, q_scale = freqs[freqs.shape[-2] - n_q:], scale[scale.shape[0] - n_q:] if scale.ndim == 2 else scale
    q = q * ops.cos(q_freqs) * q_scale + rotate_half(q) * ops.sin(q_freqs) * q_scale
    k = k * ops.cos(freqs) / scale + rotate_half(k) * ops.sin(freqs) / scale
    return q, k


class SinusoidalEmbeddings(nn.Cell):
    r"""
    Angles and xpos scales of rotary position embedding.

    Dimensions `i` and `i + dim/2` of a token at position `t` turn together by
    `t * theta ** (-2i / dim)` radians.

    Args:
        dim (int): Head dimension, even.
        scale_base (float): The number of positions over which an xpos scale is multiplied by its base; needed with
            `use_xpos`. Default: ``None`` .
        use_xpos (bool): Whether to return xpos scales. Default: ``False`` .
        theta (float): Base of the wavelengths. Default: ``10000`` .

    Inputs:
        - **x** (Tensor) - Any tensor of shape `(..., n, d)`; only its `n` is used.

    Outputs:
        Tuple of the angles, float32 `(n, dim)`, and the scales, float32 `(n, dim)` with xpos and ones of
        shape `(1,)` without.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If `dim` is odd or not positive, or `use_xpos` is given without a positive `scale_base`.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention.rotary import SinusoidalEmbeddings
        >>> freqs, scale = SinusoidalEmbeddings(8)(ops.zeros((2, 5, 8)))
        >>> print(freqs.shape, scale.shape)
        (5, 8) (1,)
    """

    def __init__(self, dim, scale_base=None, use_xpos=False, theta=10000):
        super().__init__()
        owner = "SinusoidalEmbeddings"
        if checks.positive_int(owner, "dim", dim) % 2:
            raise checks.value_error(owner, "dim", "even for rotary embeddings", dim)
        self.dim, self.use_xpos = dim, checks.boolean(owner, "use_xpos", use_xpos)
        if use_xpos and scale_base is None:
            raise checks.value_error(owner, "scale_base", "given with 'use_xpos'", None)
        self.scale_base = None if scale_base is None else checks.positive_number(owner, "scale_base", scale_base)
        self.theta = checks.positive_number(owner, "theta", theta)
        self.inv_freq = self.theta ** -(np.arange(0, dim, 2) / dim)

    def extend_repr(self):
        return checks.settings(self)

    @property
    def inv_freq(self):
        """Radians per position, float64 `(dim / 2,)`."""
        return np.array(self.frequencies)

    @inv_freq.setter
    def inv_freq(self, value):
        self.frequencies = tuple(np.asarray(value, np.float64).tolist())  # hashable: a constant of a graph

    def construct(self, x):
        return _embeddings(self.frequencies, x.shape[-2], self.scale_base if self.use_xpos else None)

    def rotate(self, x, start=0, xpos_power=None):
        """
        Rotate `x (..., n, dim)`, float32, whose tokens are at `start, start + 1, …`.

        `xpos_power` is None or `(first, step)`: the token at index r is scaled by xpos's base to the power of
        `(first + step * r) / scale_base`.
        """
        power = None if xpos_power is None else (xpos_power[0] / self.scale_base, xpos_power[1] / self.scale_base)
        if unknown(x.shape) or portable.exporting():  # tables of x's shape would be larger than the weights
            return _rotation_of_any(self.frequencies, x.shape[-2], start, power)(x)
        far = start + x.shape[-2] >= 2**31  # the kernel's positions are int32
        fused = None if far or xpos_power is not None else _fused_rotation(self.frequencies)
        if fused is not None:
            return fused(x, _as_tensor(start))
        return _rotation(self.frequencies, x.shape, start, power)(x)

    def rotate_at(self, x, position):
        """Rotate `x (g, n, dim)`, float32, whose tokens are at `position, position + 1, …`. `position` is an int, or in
        a step of decoding a Tensor, int32 `(1,)`."""
        fused = _fused_rotation(self.frequencies)
        if fused is not None:
            return fused(x, _as_tensor(position) if isinstance(position, int) else position)
        if isinstance(position, int):
            return _rotation(_rounded(self.frequencies), x.shape, position, None)(x)
        return _rotation_at(self.frequencies, x.shape[1])(x, position)

    def rotate_rows(self, x, positions):
        """Rotate `x (g, n, dim)`, float32, all tokens of a row by its position, int32 `(g, 1, 1)`."""
        return _rotation_at(self.frequencies, 1)(x, positions)


def _xpos_base(dim):
    """Return the bases of xpos's scales, float64 `(dim / 2,)`, in (0, 1); their exponents depend on the position."""
    return (np.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)


@constexpr
def _embeddings(frequencies, n, scale_base):
    angles, scale = np.outer(np.arange(n), frequencies), np.ones(1)
    if scale_base is not None:
        scale = np.tile(_xpos_base(2 * len(frequencies)) ** ((np.arange(n) - n // 2)[:, None] / scale_base), 2)
    return Tensor(np.tile(angles, 2).astype(np.float32)), Tensor(scale.astype(np.float32))


def rotation_matrix(dim):
    """Return `rotate_half` as a matrix by which rows are multiplied."""
    half = np.eye(dim // 2)
    return Tensor(np.block([[0 * half, half], [-half, 0 * half]]).astype(np.float32))


def rotation_tables(frequencies, start, n, power=None):
    """Return cosines and sines for the positions `start … start + n - 1`, float64 `(n, dim)`, times xpos's scales."""
    angles, scale = np.tile(np.outer(np.arange(start, start + n), frequencies), 2), 1.
    if power is not None:
        scale = np.tile(_xpos_base(2 * len(frequencies)) ** (power[0] + power[1] * np.arange(n)[:, None]), 2)
    return scale * np.cos(angles), scale * np.sin(angles)


class _Rotation(Float32):
    """Computes `x * cos + rotate_half(x) * sin`, with tables of the shape of x."""

    def __init__(self, frequencies, shape, start, power):
        super().__init__()
        *leading, n, dim = shape
        groups = math.prod(leading)
        together = max(size for size in range(1, groups + 1)
                       if groups % size == 0 and (size == 1 or size * n * dim <= ELEMENTS_AT_ONCE))
        self.cos, self.sin = (Tensor(np.tile(table, (together, 1)).astype(np.float32))
                              for table in rotation_tables(frequencies, start, n, power))
        self.half = rotation_matrix(dim)
        self.parts = groups // together
        self.split, self.concat, self.matmul = ops.Split(0, self.parts), ops.Concat(0), ops.MatMul()

    def construct(self, x):
        rows = x.reshape(-1, x.shape[-1])
        if self.parts == 1:  # MindSpore warns about the gradient of a Concat of one
            return self._turned(rows).reshape(x.shape)
        parts = []
        for part in self.split(rows):
            parts.append(self._turned(part))
        return self.concat(parts).reshape(x.shape)

    def _turned(self, rows):
        return ops.add(ops.mul(rows, self.cos), ops.mul(self.matmul(rows, self.half), self.sin))


_rotation = constexpr(lru_cache(maxsize=64)(_Rotation))


def _in_turns(frequencies):
    """Return frequencies in units of 2**-32 of a turn, int32. Their products with positions wrap around as turns do, so
    angles are equally precise at any position. Rounding changes the distance between two tokens by less than 1e-9 of
    it."""
    return np.round(np.array(frequencies) / (2 * np.pi) * 2**32).astype(np.int64).astype(np.int32)


@constexpr
def _rounded(frequencies):
    return tuple((_in_turns(frequencies).astype(np.float64) * (2 * np.pi / 2**32)).tolist())


class _RotationAt(Float32):
    """Computes the same for n tokens whose first position is a Tensor."""

    def __init__(self, frequencies, n):
        super().__init__()
        self.units = Tensor(np.tile(_in_turns(frequencies), 2)[None])
        self.half, self.after = rotation_matrix(2 * len(frequencies)), Tensor(np.arange(n, dtype=np.int32)[:, None])

    def construct(self, x, position):
        units = ops.cast(ops.mul(ops.add(self.after, position), self.units), ms.float32)
        angles = ops.mul(units, 2 * math.pi / 2**32)
        turned = ops.matmul(x.reshape(-1, x.shape[-1]), self.half).reshape(x.shape)
        return ops.add(ops.mul(x, ops.cos(angles)), ops.mul(turned, ops.sin(angles)))


_rotation_at = constexpr(lru_cache(maxsize=64)(_RotationAt))


class _RotationOfAny(Float32):
    """Computes the same if a graph does not know the leading axes of x or, without xpos, its length."""

    def __init__(self, frequencies, n, start, power):
        super().__init__()
        self.half = rotation_matrix(2 * len(frequencies))
        first = start * np.array(frequencies)
        first = np.arctan2(np.sin(first), np.cos(first))  # fmod would not know pi as well as these
        self.units, self.first = (Tensor(np.tile(_in_turns(angles), 2)[None]) for angles in (frequencies, first))
        self.tables = None
        if n is not None:
            self.tables = tuple(Tensor(table.astype(np.float32))
                                for table in rotation_tables(frequencies, start, n, power))

    def construct(self, x):
        if self.tables is None:
            positions = ops.cast(ops.arange(0, x.shape[-2], 1), ms.int32).reshape(-1, 1)
            turned = ops.add(ops.mul(positions, self.units), self.first)
            angles = ops.mul(ops.cast(turned, ms.float32), 2 * math.pi / 2**32)
            cos, sin = ops.cos(angles), ops.sin(angles)
        else:
            cos, sin = self.tables
        return ops.add(ops.mul(x, cos), ops.mul(ops.matmul(x, self.half), sin))


_rotation_of_any = constexpr(lru_cache(maxsize=64)(_RotationOfAny))


class _FusedRotation(InFloat32):
    """Computes the same by the native kernel, for tokens whose first position is a Tensor."""

    def __init__(self, frequencies):
        super().__init__()
        self.numbers, self.back = (row_numbers(back, *frequencies) for back in (0, 1))
        self.turn = custom("rotary", [FLOATS, INT32, INT64], [FLOATS])

    def construct(self, x, position):
        return self.turn(x, position, self.numbers)

    def bprop(self, x, position, out, dout):
        return self.turn(last(dout), position, self.back), position


@constexpr
def _fused_rotation(frequencies):
    """Return the kernel as a Cell, None if it cannot run."""
    return made(_FusedRotation, frequencies)


@constexpr
def _as_tensor(position):
    return Tensor(np.array([position], np.int32))
