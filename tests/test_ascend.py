"""The Ascend backend's use of the fused operator, on a CPU, with an emulation of the operator in its place.

This shows only that arguments and results agree with the operator's documentation. It was not run on Ascend.
"""
import inspect

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from mindspore.ops import auto_generate

import flash_emulation
import oracle
from local_attention import LocalAttention, LocalMHA, WindowSpec, sliding_window_attention, windowed_attention
from local_attention import attend as attend_module
from local_attention import settings
from calls import attend_to
from local_attention.attend import Frame, Problem, choose
from local_attention.backends import ascend
from local_attention.backends.spans import document_bounds
from local_attention.spec import NO_LIMIT, Scoring

W, D, HEADS = 7, 10, 3
in_both_modes = pytest.mark.parametrize("mode", ["pynative", "graph"])


@pytest.fixture(autouse=True)
def on_ascend(monkeypatch):
    """Emulate the operator, record its calls, and report an Ascend device."""
    monkeypatch.setattr(ms.ops, "flash_attention_score", flash_emulation.flash_attention_score)
    for primitive in ("FlashAttentionScore", "FlashAttentionScoreGrad"):
        monkeypatch.setattr(ascend, primitive, getattr(flash_emulation, primitive))
    monkeypatch.setattr(settings, "device", lambda: "Ascend")
    monkeypatch.setattr(ascend, "ROWS", 16)  # so that short sequences have several blocks
    attend_module._prepared.cache_clear()
    flash_emulation.CALLS.clear()
    yield flash_emulation.CALLS
    attend_module._prepared.cache_clear()


class Case:
    """Inputs of batch 2 and 3 heads, with values that float16 holds, and the oracle's results."""

    def __init__(self, spec, n, offset=0, mask=False, bias=False, n_k=None, share=1, documents=False, sinks=False,
                 lse=False):
        rng = np.random.default_rng(n)
        self.spec, self.options = spec, {"scale": 0.3, "offset": offset}
        n_k = n + offset if n_k is None else n_k

        def draw(*shape):
            return rng.standard_normal(shape).astype(np.float16).astype(np.float32)
        self.q, self.k, self.v, self.dout = (
            draw(groups, rows, D) for groups, rows in ((6, n), (6 // share, n_k), (6 // share, n_k), (6, n)))
        self.mask = rng.random((2, n_k)) > .4 if mask else None
        self.bias = draw(HEADS if bias is True else bias, W, spec.backward + W + spec.forward) if bias else None
        self.ids = np.sort(rng.integers(-1, 4, (2, n_k)), 1).astype(np.int32) if documents else None
        self.sinks, self.lse = draw(HEADS) if sinks else None, lse
        self.dlse = draw(6, n) if lse else None

    def wanted(self):
        """Return the output, the log-sum-exp if requested, and the gradients of q, k, v and sinks."""
        options = dict(self.options, key_mask=self.mask, bias=self.bias, sinks=self.sinks, dout=self.dout,
                       dlse=self.dlse)
        if self.ids is None:
            got = oracle.everything(self.q, self.k, self.v, self.spec, **options)
        else:
            options.pop("offset")
            got = oracle.in_documents(self.q, self.k, self.v, self.spec, segment_ids=self.ids, **options)
        names = ["out", *["lse"] * self.lse, "q", "k", "v", *["sinks"] * (self.sinks is not None)]
        return [got[name] for name in names]

    def got(self, mode="pynative"):
        mask, bias = (None if x is None else Tensor(x) for x in (self.mask, self.bias))
        dout, spec, options, with_lse = Tensor(self.dout), self.spec, self.options, self.lse
        documents = None if self.ids is None else document_bounds(Tensor(self.ids))
        dlse = None if self.dlse is None else Tensor(self.dlse)
        inputs = [Tensor(x).astype(ms.float16) for x in (self.q, self.k, self.v)]
        if self.sinks is not None:
            inputs.append(Tensor(self.sinks))

        def forward(q, k, v, sinks=None):
            out = attend_to(q, k, v, spec, key_mask=mask, bias=bias, bias_is_constant=True, backend="ascend",
                            documents=documents, sinks=sinks, lse=with_lse, **options)
            if not with_lse:
                return (out.astype(ms.float32) * dout).sum(), out
            there = ops.cast(out[1] > -1e30, ms.float32)
            lse = ops.masked_fill(out[1], there == 0, 0.)
            return (out[0].astype(ms.float32) * dout).sum() + (lse * dlse).sum(), out
        step = ms.value_and_grad(forward, tuple(range(len(inputs))), has_aux=True)
        (_, out), grads = (ms.jit(step) if mode == "graph" else step)(*inputs)
        outs = out if with_lse else (out,)
        assert outs[0].dtype == ms.float16 and all(x.dtype == ms.float32 for x in outs[1:])
        return [x.astype(ms.float32).asnumpy() for x in (*outs, *grads)]

    def check(self, *arguments):
        got, wanted = self.got(*arguments), self.wanted()
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted):
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
    "a key mask and windows": dict(spec=WindowSpec(W, W, 0, True), n=61, mask=True),
    "the query hidden": dict(spec=WindowSpec(1, 3, -1, False), n=23),
    "keys after the last query": dict(spec=WindowSpec(1, W, 2, False), n=5, offset=4, n_k=13),
    "a bias": dict(spec=WindowSpec(W, W, 0, True), n=61, bias=True),
    "a bias, a mask and an offset": dict(spec=WindowSpec(1, W, W, False), n=20, offset=9, bias=True, mask=True),
    "grouped heads, a bias and a mask": dict(spec=WindowSpec(W, W, 0, True), n=23, bias=True, mask=True, share=3),
    "grouped heads, a bias of one head": dict(spec=WindowSpec(1, W, 0, True), n=23, bias=1, sinks=True, share=3),
    "documents": dict(spec=WindowSpec(1, W, 0, True), n=61, documents=True),
    "documents in windows": dict(spec=WindowSpec(W, W, W, False), n=61, documents=True, share=3),
    "documents, a mask, an offset": dict(spec=WindowSpec(1, W, 3, False), n=20, offset=31, documents=True, mask=True),
    "documents, sinks and their sums": dict(spec=WindowSpec(W, W, 0, True), n=61, documents=True, sinks=True, lse=True),
    "documents with a prefix": dict(spec=WindowSpec(1, W, 0, True, 2), n=61, documents=True),
    "sinks": dict(spec=WindowSpec(W, W, 0, True), n=23, sinks=True, share=3),
    "sinks, a mask and a bias": dict(spec=WindowSpec(W, W, 0, True), n=23, sinks=True, mask=True, bias=True),
    "sums": dict(spec=WindowSpec(W, W, 0, True), n=23, lse=True, mask=True),
    "a prefix": dict(spec=WindowSpec(W, W, 0, True, 3), n=37, share=3),
    "a prefix, a mask, sinks and sums": dict(spec=WindowSpec(W, W, 0, True, 3), n=37, mask=True, sinks=True, lse=True),
}
BANDED = {
    "sinks": dict(n=23, sinks=True),
    "sinks of grouped heads": dict(n=23, sinks=True, share=3),
    "sums": dict(n=23, lse=True),
    "sums of a few queries": dict(n=5, offset=18, lse=True, share=3),
    "a prefix": dict(spec=WindowSpec(1, W, 0, True, 3), n=37),
    "a key mask": dict(spec=WindowSpec(1, W, 2, False), n=61, mask=True),
    "no limit and a key mask": dict(spec=WindowSpec(1, NO_LIMIT, NO_LIMIT, False), n=23, mask=True),
    "a key mask and sinks": dict(n=61, mask=True, sinks=True),
    "all of it": dict(spec=WindowSpec(1, W, 0, True, 3), n=37, mask=True, sinks=True, lse=True, share=3),
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


@pytest.mark.parametrize("mode, name", [("pynative", name) for name in BANDED] +
                         [("graph", name) for name in ("sinks", "all of it")])
def test_a_band_with_what_comes_beside_it(mode, name, on_ascend):
    case = Case(**{"spec": WindowSpec(1, W, 0, True), **BANDED[name]})
    case.check(mode)
    assert {call["sparse_mode"] for call in on_ascend} == {4}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_of_whole_rows_is_a_band(padding, on_ascend):
    case = Case(WindowSpec(1, W, 0, True), 23, mask=True)
    case.mask = np.arange(23) < np.array([[13], [23]])
    if padding == "left":
        case.mask = case.mask[:, ::-1].copy()
    case.check()
    assert {call["sparse_mode"] for call in on_ascend} == {4}


def test_the_sinks_gradient_is_there_where_a_query_sees_nothing_else():
    case = Case(WindowSpec(1, W, 0, True), 23, mask=True, sinks=True, lse=True)
    case.mask[:, :12] = False
    case.check()


@pytest.mark.parametrize("size", [1e-4, 1., 1e4])
def test_gradients_of_a_log_sum_exp_are_not_rounded_to_16_bits(size, monkeypatch):
    """equally many labels in each half of the batch: the mean of both losses is right"""
    case = Case(WindowSpec(1, W, 0, True), 23, lse=True)
    case.dlse, case.dout = np.float32(size) * case.dlse, 0 * case.dout
    q, k, v = (Tensor(x).astype(ms.float16).reshape(2, 3, 23, D) for x in (case.q, case.k, case.v))
    found = {}
    backward = flash_emulation.FlashAttentionScoreGrad.construct

    def kept(self, query, key, value, dy, *more):
        found["sum"] = (dy.astype(ms.float32) * more[7].astype(ms.float32)).sum(-1)
        return backward(self, query, key, value, dy, *more)
    monkeypatch.setattr(flash_emulation.FlashAttentionScoreGrad, "construct", kept)

    def forward(q):
        _, lse = windowed_attention(q, k, v, case.spec, return_lse=True, backend="ascend")
        return (lse.reshape(6, 23) * Tensor(case.dlse)).sum()
    ms.grad(forward)(q)
    np.testing.assert_allclose(-found["sum"].asnumpy().reshape(6, 23), case.dlse, rtol=2e-5, atol=1e-9)


def parameters(function):
    return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]


@pytest.mark.parametrize("name", ["FlashAttentionScore", "FlashAttentionScoreGrad"])
def test_the_emulation_takes_what_the_installed_primitives_take(name):
    """The arguments have the same names, order and defaults, and the primitives accept what the emulation gets."""
    real, emulated = getattr(auto_generate, name), getattr(flash_emulation, name)
    assert parameters(real.__call__) == parameters(emulated.construct)
    assert parameters(real.__init__)[1:] == parameters(emulated.__init__)[1:]
    real(3, 1., .125, 7, 0, 0, "BNSD", 4)


def test_the_emulation_takes_what_the_installed_function_takes():
    from mindspore.ops.operations.manually_defined import flash_attention_score
    assert parameters(flash_attention_score) == parameters(flash_emulation.flash_attention_score)


def test_arguments_are_those_of_mindspores_own_calls(on_ascend):
    """mindformers gives a window as a band: mode 4, counts to the left and right, the triangle of 2048, and k and v
    unrepeated. MindSpore's own gradient, and its ring attention, give the gradient primitive the numbers of the forward
    pass."""
    Case(WindowSpec(1, 5, 3, False), 23, share=3, sinks=True).check()
    forward, backward = on_ascend
    assert (forward.pop("name"), backward.pop("name")) == ("forward", "backward")
    assert forward == backward == dict(shape=(1, 6, 23, 16), key=(1, 2, 23, 16), sparse_mode=4, pre_tokens=5,
                                       next_tokens=3, scale=0.3, mask=(2048, 2048))


@in_both_modes
def test_sinks_of_a_block_that_computes_in_float16(mode, on_ascend):
    """Statistics stay in float32 when `to_float` casts everything else."""
    block = LocalMHA(dim=12, window_size=W, dim_head=D, heads=4, kv_heads=2, causal=True, learned_sinks=True, prefix=2)
    block.sinks.set_data(Tensor(np.array([.5, -1., 2., 0.], np.float32)))
    x = Tensor(np.random.randn(2, 23, 12).astype(np.float32))
    wanted, wanted_grads = step_of(block)(x)
    block.to_float(ms.float16)
    step = step_of(block)
    out, grads = (ms.jit(step) if mode == "graph" else step)(x)
    assert {call["name"] for call in on_ascend} == {"forward", "backward"}
    for a, b in zip((out, *grads), (wanted, *wanted_grads)):
        np.testing.assert_allclose(a.astype(ms.float32).asnumpy(), b.asnumpy(), atol=2e-2, rtol=2e-2)
        assert np.abs(b.asnumpy()).max() > 1e-2


def step_of(block):
    def forward(x):
        out = block(x)
        return ops_square_sum(out), out
    gradients = ms.value_and_grad(forward, None, block.trainable_params(), has_aux=True)

    def step(x):
        (_, out), grads = gradients(x)
        return out, grads
    return step


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
    """Only forward and in a band: on CPU, bfloat16 can be neither gathered nor, in a gradient, sliced."""
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
    """The documentation says both: the emulation scales the bias, and the function here does not."""
    def other_reading(*inputs, real_shift, scalar_value, **options):
        assert scalar_value == 1
        return flash_emulation.flash_attention_score(*inputs, real_shift=real_shift, **options)
    monkeypatch.setattr(ms.ops, "flash_attention_score", other_reading)
    Case(WindowSpec(W, W, 0, True), 23, bias=True).check()


def test_spans_to_both_sides_that_are_wider_than_the_mask_are_not_a_band():
    def problem(before, after):
        return Problem(WindowSpec(1, before, after, False), Scoring(0.125), 1, 5000, 5000, 64, 64, "Float16")
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


@pytest.mark.parametrize("options", [{}, dict(kv_heads=1), dict(kv_heads=1, learned_sinks=True)], ids=str)
def test_decoding_in_float16_takes_it(options, on_ascend):
    block = LocalMHA(dim=12, window_size=W, dim_head=D, heads=HEADS, causal=True, **options)
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
    (dict(shapes=(("bias", (3, 7, 14)),)), "gives a bias no gradient"),
    (dict(shapes=(("rel_pos_emb", (8, 64)),)), "has no place for embeddings of offsets"),
    (dict(scoring=Scoring(.1, hide_self=True)), "gives a query's own key no score of its own"),
    (dict(scoring=Scoring(.1, dropout=.1)), "draws dropout that no seed repeats"),
    (dict(d=513, d_v=513), "takes heads of at most 512 dimensions"),
    (dict(n_k=524289), "takes sequences of at most 524288 tokens"),
    (dict(groups=999, shapes=(("bias", (333, 1, 1)),), frame=Frame(bias_is_constant=True)),
     "takes at most 256 heads"),
    (dict(scoring=Scoring(.1, softcap=5.)), "caps no scores"),
    (dict(d=500, d_v=500, frame=Frame(lse=True)), "takes heads of at most 496 dimensions with these options"),
    (dict(shapes=(("bias", (3, 7, 14)), ("documents", (2, 23, 2))), frame=Frame(bias_is_constant=True)),
     "takes one bias for a whole batch, and in documents each row has its own"),
    (dict(groups=257 * 2048), "takes a batch of at most 2048, and this would be one of 2056"),
]


@pytest.mark.parametrize("change, reason", REFUSED)
def test_what_the_operator_cannot_do_is_refused_with_a_reason(change, reason):
    problem = Problem(**{**dict(spec=WindowSpec(1, 7, 0, True), scoring=Scoring(0.125), groups=6, n_q=23, n_k=23,
                                d=64, d_v=64, dtype="Float16", device="Ascend"), **change})
    assert ascend.why_not(problem) == reason
    with pytest.raises(ValueError, match="the backend 'ascend' cannot run this call: it " + reason):
        choose(problem, "ascend")
    assert choose(problem) != "ascend"


def test_without_ascend_it_is_refused():
    problem = Problem(WindowSpec(1, 7, 0, True), Scoring(0.125), 6, 23, 23, 64, 64, "Float16")
    assert ascend.why_not(problem) == "runs on Ascend alone, and the device is CPU"
    assert choose(problem) != "ascend"


@in_both_modes
@pytest.mark.parametrize("width", [D, 4, 20])
def test_ends_of_documents_are_one_call(on_ascend, mode, width):
    rng, spec = np.random.default_rng(5), WindowSpec(1, 4, 0, True)
    q, k, v, dout = (rng.standard_normal(shape).astype(np.float16) for shape in (
        (2, 4, 13, D), (2, 2, 13, D), (2, 2, 13, width), (2, 4, 13, width)))
    ends = Tensor([0, 5, 13, 13, 20, 26, 26], ms.int32)
    ids = np.array([[0] * 5 + [1] * 8, [0] * 7 + [1] * 6], np.int32)

    def forward(q, k, v):
        out = windowed_attention(q, k, v, spec, cu_seqlens=ends)
        return (out.astype(ms.float32) * Tensor(dout).astype(ms.float32)).sum(), out
    step = ms.value_and_grad(forward, (0, 1, 2), has_aux=True)
    (_, out), grads = (ms.jit(step) if mode == "graph" else step)(*(Tensor(x) for x in (q, k, v)))
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    want = oracle.in_documents(*flat, spec, D ** -.5, ids, dout=dout.reshape(8, 13, width).astype(np.float64))
    for name, x in zip(("out", "q", "k", "v"), (out, *grads)):
        np.testing.assert_allclose(x.asnumpy(), want[name].reshape(x.shape), atol=8e-3, rtol=4e-3, err_msg=name)
    common = 16 * -(-max(D, width) // 16)
    assert [(call["shape"], call["sparse_mode"], call["pre_tokens"], call["next_tokens"]) for call in on_ascend] == [
        ((26, 4, common), 4, 4, 0)]


@in_both_modes
@pytest.mark.parametrize("width, options", [(4, {}), (20, dict(mask=True)), (4, dict(documents=True, lse=True))])
def test_values_of_another_width(mode, width, options):
    case = Case(WindowSpec(1, W, 0, True), 23, **options)
    rng = np.random.default_rng(7)
    case.v, case.dout = (rng.standard_normal((6, 23, width)).astype(np.float16).astype(np.float32) for _ in range(2))
    case.check(mode)


@pytest.mark.parametrize("name, tensor", [("order", Tensor(np.zeros((2, 9), np.int32))),
                                          ("sinks", Tensor(np.zeros((2, 3, 9), np.float32))),
                                          ("attn_bias", Tensor(np.zeros((1, 1, 9, 5), np.float32)))])
def test_what_the_operator_has_no_place_for_is_computed_by_blocks(on_ascend, name, tensor):
    x = Tensor(np.ones((2, 3, 9, D), np.float16))
    spec = WindowSpec(1, 4, 0, False)
    assert windowed_attention(x, x, x, spec, **{name: tensor}).shape == x.shape and not on_ascend
    with pytest.raises(ValueError, match="'ascend' cannot run this call: it (takes no '|gives a bias)"):
        windowed_attention(x, x, x, spec, **{name: tensor}, backend="ascend")
