"""Names of arguments that no Cell knows, or that another Cell sets; and how little of a value a message shows."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from local_attention import (
    DynamicPositionBias,
    LocalAttention,
    LocalMHA,
    LocalSelfAttention,
    LocalTransformer,
    MultiHeadLocalAttention,
    WindowSpec,
    sliding_window_attention,
    use_backend,
    windowed_attention,
    zoo,
)
from local_attention.transformer import FeedForward

MODEL = dict(num_tokens=11, max_seq_len=16, dim=8, depth=1, local_attn_window_size=4)
HEADS = dict(in_features=8, num_heads=2)
BLOCK = dict(dim=8, window_size=4)


@pytest.mark.parametrize("cell, settings, name, value, nearest", [
    (LocalTransformer, MODEL, "window_size", 32, "local_attn_window_size"),
    (LocalTransformer, MODEL, "num_heads", 2, "heads"),
    (LocalTransformer, MODEL, "head_dim", 8, "dim_head"),
    (LocalTransformer, MODEL, "dropout", .1, "attn_dropout' or 'ff_dropout"),
    (LocalTransformer, MODEL, "local_window_size", 4, "local_attn_window_size"),
    (LocalTransformer, MODEL, "num_kv_heads", 4, "kv_heads"),
    (LocalMHA, BLOCK, "head_dim", 8, "dim_head"),
    (LocalMHA, BLOCK, "num_heads", 2, "heads"),
    (LocalMHA, BLOCK, "look_backwards", 1, "look_backward"),
    (LocalAttention, dict(window_size=4), "head_dim", 8, "dim"),
    (LocalAttention, dict(window_size=4), "sequence_paralell", True, "sequence_parallel"),
    (LocalSelfAttention, HEADS, "window_size", 4, "window_size_left' and 'window_size_right"),
    (LocalSelfAttention, HEADS, "heads", 2, "num_heads"),
    (MultiHeadLocalAttention, HEADS, "window_left", 4, "window_size_left"),
    (FeedForward, dict(dim=8), "ff_mult", 4, "mult"),
    (DynamicPositionBias, dict(dim=8, heads=2), "num_heads", 2, "heads"),
])
def test_unknown_names_are_refused_where_they_arrive(cell, settings, name, value, nearest):
    rule = f"^For '{cell.__name__}', '{name}' must be the name of one of its arguments; the nearest is '{nearest}'"
    with pytest.raises(TypeError, match=rule):
        cell(**settings, **{name: value})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("function, name, nearest", [
    (windowed_attention, "window_size", "spec"), (windowed_attention, "attn_mask", "mask"),
    (sliding_window_attention, "window_size", "window_size_left' and 'window_size_right"),
    (sliding_window_attention, "dropout", "dropout_rate"), (sliding_window_attention, "segments", "segment_ids")])
def test_unknown_names_of_functions(function, name, nearest, compiled):
    def call(x):
        return function(x, x, x, **{name: 1})
    rule = f"For '{function.__name__}', '{name}' must be the name of one of its arguments; the nearest is '{nearest}'"
    with pytest.raises(TypeError, match=rule):
        (ms.jit(call) if compiled else call)(ops.ones((1, 2, 7, 8)))


def test_a_softcap_that_a_graph_rounds_to_0():
    @ms.jit
    def call(x):
        return sliding_window_attention(x, x, x, softcap=1e-46)
    with pytest.raises(ValueError, match="'softcap' must be a positive number from 1e-30 to 1e30, but got 0.0, as "):
        call(ops.ones((1, 2, 7, 8)))


@pytest.mark.parametrize("cell, settings, name", [
    (LocalTransformer, MODEL, "prenorm"), (LocalTransformer, MODEL, "use_rotary_pos_emb"),
    (LocalTransformer, MODEL, "scale"), (LocalMHA, BLOCK, "scale"), (LocalMHA, BLOCK, "zzz"),
    (LocalAttention, dict(window_size=4), "zzz")])
def test_names_that_another_cell_sets_or_nobody_knows(cell, settings, name):
    with pytest.raises(TypeError, match=f"^For '{cell.__name__}', '{name}' must be the name of one of its arguments"):
        cell(**settings, **{name: True})


def test_names_that_are_handed_on():
    LocalTransformer(**MODEL, qk_rmsnorm=True, kv_heads=4, learned_sinks=True, gate_values_per_head=True, prefix=1,
                     softcap=5., exact_windowsize=False, look_backward=2, backend="dense")
    LocalMHA(**BLOCK, use_rotary_pos_emb=False, shared_qk=True, look_backward=2, look_forward=1, prefix=1, softcap=3.)
    LocalTransformer(**MODEL, autopad=True)
    with pytest.raises(ValueError, match=r"'q' must be of a length that is a multiple of the window \(4\)"):
        LocalMHA(**BLOCK, autopad=False)(ops.ones((1, 7, 8)))


@pytest.mark.parametrize("value", [np.zeros((1, 2, 700, 8), np.float32), [[0.] * 2000], {"q": list(range(5000))}])
def test_messages_show_little_of_what_came(value):
    x, spec = ops.ones((1, 2, 7, 8)), WindowSpec(1, 3, 0, True)
    for call in (lambda: windowed_attention(value, x, x, spec), lambda: windowed_attention(x, x, x, value),
                 lambda: LocalAttention(4, autopad=True)(x, value, x), lambda: LocalAttention(value)):
        with pytest.raises(TypeError) as error:
            call()
        assert len(str(error.value)) < 300
        if isinstance(value, np.ndarray):
            assert "one of shape (1, 2, 700, 8) and float32 of type ndarray" in str(error.value)


@pytest.mark.parametrize("value, message", [
    (np.int64(0), "must be a positive int, but got 0."), (np.float32(2.5), "but got 2.5 of type float32."),
    (np.array(3), "but got array(3) of type ndarray."), (np.ndarray, "but got <class 'numpy.ndarray'> of type type."),
    (nn.SequentialCell([nn.Dense(2, 2) for _ in range(3)]), "of type SequentialCell.")])
def test_messages_show_numbers_and_are_one_line(value, message):
    with pytest.raises((TypeError, ValueError)) as error:
        LocalAttention(value)
    assert str(error.value).endswith(message) and "\n" not in str(error.value)


def test_messages_show_little_of_a_long_name():
    for call in (lambda: LocalAttention(4, backend="x" * 9000), lambda: use_backend("x" * 9000),
                 lambda: zoo.register(zoos=["x" * 9000])):
        with pytest.raises(ValueError) as error:
            call()
        assert len(str(error.value)) < 250
