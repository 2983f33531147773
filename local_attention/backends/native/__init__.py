"""The fused kernel of src/, for CPU: tiles of queries by keys with an online softmax, threads, and every option.

The kernel is a library without MindSpore's headers, called through MindSpore's Custom operator. It is built when the
package is installed, if there is a C++ compiler; otherwise `library.unavailable` says so.
"""
import mindspore as ms
import numpy as np
from mindspore import nn, ops

from ... import settings
from ...cells import compiling, given, last
from .. import PLAIN, Backend
from . import library
from .library import GRADIENTS, RECEIVED, RESULTS, attention

TILE = 64  # queries, and keys


def why_not(problem):
    """Return why it cannot run a problem, None if it can: everything that `attend` offers is implemented."""
    if problem.any_length:
        return "takes its numbers from lengths, which a graph does not know here"
    return library.unavailable(problem.device)


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
    """Run one operator forward, and one backward. They take q, k and v of one type, and other floats as float32."""
    fused, linked = constants
    mask, documents, order = (given(tensors["mask"], ms.bool_), given(tensors["documents"], ms.int32),
                              given(tensors["order"], ms.int32))
    bias, sinks, emb, asks = (_in_float32(tensors["bias"]), _in_float32(tensors["sinks"]),
                              _in_float32(tensors["rel_pos_emb"]), _in_float32(tensors["rel_pos_query"]))
    if k.dtype != q.dtype or v.dtype != q.dtype:
        q, k, v = _in_float32(q), _in_float32(k), _in_float32(v)
    seed = given(tensors["seed"], ms.int32)
    out, statistics, lse = fused(q, k, v, mask, documents, order, bias, sinks, emb, asks, seed)
    if compiling():
        return linked(q, k, v, mask, documents, order, bias, sinks, emb, asks, seed, ops.stop_gradient(out),
                      ops.stop_gradient(statistics), ops.stop_gradient(lse))
    return out, lse


def _in_float32(x):
    return given(x if x is None or x.dtype == ms.float32 else ops.cast(x, ms.float32), ms.float32)


class Fused(nn.Cell):
    """Runs the kernel, forward and backward, for one problem."""

    def __init__(self, problem):
        super().__init__()
        self.numbers = library.numbers(problem)
        self.forward = attention("attention_forward", RESULTS)
        self.backward = attention("attention_backward", RECEIVED, GRADIENTS)

    def construct(self, q, k, v, mask, documents, order, bias, sinks, emb, asks, seed):
        return self.forward(q, k, v, mask, documents, order, bias, sinks, emb, asks, seed, self.numbers)

    def bprop(self, q, k, v, mask, documents, order, bias, sinks, emb, asks, seed, out, dout):
        dq, dk, dv, dbias, dsinks, demb, dasks = self.backward(
            q, k, v, mask, documents, order, bias, sinks, emb, asks, seed, self.numbers, out[0], out[1],
            last(dout[0]), last(dout[2]))
        return dq, dk, dv, mask, documents, order, dbias, dsinks, demb, dasks, seed


class Linked(nn.Cell):
    """Gives the output and the log-sum-exp of a `Fused` their gradients (see `cells.compiling`)."""

    def __init__(self, fused):
        super().__init__()
        self.backward, self.numbers = fused.backward, fused.numbers

    def construct(self, q, k, v, mask, documents, order, bias, sinks, emb, asks, seed, out, statistics, lse):
        return out, lse

    def bprop(self, q, k, v, mask, documents, order, bias, sinks, emb, asks, seed, out, statistics, lse, outs, dout):
        dq, dk, dv, dbias, dsinks, demb, dasks = self.backward(
            q, k, v, mask, documents, order, bias, sinks, emb, asks, seed, self.numbers, out, statistics,
            last(dout[0]), last(dout[1]))
        return dq, dk, dv, mask, documents, order, dbias, dsinks, demb, dasks, seed, out, statistics, lse


NATIVE = Backend("native", PLAIN, why_not, scores, prepare, run, ("Float32", "Float16", "BFloat16"), any_axes=True,
                 tokens_first=True, hides=True, twice=None)
