"""Every argument of every public call, with wrong values: the error names an argument of the call."""
import functools
import inspect
import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from local_attention import (
    DynamicPositionBias,
    LocalAttention,
    LocalMHA,
    LocalSelfAttention,
    LocalTransformer,
    MultiHeadLocalAttention,
    WindowSpec,
    explain_attention,
    export_torch_weights,
    load_torch_weights,
    merge_attentions,
    sliding_window_attention,
    use_backend,
    windowed_attention,
)
from local_attention.local_attention import max_neg_value
from local_attention.plot import attention_weights, plot_mask, plot_weights
from local_attention.rotary import SinusoidalEmbeddings
from local_attention.transformer import GEGLU, FeedForward, top_k
from local_attention.weights import convert

BAD = {"str": "x", "list": [1, 2], "None": None, "array": np.ones((2, 3)), "dict": {}, "tuple": (1, 2),
       "float": 1.5, "Tensor": Tensor(np.ones((2, 3)), ms.float64), "complex": Tensor(np.ones(1), ms.complex64)}


def x(*shape, dtype=ms.float32):
    return ops.ones(shape, dtype)


@functools.cache
def cell(kind, **settings):
    return kind(**settings)


def model(**settings):
    return cell(LocalTransformer, num_tokens=7, max_seq_len=12, dim=4, depth=1, heads=1, dim_head=4,
                local_attn_window_size=3, **settings)


def block():
    return cell(LocalMHA, dim=4, window_size=3, heads=1, dim_head=4, causal=True)


TOKENS, MASK, FLOATS = ops.ones((2, 5), ms.int32), ops.ones((2, 5), ms.bool_), x(2, 6, 4)
HEADS, SLIDING = x(1, 2, 6, 4), dict(in_features=4, num_heads=2)
# For each call: the arguments it gets, and for each argument which of the values here are right.
NUMBERS = {"float", "None"}  # for a number with a default
OF_SCORES = dict(scale=NUMBERS, softcap=NUMBERS, sinks={"None"}, segment_ids={"None"})
CALLS = {
    "LocalAttention": (LocalAttention, dict(window_size=3, dim=4), dict(
        scale=NUMBERS, xpos_scale_base=NUMBERS, look_forward={"None"}, backend={"None"}, dim={"None"},
        rel_pos_emb_config={"None"}, sequence_parallel=set(), softcap=NUMBERS)),
    "LocalMHA": (LocalMHA, dict(dim=4, window_size=3, heads=1, dim_head=4), dict(
        qk_scale={"float"}, xpos_scale_base=NUMBERS, exact_windowsize={"None"}, kv_heads={"None"})),
    "LocalTransformer": (LocalTransformer, dict(num_tokens=7, max_seq_len=12, dim=4, depth=1, dim_head=4), dict(
        num_tokens={"None"}, ff_mult={"float"}, xpos_scale_base=NUMBERS, global_attn_layer={"None"},
        layers_insert_global_attn={"None"})),
    "DynamicPositionBias": (DynamicPositionBias, dict(dim=2, heads=1), {}),
    "LocalSelfAttention": (LocalSelfAttention, SLIDING, dict(
        qkv_features={"None"}, out_features={"None"}, num_kv_heads={"None"})),
    "MultiHeadLocalAttention": (MultiHeadLocalAttention, SLIDING, dict(
        qkv_features={"None"}, out_features={"None"}, num_kv_heads={"None"})),
    "FeedForward": (FeedForward, dict(dim=4), dict(mult={"float"})),
    "SinusoidalEmbeddings": (SinusoidalEmbeddings, dict(dim=4), dict(scale_base=NUMBERS, theta={"float"})),
    "WindowSpec": (WindowSpec, dict(bucket=1, backward=2, forward=0, causal=True), {}),
    "from_sliding_window": (WindowSpec.from_sliding_window, dict(sliding_window=3), {}),
    "from_flash": (WindowSpec.from_flash, dict(window_size=(1, 1)), dict(window_size={"list", "tuple"})),
    "from_centered": (WindowSpec.from_centered, dict(width=3), {}),
    "from_streaming": (WindowSpec.from_streaming, dict(chunk=3, left=2, right=1), {}),
    "from_sinks": (WindowSpec.from_sinks, dict(window=3, keep=1), {}),
    "from_chunks": (WindowSpec.from_chunks, dict(chunk_size=3), {}),
    "show": (WindowSpec(1, 2, 0, True).show, dict(n=3), dict(order={"None"})),

    "attention": (cell(LocalAttention, window_size=3), dict(q=FLOATS, k=FLOATS, v=FLOATS), dict(
        mask={"None"}, input_mask={"None"}, attn_bias={"None"}, window_size={"None"}, segment_ids={"None"},
        sinks={"None"}, order={"None"})),
    "explain": (cell(LocalAttention, window_size=3).explain, dict(n=6), dict(
        dtype={"None"}, device={"None"})),
    "explain_attention": (explain_attention, dict(q_shape=(1, 2, 6, 4), spec=WindowSpec(1, 2, 0, True)), dict(
        k_shape={"None"}, v_width={"None"}, dtype={"None"}, device={"None"})),
    "block": (block(), dict(x=FLOATS), dict(
        mask={"None"}, attn_bias={"None"}, cache={"None"}, segment_ids={"None"}, order={"None"})),
    "model": (model(), dict(x=TOKENS), dict(mask={"None"}, cache={"None"}, segment_ids={"None"})),
    "generate": (model().generate, dict(prime=TOKENS, seq_len=1), dict(
        temperature={"float"}, mask={"None"}, stop_token={"None"}, callback={"None"})),
    "bias": (cell(DynamicPositionBias, dim=2, heads=1), dict(i=2, j=3), {}),
    "self": (cell(LocalSelfAttention, **SLIDING), dict(x=FLOATS), dict(
        mask={"None"}, seed={"None"}, segment_ids={"None"})),
    "cross": (cell(MultiHeadLocalAttention, **SLIDING), dict(inputs_q=FLOATS, inputs_kv=FLOATS), dict(
        mask={"None"}, seed={"None"}, segment_ids={"None"})),
    "sliding": (sliding_window_attention, dict(q=FLOATS, k=FLOATS, v=FLOATS), dict(
        mask={"None"}, rel_pos_emb={"None"}, rel_pos_query={"None"}, seed={"None"}, backend={"None"}, **OF_SCORES)),
    "windowed": (windowed_attention, dict(q=HEADS, k=HEADS, v=HEADS, spec=WindowSpec(1, 2, 0, True)), dict(
        mask={"None"}, cu_seqlens={"None"}, order={"None"}, attn_bias={"None"}, seed={"None"}, backend={"None"},
        **OF_SCORES)),
    "merge": (merge_attentions, dict(outs=(x(2, 3),), lses=(x(2),)), {}),
    "use_backend": (use_backend, {}, dict(backend={"None"})),
    "GEGLU": (cell(GEGLU), dict(x=FLOATS), {}),
    "top_k": (top_k, dict(logits=x(2, 7)), {}),

    "load_torch_weights": (load_torch_weights, dict(cell=block(), source=export_torch_weights(block())), {}),
    "export_torch_weights": (export_torch_weights, dict(cell=block()), {}),
    "convert": (convert, dict(source="a.npz", target="b.ckpt"), {}),
    "attention_weights": (attention_weights, dict(model=block()), {}),
    "plot_mask": (plot_mask, dict(spec=WindowSpec(1, 2, 0, True), n=3), dict(axes={"None"}, order={"None"})),
    "plot_weights": (plot_weights, dict(weights=[np.ones((1, 3, 3))]), dict(names={"None"})),

    "max_neg_value": (max_neg_value, dict(tensor=FLOATS), dict(tensor={"Tensor"})),
}


def arguments():
    for name, (call, _, good) in CALLS.items():
        of = call.construct if isinstance(call, nn.Cell) else call
        for argument, parameter in inspect.signature(of).parameters.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                yield from ((name, argument, kind) for kind in BAD if kind not in good.get(argument, ()))


@pytest.mark.parametrize("name, argument, kind", list(arguments()))
def test_what_is_no_value_of_an_argument_is_an_error_that_names_one(name, argument, kind):
    call, given, _ = CALLS[name]
    of = call.construct if isinstance(call, nn.Cell) else call
    owned = set(inspect.signature(of).parameters)
    with pytest.raises((TypeError, ValueError)) as raised:
        call(**{**given, argument: BAD[kind]})
    named = re.match(r"For '[\w.]+', .*?'(\w+)' ", str(raised.value))
    assert named and named.group(1) in owned, raised.value


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])
@pytest.mark.parametrize("change", [
    lambda k, v, at: (k, v), lambda k, v, at: (k, v, 5), lambda k, v, at: (k, "x", at),
    lambda k, v, at: (k, v[:, 1:], at),
    lambda k, v, at: (k, v, at.astype(ms.float32)), lambda k, v, at: (k, v, ops.ones((7,), ms.int32)),
    lambda k, v, at: (k.astype(ms.float16), v, at), lambda k, v, at: [k, v, at]])
def test_parts_of_a_cache(change, compiled):
    mha = block()
    _, (keys, values, position) = mha(FLOATS, return_cache=True)
    broken = change(keys, values, position)

    def call(x):
        return mha(x, cache=broken)
    with pytest.raises((TypeError, ValueError), match="For 'LocalMHA', 'cache' must be "):
        (ms.jit(call) if compiled else call)(FLOATS)


@pytest.mark.parametrize("change", [
    lambda layers, bias, seen: (layers, bias), lambda layers, bias, seen: (layers[:0], bias, seen),
    lambda layers, bias, seen: (layers, bias, "5"), lambda layers, bias, seen: (layers, "x", seen),
    lambda layers, bias, seen: (list(layers), bias, seen), lambda layers, bias, seen: ((layers[0][:2],), bias, seen)])
def test_parts_of_a_model_s_cache(change):
    _, cache = model()(TOKENS, return_cache=True)
    with pytest.raises((TypeError, ValueError), match="For 'Local(Transformer|MHA)', 'cache' must be "):
        model()(ops.ones((2, 6), ms.int32), cache=change(*cache))
