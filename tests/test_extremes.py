"""Windows as large as 64 bits, and scales and caps at the ends of float32."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from calls import COMPLETE
from local_attention import (
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    WindowSpec,
    sliding_window_attention,
    windowed_attention,
)
from local_attention.backends.spans import tanh

N = 70
WIDE = {
    "chunk 2**32": (WindowSpec.from_chunks(2**32), WindowSpec.from_chunks(N)),
    "chunk 2**32 + 7": (WindowSpec.from_chunks(2**32 + 7), WindowSpec.from_chunks(N)),
    "chunk 2**62": (WindowSpec.from_chunks(2**62), WindowSpec.from_chunks(N)),
    "2**62 to both sides": (WindowSpec(1, 2**62, 2**62, False), WindowSpec(1, N, N, False)),
    "2**63 - 1 forward": (WindowSpec(1, 0, 2**63 - 1, False), WindowSpec(1, 0, N, False)),
    "2**63 - 1 everywhere": (WindowSpec(*3 * [2**63 - 1], False, 2**63 - 1), WindowSpec(1, N, N, False)),
    "chunk 2**32 without its last": (WindowSpec(2**32, 0, -1, False), WindowSpec(1, N, N, False)),
    "prefix 2**63 - 1": (WindowSpec(1, 2, 0, True, 2**63 - 1), WindowSpec(1, N, 0, True)),
}


def both(function, *inputs):
    def total(*inputs):
        out = function(*inputs)
        return (out * Tensor(np.cos(np.arange(out.size, dtype=np.float32)).reshape(out.shape))).sum(), out
    (_, out), grads = ms.value_and_grad(total, tuple(range(len(inputs))), has_aux=True)(*inputs)
    return [out.asnumpy(), *(grad.asnumpy() for grad in grads)]


def values(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("wide, same", WIDE.values(), ids=WIDE)
def test_wide_windows(wide, same, backend, documents):
    q, k, v = (values(1, 2, N, 6, seed=seed) for seed in range(3))
    more = dict(segment_ids=Tensor((np.arange(N) // 30)[None].astype(np.int32))) if documents else {}
    got = both(lambda *x: windowed_attention(*x, wide, backend=backend, **more), q, k, v)
    wanted = both(lambda *x: windowed_attention(*x, same, backend="dense", **more), q, k, v)
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("wide, same", WIDE.values(), ids=WIDE)
def test_their_pictures(wide, same):
    assert wide.show(9) == same.show(9)


def test_a_wide_window_of_cells_and_of_unknown_lengths():
    q = values(1, 2, N, 6)
    wide, same = (LocalAttention(size, causal=True, autopad=True, look_backward=1) for size in (2**32, 128))
    np.testing.assert_allclose(wide(q, q, q).asnumpy(), same(q, q, q).asnumpy(), rtol=2e-5, atol=2e-5)
    assert "runs this" in wide.explain(N)
    np.testing.assert_allclose(sliding_window_attention(q, q, q, None, None, 2**62, 1).asnumpy(),
                               same(q, q, q).asnumpy(), rtol=2e-5, atol=2e-5)
    spec = WindowSpec.from_chunks(2**62)

    @ms.enable_dynamic(q=Tensor(shape=[1, 2, None, 6], dtype=ms.float32))  # jit ignores an `input_signature`
    @ms.jit
    def call(q):
        return windowed_attention(q, q, q, spec)
    np.testing.assert_allclose(call(q).asnumpy(), same(q, q, q).asnumpy(), rtol=2e-5, atol=2e-5)


def rotated(x, start):
    """Rotate x (..., n, d) by its positions from `start` on, in float64."""
    n, d = x.shape[-2:]
    angles = np.tile(np.outer(np.arange(start, start + n), 10000. ** -(np.arange(0, d, 2) / d)), 2)
    return x * np.cos(angles) + np.concatenate([-x[..., d // 2:], x[..., :d // 2]], -1) * np.sin(angles)


@pytest.mark.parametrize("size", [2**31, 2**40])
def test_rotations_that_start_beyond_32_bits(size):
    """As in upstream, queries count from the end of their window's span, which is `size` further on."""
    q, k, v = (values(1, 2, 41, 8, seed=seed) for seed in range(3))
    attn = LocalAttention(size, dim=8, autopad=True)
    scores = rotated(q.asnumpy(), size) @ rotated(k.asnumpy(), 0).swapaxes(-1, -2) / 8 ** .5
    weights = np.exp(scores)
    wanted = weights / weights.sum(-1, keepdims=True) @ v.asnumpy()
    np.testing.assert_allclose(attn(q, k, v).asnumpy(), wanted, atol=5e-6)

    @ms.enable_dynamic(**{name: Tensor(shape=[1, 2, None, 8], dtype=ms.float32) for name in "qkv"})
    @ms.jit
    def call(q, k, v):
        return attn(q, k, v)
    np.testing.assert_allclose(call(q, k, v).asnumpy(), wanted, atol=5e-6)


@pytest.mark.parametrize("settings", [
    dict(causal=True), dict(exact_windowsize=True), dict(look_backward=0, look_forward=2, exact_windowsize=True),
    dict(window_size=8, look_backward=9, look_forward=7), dict(window_size=8, look_backward=2, causal=True)])
def test_xpos_fills_up_no_more_than_it_needs(settings):
    """With a bias, whose columns are those of the whole span, all of the span is made."""
    settings = {"window_size": 64, **settings}
    q, k, v, mask = *(values(2, 2, 41, 6, seed=seed) for seed in range(3)), Tensor(np.arange(82).reshape(2, 41) % 5 > 0)
    attn = LocalAttention(dim=6, use_xpos=True, autopad=True, **settings)
    bias = ops.zeros((2, attn.window_size, attn.windows.span))
    np.testing.assert_allclose(attn(q, k, v, mask=mask).asnumpy(),
                               attn(q, k, v, mask=mask, attn_bias=bias).asnumpy(), atol=1e-6)


def test_xpos_in_windows_far_wider_than_the_sequence():
    q, settings = values(1, 2, 41, 8), dict(dim=8, use_xpos=True, xpos_scale_base=40, autopad=True, causal=True)
    wide, same = LocalAttention(2**62, **settings), LocalAttention(64, **settings)
    np.testing.assert_allclose(wide(q, q, q).asnumpy(), same(q, q, q).asnumpy(), atol=1e-6)
    assert "scores: 8,192 " in wide.explain(41)


def test_windows_that_cannot_be_had():
    q, x = values(1, 2, 5, 8), values(1, 5, 16)
    with pytest.raises(ValueError, match="'window_size' must be at most 1099511627776 together for all windows"):
        LocalAttention(2**41, dim=8, autopad=True)(q, q, q)
    block = LocalMHA(dim=16, window_size=2**62, heads=2, dim_head=8, causal=True)
    model = LocalTransformer(num_tokens=11, max_seq_len=16, dim=16, depth=1, heads=2, dim_head=8,
                             local_attn_window_size=2**62)
    for owner, call in ("LocalMHA", block), ("LocalTransformer", model):
        x = x if owner == "LocalMHA" else Tensor([[1, 2, 3]])
        with pytest.raises(ValueError, match=f"For '{owner}', 'cache' must be None, .* keep more than 16777216 tokens"):
            call(x, return_cache=True)
    assert model.generate(Tensor([[1, 2, 3]]), 2).shape == (1, 2)


@pytest.mark.parametrize("make", [
    lambda: WindowSpec.from_chunks(2**63), lambda: WindowSpec(1, 2**63, 0, True), lambda: LocalAttention(2**63),
    lambda: WindowSpec(1, 0, 2**64, False), lambda: WindowSpec(1, 0, 0, True, prefix=2**63)])
def test_numbers_that_64_bits_do_not_hold_are_refused(make):
    with pytest.raises(ValueError, match=r"must be .* below 2\*\*63, but got"):
        make()


def test_a_seed_may_be_of_any_size():
    x = values(1, 1, 9, 4)
    out = [windowed_attention(x, x, x, WindowSpec(1, 4, 0, True), dropout_rate=.5, seed=seed).asnumpy()
           for seed in (3, 2**63 + 3 - 2**63 % 2**32)]
    np.testing.assert_array_equal(*out)


@pytest.mark.parametrize("softcap", [1e-46, 1e-44, 1e-39, 2.4e38])
def test_caps_that_float32_does_not_hold_are_refused(softcap):
    x = values(1, 1, 4, 2)
    with pytest.raises(ValueError, match="'softcap' must be from 1e-30 to 1e30, but got"):
        windowed_attention(x, x, x, WindowSpec(1, 2, 0, True), softcap=softcap)
    with pytest.raises(ValueError, match="For 'LocalAttention', 'softcap' must be from 1e-30 to 1e30, but got"):
        LocalAttention(4, softcap=softcap)


def test_a_scale_that_float32_does_not_hold_is_refused():
    x = values(1, 1, 4, 2)
    for make in (lambda: windowed_attention(x, x, x, WindowSpec(1, 2, 0, True), scale=1e39),
                 lambda: LocalAttention(4, scale=-1e39), lambda: LocalMHA(dim=8, window_size=4, qk_scale=1e39)):
        with pytest.raises(ValueError, match="must be a number of at most 3.4e.38, float32's largest, but got"):
            make()


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("softcap", [1e-30, 3., 1e4, 1e10, 1e30])
def test_caps_in_every_backend(softcap, backend, mode):
    q, k, v = (values(1, 1, 20, 4, seed=seed) for seed in range(3))
    spec = WindowSpec(1, 6, 0, True)

    def call(q, k, v):
        return windowed_attention(q, k, v, spec, softcap=softcap, backend=backend)
    got = both(call if mode == "pynative" else ms.jit(call), q, k, v)
    if softcap > 1e3:  # caps nothing that float32 shows
        wanted = both(lambda *x: windowed_attention(*x, spec, backend="dense"), q, k, v)
    elif softcap < 1:  # all scores are the same
        wanted = both(lambda *x: windowed_attention(*x, spec, scale=0., backend="dense"), q, k, v)
    else:
        wanted = both(lambda *x: windowed_attention(*x, spec, softcap=softcap, backend="dense"), q, k, v)
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("backend", COMPLETE)
def test_a_scale_of_0_leaves_the_embeddings_of_offsets(backend, mode):
    q, k, v, emb = (values(1, 1, 20, 4, seed=seed) if seed < 3 else values(5, 4) for seed in range(4))
    mask = Tensor(np.arange(20)[None] % 7 > 0)

    def call(q, k, v, emb, backend=backend):
        return sliding_window_attention(q, k, v, mask, emb, 3, 2, scale=0., backend=backend)

    def dense(q, k, v, emb):
        return call(q, k, v, emb, "dense")
    got = both(call if mode == "pynative" else ms.jit(call), q, k, v, emb)
    for a, b in zip(got, both(dense, q, k, v, emb)):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_tanh_and_its_gradient(compiled):
    x = np.concatenate([10. ** np.arange(-30, 3), np.linspace(.001, 12, 999)]).astype(np.float32)
    x = np.concatenate([x, -x])
    function = ms.jit(tanh) if compiled else tanh
    np.testing.assert_allclose(function(Tensor(x)).asnumpy(), np.tanh(x.astype(np.float64)), rtol=6e-7)
    inside = Tensor(x[np.abs(x) < 5])
    slope = ms.grad(lambda x: ops.reduce_sum(function(x)))(inside).asnumpy()
    np.testing.assert_allclose(slope, 1 - np.tanh(inside.asnumpy().astype(np.float64)) ** 2, rtol=2e-3, atol=1e-6)
