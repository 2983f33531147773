"""Sliding windows: the span of every query, embeddings of offsets, dropout, and the Cells around it."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import oracle
from calls import COMPLETE
from local_attention import (LocalSelfAttention, MultiHeadLocalAttention, WindowSpec, sliding_window_attention)

B, H, D = 2, 3, 10


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def results(mode, q, k, v, emb=None, **kwargs):
    """Return the output and the gradients of the sum of its squares."""
    has_emb = emb is not None

    def forward(q, k, v, *emb):
        out = sliding_window_attention(q, k, v, rel_pos_emb=emb[0] if has_emb else None, **kwargs)
        return (out * out).sum(), out
    arrays = [Tensor(x) for x in (q, k, v, emb) if x is not None]
    step = ms.value_and_grad(forward, tuple(range(len(arrays))), has_aux=True)
    (_, out), grads = (ms.jit(step) if mode == "graph" else step)(*arrays)
    return [x.asnumpy() for x in (out, *grads)]


@pytest.mark.parametrize("left, right", [(5, 3), (0, 1), (7, 0), (0, 4), (100, 100), (3, 100), (0, 0)])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 23])
def test_left_and_right_of_any_size(n, left, right):
    q, k, v = (draw(B, H, n, D, seed=seed) for seed in range(3))
    emb = draw(left + right, D) if left + right else None
    got = results("pynative", q, k, v, emb, window_size_left=left, window_size_right=right)
    flat = [x.reshape(B * H, n, D) for x in (q, k, v)]
    spec = WindowSpec(1, left, right - 1, False)
    dout = 2 * oracle.attention(*flat, spec, D ** -0.5, rel_pos_emb=emb)
    wanted = oracle.attention(*flat, spec, D ** -0.5, rel_pos_emb=emb, dout=dout)
    for a, b in zip(got, [x for x in wanted if x is not None]):
        np.testing.assert_allclose(a.reshape(b.shape), b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_mask_embeddings_and_span_together_have_gradients(mode):
    n, left, right = 150, 9, 4
    q, k, v = (draw(B, H, n, D, seed=seed) for seed in range(3))
    emb, mask = draw(left + right, D), np.random.default_rng(0).random((B, n)) > .3
    got = results(mode, q, k, v, emb, mask=Tensor(mask[:, None]), window_size_left=left, window_size_right=right)
    flat = [x.reshape(B * H, n, D) for x in (q, k, v)]
    options = dict(spec=WindowSpec(1, left, right - 1, False), scale=D ** -0.5, rel_pos_emb=emb, key_mask=mask)
    wanted = oracle.attention(*flat, dout=2 * oracle.attention(*flat, **options), **options)
    for a, b in zip(got, [x for x in wanted if x is not None]):
        assert np.abs(b).max() > 1e-2
        np.testing.assert_allclose(a.reshape(b.shape), b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("n, left", [(6, 9), (150, 20)])
def test_embeddings_that_no_pair_uses_and_queries_of_padding_have_no_effect(backend, mode, n, left):
    """Documents of up to 4 tokens, or padding on the left, leave embeddings of far keys unused."""
    q, k, v, emb = (*(draw(B, H, n, D, seed=seed) for seed in range(3)), draw(left + 3, D))
    ids = np.arange(n)[None].repeat(B, 0).astype(np.int32) // 4
    ids[:, 4:6] = -1
    last_two = np.arange(n)[None] >= n - 2
    for plain, unused in ((dict(segment_ids=Tensor(ids)), left - 3), (dict(mask=Tensor(last_two)), left - 1),
                          ({}, max(left - n + 1, 0))):
        poisoned, far = q.copy(), emb.copy()
        if "segment_ids" in plain:
            poisoned[:, :, 4:6] = np.nan
        far[:unused] = np.nan
        options = dict(window_size_left=left, window_size_right=3, backend=backend, **plain)
        clean, got = results(mode, q, k, v, emb, **options), results(mode, poisoned, k, v, far, **options)
        for a, b in zip(got, clean):
            np.testing.assert_allclose(a, b, atol=1e-6)
        assert all(np.abs(x).max() > 1e-2 for x in clean)


@pytest.mark.parametrize("backend", COMPLETE)
def test_an_embedding_that_is_used_has_an_effect(backend):
    q, k, v, emb = (*(draw(B, H, 23, D, seed=seed) for seed in range(3)), draw(8, D))
    emb[0, 1] = np.nan  # of the key 5 before
    got = results("pynative", q, k, v, emb, window_size_left=5, window_size_right=3, backend=backend)
    assert np.isnan(got[0][:, :, 5:]).all()
    assert not np.isnan(got[0][:, :, :5]).any()


def test_the_query_is_among_the_right_ones():
    """Only one position has a value other than zero, which shows the queries that see it."""
    n, at = 20, 10
    zeros, v = np.zeros((1, n, 1), np.float32), np.zeros((1, n, 1), np.float32)
    v[0, at] = 1

    def seen_by(left, right):
        out = sliding_window_attention(Tensor(zeros), Tensor(zeros), Tensor(v), window_size_left=left,
                                       window_size_right=right).asnumpy()
        return (np.flatnonzero(out[0, :, 0]) - at).tolist()
    assert seen_by(3, 2) == [-1, 0, 1, 2, 3]
    assert seen_by(3, 1) == [0, 1, 2, 3]
    assert seen_by(3, 0) == [1, 2, 3]


def test_a_mask_of_two_axes_is_by_batch_always():
    """Even if there are as many heads as batch entries."""
    q, k, v = (Tensor(draw(2, 2, 23, D, seed=seed)) for seed in range(3))
    mask = np.random.default_rng(1).random((2, 23)) > .4
    options = dict(window_size_left=5, window_size_right=5)
    out = sliding_window_attention(q, k, v, Tensor(mask), **options).asnumpy()
    wanted = sliding_window_attention(q, k, v, Tensor(np.repeat(mask[:, None], 2, 1)), **options).asnumpy()
    np.testing.assert_array_equal(out, wanted)
    assert np.abs(out - sliding_window_attention(q, k, v, Tensor(mask[None]), **options).asnumpy()).max() > 1e-2


@pytest.mark.parametrize("shape", [(23,), (1, 23), (1, H, 23), (B, 1, 23), (B, H, 23), (B, H, 1)])
def test_masks_broadcast(shape):
    q, k, v = (Tensor(draw(B, H, 23, D, seed=seed)) for seed in range(3))
    mask = np.random.default_rng(1).random(shape) > .4
    full = np.broadcast_to(mask, (B, H, 23)).copy()
    options = dict(window_size_left=5, window_size_right=5)
    np.testing.assert_array_equal(sliding_window_attention(q, k, v, Tensor(mask), **options).asnumpy(),
                                  sliding_window_attention(q, k, v, Tensor(full), **options).asnumpy())


@pytest.mark.parametrize("dtype, tolerance", [(ms.float16, 1e-2), (ms.bfloat16, 8e-2)])
def test_half_precision(dtype, tolerance):
    q, k, v = (Tensor(draw(B, H, 23, D, seed=seed)) for seed in range(3))
    emb = Tensor(draw(8, D))
    options = dict(window_size_left=5, window_size_right=3)
    out = sliding_window_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), rel_pos_emb=emb.astype(dtype),
                                   **options)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(ms.float32).asnumpy(),
                               sliding_window_attention(q, k, v, rel_pos_emb=emb, **options).asnumpy(), atol=tolerance)


def test_a_seed_makes_dropout_repeatable_in_both_modes():
    q, k, v = (draw(B, H, 23, D, seed=seed) for seed in range(3))
    options = dict(window_size_left=5, window_size_right=3, dropout_rate=0.4)
    first = results("pynative", q, k, v, seed=5, **options)
    for again in (results("pynative", q, k, v, seed=5, **options), results("graph", q, k, v, seed=5, **options),
                  results("graph", q, k, v, seed=Tensor(5), **options)):
        for a, b in zip(first, again):
            np.testing.assert_allclose(a, b, atol=1e-5)
    for other in (6, None):
        assert np.abs(results("pynative", q, k, v, seed=other, **options)[0] - first[0]).max() > 0.1


def test_no_seed_draws_from_the_global_one():
    q, k, v = (Tensor(draw(B, H, 23, D, seed=seed)) for seed in range(3))

    def drawn():
        ms.set_seed(4)
        return [sliding_window_attention(q, k, v, dropout_rate=0.4).asnumpy() for _ in range(2)]
    (a, b), (c, d) = drawn(), drawn()
    assert (a == c).all() and (b == d).all() and np.abs(a - b).max() > 0.1


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("cls", [LocalSelfAttention, MultiHeadLocalAttention])
def test_cells_learn(cls, mode):
    attn = cls(12, 3, qkv_features=6, out_features=12, window_size_left=5, window_size_right=2, dropout_rate=0.1,
               use_rel_pos_emb=True)
    attn.set_train()
    x, mask = Tensor(draw(2, 23, 12)), Tensor(np.arange(23)[None].repeat(2, 0) < 20)
    inputs = (x,) if cls is LocalSelfAttention else (x, Tensor(draw(2, 23, 12, seed=1)))
    optimizer = nn.Adam(attn.trainable_params(), 1e-2)

    def loss(*inputs):
        return ((attn(*inputs, mask=mask, seed=3) - x) ** 2).mean()
    step = ms.value_and_grad(loss, None, optimizer.parameters)
    step = ms.jit(step) if mode == "graph" else step
    losses = []
    for _ in range(5):
        value, grads = step(*inputs)
        optimizer(grads)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    for parameter, grad in zip(optimizer.parameters, grads):
        zero = parameter.name == "key.bias"  # adding the same to all keys changes no softmax
        assert (np.abs(grad.asnumpy()).max() < 1e-6) == zero, parameter.name


def test_cells_drop_in_training_alone():
    attn = LocalSelfAttention(12, 3, window_size_left=5, window_size_right=2, dropout_rate=0.5)
    x = Tensor(draw(2, 23, 12))
    still = attn(x, seed=1).asnumpy()
    np.testing.assert_array_equal(still, attn(x, seed=2).asnumpy())
    attn.set_train()
    assert np.abs(attn(x, seed=1).asnumpy() - still).max() > 1e-3


def test_self_attention_is_cross_attention_of_a_sequence_with_itself():
    ms.set_seed(1)
    alone = LocalSelfAttention(12, 3, window_size_left=5, window_size_right=2, use_rel_pos_emb=True)
    cross = MultiHeadLocalAttention(12, 3, window_size_left=5, window_size_right=2, use_rel_pos_emb=True)
    assert not ms.load_param_into_net(cross, alone.parameters_dict())[0]
    x = Tensor(draw(2, 23, 12))
    np.testing.assert_array_equal(alone(x).asnumpy(), cross(x, x).asnumpy())
    assert np.abs(cross(x, ops.zeros_like(x)).asnumpy() - alone(x).asnumpy()).max() > 1e-3


@pytest.mark.parametrize("spec, left, right", [
    (WindowSpec.from_sliding_window(128), 127, 1),
    (WindowSpec.from_flash((127, 0), causal=True), 127, 1),
    (WindowSpec.from_flash((64, 63)), 64, 64),
])
def test_other_libraries_words_for_one_span(spec, left, right):
    """The rows of the README's table of conventions."""
    queries = np.arange(300)
    ours = WindowSpec(1, left, right - 1, False)
    np.testing.assert_array_equal(spec.visible(queries, queries), ours.visible(queries, queries))
    first, last = ours.span(200)
    assert last - first + 1 == left + right


@pytest.mark.parametrize("change, error, message", [
    (dict(window_size_left=-1), ValueError, "'window_size_left' must be a non-negative int, but got -1"),
    (dict(window_size_right=1.5), TypeError, "'window_size_right' must be a non-negative int, but got 1.5"),
    (dict(dropout_rate=1.), ValueError, r"'dropout_rate' must be a rate in \[0, 1\), but got 1.0"),
    (dict(mask=Tensor(np.ones((B, 5), bool))), ValueError, r"'mask' must be broadcastable to \(2, 3, 23\), but got"),
    (dict(mask=Tensor(np.ones((B, 1, 23), np.float32))), TypeError, "'mask' must be a Tensor of bool, but got float32"),
    (dict(rel_pos_emb=Tensor(draw(5, D))), ValueError, r"'rel_pos_emb' must be of shape .* \(256, 10\), but got \(5"),
    (dict(seed="x"), TypeError, "'seed' must be an int"),
    (dict(backend="fast"), ValueError, "'backend' must be None or one of"),
    (dict(k=Tensor(draw(B, H, 22, D))), ValueError, r"'k' must be of q's shape \(2, 3, 23, 10\), but got"),
    (dict(q=[1]), TypeError, r"'q' must be a Tensor, but got \[1\] of type list"),
])
def test_bad_arguments_are_named(change, error, message):
    x = Tensor(draw(B, H, 23, D))
    with pytest.raises(error, match=f"For 'sliding_window_attention', {message}"):
        sliding_window_attention(**{**dict(q=x, k=x, v=x), **change})


@pytest.mark.parametrize("arguments, error, message", [
    (dict(in_features=0), ValueError, "'in_features' must be a positive int, but got 0"),
    (dict(num_heads=5), ValueError, "'qkv_features' must be a multiple of the 5 heads, but got 12"),
    (dict(window_size_left=-1), ValueError, "'window_size_left' must be a non-negative int, but got -1"),
    (dict(dropout_rate=-0.1), ValueError, r"'dropout_rate' must be a rate in \[0, 1\), but got -0.1"),
    (dict(use_bias=1), TypeError, "'use_bias' must be a bool, but got 1"),
])
def test_bad_cell_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"For 'LocalSelfAttention', {message}"):
        LocalSelfAttention(**{**dict(in_features=12, num_heads=3), **arguments})


def test_bad_cell_inputs_are_named():
    attn = MultiHeadLocalAttention(12, 3)
    x = Tensor(draw(2, 23, 12))
    with pytest.raises(ValueError, match="For 'MultiHeadLocalAttention', 'inputs_kv' must be of the shape of inp"):
        attn(x, x[:, :5])
    with pytest.raises(ValueError, match=r"'inputs_q' must be of shape \(b, n, 12\), but got \(2, 23, 6\)"):
        attn(x[..., :6], x)
    with pytest.raises(ValueError, match=r"'mask' must be of shape \(b, n\)"):
        attn(x, x, mask=Tensor(np.ones((2, 5), bool)))


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_grouped_heads_documents_sinks_and_a_cap(mode):
    q, k, v = draw(B, 4, 23, D), draw(B, 2, 23, D, seed=1), draw(B, 2, 23, D, seed=2)
    emb, sinks = draw(8, D) / 3, draw(4)
    ids = np.repeat([[0] * 9 + [1] * 14], B, 0).astype(np.int32)

    def forward(q, k, v, emb, sinks):
        out, lse = sliding_window_attention(q, k, v, None, emb, 5, 3, scale=.4, softcap=2., sinks=sinks,
                                            segment_ids=Tensor(ids), return_lse=True)
        return (out * out).sum() + lse.sum(), out, lse
    step = ms.value_and_grad(forward, (0, 1, 2, 3, 4), has_aux=True)
    (_, out, lse), grads = (ms.jit(step) if mode == "graph" else step)(*map(Tensor, (q, k, v, emb, sinks)))
    flat = [x.reshape(-1, 23, D) for x in (q, k, v)]
    options = dict(rel_pos_emb=emb, sinks=sinks, softcap=2.)
    spec = WindowSpec(1, 5, 2, False)
    wanted = oracle.in_documents(*flat, spec, .4, ids, **options)
    wanted = oracle.in_documents(*flat, spec, .4, ids, dout=2 * wanted["out"], dlse=np.ones(wanted["lse"].shape),
                                 **options)
    for a, name in zip((out, lse, *grads), ("out", "lse", "q", "k", "v", "rel_pos_emb", "sinks")):
        assert np.abs(a.asnumpy()).max() > 1e-2
        np.testing.assert_allclose(a.asnumpy(), wanted[name].reshape(a.shape), atol=5e-5)


class AnyLength(nn.Cell):
    def construct(self, q, k, v, mask):
        return sliding_window_attention(q, k, v, mask, window_size_left=5, window_size_right=3)


def test_lengths_that_a_graph_does_not_know(tmp_path):
    """In an exported graph."""
    net, x = AnyLength(), [Tensor(draw(B, H, 300, D, seed=seed)) for seed in range(3)]
    mask = Tensor(np.random.default_rng(0).random((B, 300)) > .3)
    open_shape = Tensor(shape=[None, H, None, D], dtype=ms.float32)
    ms.export(net, open_shape, open_shape, open_shape, Tensor(shape=[None, None], dtype=ms.bool_),
              file_name=str(tmp_path / "sliding"), file_format="MINDIR")
    graph = nn.GraphCell(ms.load(str(tmp_path / "sliding.mindir")))
    for n in (300, 37):
        part = [y[:, :, :n] for y in x] + [mask[:, :n]]
        np.testing.assert_allclose(graph(*part).asnumpy(), net(*part).asnumpy(), atol=2e-5)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_a_cell_with_fewer_key_heads_and_documents(mode):
    attn = LocalSelfAttention(12, 4, window_size_left=5, window_size_right=2, num_kv_heads=2, use_rel_pos_emb=True)
    assert attn.key.weight.shape == attn.value.weight.shape == (6, 12)
    x, ids = Tensor(draw(2, 23, 12)), Tensor(np.repeat([[0] * 9 + [1] * 14], 2, 0).astype(np.int32))

    def call(x, ids):
        return attn(x, segment_ids=ids)
    out = (ms.jit(call) if mode == "graph" else call)(x, ids).asnumpy()
    for start, end in ((0, 9), (9, 23)):
        np.testing.assert_allclose(out[:, start:end], attn(x[:, start:end]).asnumpy(), atol=1e-5)
    with pytest.raises(ValueError, match="For 'LocalSelfAttention', 'num_kv_heads' must be a divisor of the 4 heads"):
        LocalSelfAttention(12, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"For 'LocalSelfAttention', 'segment_ids' must be of shape \(2, 23\)"):
        attn(x, segment_ids=ids[:, 1:])


class SlidingCell(nn.Cell):
    def __init__(self):
        super().__init__()
        self.attn = LocalSelfAttention(12, 4, window_size_left=5, window_size_right=2, num_kv_heads=2)

    def construct(self, x, mask):
        return self.attn(x, mask)


def test_a_cell_of_any_length(tmp_path):
    net, x, mask = SlidingCell(), Tensor(draw(2, 60, 12)), Tensor(np.random.default_rng(0).random((2, 60)) > .3)
    ms.export(net, Tensor(shape=[None, None, 12], dtype=ms.float32), Tensor(shape=[None, None], dtype=ms.bool_),
              file_name=str(tmp_path / "cell"), file_format="MINDIR")
    graph = nn.GraphCell(ms.load(str(tmp_path / "cell.mindir")))
    for n in (60, 17):
        np.testing.assert_allclose(graph(x[:, :n], mask[:, :n]).asnumpy(), net(x[:, :n], mask[:, :n]).asnumpy(),
                                   atol=2e-5)
