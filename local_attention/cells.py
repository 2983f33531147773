"""What Cells of this package stand on: those that stay in float32, and those that are differentiated once.

At O1, `amp` writes the class of a Cell anew from its source, with the functions that its `construct` calls, which lose
the names of their own modules; what base classes have, it takes as it is. So a public Cell's class has its constructor
and, where there are projections, a `construct` that calls these, which O1 casts, and methods of a base class.
"""
import sys

import mindspore as ms
from mindspore import nn
from mindspore._c_expression import MixedPrecisionType, PyNativeExecutor_
from mindspore.ops import constexpr


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


class AsGiven(nn.Cell):
    """A Cell whose operators get what they are given, whatever `to_float` or `amp` casts around it."""

    def __init__(self):
        super().__init__()
        self.mixed_precision_type = MixedPrecisionType.NOTSET


class InFloat32(nn.Cell):
    """What `Float32` is, for Cells with a gradient of their own and inputs in float32: a graph casts nothing inside of
    them, and with `to_float` it would take their gradients for float32 where the model is not."""

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
    """Where a bprop runs in the forward pass of another gradient, and is recorded, it is going to be differentiated."""
    if PyNativeExecutor_.get_instance().requires_grad():  # so too, for once, after an exception within a gradient
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_name not in ("__infer__", "_pynative_forward_run"):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_name != "__infer__":  # which is a compiler's
            _refuse()


class _Last(InFloat32):
    def construct(self, dout):
        return dout

    def bprop(self, dout, out, ddout):
        _refuse_in_graphs()
        return (ddout,)


_last = _Last()


def last(dout):
    """A gradient as it is, on its way into a bprop that has none itself."""
    _refuse_outside_graphs()
    return _last(dout)


class Once(InFloat32):
    """What a backend of plain operators gives, as it is, with a gradient that has none itself.

    Outside a graph, MindSpore takes the gradients of its own products for constants: those of them would be zeros. In a
    graph they have some, `twice`, unless they are written by hand.
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
