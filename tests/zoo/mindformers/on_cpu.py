"""Operators of mindformers 1.9.0's training graph that MindSpore 2.9.0 has no CPU kernel for, by others that it has one
for. Import this before mindformers.

FlashAttentionScore here computes what the operator's documentation says, in float32, for any float dtype.
"""
import mindspore as ms
import mindspore.ops.operations as operations
import numpy as np
from mindspore import Tensor, mint, nn, ops
from mindspore.ops import auto_generate, constexpr
from mindspore.ops.operations import nn_ops

CALLS = []  # of FlashAttentionScore: its sparse_mode, pre_tokens, next_tokens, and the dtype of its queries
NO_LIMIT = 2147483647


class Stand(nn.Cell):
    """A Cell in the place of a primitive: takes what a primitive is told, and ignores it."""

    def __init__(self, *args, **kwargs):
        super().__init__(auto_prefix=False)

    def shard(self, *args, **kwargs):
        return self

    def add_prim_attr(self, *args):
        return self


class Outer(Stand):
    def construct(self, x, y):
        return x.reshape(-1, 1) * y.reshape(1, -1)


class OneHotExt(Stand):
    def construct(self, label, n, on, off):
        return ops.cast(ops.equal(label.reshape(-1, 1), ops.arange(n).astype(label.dtype).reshape(1, -1)), ms.int32)


class RmsNorm(Stand):
    def __init__(self, epsilon=1e-6):
        super().__init__()
        self.epsilon = epsilon

    def construct(self, x, gamma):
        factor = ops.rsqrt(ops.square(x).mean(-1, keep_dims=True) + self.epsilon)
        return x * factor * gamma, factor


def embedding(ids, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False):
    return ops.gather(weight, ids, 0)


@constexpr
def _noted(*what):
    CALLS.append(what)


@constexpr
def _band(n_q, n_k, before, after):
    i, j = np.arange(n_q)[:, None] + n_k - n_q, np.arange(n_k)
    return Tensor((j < i - before) | (j > i + after))


class FlashAttentionScore(Stand):
    def __init__(self, head_num, keep_prob=1.0, scale_value=1.0, pre_tokens=NO_LIMIT, next_tokens=NO_LIMIT,
                 inner_precise=0, input_layout="BSH", sparse_mode=0):
        super().__init__()
        self.heads, self.scale, self.layout, self.mode = head_num, scale_value, input_layout, sparse_mode
        self.pre, self.next = pre_tokens, next_tokens

    def construct(self, q, k, v, real_shift=None, drop_mask=None, padding_mask=None, mask=None, prefix=None,
                  actual_q=None, actual_k=None):
        _noted(self.mode, self.pre, self.next, q.dtype)
        if self.layout == "TND":
            return 0, 0, 0, self.tnd(q, k, v, actual_q)
        hidden = None
        if self.mode == 4:
            hidden = _band(q.shape[2], k.shape[2], self.pre, self.next)
        elif self.mode in (2, 3):
            hidden = _band(q.shape[2], k.shape[2], NO_LIMIT, 0)
        elif mask is not None:
            hidden = ops.cast(mask, ms.bool_)
        return 0, 0, 0, self.attend(q, k, v, hidden)

    def tnd(self, q, k, v, ends):
        n = q.shape[0]
        ends = ops.cast(ends, ms.int32).reshape(1, -1)
        document = (ends <= ops.arange(n).astype(ms.int32).reshape(-1, 1)).int().sum(-1)
        hidden = _band(n, n, self.pre if self.mode == 4 else NO_LIMIT, self.next if self.mode == 4 else 0)
        hidden = ops.logical_or(hidden, document.reshape(-1, 1) != document.reshape(1, -1))
        out = self.attend(q.swapaxes(0, 1)[None], k.swapaxes(0, 1)[None], v.swapaxes(0, 1)[None], hidden)
        return out[0].swapaxes(0, 1)

    def attend(self, q, k, v, hidden):
        dtype, share = q.dtype, q.shape[1] // k.shape[1]
        q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
        if share > 1:
            k, v = ops.repeat_interleave(k, share, 1), ops.repeat_interleave(v, share, 1)
        scores = ops.matmul(q, k.swapaxes(2, 3)) * self.scale
        if hidden is not None:
            scores = ops.masked_fill(scores, hidden, float("-inf"))
        return ops.cast(ops.matmul(ops.softmax(scores, -1), v), dtype)


auto_generate.Outer = Outer
auto_generate.OneHotExt = OneHotExt
nn_ops.FlashAttentionScore = FlashAttentionScore
operations.RmsNorm = RmsNorm
mint.nn.functional.embedding = embedding


class Cast(Stand):
    """Casts, but not to float16."""

    def construct(self, x, dtype):
        return x if dtype == ms.float16 else ops.cast(x, dtype)


def keep_float32(model):
    """Return the model, attending in float32 where mindformers casts to float16, as it does with flash attention."""
    for _, cell in model.cells_and_names():
        if hasattr(cell, "core_attention"):
            del cell.cast
            cell.cast = Cast()
    return model
