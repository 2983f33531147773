"""The one channel: checked tensors in, a backend chosen once a problem, the same out of every backend."""
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore._c_expression import MixedPrecisionType
from mindspore.ops import constexpr

from . import checks
from .backends import ascend, blocked, dense, native
from .spec import WindowSpec

BACKENDS = {"ascend": ascend, "native": native, "blocked": blocked, "dense": dense}  # in order of preference


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is known before its values are: what a backend is chosen and planned by."""
    spec: WindowSpec
    groups: int  # batch entries times heads, heads fastest
    n_q: int
    n_k: int
    head_dim: int
    scale: float
    dtype: str = "Float32"
    batch: int = 0  # rows of the key mask, 0 where there is none
    bias_shape: Optional[tuple] = None  # (heads, period, columns)
    bias_backward: int = 0  # how many positions before its period a bias's first column stands
    bias_is_constant: bool = False  # whether no gradient of it is wanted
    by_offset: bool = False  # whether embeddings of the offsets from query to key are scored
    hide_self: bool = False
    dropout: float = 0.
    offset: int = 0  # the position of the first query among the keys
    origin: tuple = (0, 0)  # which group and position of a larger problem dropout counts the first ones here as

    @property
    def heads(self):
        """How many heads differ in more than their tensors."""
        return self.bias_shape[0] if self.bias_shape else 1

    @property
    def bias_period(self):
        """After how many positions the bias repeats."""
        return self.bias_shape[1] if self.bias_shape else 1

    def bias_index(self, queries, keys):
        """Where in a head's flattened bias the score of a query and a key, given by position, finds its entry."""
        _, period, columns = self.bias_shape
        column = keys - (queries // period * period - self.bias_backward)
        return queries % period * columns + np.clip(column, 0, columns - 1)


def refusals(problem):
    """Why each backend cannot run a problem, None for one that can."""
    return {name: module.why_not(problem) for name, module in BACKENDS.items()}


def choose(problem, backend=None):
    """The name of the backend that runs a problem: the one asked for, else the first that can."""
    if backend is None:
        return next(name for name in BACKENDS if BACKENDS[name].why_not(problem) is None)
    reason = BACKENDS[check_backend("attend", backend)].why_not(problem)
    if reason is not None:
        raise ValueError(f"For 'attend', the backend '{backend}' cannot run this call: it {reason}.")
    return backend


def check_backend(owner, backend):
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise checks.value_error(owner, "backend", f"None or one of {', '.join(BACKENDS)}", repr(backend))
    return backend


class Float32(nn.Cell):
    """A Cell that stays in float32 where `to_float` or `amp` casts the model around it.

    Outside a graph, every operator under a `to_float(float16)` Cell gets float16, whatever was cast to what before.
    """

    def __init__(self):
        super().__init__()
        self.to_float(ms.float32)

    def add_flags(self, **flags):
        if "fp16" in flags:
            flags.update(fp16=False, bf16=False, fp32=True)
        return super().add_flags(**flags)


class InFloat32(nn.Cell):
    """What `Float32` is, for Cells with a gradient of their own and inputs in float32: a graph casts nothing inside of
    them, and with `to_float` it would take their gradients for float32 where the model is not."""

    def __init__(self):
        super().__init__()
        self.mixed_precision_type = MixedPrecisionType.FP32


class _Run(Float32):
    """A backend's function as a Cell: float32 in, float32 out."""

    def construct(self, run, constants, q, k, v, key_mask, bias, rel_pos_emb, seed):
        return run(constants, q, k, v, key_mask, bias, rel_pos_emb, seed)


_run = _Run()


@lru_cache(maxsize=64)
def _prepared(problem, name):
    module = BACKENDS[name]
    return (module.run, module.prepare(problem), problem.dtype in getattr(module, "AS_GIVEN", ()),
            getattr(module, "ANY_AXES", False))


@constexpr
def _chosen(spec, scale, q_shape, n_k, dtype, mask_shape, bias_shape, bias_backward, bias_is_constant, by_offset,
            hide_self, dropout, offset, origin, backend):
    *leading, n_q, head_dim = q_shape
    problem = Problem(spec, math.prod(leading), n_q, n_k, head_dim, scale, str(dtype),
                      mask_shape[0] if mask_shape else 0, bias_shape, bias_backward, bias_is_constant, by_offset,
                      hide_self, dropout, offset, origin)
    return _prepared(problem, choose(problem, backend))


def attend(q, k, v, spec, scale, key_mask=None, bias=None, bias_backward=0, rel_pos_emb=None, hide_self=False,
           dropout=0., seed=None, offset=0, origin=(0, 0), backend=None, dtype=None, bias_is_constant=False):
    """Attention of `q (..., n_q, d)` over `k, v (..., n_k, d)`, every query over the keys that `spec` shows it.

    Args:
        q, k, v (Tensor): float32, float16 or bfloat16, of any leading axes, heads fastest. The softmax is in float32.
        spec (WindowSpec): Which keys a query sees; query `r` stands at position `r + offset`, key `j` at `j`.
        scale (float): Multiplies the products of queries and keys.
        key_mask (Tensor): bool `(batch, n_k)`, True = a real key; `batch` divides the product of
            the leading axes.
        bias (Tensor): `(heads, period, columns)`, added to the scaled products: the query at position `i` takes row
            `i % period`, the key at position `j` column `j - (i - i % period - bias_backward)`.
        rel_pos_emb (Tensor): `(backward + 1 + forward, d)` with a bucket of 1: row r is scored against q, unscaled,
            and added for the key at position `i + r - backward`.
        hide_self (bool): Whether a query's own key scores -5e4, seen only where nothing else is.
        dropout (float): The rate at which weights are dropped, by `seed`, int32 `(1,)`; drawn where it is None.
        offset (int): The position of the first query among the keys.
        origin (tuple): The group and the position that the first ones are of the whole that this is a part of: the
            parts of a whole drop, by one seed, what the whole does.
        backend (str): By name, or None for the fastest that can.
        dtype (mindspore.dtype): The precision that is called for, where it is not q's: of what was rotated in float32.
        bias_is_constant (bool): Whether no gradient of the bias is wanted.

    Returns:
        Tensor of q's shape and dtype; zeros, with zero gradient, for a query that sees no real key.
    """
    shape = q.shape
    if 0 in shape:
        return q
    run, constants, as_given, any_axes = _chosen(
        spec, scale, shape, k.shape[-2], q.dtype if dtype is None else dtype,
        None if key_mask is None else key_mask.shape, None if bias is None else bias.shape, bias_backward,
        bias_is_constant, rel_pos_emb is not None, hide_self, dropout, offset, origin, backend)
    if dropout > 0 and seed is None:
        seed = draw_seed()
    flatten = not any_axes and len(shape) != 3  # on CPU a reshape is a copy
    if flatten:
        q, k, v = _flat(q), _flat(k), _flat(v)
    if as_given:
        out = run(constants, q, k, v, key_mask, bias, rel_pos_emb, seed)
    else:
        out = _run(run, constants, _in_float32(q), _in_float32(k), _in_float32(v), key_mask, _in_float32(bias),
                   _in_float32(rel_pos_emb), seed)
    out = ops.cast(out, q.dtype)
    return out.reshape(shape) if flatten else out


def _flat(x):
    return x.reshape(-1, x.shape[-2], x.shape[-1])


def _in_float32(x):
    """A backward pass runs outside the Cell that keeps the forward one in float32, and so needs its inputs in it."""
    return None if x is None else ops.cast(x, ms.float32)


class _FourBytes(Float32):
    """Four numbers, each below 256, as digits of an int32: by an operator that has kernels everywhere."""

    def __init__(self):
        super().__init__()
        self.likely, self.powers = Tensor(np.ones(256, np.float32)), Tensor(256 ** np.arange(4, dtype=np.int32))
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self):
        return self.sum(ops.mul(ops.cast(ops.multinomial(self.likely, 4), ms.int32), self.powers), 0)


_four_bytes = _FourBytes()


def draw_seed(salt=0):
    """A seed for one call, int32 `(1,)`, from MindSpore's global one.

    All draws in one graph give the same number at a step: what drops in several places needs a `new_salt` for each.
    """
    return ops.bitwise_xor(_four_bytes(), salt)


def new_salt(dropout):
    """A number for a Cell that drops, of the generator that `mindspore.set_seed` seeds too."""
    return int(np.random.randint(2**31)) if dropout else 0


def explain(problem, backend=None):
    """In words: which backend runs a problem, why each other one does not, what it works on, and what compiles anew."""
    chosen = choose(problem, backend)
    computed, at_once = BACKENDS[chosen].scores(problem)
    elements = problem.groups * (2 * problem.n_q + 2 * problem.n_k) * problem.head_dim
    size = 2 if problem.dtype in ascend.AS_GIVEN else 4
    instead = f"could run it, but {chosen} {'was asked for' if backend else 'comes first'}"
    lines = [f"{chosen}: runs this"]
    lines += [f"{name}: {reason or instead}" for name, reason in refusals(problem).items() if name != chosen]
    lines += [f"multiply-adds: {2 * computed * problem.head_dim:,} forward",
              f"scores: {computed:,} ({4 * computed:,} bytes), of which {4 * at_once:,} bytes at once",
              f"q, k, v and the output: {elements:,} numbers ({size * elements:,} bytes)",
              "compiles anew for: another shape or dtype of an input, a mask or bias where there was none or none where"
              " there was one, training in place of evaluation or the reverse"]
    return "\n".join(lines)
