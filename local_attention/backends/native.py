"""The fused kernel of native.cpp, for CPU: tiles of queries by keys with an online softmax, threads, and every option.

The kernel is a library without MindSpore's headers, called through MindSpore's Custom operator. It is built when the
package is installed, if there is a C++ compiler; otherwise `unavailable` says so.
"""
import ctypes
import os
import sys
import threading
from functools import cache, lru_cache
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import CustomRegOp, DataType

from .. import settings
from ..cells import compiling, given, last
from . import Backend

FLOATS, BOOLS = DataType.F32_Default, DataType.BOOL_Default
INT32, INT64 = DataType.I32_Default, DataType.I64_Default
INPUTS = {"q": FLOATS, "k": FLOATS, "v": FLOATS, "mask": BOOLS, "documents": INT32, "bias": FLOATS, "sinks": FLOATS,
          "emb": FLOATS, "seed": INT32, "numbers": INT64}
TILE = 64  # queries, and keys
INTERFACE = 8  # the version of the kernel's interface that this file needs


@cache
def library():
    """Return (path of the built kernel, None), or (None, why it cannot be used)."""
    path = str(Path(__file__).with_name("_native.so"))
    if not os.path.isfile(path):
        return None, "was not built: that takes a C++ compiler where the package is installed"
    try:
        stale = ctypes.CDLL(path).attention_interface() != INTERFACE
    except (OSError, AttributeError) as error:
        return None, f"could not be loaded ({error})"
    return (None, "was built from other sources: the package is to be installed again") if stale else (path, None)


def machine_level():
    """Return the widest vectors that the kernel can use on this machine, as an index of LEVELS."""
    return ctypes.CDLL(library()[0]).attention_level()


def exporting():
    """Whether the caller is being exported, to machines without this library. A graph does not show it, but
    `mindspore.export` is then among the callers."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "mindspore.train.serialization":
        frame = frame.f_back
    return frame is not None


def unavailable(device):
    """Return why the library cannot run on a device now, None if it can."""
    if device != "CPU":
        return "runs on CPU alone"
    if exporting():
        return "is a library of this machine, which an exported graph would look for where it runs"
    return library()[1]


def why_not(problem):
    """Return why it cannot run a problem, None if it can: everything that `attend` offers is implemented."""
    if problem.any_length:
        return "takes its numbers from lengths, which a graph does not know here"
    return unavailable(problem.device)


def scores(problem):
    """Return how many scores are computed in all, and how many at once; with documents, as for one document."""
    starts = np.arange(0, problem.n_q, TILE) + problem.offset
    first, _ = problem.spec.span(starts)
    _, last = problem.spec.span(np.minimum(starts + TILE, problem.n_q + problem.offset) - 1)
    keys = np.minimum(last, problem.n_k - 1) - np.maximum(first, 0) + 1
    tiles = int(np.ceil(np.maximum(keys, 0) / TILE).sum()) * problem.groups
    return (tiles * TILE**2 + problem.groups * problem.n_q * problem.spec.prefix,
            min(settings.threads(), tiles) * TILE**2)


def prepare(problem):
    """Return the Cell that calls the kernel with the problem's numbers, and the one that gives its result gradients in
    a graph."""
    fused = Fused(problem)
    return fused, Linked(fused)


def run(constants, q, k, v, tensors):
    """Run one operator forward, and one backward."""
    fused, linked = constants
    mask, documents = given(tensors["mask"], ms.bool_), given(tensors["documents"], ms.int32)
    bias, sinks = given(tensors["bias"], ms.float32), given(tensors["sinks"], ms.float32)
    emb, seed = given(tensors["rel_pos_emb"], ms.float32), given(tensors["seed"], ms.int32)
    out, statistics, lse = fused(q, k, v, mask, documents, bias, sinks, emb, seed)
    if compiling():
        return linked(q, k, v, mask, documents, bias, sinks, emb, seed, ops.stop_gradient(out),
                      ops.stop_gradient(statistics), ops.stop_gradient(lse))
    return out, lse


class Fused(nn.Cell):
    """Runs the kernel, forward and backward, for one problem."""

    def __init__(self, problem):
        super().__init__()
        spec, scoring = problem.spec, problem.scoring
        heads, period, columns = problem.shape("bias") or (1, 1, 0)
        offsets = spec.backward + 1 + spec.forward if problem.has("rel_pos_emb") else 0
        self.numbers = integers(  # in the order of Call in native_call.h
            problem.groups, problem.groups // problem.per_key_head, problem.n_q, problem.n_k, problem.d, spec.bucket,
            spec.backward, spec.forward, spec.causal, spec.prefix, problem.offset, problem.rows("mask"),
            problem.rows("documents"), heads, period, columns, spec.backward, offsets, problem.rows("sinks"),
            scoring.hide_self, *settings.of_kernel(), *problem.frame.origin, problem.heads_in_row,
            float(scoring.scale), float(scoring.softcap or 0), float(scoring.dropout))
        self.forward = custom("attention_forward", [*INPUTS.values()], 3 * [FLOATS])  # the output, statistics, lse
        self.backward = custom("attention_backward", [*INPUTS.values(), *4 * [FLOATS]], 6 * [FLOATS])

    def construct(self, q, k, v, mask, documents, bias, sinks, emb, seed):
        return self.forward(q, k, v, mask, documents, bias, sinks, emb, seed, self.numbers)

    def bprop(self, q, k, v, mask, documents, bias, sinks, emb, seed, out, dout):
        dq, dk, dv, dbias, dsinks, demb = self.backward(q, k, v, mask, documents, bias, sinks, emb, seed, self.numbers,
                                                        out[0], out[1], last(dout[0]), last(dout[2]))
        return dq, dk, dv, mask, documents, dbias, dsinks, demb, seed


class Linked(nn.Cell):
    """Gives the output and the log-sum-exp of a `Fused` their gradients (see `cells.compiling`)."""

    def __init__(self, fused):
        super().__init__()
        self.backward, self.numbers = fused.backward, fused.numbers

    def construct(self, q, k, v, mask, documents, bias, sinks, emb, seed, out, statistics, lse):
        return out, lse

    def bprop(self, q, k, v, mask, documents, bias, sinks, emb, seed, out, statistics, lse, outs, dout):
        dq, dk, dv, dbias, dsinks, demb = self.backward(q, k, v, mask, documents, bias, sinks, emb, seed, self.numbers,
                                                        out, statistics, last(dout[0]), last(dout[1]))
        return dq, dk, dv, mask, documents, dbias, dsinks, demb, seed, out, statistics, lse


def made(cell, *args):
    """Return a Cell of operators that work row by row, `cell(*args)`, for the threads and the widest vectors allowed
    now; None if the library cannot run or is not wanted."""
    if settings.backend not in (None, "native") or unavailable(settings.device()) is not None:
        return None
    return _made(cell, settings.of_kernel(), *args)


@lru_cache(maxsize=256)
def _made(cell, of_kernel, *args):
    return cell(*args)


def row_numbers(*more):
    """Return the numbers that such an operator gets."""
    return integers(*settings.of_kernel(), *more)


def integers(*numbers):
    """Return a Tensor of int64, with floats as their bits: a Cell that stays in float32 would cast any other dtype."""
    return Tensor(np.array([np.float64(x).view(np.int64) if isinstance(x, float) else x for x in numbers], np.int64))


def custom(name, inputs, outputs, *others):
    """Return an operator of the library with inputs and outputs of these types; it infers shapes itself. `others` are
    further lists of types, of inputs and outputs together: MindSpore keeps one registration for each name."""
    info = CustomRegOp(name)
    for number in range(len(inputs)):
        info = info.input(number, f"x{number}")
    for number in range(len(outputs)):
        info = info.output(number, f"y{number}")
    for types in ((*inputs, *outputs), *others):
        info = info.dtype_format(*types)
    info = info.target("CPU").get_op_info()
    return _Operator(f"{library()[0]}:{name}", out_shape=None, out_dtype=None, func_type="aot", reg_info=info)


_one_call = threading.RLock()


class _Operator(ops.Custom):
    """A custom operator that threads call one after the other. Outside graphs, MindSpore shares what it hands to such
    operators between threads, so one may get the tensors of another's call. In a graph, this is not called."""

    def __call__(self, *args):
        with _one_call:
            return super().__call__(*args)


NATIVE = Backend(
    "native", frozenset(("mask", "documents", "bias", "sinks", "rel_pos_emb", "seed", "kv_heads", "prefix", "lse",
                         "softcap", "hide_self", "dropout")), why_not, scores, prepare, run,
    any_axes=True, tokens_first=True, twice=None)
