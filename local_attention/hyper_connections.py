r"""Hyper-connections: several parallel residual streams instead of one.

Every half of a layer works on a weighted sum of the streams. Its output is added to each stream with a weight, and the
streams themselves are mixed. All these weights are learned numbers plus a learned function of the token:

    D. Zhu et al., "Hyper-Connections", 2024, https://arxiv.org/abs/2409.19606

The form is the one that the PyTorch package `hyper-connections` 0.4.11 by Phil Wang (MIT licence) gives
`local-attention`. They drop nothing and compute the same in training and in evaluation.
"""
import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from . import checks
from .backends import portable
from .backends.spans import tanh as _tanh
from .cells import Float32

# Primitives: outside a graph, the gradient of `ops.matmul` with many rows takes six times as long as that of MatMul.
_matmul, _product, _product_of_transposed = ops.MatMul(), ops.BatchMatMul(), ops.BatchMatMul(transpose_a=True)


def expand(x, count):
    """Return streams `(b, n, count, d)`, each of which is `x (b, n, d)`."""
    b, n, dim = x.shape
    ones = ops.ones((b * n, count, 1), x.dtype)
    return _product(ones, x.reshape(b * n, 1, dim)).reshape(b, n, count, dim)  # its gradient sums by a product too


def reduce(streams):
    """Return the sum `(b, n, d)` of streams `(b, n, count, d)`."""
    b, n, count, dim = streams.shape
    ones = ops.ones((b * n, 1, count), streams.dtype)
    return _product(ones, streams.reshape(b * n, count, dim)).reshape(b, n, dim)


def add_output(streams, out, beta):
    """Add to streams `(b, n, count, d)` the product of `out (b, n, d)` and `beta (b * n, count, 1)`."""
    b, n, dim = out.shape
    out = ops.cast(out, streams.dtype)  # a layer may be cast to half precision while its residual stream is not
    return streams + _product(beta, out.reshape(b * n, 1, dim)).reshape(streams.shape)


class _Norm(nn.Cell):
    """Holds the weight of an RMSNorm, minus 1. `HyperConnection` computes with it."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = Parameter(ops.zeros((dim,), ms.float32), name="gamma")


class HyperConnection(Float32):
    r"""
    The weights with which a half of a layer reads from the residual streams, and writes back to them.

    For each token, with its streams as rows `H (s, d)` and RMSNorm of each row:

        [alpha, beta] = tanh(norm(H) @ [F_alpha, f_beta]) * [c_alpha, c_beta] + [A, b]

    Column 0 of `alpha (s, 1 + s)` makes the input of the half, `alpha[:, 0].T @ H`. The other columns make the
    streams that bypass it, `alpha[:, 1:].T @ H`. `beta (s)` is how much of the output is added to each
    of these. Initially `F, f` are 0, the input is one stream, drawn at random, and all streams get the output.

    Args:
        count (int): Number of streams, s.
        dim (int): Size of a token's vector, d.

    Inputs:
        - **streams** (Tensor) - `(b, n, s, d)`.

    Outputs:
        The input of the half `(b, n, d)`, the mixed streams `(b, n, s, d)`, both of the dtype of `streams`,
        and beta `(b * n, s, 1)`, which `add_output` takes.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.
    """

    def __init__(self, count, dim):
        super().__init__()
        self.count, self.dim = count, dim
        drawn = np.eye(count)[:, np.random.randint(count, size=1)]  # `mindspore.set_seed` seeds this, too
        self.static_alpha = Parameter(Tensor(np.concatenate([drawn, np.eye(count)], 1), ms.float32), "static_alpha")
        self.dynamic_alpha_fn = Parameter(ops.zeros((dim, 1 + count), ms.float32), "dynamic_alpha_fn")
        # shape (1,), because `ops.clip_by_global_norm` gives the gradient of a scalar that shape
        self.dynamic_alpha_scale = Parameter(Tensor([0.01], ms.float32), "dynamic_alpha_scale")
        self.static_beta = Parameter(ops.ones((count,), ms.float32), "static_beta")
        self.dynamic_beta_fn = Parameter(ops.zeros((dim,), ms.float32), "dynamic_beta_fn")
        self.dynamic_beta_scale = Parameter(Tensor([0.01], ms.float32), "dynamic_beta_scale")
        self.norm = _Norm(dim)

    def extend_repr(self):
        return checks.settings(self)

    def construct(self, streams):
        b, n, count, dim = streams.shape
        rows = ops.cast(streams, ms.float32).reshape(-1, dim)
        squares = _matmul(ops.square(rows), ops.ones((dim, 1), ms.float32))
        inverse = portable.rsqrt(ops.maximum(squares, 1e-24))  # as in PyTorch's normalize, the norm is at least 1e-12
        gain = (self.norm.gamma + 1.) * dim ** 0.5  # the norm's, multiplied into a small matrix instead of many rows
        functions = ops.cat((self.dynamic_alpha_fn, self.dynamic_beta_fn.reshape(-1, 1)), 1) * gain.reshape(-1, 1)
        scales = ops.cat((ops.tile(self.dynamic_alpha_scale, (1 + count,)), self.dynamic_beta_scale))
        static = ops.cat((self.static_alpha, self.static_beta.reshape(-1, 1)), 1)
        dynamic = _tanh(_matmul(rows, functions) * inverse).reshape(b * n, count, 2 + count)
        weights = dynamic * scales + static
        alpha, beta = weights[:, :, :-1], weights[:, :, -1:]
        rows = rows.reshape(b * n, count, dim)
        taken = _product_of_transposed(alpha[:, :, :1], rows).reshape(b, n, dim)
        passed = _product_of_transposed(alpha[:, :, 1:], rows).reshape(b, n, count, dim)
        return ops.cast(taken, streams.dtype), ops.cast(passed, streams.dtype), ops.cast(beta, streams.dtype)


class HyperConnections(nn.Cell):
    """The hyper-connections of a model: two for each layer, and one for each layer whose number is in `global_layers`.

    They are a separate tree, instead of wrapping what they connect, so that the rest of the model keeps its parameter
    names.
    """

    def __init__(self, count, dim, depth, global_layers=()):
        super().__init__()
        self.layers = nn.CellList([nn.CellList([HyperConnection(count, dim), HyperConnection(count, dim)])
                                   for _ in range(depth)])
        self.global_layers = nn.CellList([HyperConnection(count, dim) if number in global_layers else nn.Identity()
                                          for number in range(depth)])
