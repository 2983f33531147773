"""Compare blocks at O1 with the same blocks in float32. tests/test_amp.py runs this in its own process and folder,
because MindSpore rewrites classes by their place. It prints a line for each case, or for those that are named."""
import sys

import mindspore as ms
import numpy as np
from mindspore import nn, ops

import local_attention
from local_attention import (LocalAttention, LocalMHA, LocalSelfAttention, LocalTransformer, MultiHeadLocalAttention,
                             WindowSpec, sliding_window_attention, windowed_attention)
from local_attention.local_attention import l2norm, max_neg_value
from local_attention.transformer import FeedForward

DIM, HEADS, N = 20, 3, 23
SETTINGS = [
    dict(prenorm=True),
    dict(qk_rmsnorm=True, gate_values_per_head=True, learned_sinks=True),
    dict(use_xpos=True, exact_windowsize=False),
    dict(shared_qk=True, kv_heads=1, softcap=5.),
]


class Holder(nn.Cell):
    """A user's Cell that contains blocks."""

    def __init__(self, *blocks):
        super().__init__()
        self.first, self.second = blocks
        self.out = nn.Dense(DIM, DIM)

    def construct(self, x):
        return self.out(self.first(x) + self.second(x))


class OfGiven(nn.Cell):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Dense(DIM, DIM)
        self.attn = LocalAttention(5, dim=DIM, causal=True, autopad=True, shared_qk=True)

    def construct(self, x):
        return self.attn(self.to_q(x), x, x)


class OfFunctions(nn.Cell):
    """A user's Cell that calls functions, by their names and as a module's."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Dense(DIM, DIM)
        self.spec = WindowSpec(1, 5, 0, True)

    def construct(self, x):
        q = self.to_q(x)
        q = l2norm(q.expand_dims(1))
        out, lse = local_attention.windowed_attention(q, q, q, self.spec, return_lse=True)
        both, _ = local_attention.merge_attentions((out, out), (lse, lse))
        return both + sliding_window_attention(q, q, q) + windowed_attention(q, q, q, self.spec) + (
            1 / max_neg_value(q))


def block(**settings):
    return LocalMHA(dim=DIM, window_size=5, heads=HEADS, dim_head=10, causal=True, **settings)


def sliding(kind):
    return kind(DIM, 2, window_size_left=4, window_size_right=2, use_rel_pos_emb=True)


def value_and_gradients(cell, inputs):
    out = cell(*inputs)
    weights = ops.cos(ops.arange(out.size).astype(ms.float32)).reshape(out.shape)

    def total(*inputs):
        return (cell(*inputs) * weights).sum()
    step = ms.value_and_grad(total, 0, cell.trainable_params() or None)
    _, gradients = (ms.jit(step) if compiled else step)(*inputs)
    gradients = (gradients[0], *gradients[1]) if cell.trainable_params() else (gradients,)
    return out.asnumpy(), [gradient.asnumpy() for gradient in gradients]


def far(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def fed(cell, x):
    """Return the outputs of calls on one chunk after another, side by side."""
    def step(x, cache):
        return cell(x, cache=cache, return_cache=True)
    outs, start, cache = [], 0, None
    later = ms.jit(step) if compiled else step
    for size in (7, 1, 1, 11, 3):
        out, cache = step(x[:, :size], None) if start == 0 else later(x[:, start:start + size], ms.mutable(cache))
        outs.append(out.asnumpy())
        start, cache = start + size, tuple(cache)
    return np.concatenate(outs, 1)


def check(name, cell, *inputs, casts=True):
    if named and name not in named:
        return
    wanted, wanted_gradients = value_and_gradients(cell, inputs)
    mixed = ms.amp.auto_mixed_precision(cell, "O1")
    found, gradients = value_and_gradients(mixed, inputs)
    assert far(found, wanted) < 5e-3 and (not casts or (found != wanted).any()), name
    largest = max(np.abs(gradient).max() for gradient in wanted_gradients)  # some are 0, such as those of keys' biases
    for gradient, other in zip(gradients, wanted_gradients):
        assert np.abs(gradient - other).max() < 1e-2 * largest > 0, name
    if isinstance(cell, LocalMHA):
        together = far(fed(mixed, inputs[0][:, :N]), found)
        assert together < 5e-3, name
    print(name, "is right", flush=True)


compiled, named = sys.argv[1] == "jit", sys.argv[2:]
ms.set_context(pynative_synchronize=True)
ms.set_seed(0)
np.random.seed(0)
x, heads = ops.randn((2, N, DIM)), ops.randn((2, HEADS, N, 10))
for settings in SETTINGS:
    check(",".join(settings), block(**settings), x)
check("LocalAttention", LocalAttention(5, dim=10, autopad=True), heads, heads + 1, heads, casts=False)
check("LocalSelfAttention", sliding(LocalSelfAttention), x)
check("MultiHeadLocalAttention", sliding(MultiHeadLocalAttention), x, x + 1)
check("FeedForward", FeedForward(DIM), x, casts=False)
check("a Cell with blocks", Holder(block(prenorm=True), sliding(LocalSelfAttention)), x)
check("a Cell with LocalAttention", OfGiven(), x)
check("a Cell with functions", OfFunctions(), x)
model = LocalTransformer(num_tokens=None, dim=DIM, depth=2, max_seq_len=N, local_attn_window_size=5, heads=HEADS,
                         dim_head=10, num_residual_streams=2, use_dynamic_pos_bias=True)
check("LocalTransformer", model, x, casts=False)
