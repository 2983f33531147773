"""The arguments of LocalAttention in terms of spans, positions and padding. test_reference.py has upstream's values."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import oracle
from local_attention import LocalAttention, LocalMHA, WindowSpec
from local_attention.local_attention import l2norm, look_around, pad_to_multiple
from local_attention.rotary import SinusoidalEmbeddings

B, H, D, W = 2, 3, 10, 7
LENGTHS = [1, W - 1, W, W + 1, 3 * W - 1, 3 * W, 3 * W + 1]


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def inputs(n, *leading):
    leading = leading or (B, H)
    return [draw(*leading, n, D, seed=seed) for seed in range(3)]


def outputs(attn, arrays, mode="pynative", **kwargs):
    """Return the output and the gradients of the sum of its squares."""
    kwargs = {name: Tensor(value) if isinstance(value, np.ndarray) else value for name, value in kwargs.items()}

    def forward(q, k, v):
        out = attn(q, k, v, **kwargs)
        return (out * out).sum(), out
    step = ms.value_and_grad(forward, (0, 1, 2), has_aux=True)
    (_, out), grads = (ms.jit(step) if mode == "graph" else step)(*map(Tensor, arrays))
    return [x.asnumpy() for x in (out, *grads)]


def turned(x, start=0, theta=10000):
    """Compute rotary embedding by complex numbers: the two halves of a vector are the real and imaginary parts."""
    half = x.shape[-1] // 2
    angles = (start + np.arange(x.shape[-2]))[:, None] * float(theta) ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("settings, spec", [
    (dict(causal=True), WindowSpec(W, W, 0, True)),
    (dict(), WindowSpec(W, W, W, False)),
    (dict(look_backward=2, look_forward=0), WindowSpec(W, 2 * W, 0, False)),
    (dict(look_backward=0, causal=True), WindowSpec(W, 0, 0, True)),
    (dict(look_backward=0, look_forward=3, exact_windowsize=True), WindowSpec(1, 0, 3 * W, False)),
    (dict(exact_windowsize=True, causal=True), WindowSpec(1, W, 0, True)),
])
@pytest.mark.parametrize("n", LENGTHS)
def test_spans_at_every_boundary_length(settings, spec, n):
    attn = LocalAttention(W, autopad=True, **settings)
    assert attn.spec == spec
    q, k, v = inputs(n)
    out, *grads = outputs(attn, (q, k, v))
    flat = [x.reshape(B * H, n, D) for x in (q, k, v)]
    dout = 2 * oracle.attention(*flat, spec, D ** -0.5)
    for got, wanted in zip([out, *grads], oracle.attention(*flat, spec, D ** -0.5, dout=dout)):
        np.testing.assert_allclose(got.reshape(wanted.shape), wanted, atol=2e-5)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("settings", [dict(causal=True), dict(look_backward=2, look_forward=1), dict(look_forward=2)])
def test_rotary_turns_queries_and_keys_by_their_distance(settings, mode):
    """With look_forward, as in upstream, the query's position is that many windows after its own place."""
    attn = LocalAttention(W, dim=D, autopad=True, **settings)
    q, k, v = (x.reshape(B * H, 23, D) for x in inputs(23))
    wanted = oracle.attention(turned(q, attn.look_forward * W), turned(k), v, attn.spec, D ** -0.5)
    np.testing.assert_allclose(outputs(attn, (q, k, v), mode)[0], wanted, atol=2e-5)


@pytest.mark.parametrize("start", [0, 12345, 10**9])
def test_a_step_of_decoding_rotates_as_well_at_any_position(start):
    """The products of queries and keys depend only on their distance, at any position and however it is given."""
    rel_pos, x = SinusoidalEmbeddings(10), ops.randn((3, 7, 10))
    near = rel_pos.rotate(x).asnumpy()
    for position in (start, Tensor([start], ms.int32)):
        far = rel_pos.rotate_at(x, position).asnumpy()
        np.testing.assert_allclose(far @ far.swapaxes(1, 2), near @ near.swapaxes(1, 2), atol=1e-5)
        assert start == 0 or np.abs(far - near).max() > 1e-2


def test_rotary_far_into_a_sequence_is_as_right_as_at_its_start():
    n = 40 * W
    q, k, v = (np.tile(x, (1, 40, 1)) for x in inputs(W, 1))
    out = outputs(LocalAttention(W, dim=D, causal=True), (q, k, v))[0].reshape(40, W, D)
    assert out.size == n * D
    np.testing.assert_allclose(out[1:], np.tile(out[1:2], (39, 1, 1)), atol=1e-5)


def test_xpos_multiplies_each_pair_by_a_power_of_its_distance():
    attn = LocalAttention(W, dim=D, causal=True, use_xpos=True, xpos_scale_base=5, scale=1.)
    q, k, v = inputs(3 * W, 1)
    base = np.tile((np.arange(0, D, 2) + 0.4 * D) / (1.4 * D), 2)
    distance = np.arange(3 * W)[:, None] - np.arange(3 * W)
    scores = np.einsum("id,jd,ijd->ij", turned(q)[0], turned(k)[0], base ** (distance[..., None] / 5))
    scores = np.where(attn.spec.visible(np.arange(3 * W), np.arange(3 * W)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ v[0]
    np.testing.assert_allclose(outputs(attn, (q, k, v))[0][0], wanted, atol=2e-5)


def test_xpos_gives_each_head_its_own_bias_and_each_batch_entry_its_own_mask():
    attn = LocalAttention(W, dim=D, causal=True, use_xpos=True)
    bias, mask = draw(H, W, 2 * W), np.random.default_rng(0).random((B, 3 * W)) > .4
    arrays = inputs(3 * W)
    together = outputs(attn, arrays, attn_bias=bias, mask=mask)
    for batch in range(B):
        for head in range(H):
            alone = outputs(attn, [x[batch, head] for x in arrays], attn_bias=bias[head:head + 1],
                            mask=mask[batch:batch + 1])
            for a, b in zip(together, alone):
                np.testing.assert_allclose(a[batch, head], b, atol=1e-5)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_xpos_stays_finite_on_long_sequences_of_any_length(mode):
    attn = LocalAttention(W, dim=D, causal=True, use_xpos=True, autopad=True)
    q, k, v = inputs(2999, 1)
    results = outputs(attn, (q, k, v), mode, mask=np.arange(2999)[None] % 5 != 0)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 1e-2 for x in results)


@pytest.mark.parametrize("settings", [dict(causal=True), dict(look_forward=2, exact_windowsize=True, shared_qk=True)])
def test_a_call_time_window_is_the_window_of_that_call(settings):
    n, options = 29, dict(dim=D, use_xpos=True, xpos_scale_base=3, autopad=True, **settings)
    arrays = inputs(n)
    wide, narrow = LocalAttention(11, **options), LocalAttention(W, **options)
    bias = draw(H, 11, 11 * (1 + narrow.look_backward + narrow.look_forward))
    for a, b in zip(outputs(wide, arrays, attn_bias=bias), outputs(narrow, arrays, window_size=11, attn_bias=bias)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 1, 3), (1, 2, 1, 3)])
def test_any_leading_axes(leading):
    attn = LocalAttention(W, dim=D, causal=True)
    arrays = inputs(2 * W, 6)
    wanted = outputs(attn, arrays)[0]
    if leading:
        got = outputs(attn, [x.reshape(*leading, 2 * W, D) for x in arrays])[0]
        assert got.shape == (*leading, 2 * W, D)
        np.testing.assert_array_equal(got.reshape(wanted.shape), wanted)
    else:
        np.testing.assert_allclose(outputs(attn, [x[0] for x in arrays])[0], wanted[0], atol=1e-6)


@pytest.mark.parametrize("use_xpos", [False, True])
def test_a_mask_is_a_row_for_each_batch_entry_and_input_mask_is_its_other_name(use_xpos):
    attn = LocalAttention(W, dim=D, autopad=True, use_xpos=use_xpos)
    mask = np.random.default_rng(0).random((B, 23)) > .4
    arrays = inputs(23)
    got = outputs(attn, arrays, mask=mask)
    for a, b in zip(got, outputs(attn, arrays, input_mask=mask)):
        np.testing.assert_array_equal(a, b)
    for batch in range(B):
        alone = outputs(attn, [x[batch] for x in arrays], mask=mask[batch:batch + 1])
        for a, b in zip(got, alone):
            np.testing.assert_allclose(a[batch], b, atol=1e-5)


def test_shared_qk_sees_itself_only_where_there_is_nothing_else():
    attn = LocalAttention(W, causal=True, shared_qk=True)
    q, _, v = inputs(2 * W, 1)
    out = outputs(attn, (q, q, v))[0]
    np.testing.assert_allclose(out[0, 0], v[0, 0], atol=1e-6)
    np.testing.assert_allclose(out[0, 1], v[0, 0], atol=1e-6)


def test_shared_qk_normalises_keys_with_a_gradient():
    attn = LocalAttention(W, causal=True, shared_qk=True)
    q, k, v = inputs(2 * W, 1)
    out, dq, dk, _ = outputs(attn, (q, k, v))
    np.testing.assert_allclose(out, outputs(attn, (q, 5 * k, v))[0], atol=1e-5)
    assert np.abs(dk).max() > 1e-3
    np.testing.assert_allclose((dk * k).sum(-1), 0, atol=1e-5)  # no change along a key changes anything


def test_l2norm_of_a_zero_vector_is_zero():
    assert (l2norm(ops.zeros((2, 3))).asnumpy() == 0).all()


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_dropout_is_for_training_alone(mode):
    attn = LocalAttention(W, causal=True, dropout=0.5)
    arrays = inputs(2 * W)
    still = outputs(attn, arrays, mode)
    np.testing.assert_array_equal(still[0], outputs(LocalAttention(W, causal=True), arrays, mode)[0])
    attn.set_train()
    first, second = outputs(attn, arrays, mode)[0], outputs(attn, arrays, mode)[0]
    assert np.abs(first - still[0]).max() > 0.1 and np.abs(first - second).max() > 0.1


def test_graph_mode_as_a_context():
    attn = LocalAttention(W, dim=D, causal=True, autopad=True)
    arrays = [Tensor(x) for x in inputs(23)]
    wanted = attn(*arrays).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        again = LocalAttention(W, dim=D, causal=True, autopad=True)(*arrays)
        np.testing.assert_allclose(again.asnumpy(), wanted, atol=1e-6)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
@pytest.mark.parametrize("settings", [dict(dim=D), dict(dim=D, use_xpos=True), dict(shared_qk=True)])
def test_half_precision_in_is_half_precision_out(settings, dtype):
    attn = LocalAttention(W, causal=True, autopad=True, **settings)
    arrays = [Tensor(x) for x in inputs(23)]
    out = attn(*(x.astype(dtype) for x in arrays))
    assert out.dtype == dtype
    # inputs of about 1 with 8 bits (bfloat16) or 11 (float16) of mantissa
    np.testing.assert_allclose(out.astype(ms.float32).asnumpy(), attn(*arrays).asnumpy(),
                               atol=0.1 if dtype == ms.bfloat16 else 0.01)


def test_a_batch_of_nothing():
    out = LocalAttention(W, autopad=True)(*[ops.zeros((0, H, 5, D))] * 3)
    assert out.shape == (0, H, 5, D)


def test_explain_names_every_backend_and_the_work():
    attn = LocalAttention(512, causal=True, exact_windowsize=True, dim=64, backend="blocked")
    text = attn.explain(2048, mask=True)
    assert text.splitlines()[0] == "blocked: runs this"
    for name in ("dense", "native", "ascend"):
        assert f"\n{name}: " in text
    computed = sum(min(512 + 128, 128 * (block + 1)) * 128 for block in range(16))
    assert f"multiply-adds: {2 * 64 * computed:,} forward" in text and f"{4 * computed:,} bytes" in text
    numbers = 4 * 2048 * 64
    assert f"q, k, v and the output: {numbers:,} numbers ({4 * numbers:,} bytes)" in text
    assert text.splitlines()[-1].startswith("compiles anew for: another shape or dtype of an input, a mask")
    assert LocalAttention(7, backend="dense").explain(70).startswith("dense: runs this")
    half = LocalAttention(7, dim=10).explain(70, dtype=ms.float16)
    assert f"({2 * 4 * 70 * 10:,} bytes)" in half and "\nascend: runs on Ascend alone, and the device is CPU\n" in half


def test_look_around_sets_windows_beside_their_neighbours():
    x = Tensor(np.arange(6, dtype=np.float32).reshape(1, 3, 2, 1))
    around = look_around(x, backward=1, forward=1)
    assert around.asnumpy()[0, :, :, 0].tolist() == [[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, -1, -1]]
    assert look_around(x[..., 0], backward=2, pad_value=9).asnumpy()[0, 1].tolist() == [9, 9, 0, 1, 2, 3]


def test_pad_to_multiple_says_whether_it_did():
    needed, same = pad_to_multiple(ops.ones((2, 6)), 3)
    assert not needed and same.shape == (2, 6)
    needed, padded = pad_to_multiple(ops.ones((2, 7, 4)), 3, dim=-2, value=5)
    assert needed and padded.shape == (2, 9, 4) and (padded.asnumpy()[:, 7:] == 5).all()


def test_xpos_is_nothing_where_rotary_is_off():
    """As in the PyTorch package, whose callers pass it together with a position bias of their own."""
    x = ops.randn((2, 7, 16))
    plain, xpos = (LocalMHA(dim=16, window_size=8, use_rotary_pos_emb=False, use_xpos=on) for on in (False, True))
    ms.load_param_into_net(xpos, plain.parameters_dict())
    np.testing.assert_array_equal(xpos(x).asnumpy(), plain(x).asnumpy())
    np.testing.assert_array_equal(LocalAttention(1, use_xpos=True)(x, x, x).asnumpy(),
                                  LocalAttention(1)(x, x, x).asnumpy())


# ---- options of today's models


OF_TODAY = [dict(causal=True, dim=D), dict(dim=D), dict(causal=True, exact_windowsize=True, prefix=3, dim=D),
            dict(causal=True, softcap=2., shared_qk=True), dict(causal=True, look_backward=2, softcap=2.)]


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("settings", OF_TODAY, ids=lambda settings: ",".join(settings))
def test_documents_are_as_if_alone_with_grouped_heads_and_sinks(settings, mode):
    """The lengths are not multiples of the window: windows, rotation and the prefix start anew."""
    attn = LocalAttention(W, autopad=True, **settings)
    q, k, v = draw(B, 4, 40, D), draw(B, 2, 40, D, seed=1), draw(B, 2, 40, D, seed=2)
    sinks = draw(4)
    ids = np.repeat([[0] * 17 + [3] * 12 + [-1] * 11], B, 0).astype(np.int32)
    got = outputs(attn, (q, k, v), mode, segment_ids=ids, sinks=sinks)
    wanted = [np.zeros_like(x) for x in got]
    for start, end in ((0, 17), (17, 29)):
        parts = outputs(attn, [x[:, :, start:end] for x in (q, k, v)], sinks=sinks)
        for whole, part in zip(wanted, parts):
            whole[:, :, start:end] = part
    for a, b in zip(got, wanted):
        assert np.abs(b).max() > 1e-2
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("settings", [dict(causal=True, dim=D), dict(causal=True, use_xpos=True, dim=D),
                                      dict(exact_windowsize=True, shared_qk=True)])
def test_grouped_heads_are_repeated_ones(settings):
    attn = LocalAttention(W, autopad=True, **settings)
    q, k, v = draw(B, 4, 23, D), draw(B, 2, 23, D, seed=1), draw(B, 2, 23, D, seed=2)
    got = outputs(attn, (q, k, v))
    out, dq, dk, dv = outputs(attn, (q, np.repeat(k, 2, 1), np.repeat(v, 2, 1)))
    for a, b in zip(got, (out, dq, dk.reshape(B, 2, 2, 23, D).sum(2), dv.reshape(B, 2, 2, 23, D).sum(2))):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("settings, given, message", [
    (dict(use_xpos=True, dim=D), dict(segment_ids=np.zeros((B, 14), np.int32)),
     "'segment_ids' and 'use_xpos' cannot go together"),
    (dict(prefix=2), dict(attn_bias=np.zeros((H, W, 3 * W), np.float32)),
     "'attn_bias' and 'prefix' cannot go together"),
    (dict(), dict(segment_ids=np.zeros((B, 13), np.int32)), r"'segment_ids' must be of shape \(batch, 14\)"),
    (dict(), dict(segment_ids=np.zeros((4, 14), np.int32)), r"'segment_ids' must be .* a divisor of 6"),
    (dict(), dict(sinks=np.zeros(4, np.float32)), r"'sinks' must be of shape \(3,\), one for each head, or .*, but"),
])
def test_what_does_not_go_together_or_fit_is_named(settings, given, message):
    x = Tensor(draw(B, H, 14, D))
    with pytest.raises(ValueError, match=f"For 'LocalAttention', {message}"):
        LocalAttention(W, **settings)(x, x, x, **{name: Tensor(value) for name, value in given.items()})


def test_heads_that_do_not_divide_are_named():
    q, k = Tensor(draw(B, H, 14, D)), Tensor(draw(B, 2, 14, D))
    with pytest.raises(ValueError, match=r"'k' must be of q's shape \(2, 3, 14, 10\), or of a divisor of its 3 heads"):
        LocalAttention(W)(q, k, k)
