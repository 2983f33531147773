"""The layers around attention, by the native kernel and by plain operators, against NumPy in float64."""
import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from local_attention import LocalAttention, LocalMHA, layers, mha, rotary, settings, windows
from local_attention.backends.native import library
from local_attention.layers import GEGLU, LayerNorm
from local_attention.rotary import SinusoidalEmbeddings

SHAPES = [(1, 1, 2), (3, 7, 38), (5, 512), (2, 33, 1366)]
LEVELS = range(library.machine_level() + 1) if library.load()[0] else []
by_each = pytest.mark.parametrize("by", ["operators", *LEVELS])
in_both_modes = pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.fixture
def choose(monkeypatch):
    """Force the plain operators, or the kernel at one width of vectors."""
    def to(by):
        if by == "operators":
            monkeypatch.setattr(library, "unavailable", lambda device: "is not to be used")
        else:
            monkeypatch.setattr(settings, "level", by)
    return to


def gradients(cell, x, dy, compiled):
    """Return the output, and the gradients of the input and of the parameters, in float64."""
    weights = ms.ParameterTuple(cell.trainable_params())

    def weighed(x, dy):
        out = cell(x)
        return (out * dy).sum(), out
    gradient = ms.value_and_grad(weighed, 0, weights if len(weights) else None, has_aux=True)

    def run(x, dy):
        return gradient(x, dy)
    (_, out), grads = (ms.jit(run) if compiled else run)(x, dy)
    dx, dweights = grads if len(weights) else (grads, ())
    return [x.astype(ms.float32).asnumpy().astype(np.float64) for x in (out, dx, *dweights)]


def assert_near(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


def wanted_layer_norm(x, gamma, beta, dy):
    from_mean = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((from_mean**2).mean(-1, keepdims=True) + 1e-5)
    normed, wanted = from_mean * inverse, dy * gamma
    dx = inverse * (wanted - wanted.mean(-1, keepdims=True) - normed * (wanted * normed).mean(-1, keepdims=True))
    axes = tuple(range(x.ndim - 1))
    return normed * gamma + beta, dx, (dy * normed).sum(axes), dy.sum(axes)


@by_each
@in_both_modes
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(choose, by, shape, compiled):
    choose(by)
    x, dy, (gamma, beta) = 3 * draw(*shape) + 1, draw(*shape)[::-1].copy(), draw(2, shape[-1])
    cell = LayerNorm(shape[-1])
    cell.gamma.set_data(Tensor(gamma.astype(np.float32)))
    cell.beta.set_data(Tensor(beta.astype(np.float32)))
    found = gradients(cell, Tensor(x.astype(np.float32)), Tensor(dy.astype(np.float32)), compiled)
    assert_near(found, wanted_layer_norm(x, gamma, beta, dy), 2e-5 if by == "operators" or shape[-1] == 2 else 2e-6)


def wanted_geglu(x, dy):
    a, gate = np.split(x, 2, -1)
    below = (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2
    slope = below + gate * np.exp(-gate**2 / 2) / math.sqrt(2 * math.pi)
    return a * gate * below, np.concatenate([dy * gate * below, dy * a * slope], -1)


@by_each
@in_both_modes
@pytest.mark.parametrize("shape", SHAPES)
def test_geglu(choose, by, shape, compiled):
    choose(by)
    x, dy = 3 * draw(*shape), draw(*shape)[..., :shape[-1] // 2].copy()
    found = gradients(GEGLU(), Tensor(x.astype(np.float32)), Tensor(dy.astype(np.float32)), compiled)
    assert_near(found, wanted_geglu(x, dy), 2e-6)


def test_geglu_far_from_zero():
    """Relative to the values, down to those that vanish."""
    gate = np.array([-30., -12, -8, -5, -2, -1e-3, 0, 1e-3, 2, 5, 30], np.float32)
    found = GEGLU()(Tensor(np.stack([np.ones_like(gate), gate], 1))).asnumpy()[:, 0]
    wanted = np.array([x * math.erfc(-x / math.sqrt(2)) / 2 for x in gate.astype(np.float64)])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-30 if library.load()[0] else 1e-5)


@by_each
@in_both_modes
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 9, 10), (4, 70, 64)])
def test_rotation(choose, by, shape, compiled):
    choose(by)
    embeddings, x, dy = SinusoidalEmbeddings(shape[-1]), draw(*shape), draw(*shape)[::-1].copy()

    class Rotate(nn.Cell):
        def construct(self, x):
            return embeddings.rotate(x, 1000)
    angles = np.tile(np.outer(1000 + np.arange(shape[-2]), embeddings.inv_freq), 2)

    def turned(x, sign=1):
        first, second = np.split(x, 2, -1)
        return x * np.cos(angles) + sign * np.concatenate([-second, first], -1) * np.sin(angles)
    found = gradients(Rotate(), Tensor(x.astype(np.float32)), Tensor(dy.astype(np.float32)), compiled)
    assert_near(found, (turned(x), turned(dy, -1)), 2e-6)


@pytest.mark.parametrize("position", [5, 10**6, 2**31 - 100])
def test_a_rotation_of_what_comes_next_goes_on_where_the_last_one_ended(position):
    embeddings, x = SinusoidalEmbeddings(16), ops.randn((2, 9, 16))
    together = embeddings.rotate_at(x, position).asnumpy()
    at = Tensor(np.array([position + 4], np.int32))
    np.testing.assert_allclose(embeddings.rotate_at(x[:, 4:], at).asnumpy(), together[:, 4:], atol=1e-6)


if LEVELS:  # plain operators compute in the dtype of their inputs

    @in_both_modes
    @pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
    def test_half_precision_is_rounded_at_the_edges_alone(dtype, compiled):
        x = Tensor(draw(4, 64).astype(np.float32)).astype(dtype)
        near = 2 * {ms.float16: 2**-11, ms.bfloat16: 2**-8}[dtype]
        for cell in (LayerNorm(64), GEGLU()):
            def run(x, cell=cell):
                return cell(x)
            out = (ms.jit(run) if compiled else run)(x)
            assert out.dtype == dtype
            wanted = run(x.astype(ms.float32)).asnumpy()
            assert np.abs(out.astype(ms.float32).asnumpy() - wanted).max() <= near * np.abs(wanted).max()


def test_the_kernel_is_what_runs():
    made = layers._fused("layer_norm", (2, 3), 1e-5), layers._fused("geglu", (2, 4)), rotary._fused_rotation((1.,))
    assert [cell is None for cell in made] == 3 * [not LEVELS]
    assert layers._fused("geglu", (0, 4)) is None


# Heads


HEADS = {
    "causal": dict(causal=True), "grouped": dict(heads=6, kv_heads=2, dim_head=6), "unrotated": dict(
        use_rotary_pos_emb=False, dim_head=7), "options": dict(causal=True, learned_sinks=True, exact_windowsize=False,
                                                               prefix=3, dropout=0.3, gate_values_per_head=True)}


@pytest.mark.skipif(not LEVELS, reason="the kernel is not built")
@in_both_modes
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
@pytest.mark.parametrize("name", HEADS)
def test_heads_by_the_kernel_are_those_that_are_gathered(name, dtype, compiled, monkeypatch):
    block = LocalMHA(**{**dict(dim=20, window_size=7, heads=3, dim_head=10, prenorm=True), **HEADS[name]})
    block.set_train()
    block.to_float(dtype)
    mask = None if name == "causal" else Tensor(np.arange(31) < np.array([[31], [17]]))
    seeds, used = Tensor([5], ms.int32), []

    class Masked(nn.Cell):
        def __init__(self):
            super().__init__()
            self.block = block

        def construct(self, x):
            return self.block(x, mask=mask)

    split = mha.fused_heads

    def counted(attn, heads, kv_heads):
        used.append(split(attn, heads, kv_heads))
        return split(attn, heads, kv_heads)

    def none(attn, heads, kv_heads):
        return None

    def seed(salt):
        return seeds
    monkeypatch.setattr(windows, "draw_seed", seed)
    found = []
    for by in (counted if not compiled else split, none):
        monkeypatch.setattr(mha, "fused_heads", by)
        found.append(gradients(Masked(), Tensor(draw(2, 31, 20), dtype), Tensor(draw(2, 31, 20) + 1, dtype), compiled))
    assert compiled or all(cell is not None for cell in used) and used
    assert_near(*found, 1e-6 if dtype == ms.float32 else 2e-3)
    assert all(np.abs(x).max() > 0 for x in found[0][:4])


def test_heads_are_gathered_where_another_backend_is_asked_for():
    def split(**options):
        return layers.fused_heads(LocalMHA(dim=8, window_size=4, heads=2, dim_head=4, **options).attn_fn, 2, 2)
    assert (split() is not None) == bool(LEVELS)
    assert split(backend="blocked") is split(shared_qk=True) is split(use_xpos=True) is None


class Twice(nn.Cell):
    """Another Cell's output, doubled."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, q, k, v, mask=None, attn_bias=None, segment_ids=None, sinks=None):
        return 2 * self.cell(q, k, v, mask=mask, attn_bias=attn_bias, segment_ids=segment_ids, sinks=sinks)


class Doubled(LocalAttention):
    def construct(self, q, k, v, mask=None, attn_bias=None, segment_ids=None, sinks=None):
        return 2 * super().construct(q, k, v, mask=mask, attn_bias=attn_bias, segment_ids=segment_ids, sinks=sinks)


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "jit"])
@pytest.mark.parametrize("change", [
    lambda attn: Twice(attn),
    lambda attn: Doubled(4, causal=True, dim=4, autopad=True, exact_windowsize=True)], ids=["wrapped", "subclass"])
def test_a_block_calls_what_stands_in_for_its_attention(change, compiled):
    block, x = LocalMHA(dim=8, window_size=4, heads=2, dim_head=4, causal=True), ops.randn((2, 11, 8))
    once = block(x)
    block.attn_fn = change(block.attn_fn)
    twice = (ms.jit(block) if compiled else block)(x)
    np.testing.assert_allclose(twice.asnumpy(), 2 * once.asnumpy(), atol=1e-6)
