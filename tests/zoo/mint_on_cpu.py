"""Replaces operators that models of mindone call and that have no kernel on CPU by operators that have one.

It is for tests alone. Import it before mindone: the import changes MindSpore. Forward and backward are those of the
replacing operators. Operators without a gradient go through NumPy.
"""
import mindspore as ms
import mindspore.mint.nn.functional as F
import numpy as np
from mindspore import Tensor, mint, ops


def _number(x):
    return x.item() if isinstance(x, Tensor) else x


def arange(start, end=None, step=1, *, dtype=None):
    start, end = (0, start) if end is None else (start, end)
    values = np.arange(_number(start), _number(end), _number(step))
    return Tensor(values.astype(np.int64 if values.dtype.kind == "i" else np.float32), dtype)


def embedding(input, weight, padding_idx=None, *unused):
    return ops.gather(weight, input, 0)


def gelu(input, approximate="none"):
    return ops.gelu(input, approximate=approximate)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    centred = input - input.mean(-1, keep_dims=True)
    out = centred * ops.rsqrt((centred * centred).mean(-1, keep_dims=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def rms_norm(x, gamma, epsilon=1e-6):
    factor = ops.rsqrt((x * x).mean(-1, keep_dims=True) + epsilon)
    return x * factor * gamma, factor


def topk(input, k, dim=-1, largest=True, sorted=True):
    values, indices = ops.topk(input.swapaxes(dim, -1), k)
    return values.swapaxes(dim, -1), indices.swapaxes(dim, -1).astype(ms.int64)


def pad(input, pad, mode="constant", value=0.):
    for axis, (before, after) in enumerate(zip(pad[::2], pad[1::2]), 1):
        axis = input.ndim - axis
        parts = [input]
        for size, place in ((before, 0), (after, 2)):
            if size > 0:
                shape = (*input.shape[:axis], size, *input.shape[axis + 1:])
                parts.insert(place, ops.full(shape, value or 0, dtype=input.dtype))
        input = ops.cat(parts, axis) if len(parts) > 1 else input
    return input


def cumsum(input, dim, dtype=None):
    values = np.cumsum(input.asnumpy(), dim)
    return Tensor(values).astype(dtype or (ms.int64 if values.dtype.kind in "iu" else input.dtype))


def stack(tensors, dim=0):
    dim = dim % (tensors[0].ndim + 1)
    return ops.cat([each.expand_dims(dim) for each in tensors], dim)


def repeat_interleave(input, repeats, dim=None, **options):
    return ops.repeat_interleave(input, repeats, dim if dim is not None else options.get("axis"))


def nonzero(input, as_tuple=False):
    found = np.nonzero(input.asnumpy())
    return tuple(map(Tensor, found)) if as_tuple else Tensor(np.stack(found, 1))


def where(condition, input=None, other=None):
    return nonzero(condition, as_tuple=True) if input is None else ops.where(condition, input, other)


def scattered(tensor, dim, index, src, **options):
    values = tensor.asnumpy().copy()
    src = src.asnumpy() if isinstance(src, Tensor) else src
    np.put_along_axis(values, index.asnumpy(), src, dim)
    return values


def index_add(input, dim, index, source, **options):
    return ops.index_add(input, index.astype(ms.int32), source, dim) if index.size > 0 else input


def in_place(function):
    """Return a method of Tensor that sets the tensor to what the function returns for it."""
    def method(self, *args, **options):
        self.assign_value(Tensor(function(self, *args, **options)).astype(self.dtype))
        return self
    return method


for name, function in dict(
        arange=arange, topk=topk, cumsum=cumsum, stack=stack, repeat_interleave=repeat_interleave,
        tril=lambda input, diagonal=0: Tensor(np.tril(input.asnumpy(), diagonal)),
        triu=lambda input, diagonal=0: Tensor(np.triu(input.asnumpy(), diagonal)),
        ones_like=lambda input, dtype=None: ops.ones(input.shape, dtype or input.dtype),
        zeros_like=lambda input, dtype=None: ops.zeros(input.shape, dtype or input.dtype),
        full=lambda size, fill_value, dtype=None: ops.full(size, fill_value, dtype=dtype or ms.float32),
        argmax=lambda input, dim=None, keepdim=False: Tensor(np.argmax(input.asnumpy(), dim).astype(np.int64)),
        outer=lambda input, vec2: input.reshape(-1, 1) * vec2.reshape(1, -1),
        full_like=lambda input, fill_value, dtype=None: ops.full(input.shape, fill_value, dtype=dtype or input.dtype),
        nonzero=nonzero, where=where, clone=lambda input: input * 1, bitwise_or=ops.logical_or).items():
    setattr(mint, name, function)
for name, function in dict(
        embedding=embedding, gelu=gelu, layer_norm=layer_norm, pad=pad,
        one_hot=lambda tensor, num_classes=-1: Tensor(np.eye(num_classes, dtype=np.int64)[tensor.asnumpy()])).items():
    setattr(F, name, function)
mint.nn.Embedding.construct = lambda self, input: embedding(input, self.weight)
mint.nn.GELU.construct = lambda self, input: gelu(input, getattr(self, "approximate", "none"))
mint.nn.LayerNorm.construct = lambda self, input: layer_norm(input, None, self.weight, self.bias, self.eps)
ops.rms_norm = rms_norm
Tensor.clone = lambda self: self.copy()
Tensor.bitwise_or = ops.logical_or
Tensor.repeat_interleave = repeat_interleave
Tensor.normal_ = in_place(lambda self, mean=0., std=1., **options: np.random.normal(mean, std, self.shape))
Tensor.masked_fill_ = in_place(lambda self, mask, value: ops.masked_fill(self, mask, value))
Tensor.zero_ = in_place(lambda self: np.zeros(self.shape))
Tensor.fill_ = in_place(lambda self, value: np.full(self.shape, value))
Tensor.bitwise_or_ = in_place(lambda self, other: ops.logical_or(self, other))
Tensor.scatter_ = in_place(scattered)
Tensor.nonzero = nonzero
Tensor.repeat = lambda self, *sizes: ops.tile(self, sizes if isinstance(sizes[0], int) else sizes[0])
Tensor.index_add = mint.index_add = index_add
Tensor.index_add_ = in_place(lambda self, dim, index, source, **options: index_add(self, dim, index, source))
