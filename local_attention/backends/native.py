"""The fused kernel of native.cpp, for the CPU: tiles of queries by keys with an online softmax, threads, every option.

The kernel is a library without a header of MindSpore's, called through its Custom operator. It is built where the
package is installed if a C++ compiler is there; `why_not` says so where it is not.
"""
import ctypes
import os
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

LEVELS = ("baseline", "AVX2", "AVX-512")
level = len(LEVELS) - 1  # the widest vectors allowed; the machine may have less


@lru_cache(maxsize=None)
def library():
    """The path of the built kernel, None where there is none."""
    built = (Path(__file__).with_name("_native" + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((str(path) for path in built if path.is_file()), None)


@lru_cache(maxsize=None)
def machine_level():
    """The widest vectors that the kernel can use on this machine, as an index of LEVELS."""
    return ctypes.CDLL(library()).attention_level()


def threads():
    """How many threads may work: OMP_NUM_THREADS, and no more than MindSpore's own or the process's cores."""
    try:
        asked = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0])
    except ValueError:
        asked = 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return asked if asked > 0 else max(1, min(cores, ms.get_context("runtime_num_threads")))


def why_not(problem):
    """Why it cannot run a problem, None where it can."""
    if ms.get_context("device_target") != "CPU":
        return "runs on CPU alone"
    if library() is None:
        return "was not built: installing the package needs a C++ compiler for that"
    if min(problem.groups, problem.n_q, problem.n_k, problem.head_dim) == 0:
        return "needs at least one query, one key and one number a head"
    return None


def scores(problem):
    """How many scores are computed, and how many at once."""
    queries, keys = 64, 64
    starts = np.arange(0, problem.n_q, queries) + problem.offset
    first, _ = problem.spec.span(starts)
    _, last = problem.spec.span(np.minimum(starts + queries, problem.n_q + problem.offset) - 1)
    tiles = -(-np.maximum(np.minimum(last, problem.n_k - 1) - np.maximum(first, 0) + 1, 0) // keys)
    return int(tiles.sum()) * problem.groups * queries * keys, min(threads(), problem.groups * len(starts)) * queries * keys


def prepare(problem):
    """The Cell that calls the kernel with the problem's numbers."""
    return Fused(problem)


def run(fused, q, k, v, key_mask, bias, rel_pos_emb, seed):
    """One operator forward, one backward."""
    absent = ops.zeros((1,), ms.float32)
    mask = ops.zeros((1,), ms.bool_) if key_mask is None else key_mask
    seed = ops.zeros((1,), ms.int32) if seed is None else seed
    return fused(q, k, v, mask, absent if bias is None else bias, absent if rel_pos_emb is None else rel_pos_emb,
                 seed)[0]


class Fused(nn.Cell):
    """The kernel, forward and backward, for one problem."""

    def __init__(self, problem):
        super().__init__()
        spec = problem.spec
        heads, period, columns = problem.bias_shape or (1, 1, 0)
        offsets = spec.backward + 1 + spec.forward if problem.by_offset else 0
        # in the order of Call in native.cpp; integers all, because a Cell that stays in float32 would cast others
        real = np.array([problem.scale, problem.dropout], np.float64).view(np.int64)
        self.numbers = Tensor(np.array([
            problem.groups, problem.n_q, problem.n_k, problem.head_dim, spec.bucket, spec.backward, spec.forward,
            spec.causal, problem.offset, problem.batch, heads, period, columns, problem.bias_backward, offsets,
            problem.hide_self, threads(), level, *real], np.int64))
        queries = (problem.groups, problem.n_q, problem.head_dim)
        keys = (problem.groups, problem.n_k, problem.head_dim)
        self.forward = _custom("attention_forward", (queries, (problem.groups, problem.n_q, 2)))
        self.backward = _custom("attention_backward", (
            queries, keys, keys, problem.bias_shape or (1,), (offsets, problem.head_dim) if offsets else (1,)))

    def construct(self, q, k, v, mask, bias, emb, seed):
        return self.forward(q, k, v, mask, bias, emb, seed, self.numbers)

    def bprop(self, q, k, v, mask, bias, emb, seed, out, dout):
        dq, dk, dv, dbias, demb = self.backward(q, k, v, mask, bias, emb, seed, self.numbers, out[0], out[1], dout[0])
        return dq, dk, dv, mask, dbias, demb, seed


def _custom(name, shapes):
    return ops.Custom(f"{library()}:{name}", out_shape=shapes, out_dtype=(ms.float32,) * len(shapes), func_type="aot")
