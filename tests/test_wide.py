"""Compare the words of the wider function with the float64 oracle: values of another width, an order, biases and sinks
of each query, queries of their own for offsets, ends of documents, and more queries than keys."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import oracle
from calls import COMPLETE
from local_attention import LocalAttention, LocalMHA, WindowSpec, sliding_window_attention, windowed_attention

B, H, D, N = 2, 4, 6, 13
MOVING, BUCKETS, PREFIX = WindowSpec(1, 4, 2, False), WindowSpec(3, 3, 2, False), WindowSpec(1, 3, 1, False, prefix=2)
IDS = np.array([[0] * 5 + [1] * 4 + [-1] + [2] * 3, [3] * 12 + [4]], np.int32)
BLOCKS = np.array([[0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6, 6, 7], [3, 3, 3, 4, 9, 5, 8, 6, 7, 1, 2, 9, 0]], np.int32)


def draw(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def computed(function, tensors, dout, dlse, mode):
    """Return the output, the log-sum-exp and the gradients of the tensors, by name."""
    names = list(tensors)
    dout, dlse = Tensor(dout), Tensor(dlse)

    def forward(*inputs):
        named = {}
        for index in range(len(names)):
            named[names[index]] = inputs[index]
        out, lse = function(**named)
        there = ops.masked_fill(lse, lse == float("-inf"), 0.)
        return (out * dout).sum() + (there * dlse).sum(), out, lse
    step = ms.value_and_grad(forward, tuple(range(len(names))), has_aux=True)
    (_, out, lse), grads = (ms.jit(step) if mode == "graph" else step)(*(Tensor(x) for x in tensors.values()))
    return dict(out=out.asnumpy(), lse=lse.asnumpy(), **dict(zip(names, (x.asnumpy() for x in grads))))


def wanted(spec, tensors, dout, dlse, segment_ids=None, offset=0, **numbers):
    def flat(x):
        return None if x is None else x.reshape(-1, *x.shape[2:])
    q, k, v = (flat(tensors[name]) for name in "qkv")
    numbers.update(bias=tensors.get("attn_bias"), sinks=tensors.get("sinks"), rel_pos_emb=tensors.get("rel_pos_emb"),
                   rel_pos_query=flat(tensors.get("rel_pos_query")), dout=flat(dout), dlse=flat(dlse))
    if segment_ids is None:
        got = oracle.everything(q, k, v, spec, q.shape[-1] ** -.5, offset=offset, **numbers)
    else:
        got = oracle.in_documents(q, k, v, spec, q.shape[-1] ** -.5, segment_ids, **numbers)
    return dict(got, attn_bias=got["bias"])


def assert_equal(got, want, zero=()):
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name].reshape(x.shape), atol=3e-5, rtol=3e-5, err_msg=name)
        assert name in ("out", "lse", *zero) or np.abs(x).max() > 1e-2, name


def inputs(seed, n_q=N, n_k=N, key_heads=2, width=D, **more):
    tensors = draw(seed, q=(B, H, n_q, D), k=(B, key_heads, n_k, D), v=(B, key_heads, n_k, width), **more)
    return tensors, draw(seed + 1, dout=(B, H, n_q, width), dlse=(B, H, n_q))


CASES = {
    "narrow": dict(spec=MOVING, width=2), "wide": dict(spec=BUCKETS, width=9),
    "order": dict(spec=MOVING, order=BLOCKS), "order in buckets": dict(spec=BUCKETS, order=BLOCKS),
    "order and prefix": dict(spec=PREFIX, order=BLOCKS, softcap=3.),
    "order in documents": dict(spec=PREFIX, order=BLOCKS, segment_ids=IDS, width=3),
    "bias": dict(spec=MOVING, attn_bias=(B, H, N, 7)), "bias of all": dict(spec=BUCKETS, attn_bias=(1, 1, N, 8)),
    "bias of heads": dict(spec=BUCKETS, attn_bias=(1, H, N, 8), segment_ids=IDS),
    "bias of rows": dict(spec=MOVING, attn_bias=(B, 1, N, 7), segment_ids=IDS, order=BLOCKS),
    "sinks": dict(spec=MOVING, sinks=(B, H, N)),
    "all": dict(spec=BUCKETS, sinks=(B, H, N), attn_bias=(B, H, N, 8), order=BLOCKS, segment_ids=IDS, width=3,
                mask=np.arange(N)[None] % 5 != np.array([[1], [3]]), softcap=2.)}


@pytest.mark.parametrize("name, mode", [(name, "pynative") for name in CASES]
                         + [(name, "graph") for name in ("order in documents", "all")])
@pytest.mark.parametrize("backend", COMPLETE)
def test_words(name, backend, mode):
    case = dict(CASES[name])
    spec, width = case.pop("spec"), case.pop("width", D)
    shapes = {name: case.pop(name) for name in ("attn_bias", "sinks") if name in case}
    tensors, douts = inputs(3, width=width, **shapes)
    if "attn_bias" in tensors:
        tensors["attn_bias"][0, 0, 2, 1:] = -np.inf
        tensors["attn_bias"][0, 0, 5] = -3.4e38
    plain = {name: Tensor(x) if isinstance(x, np.ndarray) else x for name, x in case.items()}

    def call(**named):
        return windowed_attention(**named, spec=spec, backend=backend, return_lse=True, **plain)
    case["key_mask"] = case.pop("mask", None)
    assert_equal(computed(call, tensors, **douts, mode=mode), wanted(spec, tensors, **douts, **case))


@pytest.mark.parametrize("backend", COMPLETE)
def test_fewer_queries_than_keys(backend):
    shapes = dict(attn_bias=(B, H, 5, 7), sinks=(B, H, 5))
    tensors, douts = inputs(5, n_q=5, width=3, **shapes)

    def call(**named):
        return windowed_attention(**named, spec=MOVING, backend=backend, return_lse=True, order=Tensor(BLOCKS),
                                  segment_ids=Tensor(IDS))
    got = computed(call, tensors, **douts, mode="graph")
    assert_equal(got, wanted(MOVING, tensors, **douts, order=BLOCKS, segment_ids=IDS))


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("backend", COMPLETE)
def test_more_queries_than_keys_where_all_is_seen(backend, mode):
    spec = WindowSpec.from_flash(-1)
    tensors, douts = inputs(7, n_k=5, width=3, sinks=(H,))
    mask = np.arange(5)[None] < np.array([[5], [3]])

    def call(**named):
        return windowed_attention(**named, spec=spec, backend=backend, return_lse=True, mask=Tensor(mask))
    assert_equal(computed(call, tensors, **douts, mode=mode), wanted(spec, tensors, **douts, key_mask=mask))


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("backend", COMPLETE)
def test_offsets_are_scored_against_queries_of_their_own(backend, mode):
    tensors, douts = inputs(9, rel_pos_emb=(7, D), rel_pos_query=(B, H, N, D))

    def call(**named):
        return sliding_window_attention(**named, window_size_left=4, window_size_right=3, backend=backend,
                                        return_lse=True, segment_ids=Tensor(IDS))
    assert_equal(computed(call, tensors, **douts, mode=mode), wanted(MOVING, tensors, **douts, segment_ids=IDS))


@pytest.mark.parametrize("ends", [[0, 5, 9, 13, 26], [0, 5, 5, 9, 13, 13, 25, 26, 26, 26]])
def test_ends_of_documents_are_their_ids(ends):
    ids = np.searchsorted(np.unique(ends), np.arange(B * N), side="right").reshape(B, N).astype(np.int32)
    tensors, _ = inputs(11)
    q, k, v = (Tensor(tensors[name]) for name in "qkv")
    want = windowed_attention(q, k, v, BUCKETS, segment_ids=Tensor(ids)).asnumpy()
    for call in (windowed_attention, ms.jit(windowed_attention)):
        got = call(q, k, v, BUCKETS, cu_seqlens=Tensor(ends, ms.int32)).asnumpy()
        np.testing.assert_array_equal(got, want)


def test_the_lengths_of_a_graph_may_be_unknown():
    tensors, _ = inputs(13, width=3, attn_bias=(1, H, N, 7), sinks=(B, H, N))
    named = {name: Tensor(x) for name, x in tensors.items()}

    def call(q, k, v, attn_bias, sinks, order):
        return windowed_attention(q, k, v, MOVING, attn_bias=attn_bias, sinks=sinks, order=order)
    open_shapes = [(B, H, None, D), (B, 2, None, D), (B, 2, None, 3), (1, H, None, 7), (B, H, None), (B, None)]
    types = [ms.float32] * 5 + [ms.int32]
    compiled = ms.jit(call, input_signature=tuple(
        Tensor(shape=shape, dtype=dtype) for shape, dtype in zip(open_shapes, types)))
    got = compiled(*named.values(), Tensor(BLOCKS)).asnumpy()
    np.testing.assert_allclose(got, call(*named.values(), Tensor(BLOCKS)).asnumpy(), atol=2e-6)


@pytest.mark.parametrize("poison", [np.nan, 1e38, -3e37])
@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("hides", ["order", "bias", "bias of queries", "documents"])
def test_what_a_hidden_key_holds_does_not_matter(hides, backend, poison):
    tensors, douts = inputs(15)
    order, place, plain = np.arange(N)[None].repeat(B, 0).astype(np.int32), 6, {}
    if hides == "order":
        order[:, place] = 99  # it sees itself alone
        plain["order"] = Tensor(order)
        rows = np.arange(N) != place
    elif hides == "documents":
        plain["segment_ids"] = Tensor(np.where(np.arange(N) < 6, 0, 1)[None].repeat(B, 0).astype(np.int32))
        rows = np.arange(N) < 6
    else:
        bias = np.zeros((H, 1, 7), np.float32) if hides == "bias" else np.zeros((1, 1, N, 7), np.float32)
        bias[..., 4] = -np.inf  # the query's own key
        plain["attn_bias"] = Tensor(bias)
        rows = np.arange(N) == place
    bad = {name: x.copy() for name, x in tensors.items()}
    for name in "kv":
        bad[name][:, :, place] = poison
    for name in douts:
        douts[name][:, :, ~rows] = 0

    def call(**named):
        return windowed_attention(**named, spec=MOVING, backend=backend, return_lse=True, **plain)
    got, want = (computed(call, given, **douts, mode="pynative") for given in (bad, tensors))
    for name in ("out", "lse", "q"):
        np.testing.assert_allclose(got[name][:, :, rows], want[name][:, :, rows], atol=3e-5, rtol=3e-5)
    keys = np.arange(N) != place
    for query in np.flatnonzero(~rows) if backend == "native" else ():  # it is NaN, and gives NaN to what it sees
        first, last = MOVING.span(query)
        keys[max(first, 0):last + 1] = False
    for name in "kv":
        np.testing.assert_allclose(got[name][:, :, keys], want[name][:, :, keys], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("exact, columns", [(False, 12), (True, 12), (True, 9)])
@pytest.mark.parametrize("documents", [None, IDS[:, :12]])
def test_layers_take_a_bias_of_each_query(exact, columns, documents):
    rng = np.random.default_rng(17)
    x = Tensor(rng.standard_normal((B, H, 12, D)).astype(np.float32))
    attn = LocalAttention(4, exact_windowsize=exact, use_rotary_pos_emb=False)
    ids = None if documents is None else Tensor(documents)
    rows = 4 if columns == 12 else 1
    bias = rng.standard_normal((H, rows, columns)).astype(np.float32)
    places = np.arange(12)[None]
    if documents is not None:
        first = np.array([[np.flatnonzero(row[:i + 1][::-1] != row[i])[0] if (row[:i + 1] != row[i]).any() else i + 1
                           for i in range(12)] for row in documents])
        places = first - 1
    of_queries = np.stack([bias[:, row % rows] for row in places])  # (b or 1, h, n, columns)
    want = attn(x, x, x, attn_bias=Tensor(bias), segment_ids=ids).asnumpy()
    got = attn(x, x, x, attn_bias=Tensor(of_queries), segment_ids=ids).asnumpy()
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_block_takes_an_order_and_causality_is_one():
    ms.set_seed(1)
    x = Tensor(np.random.default_rng(19).standard_normal((B, 12, 16)).astype(np.float32))
    causal = LocalMHA(dim=16, window_size=4, heads=2, dim_head=8, causal=True, look_backward=1)
    both = LocalMHA(dim=16, window_size=4, heads=2, dim_head=8, look_backward=1, look_forward=0)
    for a, b in zip(both.get_parameters(), causal.get_parameters()):
        a.set_data(b)
    order = Tensor(np.arange(12)[None].repeat(B, 0), ms.int32)
    for mode in (lambda cell: cell, lambda cell: ms.jit(cell)):
        np.testing.assert_allclose(mode(both)(x, order=order).asnumpy(), causal(x).asnumpy(), atol=2e-6)


def test_the_last_queries_of_documents_and_of_an_order_without_limits():
    spec, zeros = WindowSpec.from_flash(-1), Tensor(np.zeros((1, 1, 3, 1), np.float32))
    v = Tensor(np.array([1., 2., 4.], np.float32).reshape(1, 1, 3, 1))
    for options, right in ((dict(segment_ids=Tensor([[0, 0, 1]])), 4), (dict(order=Tensor([[0, 2, 0]])), 2.5)):
        assert windowed_attention(zeros[:, :, :1], zeros, v, spec, **options).asnumpy().item() == right
