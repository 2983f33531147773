"""The one function that all attention goes through. It chooses a backend once for each problem."""
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from . import checks, settings
from .backends import any_length, ascend, blocked, dense, native, portable, shield
from .backends.native.library import exporting
from .backends.spans import FAINT, FAR, HIDDEN
from .cells import AsGiven, Float32, Once
from .spec import Scoring, WindowSpec

BACKENDS = {backend.name: backend for backend in (
    ascend.ASCEND, native.NATIVE, blocked.BLOCKED, any_length.ANY_LENGTH, dense.DENSE)}  # in order of preference


@dataclass(frozen=True)
class Frame:
    """Which part of a larger problem a call computes, and what it should return."""
    offset: Optional[int] = 0  # the position of the first query among the keys; None: the last query is at the last key
    origin: tuple = (0, 0)  # the first (group, position) within the larger problem; dropout counts from it
    dtype: Optional[ms.Type] = None  # the precision to compute in if it is not q's, as after a rotation in float32
    bias_is_constant: bool = False  # whether the bias needs no gradient, and hides keys by HIDDEN alone
    lse: bool = False  # whether the log-sum-exp is returned too
    tokens_first: bool = False  # whether to return the output of q `(b, heads, n, d)` as `(b, n, heads * d)`


WHOLE = Frame()


@dataclass(frozen=True)
class Problem:
    """What is known of a call before its tensors have values. The choice of a backend and its plan depend on it alone.

    A length, or the number of groups, is None in a graph that is compiled for any length.
    """
    spec: WindowSpec
    scoring: Scoring
    groups: Optional[int]  # of the queries: batch entries times heads, heads fastest
    n_q: Optional[int]
    n_k: Optional[int]
    d: int  # the width of queries and keys
    d_v: int  # the width of values
    dtype: str = "Float32"
    per_key_head: int = 1  # how many consecutive query heads read the same key head
    heads_in_row: int = 1  # how many heads are side by side in a row of the output, for backends that write it so
    frame: Frame = WHOLE
    shapes: tuple = ()  # (name, shape) of each tensor beside q, k and v
    device: str = "CPU"

    def shape(self, name):
        """Return the shape of a tensor beside q, k and v; None if the call does not have it."""
        return dict(self.shapes).get(name)

    def has(self, name):
        return self.shape(name) is not None

    def rows(self, name):
        """Return the length of such a tensor's first axis; 0 if the call does not have it."""
        return self.shape(name)[0] if self.has(name) else 0

    @property
    def uses(self):
        """The names of what a backend has to take for this: tensors, and options that are not at their default."""
        options = {"kv_heads": self.per_key_head > 1, "prefix": self.spec.prefix > 0, "lse": self.frame.lse,
                   "softcap": self.scoring.softcap is not None, "hide_self": self.scoring.hide_self,
                   "dropout": self.scoring.dropout > 0, "v_width": self.d_v != self.d, "bias_rows": self.bias_rows,
                   "sink_rows": self.has("sinks") and len(self.shape("sinks")) == 3}
        return {name for name, _ in self.shapes} | {name for name, there in options.items() if there}

    @property
    def bias_rows(self):
        """Whether the bias has a row for each query, not for each place."""
        return self.has("bias") and len(self.shape("bias")) == 4

    @property
    def offset(self):
        """The position of the first query among the keys; None if a graph does not know it."""
        if self.frame.offset is None and None not in (self.n_q, self.n_k):
            return self.n_k - self.n_q
        return self.frame.offset

    @property
    def heads(self):
        """The number of heads that have a bias of their own; 1 without a bias."""
        return self.shape("bias")[-3] if self.has("bias") else 1

    @property
    def bias_period(self):
        """The number of positions after which the columns of the bias begin anew."""
        if not self.has("bias"):
            return 1
        return self.spec.bucket if self.bias_rows else self.shape("bias")[1]

    @property
    def any_length(self):
        """Whether any size that a plan depends on is unknown."""
        return None in (self.groups, self.n_q, self.n_k, *(self.rows(name) for name in (
            "mask", "documents", "order", "bias")))

    def bias_index(self, queries, keys):
        """Return the index, in a head's flattened bias, of the entry for a query and a key at these positions."""
        period, columns = self.bias_period, self.shape("bias")[-1]
        column = keys - (queries // period * period - self.spec.backward)
        row = queries - self.offset if self.bias_rows else queries % period
        return row * columns + np.clip(column, 0, columns - 1)


def beside(mask=None, documents=None, cu_seqlens=None, order=None, bias=None, sinks=None, rel_pos_emb=None,
           rel_pos_query=None, seed=None, **others):
    """Return the tensors that accompany q, k and v by name; those that a call does not have are None. A dict, because
    compiled functions give a NamedTuple or a dataclass of tensors no gradient. A backend that does not take one of
    `others` refuses the call.

    mask: bool `(batch, n_k)`, True = a real key; `batch` divides the number of groups. documents: int32 `(batch, n_k,
    2)`, the first and the last position of each position's document, made by `document_bounds`. cu_seqlens: beside
    `documents`, the same by their ends, if there is no padding. order: int32 `(batch or 1, n_k)`: a query sees keys
    whose number is at most its own. bias: `(heads, period, columns)`, added to the scaled products; what is not above
    -1e29, or the lowest number of its dtype, hides the key: the query at position `i` uses row `i % period`, and the
    key at `j` column `j - (i - i % period - backward)`; in a document, positions count from its start. Or `(batch or 1,
    heads or 1, n_q, columns)`, with a row for each query; the period is the bucket. sinks: `(heads,)` or, for each
    query, `(batch, heads, n_q)`, a score in each softmax that has no value. rel_pos_emb: `(backward + 1 + forward, d)`,
    for a bucket of 1: the product of row r and the unscaled q, or `rel_pos_query` of q's shape, is added to the score
    of the key at `i + r - backward`. seed: int32 `(1,)`, which determines what dropout drops.
    """
    return {"mask": mask, "documents": documents, "cu_seqlens": cu_seqlens, "order": order, "bias": bias,
            "sinks": sinks, "rel_pos_emb": rel_pos_emb, "rel_pos_query": rel_pos_query, "seed": seed, **others}


ALONE = beside()


def sinks_by_head(sinks, q):
    """Return sinks as `beside` takes them: `(heads,)`, or of each query `(batch, heads, n_q)`, for any leading axes."""
    if sinks is None or len(sinks.shape) == len(q.shape) - 1 == 3 or sinks.shape != q.shape[:-1]:
        return sinks
    return sinks.reshape(-1, q.shape[-3] if len(q.shape) > 2 else 1, q.shape[-2])


# ---- choosing a backend


class use_backend:
    """
    Set what `backend=None` means from here on, for all Cells and functions, including the fused layers of models.

    A plain call holds until the next one; in a `with` statement, it holds for the block. What a call returns may be
    entered again, also within itself. Under ``"dense"`` everything runs by plain operators, which a compiled function
    can differentiate twice. A function that was compiled earlier keeps the backend that it was compiled with.

    Args:
        backend (str): ``"ascend"`` , ``"native"`` , ``"blocked"`` , ``"any_length"`` or ``"dense"`` ; ``None`` is the
            fastest one that can run a call.

    Raises:
        ValueError: If there is no such backend.

    Supported Platforms:
        Plain Python, the same everywhere.

    Examples:
        >>> import local_attention
        >>> with local_attention.use_backend("dense"):
        ...     print(local_attention.LocalAttention(8).explain(64).splitlines()[0])
        dense: runs this
    """

    def __init__(self, backend):
        self.backend, self.before = check_backend("use_backend", backend), []
        self._set()
        self.is_set = True  # for the first `with`

    def _set(self):
        self.before.append(settings.backend)
        settings.backend = self.backend

    def __enter__(self):
        if not self.is_set or settings.backend != self.backend:  # another call may have come between
            self._set()
        self.is_set = False
        return self

    def __exit__(self, *error):
        settings.backend = self.before.pop()


def refusals(problem):
    """Return why each backend cannot run a problem, None for those that can."""
    return {name: backend.refusal(problem) for name, backend in BACKENDS.items()}


def choose(problem, backend=None):
    """Return the name of the backend that runs a problem: the requested one, else the first that can."""
    if exporting() == "ONNX":
        for there, rule in ((problem.any_length, "known lengths, one length for a file"),
                            (problem.scoring.dropout > 0, "no dropout, as in evaluation")):
            if there:
                raise ValueError(f"For 'attend', a call that is exported to ONNX must have {rule}.")
    backend = backend or settings.backend
    if backend is None:
        for name, able in BACKENDS.items():
            if able.refusal(problem) is None:
                return name
        raise ValueError("For 'attend', no backend can run this call: "
                         + "; ".join(f"'{name}' {reason}" for name, reason in refusals(problem).items()) + ".")
    reason = BACKENDS[check_backend("attend", backend)].refusal(problem)
    if reason is not None:
        raise ValueError(f"For 'attend', the backend '{backend}' cannot run this call: it {reason}.")
    return backend


def check_backend(owner, backend):
    if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
        raise checks.value_error(owner, "backend", f"None or one of {', '.join(BACKENDS)}", checks.shown(backend))
    return backend


_once, _twice = Once(twice=False), Once(twice=True)


class _Run(Float32):
    """Runs a backend's function as a Cell, in float32."""

    def construct(self, run, constants, q, k, v, tensors):
        return run(constants, q, k, v, tensors)


class _RunAsGiven(AsGiven):
    """Runs a backend's function as a Cell, with the dtypes of its inputs, for backends that take them as they are."""

    def construct(self, run, constants, q, k, v, tensors):
        return run(constants, q, k, v, tensors)


_run, _run_as_given = _Run(), _RunAsGiven()


def prepared(problem, backend=None):
    """Choose a backend for a problem, and return what `run` needs besides tensors: a tuple, because a graph loses the
    names of a NamedTuple's fields. This is plain Python: a Cell may call it in its constructor."""
    return _prepared(problem, choose(problem, backend), settings.of_kernel())


@lru_cache(maxsize=64)
def _prepared(problem, name, of_kernel):
    able = BACKENDS[name]
    return (problem.frame, problem.scoring.dropout > 0, able.run, able.prepare(problem),
            problem.dtype != "Float32" and problem.dtype in able.dtypes, able.any_axes, able.tokens_first,
            {None: None, True: _twice, False: _once}[able.twice], able.shielded and shield.wanted(problem),
            able.hides or problem.frame.bias_is_constant)


@constexpr
def _empty(shape):
    return 0 in shape


def problem_of(spec, scoring, frame, q_shape, k_shape, v_shape, dtype, shapes, device=None):
    """Return the problem of a call on tensors of these shapes; `shapes` are (name, shape) of those beside q, k, v.
    `device` is MindSpore's if it is None."""
    *leading, n_q, d = q_shape
    *key_leading, n_k, _ = k_shape
    if not {"bias", "rel_pos_emb"} & {name for name, _ in shapes}:  # their columns are those of the whole span
        known = None not in (n_q, n_k)
        spec = spec.within(max(n_k, n_q + (frame.offset or 0)) if known else FAR)
    return Problem(
        spec, scoring, None if None in leading else math.prod(leading), n_q, n_k, d, v_shape[-1],
        checks.dtype_name(frame.dtype or dtype), 1 if leading == key_leading else q_shape[-3] // k_shape[-3],
        q_shape[-3] if frame.tokens_first else 1, frame, shapes, device or settings.device())


@constexpr
def _prepared_for(spec, scoring, frame, q_shape, k_shape, v_shape, dtype, shapes, backend):
    return prepared(problem_of(spec, scoring, frame, q_shape, k_shape, v_shape, dtype, shapes), backend)


def _shapes(tensors):
    """Return (name, shape) of the tensors that a call has."""
    found = ()
    for name, x in tensors.items():
        if x is not None:
            found += ((name, x.shape),)
    return found


def attend(q, k, v, spec, scoring, tensors=ALONE, frame=WHOLE, backend=None):
    """Compute attention of `q (..., n_q, d)` over the keys of `k, v (..., n_k, d)` that `spec` shows to each query.

    Args:
        q, k, v (Tensor): float32, float16 or bfloat16, with any leading axes, heads fastest. k and v have as many heads
            as q, or a divisor of that number. The softmax is in float32.
        spec (WindowSpec): Which keys a query sees; query `r` stands at position `r + offset`, key `j` at `j`.
        scoring (Scoring): How a score is made.
        tensors (dict): The optional tensors of the call, as `beside` returns them. If dropout needs a seed and there
            is none, one is drawn.
        frame (Frame): Which part of a larger problem this is.
        backend (str): The name of a backend; None is the fastest one that can run the call.

    Returns:
        Tensor of q's shape, or as `frame` asks for it, and of q's dtype; a query that sees no real key gets zeros, with
        zero gradient. With `frame.lse`, a tuple of this and the log-sum-exp, float32, of q's shape without the last
        axis.
    """
    if _empty(q.shape):
        out = q if q.shape[-1] == v.shape[-1] else ops.zeros(q.shape[:-1] + v.shape[-1:], q.dtype)
        return (out, ops.full(q.shape[:-1], float("-inf"), dtype=ms.float32)) if frame.lse else out
    return run(_prepared_for(spec, scoring, frame, q.shape, k.shape, v.shape, q.dtype, _shapes(tensors), backend),
               q, k, v, tensors)


def run(prepared, q, k, v, tensors):
    """Compute what `attend` does, of a problem that is `prepared`."""
    frame, drops, run_backend, constants, as_given, any_axes, as_asked, once, shielded, hides = prepared
    shape, dtype = q.shape[:-1] + v.shape[-1:], q.dtype
    seed = draw_seed() if drops and tensors["seed"] is None else tensors["seed"]
    bias = tensors["bias"] if hides and not _narrow(tensors["bias"]) else _hiding(tensors["bias"])
    query = tensors["rel_pos_query"]
    if not as_given:
        q, k, v = _in_float32(q), _in_float32(k), _in_float32(v)
    shielded = shielded and not portable.exporting()
    if shielded:
        k, v = shield.whole(k, v)
    if not any_axes and len(shape) != 3:  # on CPU a reshape copies
        q, k, v, query = _flat(q), _flat(k), _flat(v), None if query is None else _flat(query)
    if as_given:
        out, lse = _run_as_given(run_backend, constants, q, k, v, _renamed(tensors, bias, query, seed, _as_it_is))
    else:
        out, lse = _run(run_backend, constants, q, k, v, _renamed(tensors, bias, query, seed, _in_float32))
        if once is not None:
            out, lse = once(out), once(lse) if frame.lse else None
    if shielded:
        out, lse = shield.marked(out, lse)
    out = ops.cast(out if any_axes else out.reshape(shape), dtype)
    if frame.tokens_first:
        b, heads, n, width = shape
        out = (out if as_asked else out.swapaxes(1, 2)).reshape(b, n, heads * width)
    if frame.lse:
        return out, lse.reshape(shape[:-1])
    return out


def _flat(x):
    return x.reshape(-1, x.shape[-2], x.shape[-1])


def _renamed(tensors, bias, query, seed, cast):
    """Return the tensors of a call with this bias, query of offsets and seed, and with floats after a `cast`. All are
    named anew: in a graph that is differentiated, a dict that is changed loses what is known of its other entries."""
    return beside(mask=tensors["mask"], documents=tensors["documents"], cu_seqlens=tensors["cu_seqlens"],
                  order=tensors["order"], bias=cast(bias), sinks=cast(tensors["sinks"]),
                  rel_pos_emb=cast(tensors["rel_pos_emb"]), rel_pos_query=cast(query), seed=seed)


@constexpr
def _is_float16(dtype):
    return checks.dtype_name(dtype) == "Float16"


def _narrow(bias):
    """Whether a bias hides keys by a number that is not below -1e29, the lowest of float16."""
    return bias is not None and _is_float16(bias.dtype)


def _hiding(bias):
    """Return a bias in float32, in which what hides a key is one finite number: two of those, added, are finite too."""
    if bias is None:
        return None
    wide = ops.cast(bias, ms.float32)
    return portable.masked_fill(wide, ops.less_equal(wide, -65504. if _narrow(bias) else FAINT), HIDDEN)


def _as_it_is(x):
    return x


def _in_float32(x):
    """Cast to float32. A backward pass runs outside the Cell that keeps the forward pass in float32."""
    return None if x is None else ops.cast(x, ms.float32)


class _FourBytes(Float32):
    """Draws four random bytes and returns them as one int32, by an operator that has a kernel on every device."""

    def __init__(self):
        super().__init__()
        self.likely, self.powers = Tensor(np.ones(256, np.float32)), Tensor(256 ** np.arange(4, dtype=np.int32))
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self):
        return self.sum(ops.mul(ops.cast(ops.multinomial(self.likely, 4), ms.int32), self.powers), 0)


_four_bytes = _FourBytes()


def draw_seed(salt=0):
    """Draw a seed for one call, int32 `(1,)`, from MindSpore's global seed.

    In one step, all draws of a graph give the same number. So each place that drops needs its own `new_salt`.
    """
    return ops.bitwise_xor(_four_bytes(), _as_tensor(salt))


@constexpr
def _as_tensor(salt):
    """Return a salt as int32 `(1,)`. MindSpore's tracer would make an int64 of an int."""
    return Tensor(np.array([salt], np.int32))


class _Salt(int):
    """An int that differs in each copy of the Cell that has it."""

    def __deepcopy__(self, memo):
        return new_salt(True)


def new_salt(dropout):
    """Return a random int for a Cell with dropout, else 0. `mindspore.set_seed` also seeds its generator."""
    return _Salt(np.random.randint(2**31)) if dropout else 0
