"""Decoding with a cache gives the same rows as one call on everything, for any sizes of chunks."""
import copy
import doctest

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from mindspore.ops import constexpr

from local_attention import DynamicPositionBias, LocalMHA, LocalTransformer
from local_attention import cache as cache_module
from local_attention.backends.native import library
from local_attention.cache import reorder_cache

W, HEADS, N = 5, 3, 43
# of first and later calls: a token at a time, across window boundaries, a prompt longer than the cache, one token first
CHUNKS = [[1] * N, [3] * 14 + [1], [10, 1, 1, 20, 5, 1, 5], [30, 1, 12], [1, 42], [W, W, 1, 2 * W, W - 1, 1, W + 1, 11]]
SETTINGS = [
    dict(),
    dict(exact_windowsize=False),
    dict(exact_windowsize=False, look_backward=2),
    dict(look_backward=0),
    dict(look_backward=2, use_xpos=True),
    dict(exact_windowsize=False, use_xpos=True, xpos_scale_base=3),
    dict(qk_rmsnorm=True, gate_values_per_head=True),
    dict(exact_windowsize=False, shared_qk=True, prenorm=True),
    dict(use_rotary_pos_emb=False),
    dict(prefix=3),  # inside a window; of several windows; longer than the rest of the cache
    dict(prefix=2 * W, exact_windowsize=False, look_backward=0),
    dict(prefix=13, exact_windowsize=False, shared_qk=True),
]


def block(**settings):
    return LocalMHA(dim=20, window_size=W, heads=HEADS, dim_head=10, causal=True, **settings)


def fed(function, x, chunks, **kwargs):
    """Return the outputs of calls on one chunk after another, side by side, and the last cache."""
    assert sum(chunks) == x.shape[1]
    outs, start, cache = [], 0, None
    for size in chunks:
        out, cache = function(x[:, start:start + size], cache=cache, return_cache=True, **kwargs)
        outs.append(out.astype(ms.float32).asnumpy())
        start += size
    return np.concatenate(outs, 1), cache


@pytest.mark.parametrize("chunks", CHUNKS, ids=lambda chunks: "-".join(map(str, chunks[:4])))
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "exact")
def test_chunks_equal_one_call(settings, chunks):
    mha = block(**settings)
    x = ops.randn((2, N, 20))
    np.testing.assert_allclose(fed(mha, x, chunks)[0], mha(x).asnumpy(), atol=2e-5)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("chunks", CHUNKS[:4], ids=lambda chunks: "-".join(map(str, chunks[:4])))
def test_a_bias_stays_with_its_places(exact, chunks):
    """A bias that does not depend on distance, one that does, and, if the span moves, a row of offsets."""
    mha = block(exact_windowsize=exact, use_rotary_pos_emb=False)
    x = ops.randn((2, N, 20))
    for bias in (ops.randn((HEADS, W, 2 * W)), DynamicPositionBias(8, HEADS)(W, 2 * W),
                 *([ops.randn((HEADS, 1, W + 1))] if exact else [])):
        np.testing.assert_allclose(fed(mha, x, chunks, attn_bias=bias)[0], mha(x, attn_bias=bias).asnumpy(), atol=2e-5)


@pytest.mark.parametrize("level", ["to_float", "auto", "O2"])
@pytest.mark.parametrize("settings", SETTINGS[1::2] + SETTINGS[6:7], ids=lambda settings: ",".join(settings))
def test_half_precision(settings, level):
    mha = block(**settings)
    mixed = mha.to_float(ms.float16) if level == "to_float" else ms.amp.auto_mixed_precision(mha, level)
    mha = mixed if level == "auto" else mha  # O2 wraps it
    x = ops.randn((2, N, 20))
    np.testing.assert_allclose(fed(mha, x, CHUNKS[2])[0], mha(x).asnumpy(), atol=1e-2)


def test_a_cache_has_one_shape_however_much_it_is_fed():
    mha = block(exact_windowsize=False, look_backward=2)
    x = ops.randn((2, N, 20))
    _, few = fed(mha, x[:, :1], [1])
    _, many = fed(mha, x, [30, 13])
    assert [a.shape for a in few] == [a.shape for a in many] == [(2 * HEADS, 3 * W, 10)] * 2 + [(1 + 2,)]
    _, cache = fed(block(look_backward=2, prefix=4), x, [30, 13])
    assert cache[0].shape == (2 * HEADS, 4 + 2 * W + 1, 10)


@pytest.mark.parametrize("make", [lambda: LocalTransformer(**MODEL, global_attn_layer=full()),
                                  lambda: LocalTransformer(**MODEL, use_dynamic_pos_bias=True)])
@pytest.mark.parametrize("rows", [[2, 0, 2], [0, 2], [1, 1, 0, 2, 1]])  # as many rows, fewer, more
def test_rows_of_a_cache_in_another_order(make, rows):
    model, rows = make(), np.array(rows)
    x = ops.randint(0, 31, (3, 12))
    _, cache = model(x[:, :11], return_cache=True)
    moved = np.concatenate([x.asnumpy()[rows, :11], x.asnumpy()[rows, 11:]], 1)
    found = model(ms.Tensor(moved), cache=reorder_cache(cache, ms.Tensor(rows, ms.int32)))
    np.testing.assert_allclose(found.asnumpy(), model(ms.Tensor(moved)).asnumpy()[:, 11:], atol=2e-5)


@pytest.mark.parametrize("before, rows", [(4, [1, 3]), (1, [0, 0, 0, 0])])
def test_rows_of_a_block_s_cache_become_fewer_or_more(before, rows):
    mha, x = block(prefix=3, kv_heads=1), ops.randn((before, 12, 20))
    _, cache = mha(x[:, :11], return_cache=True)
    moved = ms.Tensor(x.asnumpy()[rows])
    for start in (11, 9):  # a token, and then two more
        out, cache = mha(moved[:, 11:] if start == 11 else moved[:, 9:11],
                         cache=reorder_cache(cache, ms.Tensor(rows)) if start == 11 else cache, return_cache=True)
    whole = ms.Tensor(np.concatenate([x.asnumpy()[rows], x.asnumpy()[rows, 9:11]], 1))
    np.testing.assert_allclose(out.asnumpy(), mha(whole).asnumpy()[:, 12:], atol=2e-5)


def test_rows_that_a_cache_does_not_have():
    out, cache = block()(ops.randn((2, 3, 20)), return_cache=True)
    for wrong, message in (([0, 2], r"'rows' must be of rows in \[0, 2\), but got 0 to 2"),
                           ([-1, 0], r"'rows' must be of rows in \[0, 2\), but got -1 to 0"),
                           ([[1, 1], [1, 1]], r"'rows' must be of shape \(rows,\)")):
        with pytest.raises(ValueError, match="For 'reorder_cache', " + message):
            reorder_cache(cache, ms.Tensor(wrong))
    clock_alone = *cache[:2], cache[2][:1]
    for wrong in (clock_alone, cache[:2], (7, *cache[1:])):
        with pytest.raises(ValueError, match="For 'reorder_cache', 'cache' must be a tuple from a call with"):
            reorder_cache(wrong, ops.ones((2,), ms.int32))
    with pytest.raises(TypeError, match="For 'reorder_cache', 'cache' must be a tuple"):
        reorder_cache(list(cache), ops.ones((2,), ms.int32))

    @ms.jit
    def compiled(cache, rows):
        return reorder_cache(cache, rows)
    with pytest.raises(ValueError, match="For 'reorder_cache', the call must be outside compiled functions"):
        compiled(ms.mutable(cache), ops.ones((2,), ms.int32))


compiled = []


@constexpr
def count_a_compilation():
    compiled.append(1)


@pytest.mark.parametrize("prefix", [0, 6])
def test_one_compiled_step_serves_every_position(prefix):
    """A cache is passed to a compiled function as `ms.mutable`."""
    mha = block(exact_windowsize=False, prefix=prefix)
    x = ops.randn((2, N, 20))

    @ms.jit
    def step(token, cache):
        count_a_compilation()
        return mha(token, cache=cache, return_cache=True)
    compiled.clear()
    out, cache = mha(x[:, :3], return_cache=True)
    wanted = mha(x).asnumpy()
    for i in range(3, N):
        out, cache = step(x[:, i:i + 1], ms.mutable(cache))
        np.testing.assert_allclose(out.asnumpy()[:, 0], wanted[:, i], atol=2e-5)
    assert len(compiled) == 1


MODEL = dict(num_tokens=31, dim=20, depth=2, heads=HEADS, dim_head=10, local_attn_window_size=W, max_seq_len=40)


def full(**settings):
    """Return a global layer: attention to all earlier tokens."""
    return LocalMHA(**{**dict(dim=20, heads=HEADS, dim_head=10, window_size=40, look_backward=0, causal=True,
                              exact_windowsize=False, prenorm=True), **settings})


class Shared(nn.Cell):
    """A global layer that also sees later tokens, and has no cache."""

    def construct(self, x, mask=None):
        return x.mean(1, keep_dims=True).broadcast_to(x.shape)


class Remembering(nn.Cell):
    """A global layer with its own cache: the sum, and the number, of the tokens so far."""

    def __init__(self):
        super().__init__()
        self.scale = ms.Parameter(ops.ones((20,), ms.float32) * 2, name="scale")

    def construct(self, x, cache=None, return_cache=False):
        before, count = (ops.zeros_like(x[:, :1]), ops.zeros((1, 1, 1), ms.float32)) if cache is None else cache
        sums = before + ops.cumsum(x, 1)
        counts = count + ops.arange(1, x.shape[1] + 1).astype(ms.float32).reshape(1, -1, 1)
        out = sums / counts * self.scale
        return (out, (sums[:, -1:], counts[:, -1:])) if return_cache else out


GLOBAL = [dict(num_residual_streams=3), dict(global_attn_layer=full(), layers_insert_global_attn=(2,)),
          dict(num_residual_streams=2, global_attn_layer=Remembering())]


@pytest.mark.parametrize("settings", [dict(), dict(use_xpos=True, qk_rmsnorm=True), dict(num_tokens=None),
                                      dict(use_dynamic_pos_bias=True, exact_windowsize=False, look_backward=2),
                                      *GLOBAL])
def test_a_model_is_given_the_whole_sequence_and_returns_what_is_new(settings):
    model = LocalTransformer(**{**MODEL, **settings})
    x = ops.randn((2, 40, 20)) if model.num_tokens is None else ops.randint(0, 31, (2, 40))
    wanted, end, cache, outs = model(x).asnumpy(), 0, None, []
    for size in (4, 1, 1, 3, 10, 1, 20):
        end += size
        out, cache = model(x[:, :end], cache=cache, return_cache=True)
        assert out.shape[1] == size
        outs.append(out.asnumpy())
    np.testing.assert_allclose(np.concatenate(outs, 1), wanted, atol=5e-5)
    _, cache = model(x[:, :30], return_cache=True)
    np.testing.assert_allclose(model(x[:, :33], cache=cache).asnumpy(), wanted[:, 30:33], atol=5e-5)


@pytest.mark.parametrize("settings", [
    dict(), dict(use_dynamic_pos_bias=True, exact_windowsize=False), GLOBAL[1],  # GLOBAL: further layers, other caches
    dict(prefix=3), dict(use_dynamic_pos_bias=True, local_attn_window_size=(3, None)),
    dict(shared_qk=True), dict(use_xpos=True), dict(qk_rmsnorm=True, look_backward=2), dict(look_backward=0)])
def test_greedy_tokens_are_the_same_with_and_without_a_cache(settings):
    """Also past `max_seq_len`. The step is compiled once, for later calls too."""
    model = LocalTransformer(**{**MODEL, **settings})
    compiled.clear()
    through_layers = model._through_layers

    def counted(*args):
        count_a_compilation()
        return through_layers(*args)
    model._through_layers = counted
    prime = ops.randint(0, 31, (2, 7))
    wanted = model.generate(prime, 45, temperature=0, use_kv_cache=False).asnumpy()
    full_calls = len(compiled)
    assert full_calls == 45
    np.testing.assert_array_equal(model.generate(prime, 45, temperature=0).asnumpy(), wanted)
    past_the_end = 7 + 45 - 1 - 40
    assert len(compiled) - full_calls == 1 + 1 + past_the_end  # the prompt, the compilation of the step, and the rest
    before = len(compiled)
    short = model.generate(prime[:, :1], 20, temperature=0).asnumpy()
    assert len(compiled) - before <= 1  # the prompt, where it is not read in compiled pieces
    np.testing.assert_array_equal(short, model.generate(prime[:, :1], 20, temperature=0, use_kv_cache=False).asnumpy())


def test_decoding_by_plain_operators(monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda device: "is not to be used")
    for settings in (dict(), dict(exact_windowsize=False, use_dynamic_pos_bias=True), dict(prefix=9)):
        model = LocalTransformer(**{**MODEL, **settings})
        for attn, _ in model.layers:  # so that attention changes the tokens
            attn.to_qkv.weight.set_data(attn.to_qkv.weight * 4)
            attn.to_out.weight.set_data(attn.to_out.weight * 4)
        prime, mask = ops.randint(0, 31, (2, 7)), ms.Tensor(np.arange(7) >= [[0], [4]])
        for more in (dict(), dict(mask=mask)):
            wanted = model.generate(prime, 15, temperature=0, use_kv_cache=False, **more).asnumpy()
            np.testing.assert_array_equal(model.generate(prime, 15, temperature=0, **more).asnumpy(), wanted)


def test_models_and_batch_sizes_do_not_share_what_they_keep():
    one, other = LocalTransformer(**MODEL), LocalTransformer(**MODEL)
    prime = ops.randint(0, 31, (3, 7))
    wanted = [model.generate(prime, 9, temperature=0, use_kv_cache=False).asnumpy() for model in (one, other)]
    for rows in (3, 1, 2, 3):
        for model, tokens in zip((one, other), wanted):
            np.testing.assert_array_equal(model.generate(prime[:rows], 9, temperature=0).asnumpy(), tokens[:rows])
    assert not [name for name in one.parameters_dict() if "key" in name or "value" in name]


def test_a_step_takes_a_cache_of_another_kind():
    model = LocalTransformer(**{**MODEL, "depth": 1}, global_attn_layer=Remembering())
    prime = ops.randint(0, 31, (2, 7))
    wanted = model.generate(prime, 5, temperature=0, use_kv_cache=False).asnumpy()
    np.testing.assert_array_equal(model.generate(prime, 5, temperature=0).asnumpy(), wanted)


def test_a_model_that_has_generated_still_trains_compiled_and_so_does_its_copy():
    """If a method were compiled, it would replace `construct` in every later graph."""
    model = LocalTransformer(**{**MODEL, "depth": 1})
    tokens = ops.randint(0, 31, (2, 12))
    wanted = model(tokens, return_loss=True).asnumpy()
    first = model.generate(tokens[:, :3], 5, temperature=0).asnumpy()

    @ms.jit
    def loss(x):
        return model(x, return_loss=True)
    np.testing.assert_allclose(loss(tokens).asnumpy(), wanted, atol=1e-5)
    copied = copy.deepcopy(model)
    for parameter in copied.get_parameters():
        parameter.set_data(parameter * 0.5)
    other = copied.generate(tokens[:, :3], 5, temperature=0).asnumpy()
    np.testing.assert_array_equal(other, copied.generate(tokens[:, :3], 5, temperature=0, use_kv_cache=False).asnumpy())
    np.testing.assert_array_equal(first, model.generate(tokens[:, :3], 5, temperature=0).asnumpy())


def test_sampling_follows_the_seed_and_tells_its_progress():
    model = LocalTransformer(**MODEL)
    prime = ops.randint(0, 31, (3, 2))

    def sampled(**kwargs):
        ms.set_seed(9)
        return model.generate(prime, 12, **kwargs).asnumpy()
    seen = []
    first = sampled(callback=seen.append)
    assert seen == list(range(1, 13))
    np.testing.assert_array_equal(first, sampled())
    np.testing.assert_array_equal(first, sampled(use_kv_cache=False))
    assert (model.generate(prime, 12).asnumpy() != first).any()


def wrong(name):
    """Return a call that misuses a cache."""
    x = ops.randn((2, 8, 20))
    mha, model, tokens = block(), LocalTransformer(**MODEL), ops.ones((2, 8), ms.int32)
    _, cache = mha(x, return_cache=True)
    _, model_cache = model(tokens, return_cache=True)
    mask, longer = ops.ones((2, 8)).bool(), ops.ones((2, 9), ms.int32)
    calls = {
        "a mask": lambda: mha(x, mask=mask, cache=cache),
        "a mask, first call": lambda: mha(x, mask=mask, return_cache=True),
        "not causal": lambda: LocalMHA(dim=20, window_size=W)(x, cache=cache),
        "not causal, first call": lambda: LocalMHA(dim=20, window_size=W)(x, return_cache=True),
        "another batch size": lambda: mha(x[:1], cache=cache),
        "another block": lambda: block(look_backward=2)(x, cache=cache),
        "no cache at all": lambda: mha(x, cache="cache"),
        "a model's mask": lambda: model(tokens, mask=mask, return_cache=True),
        "a model's batch size": lambda: model(ops.ones((1, 9), ms.int32), cache=model_cache),
        "another depth": lambda: LocalTransformer(**{**MODEL, "depth": 1})(longer, cache=model_cache),
        "a layer without a cache": lambda: LocalTransformer(
            **MODEL, global_attn_layer=Shared())(longer, return_cache=True),
        "a layer that is not causal": lambda: LocalTransformer(
            **MODEL, global_attn_layer=full(causal=False))(longer, return_cache=True),
        "nothing new": lambda: model(tokens, cache=model_cache),
        "a loss": lambda: model(longer, cache=model_cache, return_loss=True),
    }
    return calls[name]


@pytest.mark.parametrize("name, message", [
    ("a mask", "For 'LocalMHA', 'mask' must be None with a cache"),
    ("a mask, first call", "For 'LocalMHA', 'mask' must be None with a cache"),
    ("not causal", "For 'LocalMHA', 'cache' must be None.* where 'causal' is False"),
    ("not causal, first call", "For 'LocalMHA', 'cache' must be None.* where 'causal' is False"),
    ("another batch size", r"For 'LocalMHA', 'cache' must be .* keys \(3, 6, 10\).* this batch size"),
    ("another block", r"For 'LocalMHA', 'cache' must be .* keys \(6, 11, 10\)"),
    ("no cache at all", "For 'LocalMHA', 'cache' must be"),
    ("a model's mask", "For 'LocalTransformer', 'mask' must be None with a cache"),
    ("a model's batch size", "'cache' must be .* this batch size"),
    ("another depth", "For 'LocalTransformer', 'cache' must be of 1 layers"),
    ("a layer without a cache", "'cache' must be None.* where 'global_attn_layer' is not causal or its 'construct'"),
    ("a layer that is not causal", "'cache' must be None.* where 'global_attn_layer' is not causal or its 'construct'"),
    ("nothing new", "For 'LocalTransformer', 'x' must be the whole sequence, longer than the 8 tokens"),
    ("a loss", "For 'LocalTransformer', 'return_loss' must be False with a cache"),
])
def test_misuse_is_named(name, message):
    with pytest.raises((TypeError, ValueError), match=message):
        wrong(name)()


def test_examples():
    assert doctest.testmod(cache_module).failed == 0
