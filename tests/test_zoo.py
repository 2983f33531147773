"""What a model zoo says, translated: tables that record stand for the zoos', and calls are those of their models."""
import sys
import types

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import oracle
from local_attention import WindowSpec, zoo
from local_attention.zoo import translation

B, H, KV, N, D, W = 2, 4, 2, 29, 6, 5
LOW = np.finfo(np.float32).min
FULL = WindowSpec.from_flash((-1, -1), causal=True)
SLIDING = WindowSpec.from_sliding_window(W)


def table():
    class Table:
        entries = {}

        @classmethod
        def register(cls, name, value):
            cls.entries[name] = value
    return Table


@pytest.fixture
def zoos(monkeypatch):
    """Modules that hold the tables of both zoos, as if they were imported; by name the tables of each."""
    tables = {name: (table(), table(), {}) for name in zoo.ZOOS}

    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, made)
    for name in (*zoo.ZOOS, "mindone.transformers", "mindnlp.transformers", "transformers"):
        module(name)
    for name, parent in (("mindone", "mindone.transformers"), ("mindnlp", "transformers")):
        module(f"{parent}.modeling_utils", AttentionInterface=tables[name][0])
        module(f"{parent}.masking_utils", AttentionMaskInterface=tables[name][1])
    module("mindnlp.transformers.masking_utils", ALL_MASK_ATTENTION_FUNCTIONS=tables["mindnlp"][2])
    sys.modules["mindnlp.transformers"].masking_utils = types.SimpleNamespace(ALL_MASK_ATTENTION_FUNCTIONS={})
    return tables


def test_register(zoos):
    assert zoo.register() == list(zoo.ZOOS)
    assert zoo.register("ours", "mindone") == ["mindone"]
    attentions, masks, _ = zoos["mindone"]
    assert attentions.entries == {name: translation.attention for name in ("local_attention", "ours")}
    assert masks.entries == {name: translation.positions for name in ("local_attention", "ours")}
    attentions, masks, own = zoos["mindnlp"]
    assert list(attentions.entries) == list(masks.entries) == list(own) == ["local_attention"]


def test_register_of_none(monkeypatch):
    for name in zoo.ZOOS:
        monkeypatch.setitem(sys.modules, name, None)
        assert zoo.register() == []
        with pytest.raises(ImportError, match=f"the zoo '{name}' cannot be imported"):
            zoo.register(zoos=(name,))
    for bad, error in ((dict(zoos="mindformers"), ValueError), (dict(zoos=3), TypeError), (dict(name=1), TypeError),
                       (dict(name=""), ValueError)):
        with pytest.raises(error, match=f"For 'register', '{list(bad)[0]}' must be"):
            zoo.register(**bad)


def test_mindnlp_wants_a_device(zoos):
    zoo.register(zoos="mindnlp")
    attentions, masks, _ = zoos["mindnlp"]
    layer = module()
    inputs = tensors()
    inputs[0]._device = "cpu"
    out, _ = attentions.entries["local_attention"](layer, *inputs, None, sliding_window=W)
    assert out._device == "cpu"
    places = Tensor(np.arange(N))
    places._device = "cpu"
    assert masks.entries["local_attention"](B, places, N) is None
    padding = Tensor(np.arange(N) > np.array([[-1], [3]]))
    got = masks.entries["local_attention"](batch_size=B, cache_position=places, kv_length=N, attention_mask=padding)
    assert got._device == "cpu" and got.shape == (B, N)
    asked = []  # transformers 5 has no `cache_position`

    def causal_of_5(*indices):
        asked.extend(index._device for index in indices)
        return indices[3] <= indices[2]
    got = masks.entries["local_attention"](batch_size=B, q_length=3, q_offset=N - 3, kv_length=N, device="npu",
                                           mask_function=causal_of_5)
    assert got._device == "npu" and set(asked) == {"npu"} and got.shape == (B, N)


def tensors(n_q=N, n_k=N):
    rng = np.random.default_rng(n_q)
    return [Tensor(rng.standard_normal(shape).astype(np.float32))
            for shape in ((B, H, n_q, D), (B, KV, n_k, D), (B, KV, n_k, D))]


def module(layer_idx=0, is_causal=True, config=None, **attributes):
    return types.SimpleNamespace(layer_idx=layer_idx, is_causal=is_causal,
                                 config=types.SimpleNamespace(**(config or {})), **attributes)


def wanted(inputs, spec, scale=D ** -0.5, **options):
    q, k, v = (x.asnumpy().reshape(-1, *x.shape[2:]) for x in inputs)
    ids = options.pop("segment_ids", None)
    options.setdefault("offset", k.shape[1] - q.shape[1])
    if ids is not None:
        options.pop("offset")
    got = oracle.everything(q, k, v, spec, scale, **options) if ids is None else \
        oracle.in_documents(q, k, v, spec, scale, ids, **options)
    return got["out"].reshape(B, H, -1, D).swapaxes(1, 2)


def same(layer, inputs, mask, right, real=None, **options):
    out, weights = translation.attention(layer, *inputs, mask, **options)
    assert weights is None
    real = np.ones(out.shape[:2], bool) if real is None else real[:, -out.shape[1]:]
    np.testing.assert_allclose(out.asnumpy()[real], right[real], atol=2e-6)


LAYERS = [
    (dict(), dict(), FULL), (dict(), dict(sliding_window=W), SLIDING), (dict(), dict(sliding_window=None), FULL),
    (dict(sliding_window=W), dict(), SLIDING), (dict(config=dict(sliding_window=W)), dict(), SLIDING),
    (dict(config=dict(sliding_window=W, use_sliding_window=False)), dict(), FULL),
    (dict(config=dict(sliding_window=W, max_window_layers=2)), dict(), FULL),
    (dict(config=dict(sliding_window=W, max_window_layers=2), layer_idx=2), dict(), SLIDING),
    (dict(config=dict(sliding_window=W, layer_types=["full_attention", "sliding_attention"])), dict(), FULL),
    (dict(config=dict(sliding_window=W, layer_types=["full_attention", "sliding_attention"]), layer_idx=1), dict(),
     SLIDING),
    (dict(config=dict(attention_chunk_size=W, layer_types=["chunked_attention"])), dict(), WindowSpec.from_chunks(W)),
    (dict(config=dict(attention_chunk_size=W, layer_types=["full_attention"])), dict(), FULL),
    (dict(config=dict(attention_chunk_size=W), use_rope=True), dict(), WindowSpec.from_chunks(W)),
    (dict(config=dict(attention_chunk_size=W), use_rope=False), dict(), FULL),
    (dict(is_causal=False), dict(sliding_window=W), WindowSpec.from_flash((W - 1, W - 1))),
    (dict(is_causal=False), dict(), WindowSpec.from_flash((-1, -1))),
    (dict(), dict(is_causal=False), WindowSpec.from_flash((-1, -1)))]


@pytest.mark.parametrize("layer, options, spec", LAYERS)
def test_window_of_a_layer(layer, options, spec):
    same(module(**layer), tensors(), None, wanted(tensors(), spec), **options)


LOCAL, GLOBAL = "sliding_attention", "full_attention"
KINDS = [  # what the configs of transformers 5.24 have, with the fields whose pattern says something else
    ("CWM", [GLOBAL, LOCAL, LOCAL, LOCAL], dict(sliding_window_pattern=4, max_window_layers=9), {}),
    ("ModernBERT", [GLOBAL, LOCAL, LOCAL, GLOBAL], dict(global_attn_every_n_layers=2), dict(is_causal=False)),
    ("SmolLM3", [GLOBAL, GLOBAL, GLOBAL, LOCAL], dict(no_rope_layers=[1, 1, 1, 0], max_window_layers=28), {}),
    ("Gemma 4", [LOCAL, LOCAL, LOCAL, LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL], dict(sliding_window_pattern=6), {}),
]


@pytest.mark.parametrize("name, kinds, settings, attributes", KINDS, ids=[name for name, *_ in KINDS])
@pytest.mark.parametrize("handed", [False, True], ids=["by the config", "by the call"])
def test_layer_types_win_over_any_pattern(name, kinds, settings, attributes, handed):
    both = not attributes.get("is_causal", True)
    full, local = (WindowSpec.from_flash(size) for size in (-1, W - 1)) if both else (FULL, SLIDING)
    config = dict(sliding_window=W, layer_types=kinds, **settings)
    right = {kind: wanted(tensors(), spec) for kind, spec in ((GLOBAL, full), (LOCAL, local))}
    for layer, kind in enumerate(kinds):  # the models hand the window of a layer to the call, None for a full one
        options = dict(sliding_window=W if kind == LOCAL else None) if handed else {}
        same(module(layer, config=config, **attributes), tensors(), None, right[kind], **options)


def test_numbers_and_gradients():
    sinks = np.linspace(-1, 1, H).astype(np.float32)
    inputs = tensors()
    right = wanted(inputs, SLIDING, .4, softcap=2., sinks=sinks)
    options = dict(sliding_window=W, scaling=.4, softcap=2., s_aux=Tensor(sinks), dropout=0.0)
    same(module(), inputs, None, right, **options)
    grads = ms.grad(lambda *x: (translation.attention(module(), *x, None, **options)[0] ** 2).sum(), (0, 1, 2))(*inputs)
    q, k, v = (x.asnumpy().reshape(-1, *x.shape[2:]) for x in inputs)
    out = oracle.everything(q, k, v, SLIDING, .4, softcap=2., sinks=sinks)["out"]
    want = oracle.everything(q, k, v, SLIDING, .4, softcap=2., sinks=sinks, dout=2 * out)
    for name, grad in zip("qkv", grads):
        np.testing.assert_allclose(grad.asnumpy().reshape(want[name].shape), want[name], atol=1e-5)
        assert np.abs(want[name]).max() > .1
    dropped, _ = translation.attention(module(), *inputs, None, dropout=.5)
    assert np.abs(dropped.asnumpy() - wanted(inputs, FULL)).max() > .1


def padding(side):
    real = np.ones((B, N), bool)
    real[1, :4 if side == "left" else None] = False if side == "left" else True
    if side == "right":
        real[1, -4:] = False
    return real


def causal(real, spec):
    """A model's own mask, added to the scores `(b, 1, n, n)`; a query without a key sees all of them, as some do."""
    seen = spec.visible(np.arange(N), np.arange(N)) & real[:, None]
    seen |= ~seen.any(-1, keepdims=True)
    return np.where(seen, 0, LOW).astype(np.float32)[:, None]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", [FULL, SLIDING])
def test_padding(side, spec):
    real, inputs = padding(side), tensors()
    right = wanted(inputs, spec, key_mask=real)
    options = dict(sliding_window=W if spec is SLIDING else None)
    for ids in (None, Tensor(np.where(real, real.cumsum(1) - 1, 1))):  # as `generate` counts them: no documents
        options["position_ids"] = ids
        ours = translation.positions(B, Tensor(np.arange(N)), N, attention_mask=Tensor(real))
        for mask in (ours, Tensor(real), Tensor(causal(real, spec)), Tensor(causal(real, FULL)),
                     Tensor(causal(real, spec) == 0), Tensor(causal(real, spec)).astype(ms.bfloat16)):
            same(module(), inputs, mask, right, real, **options)
    both = np.where(real[:, None], 0, LOW).astype(np.float32)[:, None].repeat(N, 2)
    both_ways = WindowSpec.from_flash((-1, -1))
    same(module(is_causal=False), inputs, Tensor(both), wanted(inputs, both_ways, key_mask=real), real)


def test_packed():
    ids = np.concatenate([np.arange(9), np.arange(1), np.arange(12), np.arange(7)])
    documents = np.repeat([0, 1, 2, 3], [9, 1, 12, 7])[None].repeat(B, 0)
    right = wanted(tensors(), SLIDING, segment_ids=documents)
    for given in (ids[None], ids[None].repeat(B, 0)):
        same(module(), tensors(), None, right, sliding_window=W, position_ids=Tensor(given))
    packed = Tensor(documents)  # as a zoo's mask knows of them, where its layers are handed no `position_ids`
    for seen, spec, options in (
            (lambda q, k: both_of(k <= q, k > q - W), SLIDING, {}), (lambda q, k: k <= q, FULL, {}),
            (lambda q, k: (q - k).abs() < W, WindowSpec.from_flash(W - 1), dict(is_causal=False))):
        for batch in (lambda b: b, lambda b: slice(None)):  # mindnlp's is of all rows, whichever is asked for
            mask = translation.positions(
                B, Tensor(np.arange(N)), N, allow_is_causal_skip=False,
                mask_function=lambda b, h, q, k, seen=seen, batch=batch: both_of(
                    seen(q, k), packed[batch(b), q] == packed[batch(b), k]))
            same(module(**options), tensors(), mask, wanted(tensors(), spec, segment_ids=documents), sliding_window=W)
    chunks = wanted(tensors(), WindowSpec.from_chunks(W), segment_ids=documents)
    same(module(config=dict(attention_chunk_size=W)), tensors(), None, chunks, position_ids=Tensor(ids[None]))


@pytest.mark.parametrize("n_q", [1, 3])
@pytest.mark.parametrize("left", [0, 4])
def test_caches(n_q, left):
    real = np.arange(N) >= np.array([[0], [left]])
    cache_position = Tensor(np.arange(N - n_q, N))
    inputs = tensors(n_q)
    ids = Tensor(np.arange(N - n_q, N)[None])

    def ask(kv_length, kv_offset):
        return translation.positions(B, cache_position, kv_length, kv_offset,
                                     attention_mask=Tensor(real) if left else None)
    right = wanted(inputs, SLIDING, key_mask=real)
    same(module(), inputs, ask(N, 0), right, sliding_window=W, position_ids=ids)
    kept = W - 1 + n_q  # a sliding cache hands over the last keys
    last = [inputs[0], *(x[:, :, -kept:] for x in inputs[1:])]
    same(module(), last, ask(kept, N - kept), right, sliding_window=W)
    unused = [inputs[0], *(Tensor(np.pad(x.asnumpy(), ((0, 0), (0, 0), (0, 7), (0, 0)), constant_values=9.))
                           for x in inputs[1:])]  # and a static one more than there are
    same(module(), unused, ask(N + 7, 0), right, sliding_window=W)
    seen = SLIDING.visible(np.arange(N - n_q, N), np.arange(N + 7)) & np.pad(real, ((0, 0), (0, 7)))[:, None]
    same(module(), unused, Tensor(seen[:, None]), right, sliding_window=W)
    # chunks count from a row's first real token, whatever keys are left
    chunk = np.where(real, (np.arange(N) - np.array([[0], [left]])) // W, -1)
    layer = module(config=dict(attention_chunk_size=W))
    q = np.zeros((B, H, N, D), np.float32)
    q[:, :, -n_q:] = inputs[0].asnumpy()
    right = wanted([Tensor(q), *inputs[1:]], FULL, segment_ids=chunk)[:, -n_q:]
    same(layer, inputs, ask(N, 0), right)
    same(layer, last, ask(kept, N - kept), right)


def refused(found, mask=None, layer=None, **options):
    with pytest.raises(ValueError, match=found):
        translation.attention(layer or module(), *tensors(), mask, **options)


def test_refused():
    """What a mask says beyond a causal window and padding, and what is not to be had."""
    real = np.ones((B, N), bool)
    refused("'output_attentions' must be False", output_attentions=True)
    refused("'head_mask' must be None", head_mask=Tensor(1.))
    refused("of 2 or 4 axes, but got one of shape", Tensor(np.ones((B, N, N), bool)))
    refused(r"got one of shape \(2, 4, 29, 29\) for 29 queries", Tensor(causal(real, FULL).repeat(H, 1)))
    image = causal(real, FULL)
    image[:, :, 8:12, 8:12] = 0
    refused("in row 0, query 1[12] sees key [89]", Tensor(image), sliding_window=W)  # and no window
    image[:, :, 8, 11] = LOW
    refused("'attention_mask' must be causal, .* but got one in which", Tensor(image))
    refused("in row 0, query 5 does not see key 0", Tensor(causal(real, SLIDING)))  # of a layer without a window
    documents = causal(real, FULL)
    documents[:, :, 10:, :10] = LOW
    refused("query 10 does not see key 0", Tensor(documents))
    refused("adds 0.5 to a score", Tensor(np.where(causal(real, FULL) == 0, .5, LOW).astype(np.float32)))
    hole = causal(real, FULL)
    hole[1, 0, 20, 3] = LOW
    refused("in row 1, query 20 does not see key 3", Tensor(hole))


def test_what_a_model_adds_to_its_mask():
    places, image = Tensor(np.arange(N)), Tensor((np.arange(N) // 4 == 3).astype(np.int32))

    def ask(function):
        return translation.positions(B, places, N, mask_function=function, allow_is_causal_skip=False)
    both_ways, layer = WindowSpec.from_flash(-1), module(config=dict(sliding_window=W))
    for function, spec in ((lambda b, h, q, k: k <= q, FULL), (lambda b, h, q, k: True, both_ways),
                           (lambda b, h, q, k: (k <= q)[None], FULL)):  # the last as mindnlp has it
        same(layer, tensors(), ask(function), wanted(tensors(), spec))  # whatever window the config has
    with pytest.raises(ValueError, match="shows WindowSpec.*in which, in row 0, query 12 does not see key 15; the "
                       "config's sliding_window is None"):
        ask(lambda b, h, q, k: either(k <= q, both_of(image[q] * image[k] > 0, k < q + 2)))


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("rule", ["(window and causal) or block", "window and (causal or block)"])
@pytest.mark.parametrize("n_q", [N, 20, 8])
def test_images(size, rule, n_q):
    """Tokens of an image see each other, also where the window is shorter; the second row has another image."""
    ids = np.stack([(np.arange(N) - shift) // size for shift in (12, 14)])
    ids = np.where((ids == 0) | (ids == 1), ids, -1 - np.arange(N))
    q, k = np.arange(N)[:, None], np.arange(N)
    block, window = ids[:, :, None] == ids[:, None], k > q - W
    seen = window & (k <= q) | block if rule.startswith("(") else window & ((k <= q) | block)
    function = Tensor(seen)
    mask = translation.positions(B, kv_length=N, q_length=n_q, q_offset=N - n_q, allow_is_causal_skip=False,
                                 mask_function=lambda b, h, q, k: function[b, q, k])
    inputs = tensors(n_q, N)
    right = by_mask(inputs, seen[:, -n_q:])
    same(module(), inputs, mask, right, sliding_window=W)
    if n_q == N:
        same(module(), inputs, Tensor(np.where(seen, 0, LOW).astype(np.float32)[:, None]), right, sliding_window=W)


def by_mask(inputs, seen):
    q, k, v = (x.asnumpy() for x in inputs)
    k, v = (x.repeat(H // KV, 1) for x in (k, v))
    scores = np.where(seen[:, None], q @ k.swapaxes(2, 3) * D ** -0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2)


def test_a_window_that_is_none():
    """Chunks, where nothing but the mask function says so, and keys with gaps."""
    function = Tensor(WindowSpec.from_chunks(W).visible(np.arange(N), np.arange(N)))
    mask = translation.positions(B, kv_length=N, q_length=N, mask_function=lambda b, h, q, k: function[q, k])
    same(module(), tensors(), mask, wanted(tensors(), WindowSpec.from_chunks(W)))
    mask = translation.positions(B, kv_length=N, q_length=9, q_offset=N - 9,
                                 mask_function=lambda b, h, q, k: function[q, k])
    same(module(), tensors(9), mask, by_mask(tensors(9), np.tile(function.asnumpy()[-9:], (B, 1, 1))))
    with pytest.raises(ValueError, match="sliding_window is 7"):
        translation.positions(B, kv_length=N, q_length=N, allow_is_causal_skip=False,
                              config=types.SimpleNamespace(sliding_window=7),
                              mask_function=lambda b, h, q, k: both_of(k <= q, k > q - 3 - q % 2))


def either(one, other):
    return ms.ops.logical_or(one, other)


def both_of(one, other):
    return ms.ops.logical_and(one, other)


def test_a_sliding_layer_that_hands_on_no_window():
    """mindone's Gemma 2 and Starcoder 2 have their windows in the mask of four axes alone."""
    layer, real = module(config=dict(sliding_window=W)), padding("left")
    for spec in (SLIDING, FULL):
        right = wanted(tensors(), spec, key_mask=real)
        same(layer, tensors(), Tensor(causal(real, spec)), right, real, sliding_window=None)
    other = causal(np.ones((B, N), bool), WindowSpec.from_sliding_window(W + 1))
    refused("in row 0, query 6 does not see key 0", Tensor(other), layer)


def test_a_mask_is_read_again_when_it_has_changed():
    mask = Tensor(causal(np.ones((B, N), bool), FULL))
    same(module(), tensors(), mask, wanted(tensors(), FULL))
    real = padding("left")
    mask.assign_value(Tensor(causal(real, FULL)))
    same(module(), tensors(), mask, wanted(tensors(), FULL, key_mask=real), real)
