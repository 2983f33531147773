"""Graphs that do not know the head dimension, as `ms.jit(dynamic=1)` makes them at the third shape."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from local_attention import (LocalAttention, LocalMHA, LocalSelfAttention, LocalTransformer, MultiHeadLocalAttention,
                             WindowSpec, sliding_window_attention, windowed_attention)


def values(*shape):
    return Tensor(np.random.default_rng(shape[1]).standard_normal(shape).astype(np.float32))


SETTINGS = dict(window_size=4, causal=True)
CELLS = {
    "LocalAttention": (lambda: LocalAttention(dim=8, autopad=True, **SETTINGS), 3),
    "LocalMHA": (lambda: LocalMHA(dim=16, dim_head=8, heads=2, prenorm=True, gate_values_per_head=True, **SETTINGS), 1),
    "LocalSelfAttention": (lambda: LocalSelfAttention(16, 2, window_size_left=3, use_rel_pos_emb=True), 1),
    "MultiHeadLocalAttention": (lambda: MultiHeadLocalAttention(16, 2, window_size_left=3, window_size_right=2), 2),
    "LocalTransformer": (lambda: LocalTransformer(num_tokens=None, max_seq_len=64, dim=16, depth=1, dim_head=8, heads=2,
                                                  local_attn_window_size=4), 1),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_know_it(name):
    make, inputs = CELLS[name]
    cell = make()

    def call(*x):
        return cell(*x)
    compiled = ms.jit(call, dynamic=1)
    for b, n in ((2, 5), (3, 6), (1, 9), (2, 7)):
        x = [values(b, 2, n, 8) if inputs == 3 else values(b, n, 16) for _ in range(inputs)]
        np.testing.assert_allclose(compiled(*x).asnumpy(), cell(*x).asnumpy(), rtol=1e-5, atol=1e-5)


def windowed(q, k, v):
    return windowed_attention(q, k, v, WindowSpec(1, 3, 0, True))


def sliding(q, k, v):
    return sliding_window_attention(q, k, v, None, None, 4, 1)


def cell_without_a_width(q, k, v):
    return PLAIN(q, k, v)


PLAIN = LocalAttention(4, autopad=True)


@pytest.mark.parametrize("owner, call", [("windowed_attention", windowed), ("sliding_window_attention", sliding),
                                         ("LocalAttention", cell_without_a_width)])
def test_functions_say_that_they_have_to(owner, call):
    compiled = ms.jit(call, dynamic=1)
    for n in (5, 6):
        compiled(*3 * [values(1, 2, n, 8)])
    with pytest.raises(ValueError, match=f"For '{owner}', 'q' must be of a known head dimension: .*'set_inputs'"):
        compiled(*3 * [values(1, 2, 7, 8)])
