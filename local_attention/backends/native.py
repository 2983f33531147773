"""The fused kernel of native.cpp, for the CPU: tiles of queries by keys with an online softmax, threads, every option.

The kernel is a library without a header of MindSpore's, called through its Custom operator. It is built where the
package is installed if a C++ compiler is there; `unavailable` says so where it is not.
"""
import ctypes
import os
import sys
from functools import cache, lru_cache
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import CustomRegOp, DataType

from ..cells import last

FLOATS, BOOLS = DataType.F32_Default, DataType.BOOL_Default
INT32, INT64 = DataType.I32_Default, DataType.I64_Default
INPUTS = {"q": FLOATS, "k": FLOATS, "v": FLOATS, "mask": BOOLS, "documents": INT32, "bias": FLOATS, "sinks": FLOATS,
          "emb": FLOATS, "seed": INT32, "numbers": INT64}
TILE = 64  # queries by as many keys
TOKENS_FIRST = True  # its output, where that is asked for
ANY_AXES = True  # before the last two of q, k and v, as they are counted and not looked at
INTERFACE = 6  # of the kernel that this file was written for
LEVELS = ("baseline", "AVX2", "AVX-512")
level = len(LEVELS) - 1  # the widest vectors allowed; the machine may have less
wanted = [None]  # the backend that `use_backend` asks for: layers beside attention follow it


@cache
def library():
    """The built kernel: its path, or None, and why it is of no use, or None."""
    path = str(Path(__file__).with_name("_native.so"))
    if not os.path.isfile(path):
        return None, "was not built: that takes a C++ compiler where the package is installed"
    try:
        stale = ctypes.CDLL(path).attention_interface() != INTERFACE
    except (OSError, AttributeError) as error:
        return None, f"could not be loaded ({error})"
    return (None, "was built from other sources: the package is to be installed again") if stale else (path, None)


def machine_level():
    """The widest vectors that the kernel can use on this machine, as an index of LEVELS."""
    return ctypes.CDLL(library()[0]).attention_level()


def threads():
    """How many threads may work: OMP_NUM_THREADS, and no more than MindSpore's own or the process's cores."""
    try:
        asked = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0])
    except ValueError:
        asked = 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return asked if asked > 0 else max(1, min(cores, ms.get_context("runtime_num_threads")))


def exporting():
    """Whether what calls this is compiled to be exported, to where this library is not: a graph does not tell, but
    `mindspore.export` is then among the callers."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "mindspore.train.serialization":
        frame = frame.f_back
    return frame is not None


def unavailable():
    """Why nothing of the library can run here and now, None where it can."""
    if ms.get_context("device_target") != "CPU":
        return "runs on CPU alone"
    if exporting():
        return "is a library of this machine, which an exported graph would look for where it runs"
    return library()[1]


def why_not(problem):
    """Why it cannot run a problem, None where it can: all that `attend` is asked for is implemented."""
    if problem.any_length:
        return "takes its numbers from lengths, which a graph does not know here"
    return unavailable()


def scores(problem):
    """How many scores are computed, and how many at once; of documents, as of one."""
    starts = np.arange(0, problem.n_q, TILE) + problem.offset
    first, _ = problem.spec.span(starts)
    _, last = problem.spec.span(np.minimum(starts + TILE, problem.n_q + problem.offset) - 1)
    keys = np.minimum(last, problem.n_k - 1) - np.maximum(first, 0) + 1
    tiles = int(np.ceil(np.maximum(keys, 0) / TILE).sum()) * problem.groups
    return tiles * TILE**2 + problem.groups * problem.n_q * problem.spec.prefix, min(threads(), tiles) * TILE**2


def prepare(problem):
    """The Cell that calls the kernel with the problem's numbers."""
    return Fused(problem)


def run(fused, q, k, v, tensors):
    """One operator forward, one backward."""
    mask, documents, bias, sinks, rel_pos_emb, seed = tensors
    out, _, lse = fused(q, k, v, _there(mask, ms.bool_), _there(documents, ms.int32), _there(bias, ms.float32),
                        _there(sinks, ms.float32), _there(rel_pos_emb, ms.float32), _there(seed, ms.int32))
    return out, lse


def _there(x, dtype):
    """A tensor, or something in its place that is not read."""
    return ops.zeros((1,), dtype) if x is None else x


class Fused(nn.Cell):
    """The kernel, forward and backward, for one problem."""

    def __init__(self, problem):
        super().__init__()
        spec, scoring = problem.spec, problem.scoring
        heads, period, columns = problem.bias_shape or (1, 1, 0)
        offsets = spec.backward + 1 + spec.forward if problem.by_offset else 0
        self.numbers = integers(  # in the order of Call in native_call.h
            problem.groups, problem.groups // problem.share, problem.n_q, problem.n_k, problem.head_dim, spec.bucket,
            spec.backward, spec.forward, spec.causal, spec.prefix, problem.offset, problem.batch, problem.documents,
            heads, period, columns, spec.backward, offsets, problem.sinks, scoring.hide_self, threads(), level,
            *problem.origin, problem.beside, float(scoring.scale), float(scoring.softcap or 0), float(scoring.dropout))
        self.forward = custom("attention_forward", [*INPUTS.values()], 3 * [FLOATS])  # the output, statistics, lse
        self.backward = custom("attention_backward", [*INPUTS.values(), *4 * [FLOATS]], 6 * [FLOATS])

    def construct(self, q, k, v, mask, documents, bias, sinks, emb, seed):
        return self.forward(q, k, v, mask, documents, bias, sinks, emb, seed, self.numbers)

    def bprop(self, q, k, v, mask, documents, bias, sinks, emb, seed, out, dout):
        dq, dk, dv, dbias, dsinks, demb = self.backward(q, k, v, mask, documents, bias, sinks, emb, seed, self.numbers,
                                                        out[0], out[1], last(dout[0]), last(dout[2]))
        return dq, dk, dv, mask, documents, dbias, dsinks, demb, seed


def made(cell, *args):
    """A Cell of operators that work row by row, `cell(*args)`, for as many threads and as wide vectors as there may be
    now; None where the library cannot run, or is not wanted."""
    return _made(cell, threads(), level, *args) if wanted[0] in (None, "native") and unavailable() is None else None


@lru_cache(maxsize=256)
def _made(cell, threads, level, *args):
    return cell(*args)


def row_numbers(*more):
    """What such an operator is told."""
    return integers(threads(), level, *more)


def integers(*numbers):
    """A Tensor of ints, floats among them by their bits: a Cell that stays in float32 would cast any other."""
    return Tensor(np.array([np.float64(x).view(np.int64) if isinstance(x, float) else x for x in numbers], np.int64))


def custom(name, inputs, outputs):
    """An operator of the library, of inputs and outputs of these types; it gives the shapes itself."""
    info = CustomRegOp(name)
    for number in range(len(inputs)):
        info = info.input(number, f"x{number}")
    for number in range(len(outputs)):
        info = info.output(number, f"y{number}")
    info = info.dtype_format(*inputs, *outputs).target("CPU").get_op_info()
    return ops.Custom(f"{library()[0]}:{name}", out_shape=None, out_dtype=None, func_type="aot", reg_info=info)
