"""The Ascend backend's use of the fused operator, on a CPU, with an emulation of the operator in its place.

What this can show is that arguments and results are those of the operator's documentation. It was not run on Ascend.
"""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import flash_emulation
import oracle
from local_attention import LocalAttention, LocalMHA, WindowSpec, sliding_window_attention
from local_attention import attend as attend_module
from calls import attend_to
from local_attention.attend import Problem, choose
from local_attention.backends import ascend
from local_attention.spec import NO_LIMIT, Scoring

W, D, HEADS = 7, 10, 3
in_both_modes = pytest.mark.parametrize("mode", ["pynative", "graph"])


@pytest.fixture(autouse=True)
def on_ascend(monkeypatch):
    """The operator emulated, its calls counted, and a device that says it is one of Ascend."""
    monkeypatch.setattr(ms.ops, "flash_attention_score", flash_emulation.flash_attention_score)
    monkeypatch.setattr(ascend, "device", lambda: "Ascend")
    monkeypatch.setattr(ascend, "ROWS", 16)  # so that short sequences have several blocks
    attend_module._prepared.cache_clear()
    flash_emulation.CALLS.clear()
    yield flash_emulation.CALLS
    attend_module._prepared.cache_clear()


class Case:
    """Inputs of batch 2 and 3 heads, in values that float16 holds, and what the oracle makes of them."""

    def __init__(self, spec, n, offset=0, mask=False, bias=False, n_k=None, share=1):
        rng = np.random.default_rng(n)
        self.spec, self.options = spec, {"scale": 0.3, "offset": offset}
        n_k = n + offset if n_k is None else n_k

        def draw(*shape):
            return rng.standard_normal(shape).astype(np.float16).astype(np.float32)
        self.q, self.k, self.v, self.dout = (
            draw(groups, rows, D) for groups, rows in ((6, n), (6 // share, n_k), (6 // share, n_k), (6, n)))
        self.mask = rng.random((2, n_k)) > .4 if mask else None
        self.bias = draw(HEADS, W, spec.backward + W + spec.forward) if bias else None

    def wanted(self):
        out = oracle.attention(self.q, self.k, self.v, self.spec, key_mask=self.mask, bias=self.bias, dout=self.dout,
                               **self.options)
        return out[:4]

    def got(self, mode="pynative"):
        mask, bias = (None if x is None else Tensor(x) for x in (self.mask, self.bias))
        dout, spec, options = Tensor(self.dout), self.spec, self.options

        def forward(q, k, v):
            out = attend_to(q, k, v, spec, key_mask=mask, bias=bias, bias_is_constant=True, backend="ascend", **options)
            return (out.astype(ms.float32) * dout).sum(), out
        step = ms.value_and_grad(forward, (0, 1, 2), has_aux=True)
        inputs = [Tensor(x).astype(ms.float16) for x in (self.q, self.k, self.v)]
        (_, out), grads = (ms.jit(step) if mode == "graph" else step)(*inputs)
        assert out.dtype == ms.float16
        return [x.astype(ms.float32).asnumpy() for x in (out, *grads)]

    def check(self, *arguments):
        got = self.got(*arguments)
        for a, b in zip(got, self.wanted()):
            np.testing.assert_allclose(a, b, atol=8e-3, rtol=4e-3)  # float16 has 11 bits, and these sizes are up to 4
        assert all(np.abs(x).max() > 1e-2 for x in got)


BANDS = [  # span, n, offset, n_k, and the operator's two counts
    (WindowSpec(1, W, 0, True), 23, 0, None, (W, 0)),
    (WindowSpec(1, 5, 3, False), 23, 0, None, (5, 3)),
    (WindowSpec(1, 5, 3, True), 23, 0, None, (5, 0)),
    (WindowSpec(1, NO_LIMIT, 0, False), 11, 0, None, (11, 0)),
    (WindowSpec(1, W, 0, True), 1, 22, None, (W, 0)),  # a token with the keys before it
    (WindowSpec(1, W, 0, True), 5, 13, None, (W, 0)),
    (WindowSpec(1, W, 4, False), 5, 4, 11, (W + 2, 2)),  # keys after the last query
]


@pytest.mark.parametrize("mode, spec, n, offset, n_k, tokens",
                         [("pynative", *band) for band in BANDS] + [("graph", *band) for band in BANDS[1::4]])
def test_a_span_that_moves_with_its_query_is_a_band(mode, spec, n, offset, n_k, tokens, on_ascend):
    case = Case(spec, n, offset, n_k=n_k)
    case.check(mode)
    assert {(call["sparse_mode"], call["pre_tokens"], call["next_tokens"]) for call in on_ascend} == {(4, *tokens)}


FOLDED = {
    "windows": dict(spec=WindowSpec(W, W, 0, True), n=3 * W),
    "windows of no multiple": dict(spec=WindowSpec(W, W, W, False), n=23),
    "windows from the middle": dict(spec=WindowSpec(W, 2 * W, 0, True), n=11, offset=17),
    "a key mask": dict(spec=WindowSpec(1, W, 2, False), n=61, mask=True),
    "a key mask and windows": dict(spec=WindowSpec(W, W, 0, True), n=61, mask=True),
    "no limit and a key mask": dict(spec=WindowSpec(1, NO_LIMIT, NO_LIMIT, False), n=23, mask=True),
    "the query hidden": dict(spec=WindowSpec(1, 3, -1, False), n=23),
    "keys after the last query": dict(spec=WindowSpec(1, W, 2, False), n=5, offset=4, n_k=13),
    "a bias": dict(spec=WindowSpec(W, W, 0, True), n=61, bias=True),
    "a bias, a mask and an offset": dict(spec=WindowSpec(1, W, W, False), n=20, offset=9, bias=True, mask=True),
    "grouped heads, a bias and a mask": dict(spec=WindowSpec(W, W, 0, True), n=23, bias=True, mask=True, share=3),
}


@in_both_modes
def test_grouped_heads_are_handed_over_as_they_are(mode, on_ascend):
    Case(WindowSpec(1, W, 0, True), 23, share=3).check(mode)
    assert {call["key"][1] * 3 for call in on_ascend} == {call["shape"][1] for call in on_ascend}


@pytest.mark.parametrize("mode, name", [("pynative", name) for name in FOLDED] +
                         [("graph", name) for name in list(FOLDED)[2::3]])
def test_everything_else_is_blocks_under_a_mask(mode, name, on_ascend):
    Case(**FOLDED[name]).check(mode)
    assert {call["sparse_mode"] for call in on_ascend} == {0}


@in_both_modes
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(mode):
    case = Case(WindowSpec(1, W, 0, True), 23, mask=True)
    case.mask[:, :12] = False
    hidden = ~np.repeat(case.mask, HEADS, 0)
    case.k[hidden], case.v[hidden] = np.nan, np.nan
    out, dq, dk, dv = case.got(mode)
    assert (out[:, :12] == 0).all() and (dq[:, :12] == 0).all() and np.abs(dq[:, 20:]).max() > 1e-2
    assert (dk[hidden] == 0).all() and (dv[hidden] == 0).all() and np.isfinite(dk).all() and np.isfinite(dv).all()


def test_bfloat16():
    """Forward and in a band alone: on CPU, bfloat16 can be neither gathered nor, in a gradient, sliced."""
    case = Case(WindowSpec(1, W, 0, True), 23)
    inputs = [Tensor(x).astype(ms.bfloat16) for x in (case.q, case.k, case.v)]
    out = attend_to(*inputs, case.spec, backend="ascend", **case.options)
    assert out.dtype == ms.bfloat16
    np.testing.assert_allclose(out.astype(ms.float32).asnumpy(), case.wanted()[0], atol=8e-2)  # 8 bits


def test_a_bias_that_hides_is_no_infinity():
    case = Case(WindowSpec(1, W, 0, True), 23, bias=True)
    case.bias[:, :, ::2] = -1e30
    case.bias[:, np.arange(W), W + np.arange(W)] = 0
    case.check()


def test_whether_the_scale_is_of_the_bias_too_does_not_matter(monkeypatch):
    """The documentation says both; the emulation scales it, and here it does not."""
    def other_reading(*inputs, real_shift, scalar_value, **options):
        assert scalar_value == 1
        return flash_emulation.flash_attention_score(*inputs, real_shift=real_shift, **options)
    monkeypatch.setattr(ms.ops, "flash_attention_score", other_reading)
    Case(WindowSpec(W, W, 0, True), 23, bias=True).check()


def test_spans_to_both_sides_that_are_wider_than_the_mask_are_not_a_band():
    def problem(before, after):
        return Problem(WindowSpec(1, before, after, False), Scoring(0.125), 1, 5000, 5000, 64, "Float16")
    assert ascend.band(problem(4096, 0)) == (4096, 0)
    assert ascend.band(problem(1000, 1000)) == (1000, 1000)
    assert ascend.band(problem(1024, 1024)) is None


@in_both_modes
@pytest.mark.parametrize("settings", [dict(dim=D), dict(dim=D, exact_windowsize=True), dict(dim=D, use_xpos=True)],
                         ids=lambda settings: list(settings)[-1])
def test_local_attention_in_half_precision_takes_it_rotated_or_not(settings, mode, on_ascend):
    attn = LocalAttention(W, causal=True, autopad=True, **settings)
    single = [Tensor(np.random.randn(2, HEADS, 23, D).astype(np.float16).astype(np.float32)) for _ in range(3)]

    def forward(q, k, v):
        out = attn(q, k, v)
        return ops_square_sum(out), out
    step = ms.value_and_grad(forward, (0, 1, 2), has_aux=True)
    (_, wanted), wanted_grads = step(*single)
    assert not on_ascend
    (_, out), grads = (ms.jit(step) if mode == "graph" else step)(*(x.astype(ms.float16) for x in single))
    assert out.dtype == ms.float16 and on_ascend
    for a, b in zip((out, *grads), (wanted, *wanted_grads)):
        np.testing.assert_allclose(a.astype(ms.float32).asnumpy(), b.asnumpy(), atol=2e-2, rtol=1e-2)
        assert np.abs(b.asnumpy()).max() > 0.1


def ops_square_sum(x):
    x = x.astype(ms.float32)
    return (x * x).sum()


@in_both_modes
def test_a_block_that_computes_in_float16_takes_it(mode, on_ascend):
    block = LocalMHA(dim=12, window_size=W, dim_head=D, heads=HEADS, causal=True)
    x = Tensor(np.random.randn(2, 23, 12).astype(np.float32))
    wanted = block(x).asnumpy()
    block.to_float(ms.float16)

    def forward(x):
        return block(x)
    out = (ms.jit(forward) if mode == "graph" else forward)(x)
    assert on_ascend and on_ascend[0]["shape"][-1] == 16
    np.testing.assert_allclose(out.astype(ms.float32).asnumpy(), wanted, atol=2e-2)


def test_decoding_in_float16_takes_it(on_ascend):
    block = LocalMHA(dim=12, window_size=W, dim_head=D, heads=HEADS, causal=True)
    x = Tensor(np.random.randn(2, 23, 12).astype(np.float32))
    wanted = block(x).asnumpy()
    block.to_float(ms.float16)
    _, cache = block(x[:, :20], return_cache=True)
    for at in range(20, 23):
        on_ascend.clear()
        out, cache = block(x[:, at:at + 1], cache=cache, return_cache=True)
        assert [call["shape"][2] for call in on_ascend] == [1]
        np.testing.assert_allclose(out.astype(ms.float32).asnumpy(), wanted[:, at:at + 1], atol=2e-2)


def test_sliding_window_attention_takes_it(on_ascend):
    q, k, v = (Tensor(np.random.randn(2, HEADS, 23, D).astype(np.float16)) for _ in range(3))
    out = sliding_window_attention(q, k, v, window_size_left=5, window_size_right=3)
    assert on_ascend[0]["pre_tokens"] == 5 and on_ascend[0]["next_tokens"] == 2 and out.shape == q.shape


REFUSED = [
    (dict(dtype="Float32"), "takes float16 and bfloat16, and the inputs are float32"),
    (dict(bias_shape=(3, 7, 14)), "gives a bias no gradient"),
    (dict(by_offset=True), "has no place for embeddings of offsets"),
    (dict(scoring=Scoring(.1, hide_self=True)), "gives a query's own key no score of its own"),
    (dict(scoring=Scoring(.1, dropout=.1)), "draws dropout that no seed repeats"),
    (dict(head_dim=513), "takes heads of at most 512 dimensions"),
    (dict(n_k=524289), "takes sequences of at most 524288 tokens"),
    (dict(groups=999, bias_shape=(333, 1, 1), bias_is_constant=True), "takes at most 256 heads"),
    (dict(documents=2), "has no place for documents yet"),
    (dict(sinks=3), "has no place for sinks yet"),
    (dict(spec=WindowSpec(1, 7, 0, True, prefix=2)), "has no place for a prefix yet"),
    (dict(scoring=Scoring(.1, softcap=5.)), "has no place for a softcap yet"),
    (dict(lse=True), "has no place for the log-sum-exp yet"),
    (dict(groups=257 * 2048), "takes a batch of at most 2048, and this would be one of 2056"),
]


@pytest.mark.parametrize("change, reason", REFUSED)
def test_what_the_operator_cannot_do_is_refused_with_a_reason(change, reason):
    problem = Problem(**{**dict(spec=WindowSpec(1, 7, 0, True), scoring=Scoring(0.125), groups=6, n_q=23, n_k=23,
                                head_dim=64, dtype="Float16"), **change})
    assert ascend.why_not(problem) == reason
    with pytest.raises(ValueError, match="the backend 'ascend' cannot run this call: it " + reason):
        choose(problem, "ascend")
    assert choose(problem) != "ascend"


def test_without_ascend_it_is_refused(monkeypatch):
    monkeypatch.setattr(ascend, "device", lambda: "CPU")
    problem = Problem(WindowSpec(1, 7, 0, True), Scoring(0.125), 6, 23, 23, 64, "Float16")
    assert ascend.why_not(problem) == "runs on Ascend alone, and the device is CPU"
    assert choose(problem) != "ascend"
