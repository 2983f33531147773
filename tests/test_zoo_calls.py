"""Calls of single models, by stand-ins: attention to an encoder's tokens, layers in a compiled function, text models
that are causal by their mask alone."""
import sys
import types

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from local_attention import zoo
from local_attention.zoo import huggingface, translation
from test_zoo import (FULL, LOW, SLIDING, B, D, H, KV, N, W, causal, either, module, padding, refused, same,  # noqa: F401
                      tensors, wanted, zoos)


# ---- the tokens of an encoder


def asked(n_q, kv_length, function, attention_mask=None, first=0, batch=1, kv_offset=0):
    given = None if attention_mask is None else Tensor(np.array(attention_mask))
    got = translation.positions(batch, Tensor(np.arange(first, first + n_q)), kv_length, kv_offset, function, given,
                                allow_is_causal_skip=False)
    return None if got is None else got.asnumpy().tolist()


def shows(real):
    """T5Gemma's mask function: causal, or every real key."""
    return lambda b, h, q, k: either(k <= q, real[b, k])


def test_keys_after_the_queries_are_unused_only_if_the_mask_function_hides_them():
    def always(b, h, q, k):
        return True

    def in_front(b, h, q, k):
        return k <= q
    assert asked(1, 5, always) == asked(3, 5, always) == asked(1, 5, always, first=8) == [[0, 1, 2, 3, 4]]
    assert asked(3, 2, always) == [[0, 1]]
    assert asked(1, 5, in_front) == [[0, -2, -2, -2, -2]]
    assert asked(2, 5, in_front, first=1) == [[0, 1, 2, -2, -2]]
    some = [[True, True, False, True, True]]
    assert asked(1, 5, always, some) == [[0, 1, -1, 3, 4]]


@pytest.mark.parametrize("first, queries, keys, real, wanted", [
    (0, 2, 4, 1, [[0, -1, -2, -2]]), (4, 3, 7, 5, [[0, 1, 2, 3, 4, -1, -1]])])
def test_padding_that_a_mask_function_alone_knows(first, queries, keys, real, wanted):
    found = translation.positions(1, Tensor(np.arange(first, first + queries)), keys, allow_is_causal_skip=False,
                                  mask_function=lambda b, h, q, k: k < real)
    np.testing.assert_array_equal(found.asnumpy(), wanted)


@pytest.mark.parametrize("n_q, first", [(1, 0), (1, 2), (1, 9), (3, 0), (5, 0), (7, 0)])
def test_a_mask_function_of_both_directions_may_hold_padding(n_q, first):
    real = Tensor(np.array([[True, True, False, True, False], [True, False, False, False, False]]))
    right = [[0, 1, -1, 3, -1], [0, -1, -1, -1, -1]]
    given = real.asnumpy()
    assert asked(n_q, 5, shows(real), given, first, batch=2) == right
    if n_q <= 5:
        assert asked(n_q, 5, lambda b, h, q, k: real[b, k], given, first, batch=2) == right
    assert asked(n_q, 5, lambda b, h, q, k: real[b, k], None, first, batch=2) == right


def test_queries_that_see_different_keys_of_an_encoder_are_refused():
    with pytest.raises(ValueError, match="one of the queries 0 and 2 sees key 0 and the other does not"):
        asked(3, 9, lambda b, h, q, k: k >= q)


@pytest.mark.parametrize("n_q", [1, 3, N, N + 4])
@pytest.mark.parametrize("left", [0, 4])
def test_attention_to_an_encoder(n_q, left):
    """A step of T5Gemma's decoder, its prompt, and a text that is longer than the encoder's."""
    real = np.arange(N) >= np.array([[0], [left]])
    mask = translation.positions(B, Tensor(np.arange(n_q)), N, mask_function=shows(Tensor(real)),
                                 attention_mask=Tensor(real), allow_is_causal_skip=False)
    inputs = tensors(n_q, N)
    q, k, v = (x.asnumpy() for x in inputs)
    k, v = (x.repeat(H // KV, 1) for x in (k, v))
    scores = np.where(real[:, None, None], q @ k.swapaxes(2, 3) * D ** -0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    right = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2)
    same(module(is_causal=False), inputs, mask, right, np.ones((B, n_q), bool), sliding_window=None)
    bool_mask = Tensor(np.broadcast_to(real[:, None, None], (B, 1, n_q, N)).copy())
    same(module(is_causal=False), inputs, bool_mask, right, np.ones((B, n_q), bool))


# ---- text models that are causal by their mask alone


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_by_the_mask_alone(side):
    """CLIP's text model: `is_causal` is False, and the mask is the sum of two."""
    real, layer = padding(side), module(is_causal=False)
    everywhere = np.ones((B, N), bool)
    same(layer, tensors(), Tensor(causal(everywhere, FULL)), wanted(tensors(), FULL), is_causal=False)
    pad = np.where(real, 0, LOW).astype(np.float32)[:, None, None]
    with np.errstate(over="ignore"):
        both = Tensor(causal(everywhere, FULL) + pad)
    same(layer, tensors(), both, wanted(tensors(), FULL, key_mask=real), real, is_causal=False)
    same(layer, tensors(), Tensor(causal(everywhere, SLIDING)), wanted(tensors(), SLIDING), sliding_window=W)


def test_neither_causal_nor_of_both_directions():
    layer, mask = module(is_causal=False), causal(np.ones((B, N), bool), FULL)
    mask[:, :, 20, 3] = LOW
    refused("query 20 does not see key 3", Tensor(mask), layer)
    mask[:, :, 20, 21] = 0
    refused("'attention_mask' must be .* but got one in which", Tensor(mask), layer)


# ---- layers in a compiled function


class Layer(nn.Cell):
    """The attention of mindone's Mistral and the like, without the projections."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.attention_dropout, self.scaling = 0., D ** -.5

    def construct(self, q, k, v, mask=None, **kwargs):
        return TABLE[self.config._attn_implementation](
            self, q, k, v, mask, dropout=0. if not self.training else self.attention_dropout, scaling=self.scaling,
            **kwargs)[0]


class Windowed(Layer):
    def construct(self, q, k, v, mask=None, **kwargs):
        return TABLE[self.config._attn_implementation](
            self, q, k, v, mask, scaling=self.scaling, sliding_window=getattr(self.config, "sliding_window", None),
            **kwargs)[0]


class Decoder(nn.Cell):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.CellList(list(layers))

    def construct(self, q, k, v, mask=None, position_ids=None, cache_position=None):
        outs = [layer(q, k, v, mask, position_ids=position_ids, cache_position=cache_position, use_cache=True,
                      output_attentions=False) for layer in self.layers]
        return ops.stack(outs)


TABLE = {"local_attention": translation.attention}


def config(**settings):
    return types.SimpleNamespace(_attn_implementation="local_attention", **settings)


@pytest.mark.parametrize("mode", ["jit", "graph"])
def test_layers_in_a_graph(mode):
    kinds = config(sliding_window=W, layer_types=["full_attention", "sliding_attention"])
    decoder = Decoder(Layer(kinds, 0), Layer(kinds, 1), Windowed(config(sliding_window=W), 0))
    places = Tensor(np.arange(N)[None].repeat(B, 0))
    packed = Tensor(np.concatenate([np.arange(9), np.arange(20)])[None])
    documents = np.repeat([0, 1], [9, 20])[None].repeat(B, 0)

    @ms.jit
    def jitted(q, k, v, ids):
        return decoder(q, k, v, None, ids, places[0])

    def squares(q, k, v, ids):
        return (decoder(q, k, v, None, ids, places[0]) ** 2).sum()
    if mode == "graph":
        ms.set_context(mode=ms.GRAPH_MODE)
    try:
        for ids, right in ((None, {}), (places, {}), (packed, dict(segment_ids=documents)))[2 * (mode == "graph"):]:
            got = (jitted if mode == "jit" else lambda *x: decoder(*x[:3], None, x[3], places[0]))(*tensors(), ids)
            want = [wanted(tensors(), spec, **right) for spec in (FULL, SLIDING, SLIDING)]
            np.testing.assert_allclose(got.asnumpy(), want, atol=2e-6)
        if mode == "jit":
            eager = ms.grad(squares, (0, 1, 2))(*tensors(), packed)
            for got, want in zip(ms.grad(ms.jit(squares), (0, 1, 2))(*tensors(), packed), eager):
                np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), atol=1e-5)
                assert np.abs(want.asnumpy()).max() > .1
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize("mask", [causal(np.ones((B, N), bool), FULL), np.ones((B, N), bool)])
def test_a_mask_in_a_graph(mask):
    layer = Layer(config(), 0)

    @ms.jit
    def jitted(q, k, v, mask):
        return layer(q, k, v, mask)
    with pytest.raises(ValueError, match="'attention_mask' must be None in a compiled function, where it cannot be"):
        jitted(*tensors(), Tensor(mask))


# ---- models with a table of their own


@pytest.mark.parametrize("name, package", [("mindone", "mindone.transformers"), ("mindnlp", "transformers")])
def test_a_table_of_a_models_own(name, package, zoos, monkeypatch):  # noqa: F811
    own, other = {"eager": object, "sdpa": object}, {"eagerly": 1}
    bert = types.SimpleNamespace(BERT_SELF_ATTENTION_CLASSES=own, OTHER=other)
    monkeypatch.setitem(sys.modules, f"{package}.models.bert.modeling_bert", bert)
    zoo.register(zoos=name)
    zoo.register(zoos=name)
    assert list(own) == ["eager", "sdpa", "local_attention"] and own["eager"] is object and other == {"eagerly": 1}
    with pytest.raises(ValueError, match=r"'attn_implementation' must be one of \['eager', 'sdpa'\], as this model "
                       "takes attention from a table of its own, BERT_SELF_ATTENTION_CLASSES, but got 'local_"):
        own["local_attention"](types.SimpleNamespace(), position_embedding_type=None)


# ---- arguments that are not known


@pytest.mark.parametrize("name, given", [
    ("indices", Tensor([1])), ("block_indices", Tensor([1])), ("use_top_left_mask", True), ("scores", 0.)])
def test_what_is_not_known_is_refused_by_name(name, given):
    refused(f"For 'local_attention', '{name}' must be None", **{name: given})
    same(module(), tensors(), None, wanted(tensors(), FULL), **{name: None})
    same(module(), tensors(), None, wanted(tensors(), FULL), **{name: False})


def test_what_is_not_known_in_a_graph():
    layer = Layer(config(), 0)

    @ms.jit
    def jitted(q, k, v, bias):
        return layer(q, k, v, None, block_indices=bias)
    with pytest.raises(ValueError, match="'block_indices' must be None"):
        jitted(*tensors(), Tensor(np.zeros((1, H, N, N), np.float32)))


def test_what_is_harmless_passes():
    given = dict(cache_position=Tensor(np.arange(N)), use_cache=True, logits_to_keep=1, num_items_in_batch=Tensor(3),
                 max_length_q=N, max_length_k=N, output_router_logits=True, past_key_values=types.SimpleNamespace())
    same(module(), tensors(), None, wanted(tensors(), FULL), **given)
    assert all(isinstance(reason, str) and reason for reason in huggingface.HARMLESS.values())


def test_what_is_not_known_of_a_mask():
    places = Tensor(np.arange(N))
    assert translation.positions(B, places, N, dtype=ms.float32, config=config(), local_size=W, device=None) is None
    with pytest.raises(ValueError, match="For 'local_attention', 'block_sequence_ids' must be None"):
        translation.positions(B, places, N, block_sequence_ids=Tensor(np.zeros((B, N))))


def test_a_padding_mask_of_int32():
    real = padding("right")
    same(module(), tensors(), Tensor(real.astype(np.int32)), wanted(tensors(), FULL, key_mask=real), real)


# ---- biases and sinks of each query


@pytest.mark.parametrize("n_q", [N, 3])
def test_position_bias(n_q):
    bias = np.random.default_rng(0).standard_normal((1, H, n_q, N)).astype(np.float32)
    inputs, real = tensors(n_q, N), padding("left")
    q, k, v = (x.asnumpy() for x in inputs)
    k, v = (x.repeat(H // KV, 1) for x in (k, v))
    seen = SLIDING.visible(np.arange(N - n_q, N), np.arange(N)) & real[:, None, None]
    scores = np.where(seen, q @ k.swapaxes(2, 3) * D ** -0.5 + bias, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    right = (weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9) @ v).swapaxes(1, 2)
    same(module(), inputs, Tensor(real), right, sliding_window=W, position_bias=Tensor(bias))
    unused = [inputs[0], *(Tensor(np.pad(x.asnumpy(), ((0, 0), (0, 0), (0, 7), (0, 0)))) for x in inputs[1:])]
    mask = translation.positions(B, Tensor(np.arange(N - n_q, N)), N + 7, attention_mask=Tensor(real))
    longer = Tensor(np.pad(bias, ((0, 0), (0, 0), (0, 0), (0, 7))))
    same(module(), unused, mask, right, sliding_window=W, position_bias=longer)


def test_position_bias_refused():
    bias = Tensor(np.zeros((1, H, N, N), np.float32))
    refused("'position_bias' must be None in a layer without a window", position_bias=bias)
    refused("'position_bias' must be None", layer=module(config=dict(attention_chunk_size=W)), position_bias=bias)
    refused("'position_bias' must be of shape .*29, 29., but", sliding_window=W, position_bias=bias[:, :, 1:])


def test_a_layer_with_a_bias_and_sinks_in_a_graph():
    layer, (q, k, v) = Windowed(config(sliding_window=W), 0), tensors()
    rng = np.random.default_rng(1)
    bias, sinks = (Tensor(rng.standard_normal(shape).astype(np.float32)) for shape in ((1, H, N, N), (B, H, N, 1)))

    @ms.jit
    def jitted(q, k, v, bias, sinks):
        return layer(q, k, v, None, position_bias=bias, sinks=sinks)
    np.testing.assert_allclose(jitted(q, k, v, bias, sinks).asnumpy(),
                               layer(q, k, v, None, position_bias=bias, sinks=sinks).asnumpy(), atol=2e-6)


def test_sinks_of_queries():
    sinks = np.random.default_rng(2).standard_normal((B, H, N)).astype(np.float32)
    zero = [Tensor(np.zeros((B, heads, N, 1), np.float32)) for heads in (H, KV)]
    ones = Tensor(np.ones((B, KV, N, 1), np.float32))
    count = np.minimum(np.arange(N) + 1, W)
    right = (count / (count + np.exp(sinks))).swapaxes(1, 2)[..., None]
    for given in (Tensor(sinks), Tensor(sinks[..., None])):
        out, _ = translation.attention(module(), *zero, ones, None, sliding_window=W, sinks=given)
        np.testing.assert_allclose(out.asnumpy(), right, atol=2e-6)
    refused("'sinks' must be of shape", sinks=Tensor(sinks[:, :, 1:]))
    refused("'sinks'.*'s_aux'", sinks=Tensor(sinks), s_aux=Tensor(sinks[0, :, 0]))


@pytest.mark.parametrize("n_q", [1, N])
def test_values_of_another_width(n_q):
    """DeepSeek-V3's are narrower than its keys."""
    q, k, v = tensors(n_q, N)
    wide, _ = translation.attention(module(), q, k, v, None)
    narrow, _ = translation.attention(module(), q, k, v[..., :D - 2], None)
    np.testing.assert_allclose(narrow.asnumpy(), wide.asnumpy()[..., :D - 2], atol=2e-6)


# ---- documents of the flash collator


def test_two_documents_of_one_token():
    q, v = Tensor(np.zeros((1, 1, 2, 1), np.float32)), Tensor(np.array([1., 3.], np.float32).reshape(1, 1, 2, 1))
    lens = Tensor([0, 1, 2], ms.int32)
    for given in (dict(cu_seq_lens_q=lens, cu_seq_lens_k=lens), dict(cu_seq_lens_q=[0, 1, 2], cu_seq_lens_k=lens),
                  dict(cu_seq_lens_k=lens)):
        out, _ = translation.attention(module(), q, q, v, None, max_length_q=1, max_length_k=1, **given)
        assert out.asnumpy().ravel().tolist() == [1, 3]


def test_documents_by_their_lengths():
    ends = np.array([0, 9, 10, 22, N, N + 4, 2 * N])
    documents = np.repeat(np.arange(6), np.diff(ends)).reshape(B, N)
    right = wanted(tensors(), SLIDING, segment_ids=documents)
    lens = Tensor(ends, ms.int32)
    same(module(), tensors(), None, right, sliding_window=W, cu_seq_lens_q=lens, cu_seq_lens_k=lens,
         position_ids=Tensor(np.arange(N)[None]))
    whole = Tensor([0, N, 2 * N], ms.int32)
    same(module(), tensors(), None, wanted(tensors(), FULL), cu_seq_lens_q=whole, cu_seq_lens_k=whole)
    real = padding("left")
    ids = np.where(real, documents, -1)
    same(module(), tensors(), Tensor(real), wanted(tensors(), FULL, segment_ids=ids), real, cu_seq_lens_q=lens,
         cu_seq_lens_k=lens)
    for q, k in (([0, N, 2 * N], [0, 5, 2 * N]), ([0, N, 2 * N - 1], None), ([0, 2 * N], None), ([1, N, 2 * N], None),
                 ([0, N, 5, 2 * N], None), ([0, N, 2 * N], [0, N])):
        refused("'cu_seq_lens_.' must be", cu_seq_lens_q=Tensor(q), cu_seq_lens_k=Tensor(q if k is None else k))
    with pytest.raises(ValueError, match="'cu_seq_lens_q' must be from 0 to 58, .* a cache, but got .* 3 queries"):
        translation.attention(module(), *tensors(3), cu_seq_lens_q=whole, cu_seq_lens_k=whole)


# ---- what is read


@pytest.fixture
def reads(monkeypatch):
    """A list with an entry for each time that values of a tensor are read."""
    made, asnumpy = [], Tensor.asnumpy
    monkeypatch.setattr(Tensor, "asnumpy", lambda self: (made.append(self), asnumpy(self))[1])
    return made


def decoder_layers(*indices):
    layers, settings = [module(index) for index in indices], config(sliding_window=W)
    for layer in layers:
        layer.config = settings
    return layers


@pytest.mark.parametrize("kind", ["none", "positions", "two axes", "four axes", "packed", "cu_seq_lens"])
@pytest.mark.parametrize("n_q", [1, N])
def test_a_forward_pass_reads_a_tensor_once(kind, n_q, reads):
    """A decoder of 24 layers: at most two round trips to the host for a step."""
    layers, queries, real = decoder_layers(*range(24)), np.arange(N - n_q, N), np.arange(N) >= np.array([[0], [4]])
    own = Tensor((SLIDING.visible(queries, np.arange(N)) & real[:, None])[:, None])
    lens, inputs, steps = Tensor([0, N, N + 3, 2 * N], ms.int32), tensors(n_q), []
    for _ in range(2):
        reads.clear()
        mask, options = None, dict(position_ids=Tensor(queries[None] % (11 if kind == "packed" else N)))
        if kind == "positions":
            mask = translation.positions(B, Tensor(queries), N, attention_mask=Tensor(real))
        elif kind == "two axes":
            mask = Tensor(real)
        elif kind == "four axes":
            mask = own
        elif kind == "cu_seq_lens" and n_q == N:
            options = dict(cu_seq_lens_q=lens, cu_seq_lens_k=lens)
        outs = [translation.attention(layer, *inputs, mask, **options)[0] for layer in layers]
        assert len(reads) <= 2
        steps.append(outs[-1].asnumpy())
    np.testing.assert_array_equal(*steps)
    documents = {"packed": np.tile(np.arange(N) // 11, (B, 1)),
                 "cu_seq_lens": np.arange(N) >= np.array([[N], [3]])}.get(kind) if n_q == N else None
    hidden = {} if kind in ("none", "packed", "cu_seq_lens") else dict(key_mask=real)
    right = wanted(inputs, SLIDING, **(hidden if documents is None else dict(segment_ids=documents.astype(int))))
    seen = real[:, queries] if hidden else np.ones((B, n_q), bool)
    np.testing.assert_allclose(steps[0][seen], right[seen], atol=2e-6)


@pytest.mark.parametrize("options", [dict(cache_position=[N - 1]), dict(q_length=1, q_offset=N - 1)])
def test_a_step_that_asks_a_mask_function(options, reads):
    """What is read of positions and padding, and what the mask function says, are two round trips for all layers."""
    real = np.arange(N) >= np.array([[0], [4]])
    options = {name: Tensor(given) if isinstance(given, list) else given for name, given in options.items()}
    for padding_mask, right in ((Tensor(real), dict(key_mask=real)), (None, {})):
        reads.clear()
        mask = translation.positions(B, kv_length=N, attention_mask=padding_mask, **options,
                                     mask_function=lambda b, h, q, k: ops.logical_and(k <= q, k > q - W))
        outs = [translation.attention(layer, *tensors(1, N), mask)[0] for layer in decoder_layers(*range(24))]
        assert len(reads) <= 2
        np.testing.assert_allclose(outs[-1].asnumpy(), wanted(tensors(1, N), SLIDING, **right), atol=2e-6)


def test_another_pass_reads_again():
    """A tensor may be written to between two forward passes, and between those of two models."""
    for layers in (decoder_layers(0, 1), decoder_layers(None, None)):
        ids = Tensor(np.arange(N)[None])
        for layer in layers:
            same(layer, tensors(), None, wanted(tensors(), SLIDING), position_ids=ids)
        ids[:, 9:] = Tensor(np.arange(20)[None])
        right = wanted(tensors(), SLIDING, segment_ids=np.repeat([0, 1], [9, 20])[None].repeat(B, 0))
        for layer in layers:
            same(layer, tensors(), None, right, position_ids=ids)
        ids[:, 9:] = Tensor(np.arange(9, N)[None])
        for layer in decoder_layers(5):
            same(layer, tensors(), None, wanted(tensors(), SLIDING), position_ids=ids)
