"""Code that GPU and Ascend use instead of the CPU's, with the same results, run on the CPU."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from local_attention import LocalTransformer, WindowSpec, attend, checks, windowed_attention
from local_attention.backends import blocks, dropout
from local_attention.parallel import groups
from test_attend import SPECS, Case, assert_close

MODES = ["pynative", "graph"]


@pytest.fixture
def elsewhere(monkeypatch):
    """Run `blocked` as on a device where broadcasting is cheap."""
    monkeypatch.setattr(blocks, "broadcasts", lambda problem: True)
    attend._prepared.cache_clear()
    yield
    attend._prepared.cache_clear()


@pytest.fixture
def device(monkeypatch):
    """Set the device target that MindSpore reports."""
    before = ms.get_context

    def at(name):
        monkeypatch.setattr(ms, "get_context", lambda key: name if key == "device_target" else before(key))
    return at


@pytest.mark.parametrize("seed", range(20))
def test_blocked(seed, elsewhere):
    case = Case(seed)
    assert_close(case.got("blocked", "pynative"), case.wanted(), 2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_blocked_with_every_option(mode, elsewhere):
    case = Case(0, spec=SPECS[3], n=23, bias=True, emb=True, mask=True, hide_self=True, offset=5)
    assert_close(case.got("blocked", mode), case.wanted(), 2e-5)
    more = dict(dropout=.3, seed=Tensor([11], ms.int32), softcap=3.)
    assert_close(case.got("blocked", mode, **more), case.got("dense", "graph", **more), 2e-5)


@pytest.mark.parametrize("bucket", [1, 7])
def test_blocked_with_heads_that_share_keys(bucket, elsewhere):
    rng = np.random.default_rng(bucket)
    q, dout = (Tensor(rng.standard_normal((2, 6, 29, 10)).astype(np.float32)) for _ in range(2))
    k, v = (Tensor(rng.standard_normal((2, 3, 29, 10)).astype(np.float32)) for _ in range(2))
    mask, sinks = Tensor(rng.random((2, 29)) < .7), Tensor(rng.standard_normal(6).astype(np.float32))
    bias = Tensor(rng.standard_normal((6, bucket, 7 + bucket)).astype(np.float32))

    def got(backend):
        def loss(q, k, v, bias, sinks):
            out, lse = windowed_attention(q, k, v, WindowSpec(bucket, 7, 0, True), mask=mask, attn_bias=bias,
                                          sinks=sinks, return_lse=True, backend=backend)
            return (out * dout).sum() + ms.ops.masked_fill(lse, lse < -1e9, 0.).sum(), out
        (_, out), grads = ms.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)(q, k, v, bias, sinks)
        return [x.asnumpy() for x in (out, *grads)]
    found = got("blocked")
    assert all(np.abs(x).max() > 1e-2 for x in found)
    assert_close(found, got("dense"), 5e-5)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_has_the_same_bits_without_a_shift(mode):
    high = np.arange(2**16, dtype=np.uint32) << 16
    x = high | np.random.default_rng(0).integers(0, 2**16, 2**16, dtype=np.uint32)
    x = np.concatenate([x, high, high | 0xFFFF]).view(np.int32)

    def half(x):
        return dropout._without_shift(x)
    found = (ms.jit(half) if mode == "graph" else half)(Tensor(x))
    np.testing.assert_array_equal(found.asnumpy(), x >> 16)


def test_gpu_refuses_bfloat16_in_words(device):
    model = LocalTransformer(num_tokens=None, max_seq_len=9, dim=8, depth=1, heads=2, dim_head=4,
                             local_attn_window_size=3)
    device("GPU")
    with pytest.raises(TypeError, match="'q' must be a Tensor of float32 or float16 on GPU, where MindSpore has no "
                                        "bfloat16, but got bfloat16"):
        windowed_attention(*3 * [Tensor(np.zeros((1, 2, 5, 4)), ms.bfloat16)], WindowSpec(1, 3, 0, True))
    with pytest.raises(TypeError, match="For 'LocalTransformer', 'x' must be a Tensor of float32 or float16 on GPU"):
        model(Tensor(np.zeros((1, 5, 8)), ms.bfloat16))
    assert checks.tensor("f", "x", ((3,), ms.float16), checks.FLOATS) == (3,)


@pytest.mark.parametrize("name, pairs", [("CPU", [0, 1]), ("GPU", [0, 1]), ("Ascend", [])])
def test_neighbours_have_groups_where_sums_are_all_there_is(name, pairs, device, monkeypatch):
    made = []
    monkeypatch.setattr(groups, "group_of", lambda *args: groups.Group("all", 1, 3))
    monkeypatch.setattr(groups, "pair", lambda group, first: made.append(first))
    device(name)
    groups.sequence_group("LocalAttention", True)
    assert made == pairs
