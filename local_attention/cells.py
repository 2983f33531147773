"""Base classes of the package's Cells: those that stay in float32, and those that can be differentiated only once.

At O1, `amp` rewrites the class of a Cell from its source, together with the functions that its `construct` calls, and
these lose the names of their own modules. It does not rewrite base classes. So the class of a public Cell has only its
constructor and, if there are projections, a `construct`: this calls the projections, which O1 casts, and methods of a
base class. O1 also leaves a function as it is if it defines another one, as the package's public functions do.
"""
import sys
from functools import cache
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore._c_expression import MixedPrecisionType, PyNativeExecutor_
from mindspore.ops import constexpr

# O1 imports the classes that it rewrites by their place below an entry of `sys.path`. An editable install may find the
# package by an import hook instead. Everything else comes first.
HOME = str(Path(__file__).resolve().parents[1])
if HOME not in sys.path:
    sys.path.append(HOME)


class Float32(nn.Cell):
    """A Cell that stays in float32 where `to_float` or `amp` casts the model around it.

    Outside a graph, every operator under a `to_float(float16)` Cell gets float16 inputs, even after an explicit cast.
    """

    def __init__(self):
        super().__init__()
        self.to_float(ms.float32)

    def add_flags(self, **flags):
        if "fp16" in flags:
            flags.update(fp16=False, bf16=False, fp32=True)
        return super().add_flags(**flags)


class AsGiven(nn.Cell):
    """A Cell whose operators get their inputs as they are, whatever `to_float` or `amp` casts around it."""

    def __init__(self):
        super().__init__()
        self.mixed_precision_type = MixedPrecisionType.NOTSET


class InFloat32(nn.Cell):
    """Like `Float32`, for Cells with a gradient of their own and float32 inputs. A graph casts nothing inside them.
    With `to_float`, it would treat their gradients as float32 even where the model is not."""

    def __init__(self):
        super().__init__()
        self.mixed_precision_type = MixedPrecisionType.FP32


# ---- gradients of gradients


def _refuse():
    raise NotImplementedError("For 'local_attention', a gradient of a gradient can be had of a function that is "
                              "compiled (ms.jit) under local_attention.use_backend('dense'), and nowhere else.")


@constexpr
def _refuse_in_graphs():
    _refuse()


@constexpr
def _refuse_outside_graphs():
    """Refuse a bprop that is recorded while another gradient's forward pass runs: it is going to be differentiated."""
    if PyNativeExecutor_.get_instance().requires_grad():  # also true, once, after an exception within a gradient
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_name not in ("__infer__", "_pynative_forward_run"):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_name != "__infer__":  # `__infer__` is a compiler's
            _refuse()


class _Last(InFloat32):
    def construct(self, dout):
        return dout

    def bprop(self, dout, out, ddout):
        _refuse_in_graphs()
        return (ddout,)


_last = _Last()


def last(dout):
    """Return a gradient unchanged, on its way into a bprop that cannot be differentiated itself."""
    _refuse_outside_graphs()
    return _last(dout)


class Once(InFloat32):
    """Returns the output of a backend of plain operators unchanged, with a gradient that cannot be differentiated
    itself.

    Outside a graph, MindSpore treats the gradients of its own products as constants, so their gradients would be zero.
    In a graph they have gradients, `twice`, unless they are written by hand.
    """

    def __init__(self, twice):
        super().__init__()
        self.twice = twice

    def construct(self, x):
        return x

    def bprop(self, x, out, dout):
        if not self.twice:
            return (last(dout),)
        _refuse_outside_graphs()
        return (dout,)


# ---- gradients that need what a call returned


@constexpr
def compiling():
    """Whether the caller is being compiled.

    There, a Cell with a `bprop` that reads `out` must not be called twice: if the compiled function is differentiated
    from outside of graphs, the first call's `bprop` gets the `out` of the last. (MindSpore 2.7 to 2.10.) The inputs are
    right. So in a graph, what is returned goes into one more Cell, whose `bprop` gets it as an input.
    """
    return sys._getframe(1).f_code.co_name == "__infer__"  # a compiler's frame


# ---- inputs that a call may not have


def given(x, dtype):
    """Return a tensor or, for None, a placeholder that is not read. It is a constant: outside graphs, five operators
    that make such tensors would take longer than the attention of a short sequence."""
    return _placeholder(dtype) if x is None else x


@constexpr
@cache
def _placeholder(dtype):
    return Tensor(np.zeros(1), dtype)
