"""The messages for bad arguments, one line each."""
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from local_attention import (
    DynamicPositionBias,
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    WindowSpec,
    export_torch_weights,
    load_torch_weights,
    weights,
)
from local_attention.parallel import AverageGradients, Group
from local_attention.rotary import SinusoidalEmbeddings
from local_attention.transformer import GEGLU, FeedForward, top_k


def transformer(**settings):
    return LocalTransformer(**{**dict(num_tokens=23, max_seq_len=13, dim=11, depth=1, heads=3, dim_head=10,
                                      local_attn_window_size=5), **settings})


def attention(**settings):
    return LocalAttention(**{**dict(window_size=5), **settings})


def spec(**settings):
    return WindowSpec(**{**dict(bucket=1, backward=5, forward=0, causal=True), **settings})


def block(**settings):
    return LocalMHA(**{**dict(dim=11, window_size=5, heads=3, dim_head=10), **settings})


def sliced(build, ranks=3, **settings):
    """Return a Cell with sequence_parallel, on the first of some ranks. It raises without the other ranks."""
    cell = build(**settings)
    for _, part in cell.cells_and_names():
        if hasattr(part, "group"):
            part.group = Group("hccl_world_group", 0, ranks)
    return cell


def tokens(*shape, dtype=ms.int32):
    return ops.zeros(shape, dtype)


def vectors(*shape):
    return ops.zeros(shape, ms.float32)


def mask(*shape):
    return ops.ones(shape, ms.bool_)


def check(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value).split("\n")[0]


# Constructors: a class, its arguments, and the message.

CONSTRUCTORS = [
    (attention, {"window_size": 0}, ValueError,
     "For 'LocalAttention', 'window_size' must be a positive int, but got 0."),
    (attention, {"window_size": -3}, ValueError, "'window_size' must be a positive int, but got -3."),
    (attention, {"window_size": 5.}, TypeError, "'window_size' must be a positive int, but got 5.0 of type float."),
    (attention, {"causal": 1}, TypeError, "'causal' must be a bool, but got 1 of type int."),
    (attention, {"look_backward": -1}, ValueError, "'look_backward' must be a non-negative int, but got -1."),
    (attention, {"look_forward": 0.5}, TypeError, "'look_forward' must be a non-negative int, but got 0.5"),
    (attention, {"causal": True, "look_forward": 1}, ValueError, "'look_forward' must be 0 when causal, but got 1."),
    (attention, {"dropout": 1.}, ValueError, "'dropout' must be a rate in [0, 1), but got 1.0."),
    (attention, {"dropout": -0.1}, ValueError, "'dropout' must be a rate in [0, 1), but got -0.1."),
    (attention, {"dropout": "0.1"}, TypeError, "'dropout' must be a number, but got '0.1' of type str."),
    (attention, {"shared_qk": None}, TypeError, "'shared_qk' must be a bool, but got None of type NoneType."),
    (attention, {"autopad": 1}, TypeError, "'autopad' must be a bool, but got 1"),
    (attention, {"exact_windowsize": "yes"}, TypeError, "'exact_windowsize' must be a bool, but got 'yes'"),
    (attention, {"scale": float("nan")}, ValueError, "'scale' must be finite, but got nan."),
    (attention, {"scale": "1"}, TypeError, "'scale' must be a number, but got '1'"),
    (attention, {"dim": 0}, ValueError, "'dim' must be a positive int, but got 0."),
    (attention, {"dim": 7}, ValueError, "'dim' must be even for rotary embeddings, but got 7."),
    (attention, {"rel_pos_emb_config": 8}, TypeError, "'rel_pos_emb_config' must be a tuple"),
    (attention, {"use_rotary_pos_emb": 0}, TypeError, "'use_rotary_pos_emb' must be a bool, but got 0"),
    (attention, {"xpos_scale_base": "1"}, TypeError, "'xpos_scale_base' must be a number, but got '1'"),
    (attention, {"dim": 8, "use_xpos": True, "xpos_scale_base": 0}, ValueError,
     "'xpos_scale_base' must be a positive number, but got 0."),
    (attention, {"dim": 8, "use_xpos": True, "window_size": 1}, ValueError,
     "'xpos_scale_base' must be a positive number, but got 0."),
    (attention, {"backend": "fast"}, ValueError,
     "'backend' must be None or one of ascend, native, blocked, any_length, dense, but got 'fast'."),
    (attention, {"sequence_parallel": True}, ValueError, "For 'LocalAttention', 'sequence_parallel' needs a "
     "communication group with this rank in it, made by 'mindspore.communication.init()' or 'create_group()', but got "
     "True."),
    (attention, {"sequence_parallel": 1}, TypeError,
     "'sequence_parallel' must be a bool or the name of a communication group, but got 1 of type int."),
    (AverageGradients, {"group": 1}, TypeError,
     "For 'AverageGradients', 'group' must be None or the name of a communication group, but got 1 of type int."),
    (AverageGradients, {}, ValueError, "For 'AverageGradients', 'group' needs a communication group with this rank in "
     "it"),
    (spec, {"bucket": 0}, ValueError, "For 'WindowSpec', 'bucket' must be a positive int, but got 0."),
    (spec, {"backward": -1}, ValueError, "'backward' must be a non-negative int, but got -1."),
    (spec, {"forward": -2}, ValueError, "'forward' must be an int of at least -1, but got -2."),
    (spec, {"causal": None}, TypeError, "'causal' must be a bool, but got None"),
    (WindowSpec.from_sliding_window, {"sliding_window": 0}, ValueError,
     "For 'WindowSpec.from_sliding_window', 'sliding_window' must be a positive int, but got 0."),
    (WindowSpec.from_flash, {"window_size": 5.}, TypeError,
     "'window_size' must be an int or a pair (left, right), but got 5.0 of type float."),
    (WindowSpec.from_flash, {"window_size": True}, TypeError,
     "'window_size' must be an int or a pair (left, right), but got True of type bool."),
    (WindowSpec.from_flash, {"window_size": (-2, 0)}, ValueError,
     "'window_size' must be an int of at least -1, but got -2."),
    (WindowSpec.from_flash, {"window_size": -2}, ValueError, "'window_size' must be an int of at least -1, but got"),
    (WindowSpec.from_centered, {"width": 0}, ValueError,
     "For 'WindowSpec.from_centered', 'width' must be a positive int, but got 0."),
    (WindowSpec.from_centered, {"width": 4, "extra": "up"}, ValueError,
     "For 'WindowSpec.from_centered', 'extra' must be 'left' or 'right', but got 'up'."),
    (WindowSpec.from_centered, {"width": 4, "extra": None}, TypeError,
     "'extra' must be 'left' or 'right', but got None of type NoneType."),
    (WindowSpec.from_streaming, {"chunk": 0, "left": 0, "right": 0}, ValueError,
     "For 'WindowSpec.from_streaming', 'chunk' must be a positive int, but got 0."),
    (WindowSpec.from_streaming, {"chunk": 2, "left": -1, "right": 0}, ValueError,
     "'left' must be a non-negative int, but got -1."),
    (WindowSpec.from_streaming, {"chunk": 2, "left": 0, "right": -1}, ValueError,
     "'right' must be a non-negative int, but got -1."),
    (WindowSpec.from_sinks, {"window": 0, "keep": 0}, ValueError,
     "For 'WindowSpec.from_sinks', 'window' must be a positive int, but got 0."),
    (WindowSpec.from_sinks, {"window": 4, "keep": -1}, ValueError, "'keep' must be a non-negative int, but got -1."),
    (WindowSpec.from_sinks, {"window": 4, "keep": 4}, ValueError,
     "For 'WindowSpec.from_sinks', 'keep' must be less than 'window', which is 4, but got 4."),
    (WindowSpec.from_chunks, {"chunk_size": 0}, ValueError,
     "For 'WindowSpec.from_chunks', 'chunk_size' must be a positive int, but got 0."),
    (spec, {"prefix": -1}, ValueError, "For 'WindowSpec', 'prefix' must be a non-negative int, but got -1."),
    (attention, {"prefix": 2.}, TypeError, "'prefix' must be a non-negative int, but got 2.0 of type float."),
    (attention, {"softcap": 0}, ValueError, "'softcap' must be a positive number, but got 0."),
    (attention, {"dim": 8, "use_xpos": True, "prefix": 2}, ValueError,
     "For 'LocalAttention', 'prefix' and 'use_xpos' cannot go together, but got both."),
    (SinusoidalEmbeddings, {"dim": 3}, ValueError, "For 'SinusoidalEmbeddings', 'dim' must be even"),
    (SinusoidalEmbeddings, {"dim": 4, "use_xpos": True}, ValueError, "'scale_base' must be given with 'use_xpos'"),

    (transformer, {"num_tokens": 0}, ValueError, "'LocalTransformer', 'num_tokens' must be a positive int, but got 0."),
    (transformer, {"num_tokens": "23"}, TypeError,
     "'num_tokens' must be a positive int, but got '23' of type str."),
    (transformer, {"max_seq_len": 0}, ValueError, "'max_seq_len' must be a positive int, but got 0."),
    (transformer, {"dim": 0}, ValueError, "For 'LocalTransformer', 'dim' must be a positive int, but got 0."),
    (transformer, {"dim": 1.5}, TypeError, "'dim' must be a positive int, but got 1.5 of type float."),
    (transformer, {"depth": -1}, ValueError, "'depth' must be a positive int, but got -1."),
    (transformer, {"local_attn_window_size": 0}, ValueError,
     "'LocalTransformer', 'local_attn_window_size' must be a positive int, but got 0."),
    (transformer, {"heads": True}, TypeError, "'heads' must be a positive int, but got True of type bool."),
    (transformer, {"ff_mult": 0}, ValueError, "'LocalTransformer', 'ff_mult' must be a positive number, but got 0."),
    (transformer, {"attn_dropout": 1}, ValueError,
     "'LocalTransformer', 'attn_dropout' must be a rate in [0, 1), but got 1."),
    (transformer, {"ff_dropout": -0.1}, ValueError,
     "'LocalTransformer', 'ff_dropout' must be a rate in [0, 1), but got -0.1."),
    (transformer, {"ignore_index": 0.5}, TypeError, "'ignore_index' must be an int"),
    (transformer, {"causal": 1}, TypeError, "'causal' must be a bool, but got 1 of type int."),
    (transformer, {"use_xpos": None}, TypeError, "'LocalTransformer', 'use_xpos' must be a bool, but got None"),
    (transformer, {"use_dynamic_pos_bias": 1}, TypeError, "'use_dynamic_pos_bias' must be a bool, but got 1"),
    (transformer, {"use_dynamic_pos_bias": True, "dim": 1}, ValueError,
     "'dim' must be at least 2 with 'use_dynamic_pos_bias', but got 1."),
    (transformer, {"num_residual_streams": 0}, ValueError, "'num_residual_streams' must be a positive int, but got 0."),
    (transformer, {"num_residual_streams": 4.}, TypeError,
     "'num_residual_streams' must be a positive int, but got 4.0 of type float."),
    (transformer, {"global_attn_layer": abs}, TypeError,
     "For 'LocalTransformer', 'global_attn_layer' must be a Cell, but got <built-in function abs>"),
    (transformer, {"global_attn_layer": nn.Dense(11, 11), "sequence_parallel": True}, ValueError,
     "'global_attn_layer' must be None with 'sequence_parallel', where it would see the tokens of one rank, but got "
     "Dense."),
    (transformer, {"layers_insert_global_attn": (1,)}, ValueError,
     "'layers_insert_global_attn' must be None without 'global_attn_layer', but got (1,)."),
    (transformer, {"global_attn_layer": nn.Dense(11, 11), "layers_insert_global_attn": (1, 2)}, ValueError,
     "'layers_insert_global_attn' must be a tuple of numbers of layers, from 1 to 1, but got 2."),
    (transformer, {"global_attn_layer": nn.Dense(11, 11), "layers_insert_global_attn": [0]}, ValueError,
     "'layers_insert_global_attn' must be a tuple of numbers of layers, from 1 to 1, but got 0."),
    (transformer, {"global_attn_layer": nn.Dense(11, 11), "layers_insert_global_attn": 1}, TypeError,
     "'layers_insert_global_attn' must be a tuple of numbers of layers, from 1 to 1, but got 1 of type int."),
    (transformer, {"global_attn_layer": nn.Dense(11, 11), "layers_insert_global_attn": (True,)}, TypeError,
     "'layers_insert_global_attn' must be a tuple of numbers of layers, from 1 to 1, but got True of type bool."),
    (transformer, {"sequence_parallel": True}, ValueError, "'sequence_parallel' needs a communication group"),
    (transformer, {"look_forward": 1}, ValueError, "'look_forward' must be 0 when causal, but got 1."),
    (transformer, {"windows": 1}, TypeError, "'windows' must be the name of one of its arguments"),

    (block, {"dim": 0}, ValueError, "For 'LocalMHA', 'dim' must be a positive int, but got 0."),
    (block, {"window_size": 2.}, TypeError, "'window_size' must be a positive int, but got 2.0 of type float."),
    (block, {"dim_head": 0}, ValueError, "'LocalMHA', 'dim_head' must be a positive int, but got 0."),
    (block, {"dim_head": 7}, ValueError, "'LocalMHA', 'dim_head' must be even for rotary embeddings, but got 7."),
    (block, {"heads": 0}, ValueError, "'LocalMHA', 'heads' must be a positive int, but got 0."),
    (block, {"dropout": 1}, ValueError, "'dropout' must be a rate in [0, 1), but got 1."),
    (block, {"prenorm": "yes"}, TypeError, "'LocalMHA', 'prenorm' must be a bool, but got 'yes' of type str."),
    (block, {"qk_rmsnorm": 1}, TypeError, "'LocalMHA', 'qk_rmsnorm' must be a bool, but got 1 of type int."),
    (block, {"qk_scale": "8"}, TypeError, "'LocalMHA', 'qk_scale' must be a number, but got '8' of type str."),
    (block, {"exact_windowsize": 1}, TypeError, "'exact_windowsize' must be a bool, but got 1 of type int."),
    (block, {"gate_values_per_head": 1}, TypeError, "'gate_values_per_head' must be a bool, but got 1 of type int."),
    (block, {"use_xpos": True, "xpos_scale_base": 0}, ValueError,
     "'xpos_scale_base' must be a positive number, but got 0."),

    (FeedForward, {"dim": 0}, ValueError, "For 'FeedForward', 'dim' must be a positive int, but got 0."),
    (FeedForward, {"dim": 3, "mult": -1}, ValueError, "'FeedForward', 'mult' must be a positive number, but got -1."),
    (FeedForward, {"dim": 3, "mult": 0.1}, ValueError,
     "'mult' must be large enough for int(dim * mult * 2 / 3) to be positive, but got 0.1."),
    (FeedForward, {"dim": 3, "dropout": 1.5}, ValueError, "'dropout' must be a rate in [0, 1), but got 1.5."),

    (DynamicPositionBias, {"dim": 0, "heads": 1}, ValueError,
     "For 'DynamicPositionBias', 'dim' must be a positive int, but got 0."),
    (DynamicPositionBias, {"dim": 1, "heads": 0}, ValueError,
     "For 'DynamicPositionBias', 'heads' must be a positive int, but got 0."),
]


@pytest.mark.parametrize("build, given, error, message", CONSTRUCTORS)
def test_constructors(build, given, error, message):
    check(lambda: build(**given), error, message)


# Calls: a Cell, its inputs and options, and the message, in both modes.

CALLS = [
    (attention, (vectors(2, 3, 7, 4),) * 3, {}, ValueError,
     "'q' must be of a length that is a multiple of the window (5) without 'autopad', but got 7."),
    (attention, (vectors(10),) * 3, {}, ValueError,
     "'q' must be of shape (..., n, d) with n and d of at least 1, but got (10,)."),
    (attention, (tokens(2, 10, 4),) * 3, {}, TypeError,
     "'q' must be a Tensor of float32 or float16 or bfloat16, but got int32."),
    (attention, (vectors(2, 10, 4), vectors(2, 10, 3), vectors(2, 10, 4)), {}, ValueError,
     "'k' must be of q's shape (2, 10, 4), but got (2, 10, 3)."),
    (attention, (vectors(1, 5, 3, 4), vectors(1, 10, 3, 4), vectors(1, 10, 3, 4)), {}, ValueError,
     "'k' must be of q's shape (1, 5, 3, 4), or of a divisor of its 5 heads (heads stand before tokens; here they look "
     "exchanged, which swapaxes(-3, -2) of q, k and v undoes), but got (1, 10, 3, 4)."),
    (attention, (vectors(2, 10, 4), vectors(2, 10, 4), ops.zeros((2, 10, 4), ms.float16)), {}, TypeError,
     "'v' must be a Tensor of float32, but got float16."),
    (attention, (vectors(2, 10, 4),) * 3 + (tokens(2, 10),), {}, TypeError,
     "'mask' must be a Tensor of bool, but got int32."),
    (attention, (vectors(2, 10, 4),) * 3 + (mask(3, 10),), {}, ValueError,
     "'mask' must be of shape (batch, 10), batch a divisor of 2, but got (3, 10)."),
    (attention, (vectors(2, 10, 4),) * 3 + (None, None, vectors(2, 5, 10)), {}, ValueError,
     "'attn_bias' must be of shape (heads, 5, 15) or (batch, heads, 10, 15), heads a divisor of 2, but got "
     "(2, 5, 10)."),
    (attention, (vectors(2, 10, 4),) * 3, {"window_size": 2}, ValueError,
     "'window_size' must be None in a call without 'use_xpos', but got 2."),
    (lambda: attention(dim=4, use_xpos=True), (vectors(2, 10, 4),) * 3, {"window_size": 0}, ValueError,
     "'window_size' must be a positive int, but got 0."),
    (lambda: attention(dim=6), (vectors(2, 10, 4),) * 3, {}, ValueError,
     "'q' must be of head dimension 6, the rotary embedding's, but got 4."),
    (lambda: attention(backend="ascend"), (vectors(2, 10, 4),) * 3, {}, ValueError,
     "the backend 'ascend' cannot run this call: it runs on Ascend alone, and the device is CPU."),

    (lambda: sliced(attention, autopad=True), (vectors(2, 7, 4),) * 3, {}, ValueError,
     "'q' must be of a length that is a multiple of the window (5) with 'sequence_parallel', but got 7."),
    (lambda: sliced(attention, look_backward=2), (vectors(2, 5, 4),) * 3, {}, ValueError,
     "'q' must be of a length of at least 10 on each of the 3 ranks, as no further than to the next one does "
     "'sequence_parallel' look, but got 5."),
    (lambda: sliced(attention, look_backward=0, look_forward=3), (vectors(2, 10, 4),) * 3, {}, ValueError,
     "'q' must be of a length of at least 15 on each of the 3 ranks"),
    (lambda: sliced(block, causal=True), (vectors(2, 5, 11),), {"return_cache": True}, ValueError,
     "For 'LocalMHA', 'cache' must be None, and 'return_cache' False, with 'sequence_parallel', but got a cache."),
    (lambda: sliced(transformer), (tokens(2, 4),), {"return_cache": True}, ValueError,
     "For 'LocalTransformer', 'cache' must be None, and 'return_cache' False, with 'sequence_parallel'"),
    (lambda: sliced(transformer), (tokens(2, 5),), {}, ValueError,
     "'x' must be of at most 4 tokens on each of the 3 ranks ('max_seq_len' is 13), but got 5."),

    (transformer, (tokens(7),), {}, ValueError,
     "For 'LocalTransformer', 'x' must be of shape (batch, n), not empty, but got (7,)."),
    (transformer, (vectors(2, 7),), {}, TypeError,
     "For 'LocalTransformer', 'x' must be a Tensor of int32 or int64, but got float32."),
    (transformer, (tokens(2, 14),), {}, ValueError,
     "'x' must be of at most 13 tokens ('max_seq_len' is 13), but got 14."),
    (transformer, (tokens(2, 15),), {"return_loss": True}, ValueError,
     "'x' must be of at most 14 tokens ('max_seq_len' is 13), but got 15."),
    (transformer, (tokens(2, 1),), {"return_loss": True}, ValueError,
     "'x' must be of at least 2 tokens for a loss, but got 1."),
    (transformer, (tokens(2, 7), vectors(2, 7)), {}, TypeError, "'mask' must be a Tensor of bool, but got float32."),
    (transformer, (tokens(2, 7), mask(7, 2)), {}, ValueError, "'mask' must be of shape (2, 7), but got (7, 2)."),
    (transformer, (tokens(2, 7), mask(2, 6)), {"return_loss": True}, ValueError,
     "'mask' must be of shape (2, 7), but got (2, 6)."),
    (transformer, (tokens(2, 7),), {"return_loss": 1}, TypeError, "'return_loss' must be a bool, but got 1"),
    (lambda: transformer(num_tokens=None), (vectors(2, 7, 11),), {"return_loss": True}, ValueError,
     "'return_loss' must be False where 'num_tokens' is None, but got True."),
    (lambda: transformer(num_tokens=None), (vectors(2, 7, 10),), {}, ValueError,
     "For 'LocalTransformer', 'x' must be of shape (batch, n, 11), not empty, but got (2, 7, 10)."),
    (lambda: transformer(global_attn_layer=nn.Dense(11, 5)), (tokens(2, 7),), {}, ValueError,
     "'global_attn_layer' must be a Cell that returns a Tensor of its input's shape (2, 7, 11), but got (2, 7, 5)."),

    (block, (vectors(2, 11),), {}, ValueError,
     "For 'LocalMHA', 'x' must be of shape (batch, n, 11), not empty, but got (2, 11)."),
    (block, (tokens(2, 7, 11),), {}, TypeError,
     "'x' must be a Tensor of float32 or float16 or bfloat16, but got int32."),
    (block, (vectors(2, 7, 11), tokens(2, 7)), {}, TypeError, "'mask' must be a Tensor of bool, but got int32."),
    (block, (vectors(2, 7, 11), mask(1, 7)), {}, ValueError, "'mask' must be of shape (2, 7), but got (1, 7)."),
    (block, (vectors(2, 7, 11), None, vectors(3, 5, 9)), {}, ValueError,
     "'attn_bias' must be of shape (heads, 5, 15) or (heads, 1, 11) or (batch, heads, 7, 15) or (batch, heads, 7, 11), "
     "heads a divisor of 6, but got (3, 5, 9)."),

    (GEGLU, (vectors(2, 7),), {}, ValueError,
     "For 'GEGLU', 'x' must be of an even last axis, not empty, but got (2, 7)."),
    (GEGLU, (tokens(2, 6),), {}, TypeError, "For 'GEGLU', 'x' must be a Tensor of float32"),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])
@pytest.mark.parametrize("build, inputs, options, error, message", CALLS)
def test_calls(build, inputs, options, error, message, compiled):
    cell = build()

    def forward(*inputs):
        return cell(*inputs, **options)

    check(lambda: (ms.jit(forward) if compiled else forward)(*inputs), error, message)


# Functions and methods

GENERATE = "For 'LocalTransformer.generate', "
FUNCTIONS = [
    (lambda: transformer()(np.zeros((2, 7), np.int32)), TypeError,
     "'x' must be a Tensor, but got one of shape (2, 7) and int32"),
    (lambda: DynamicPositionBias(5, 3)(0, 1), ValueError, "'i' must be a positive int, but got 0."),
    (lambda: DynamicPositionBias(5, 3)(4, 3), ValueError, "'j' must be at least i (4), but got 3."),
    (lambda: DynamicPositionBias(5, 3)(4, 5.), TypeError, "'j' must be a positive int, but got 5.0 of type float."),
    (lambda: DynamicPositionBias(5, 3)(4, 5, -1), ValueError, "'after' must be a non-negative int, but got -1."),
    (lambda: top_k(vectors(2, 7), 1.1), ValueError, "For 'top_k', 'thres' must be a number in [0, 1], but got 1.1."),
    (lambda: top_k(tokens(2, 7)), TypeError, "For 'top_k', 'logits' must be a Tensor of float32"),
    (lambda: top_k(vectors(2, 0)), ValueError,
     "'logits' must be of shape (..., vocabulary), not empty, but got (2, 0)."),

    (lambda: transformer().generate(tokens(7), 3), ValueError,
     GENERATE + "'prime' must be of shape (batch, n), not empty, but got (7,)."),
    (lambda: transformer().generate(tokens(2, 0), 3), ValueError,
     GENERATE + "'prime' must be of shape (batch, n), not empty, but got (2, 0)."),
    (lambda: transformer().generate(vectors(2, 7), 3), TypeError,
     GENERATE + "'prime' must be a Tensor of int32 or int64, but got float32."),
    (lambda: transformer().generate([[1]], 3), TypeError, GENERATE + "'prime' must be a Tensor, but got [[1]]"),
    (lambda: transformer().generate(tokens(2, 7) + 23, 3), ValueError,
     GENERATE + "'prime' must be of tokens in [0, 23), but got 23 to 23."),
    (lambda: transformer().generate(tokens(2, 7), -1), ValueError,
     GENERATE + "'seq_len' must be a non-negative int, but got -1."),
    (lambda: transformer().generate(tokens(2, 7), 3, temperature=-0.5), ValueError,
     GENERATE + "'temperature' must be a non-negative number, but got -0.5."),
    (lambda: transformer().generate(tokens(2, 7), 3, temperature=float("nan")), ValueError,
     GENERATE + "'temperature' must be finite, but got nan."),
    (lambda: transformer().generate(tokens(2, 7), 3, filter_thres=1.5), ValueError,
     GENERATE + "'filter_thres' must be a number in [0, 1], but got 1.5."),
    (lambda: transformer().generate(tokens(2, 7), 3, use_kv_cache=1), TypeError,
     GENERATE + "'use_kv_cache' must be a bool, but got 1 of type int."),
    (lambda: transformer().generate(tokens(2, 7), 3, mask=mask(2, 6)), ValueError,
     GENERATE + "'mask' must be of shape (2, 7), but got (2, 6)."),
    (lambda: transformer(num_tokens=None).generate(tokens(2, 7), 3), ValueError,
     GENERATE + "the model must have tokens, but its 'num_tokens' is None."),

    (lambda: sliced(transformer).generate(tokens(2, 5), 3), ValueError, GENERATE + "the model must be one without "
     "'sequence_parallel', which its weights load into."),

    (lambda: load_torch_weights(nn.Dense(2, 3), {}), TypeError, "For 'load_torch_weights', 'cell' must be a LocalMHA"),
    (lambda: export_torch_weights(nn.Dense(2, 3)), TypeError, "For 'export_torch_weights', 'cell' must be a LocalMHA"),
    (lambda: load_torch_weights(block(), {}, strict=1), TypeError, "'strict' must be a bool, but got 1 of type int."),
    (lambda: load_torch_weights(block(), 3), TypeError,
     "'source' must be a mapping of names to arrays, or a path to one, but got 3"),
    (lambda: load_torch_weights(block(), {}), ValueError, "'source' must be the weights of this LocalMHA, each and no "
     "other, but got one where 'to_qkv.weight' is missing; 'to_out.weight' is missing."),
    (lambda: load_torch_weights(block(), "model.ckpt"), ValueError,
     "'source' must be the path of a .safetensors or .npz or .pt or .pth file, but got 'model.ckpt'."),
    (lambda: load_torch_weights(block(), "nowhere.npz"), ValueError,
     "'source' must be an existing file, but got 'nowhere.npz'."),
    (lambda: weights.convert("in.npz", "out.npz"), ValueError,
     "For 'convert', 'target' must be the path of a .ckpt file, but got 'out.npz'."),
    (lambda: weights.convert("in.npz", "out.npz", reverse=True), ValueError,
     "For 'convert', 'source' must be the path of a .ckpt file, but got 'in.npz'."),
]


@pytest.mark.parametrize("call, error, message", FUNCTIONS)
def test_functions(call, error, message):
    check(call, error, message)


def safetensors(header):
    return len(header).to_bytes(8, "little") + header + bytes(8)


FILES = [
    ("a.npz", b"", "a well-formed .npz file"),
    ("a.npz", b"PK\3\4 of a zip", "a well-formed .npz file"),
    ("a.safetensors", b"", "a well-formed .safetensors file, but got '"),
    ("a.safetensors", bytes([255] * 8) + b"{}", "a well-formed .safetensors file"),
    ("a.safetensors", safetensors(b"{nothing"), "a well-formed .safetensors file"),
    ("a.safetensors", safetensors(b"[]"), "a well-formed .safetensors file"),
    ("a.safetensors", safetensors(b'{"w": {"dtype": "F32", "shape": [3]}}'), "a well-formed .safetensors file"),
    ("a.safetensors", safetensors(b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}'),
     "a well-formed .safetensors file"),
    ("a.safetensors", safetensors(b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'),
     "a well-formed .safetensors file"),
    ("a.safetensors", safetensors(b'{"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'),
     "'w' is of dtype F8_E4M3, which is none of F64,"),
]


@pytest.mark.parametrize("name, content, message", FILES)
def test_damaged_files_of_weights(name, content, message, tmp_path):
    cell, path = block(), tmp_path / name
    path.write_bytes(content)
    before = export_torch_weights(cell)
    check(lambda: load_torch_weights(cell, path), ValueError, message)
    for loaded, array in export_torch_weights(cell).items():
        np.testing.assert_array_equal(array, before[loaded])


def test_pytorch_is_named_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it raises ImportError
    (tmp_path / "a.pt").touch()
    check(lambda: load_torch_weights(block(), tmp_path / "a.pt"), ImportError,
          "a.pt' needs PyTorch, which is not installed here; a .safetensors or .npz file does not.")
