"""Generation that is watched, stopped, nested and called from several threads, and what it computes logits for."""
from concurrent.futures import ThreadPoolExecutor

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.ops import constexpr

from local_attention import generation
from test_generation import MODEL, LowRank, greedy, model

PROMPT = np.arange(14).reshape(2, 7)


# Nested calls, and several threads


def test_generation_within_a_callback():
    """The inner calls need the same compiled step as the outer one, and another one."""
    cell, other = model(depth=1), model(depth=1)
    wanted, inner = greedy(cell, PROMPT, 12), [greedy(cell, prompt, 3) for prompt in (PROMPT + 3, PROMPT[:1] + 3)]
    found = []

    def innermost(count):
        found.append(greedy(cell, PROMPT[:1] + 3, 3))

    def guide(count, tokens):
        found.append(greedy(cell, PROMPT + 3, 3, callback=innermost if count == 2 else None))
        greedy(other, PROMPT, 2)
        with pytest.raises(ValueError):
            greedy(cell, PROMPT + MODEL["num_tokens"], 3)
    np.testing.assert_array_equal(greedy(cell, PROMPT, 12, callback=guide), wanted)
    assert len(found) == 12 + 3
    for tokens in found:
        np.testing.assert_array_equal(tokens, inner[len(tokens) == 1])
    np.testing.assert_array_equal(greedy(cell, PROMPT, 12), wanted)


def test_calls_from_several_threads():
    cells = [model(depth=1), model(depth=1)]
    cells[0].set_train()
    wanted = [greedy(cell, PROMPT, 12) for cell in cells]
    with ThreadPoolExecutor(4) as pool:
        calls = [(number, pool.submit(greedy, cells[number], PROMPT, 12)) for number in (0, 1, 0, 0, 1, 0)]
        for number, call in calls:
            np.testing.assert_array_equal(call.result(), wanted[number])
    assert cells[0].training and not cells[1].training


# Stop tokens and callbacks


def scripted(monkeypatch, columns):
    """Make the model sample these tokens for its rows, one column after the other."""
    remaining = iter(columns)
    monkeypatch.setattr(generation, "sample", lambda *_: np.array(next(remaining)))


@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_a_row_ends_with_its_first_stop_token(monkeypatch, use_kv_cache):
    seen = []
    scripted(monkeypatch, [[4, 9], [7, 8], [5, 3], [6, 7], [1, 1]])
    found = greedy(model(depth=1), PROMPT, 5, stop_token=7, use_kv_cache=use_kv_cache,
                   callback=lambda count, tokens: seen.append((count, tokens)))
    np.testing.assert_array_equal(found, [[4, 7, 7, 7], [9, 8, 3, 7]])
    assert [count for count, _ in seen] == [1, 2, 3, 4]
    assert all(tokens.dtype == ms.int32 and tokens.shape == (2,) for _, tokens in seen)
    np.testing.assert_array_equal(np.stack([tokens.asnumpy() for _, tokens in seen], 1), found)


def test_stopped_tokens_are_those_without_a_stop():
    cell = model(depth=1)
    whole = greedy(cell, PROMPT, 12)
    stop = int(whole[0, 4])
    found = greedy(cell, PROMPT, 12, stop_token=stop)
    for row, one in zip(found, whole):
        end = list(one).index(stop) if stop in one else len(one)
        np.testing.assert_array_equal(row[:end], one[:end][:len(row)])
        assert (row[end:] == stop).all()
    assert greedy(cell, PROMPT, 0, stop_token=stop).shape == (2, 0)


@pytest.mark.parametrize("answer, count", [
    (True, 3), (np.True_, 3), (Tensor(True), 3), (False, 6), (None, 6), (1, 6), ("yes", 6),
    (np.array([True, True]), 6)])
def test_true_ends_the_generation(answer, count):
    found = greedy(model(depth=1), PROMPT, 6, callback=lambda number, tokens: answer if number == 3 else None)
    assert found.shape == (2, count)


def test_callbacks_of_one_argument_get_the_count():
    """And end nothing: `tqdm.update`, for one, returns True when it has drawn its bar."""
    cell, seen = model(depth=1), []

    def with_a_default(count, other=seen):
        other.append(count)
    for callback in (seen.append, lambda count: seen.append(count) or True, with_a_default):
        seen.clear()
        assert greedy(cell, PROMPT, 3, callback=callback).shape == (2, 3)
        assert seen == [1, 2, 3]
    seen.clear()
    for callback in (lambda *args: seen.append(args), lambda count=0, tokens=None: seen.append((count, tokens))):
        greedy(cell, PROMPT, 1, callback=callback)
    assert [(count, tokens.shape) for count, tokens in seen] == [(1, (2,))] * 2


@pytest.mark.parametrize("wrong, error, message", [
    (dict(stop_token="7"), TypeError, "'stop_token' must be a non-negative int, but got '7'"),
    (dict(stop_token=True), TypeError, "'stop_token' must be a non-negative int"),
    (dict(stop_token=-1), ValueError, "'stop_token' must be a non-negative int, but got -1"),
    (dict(stop_token=31), ValueError, r"'stop_token' must be a token in \[0, 31\), but got 31"),
    (dict(callback=3), TypeError, "'callback' must be None or a function"),
    (dict(callback=lambda: None), TypeError, "'callback' must be None or a function of the count, or of the count and"),
    (dict(callback=lambda a, b, c: None), TypeError, "'callback' must be None or a function of the count, or of")])
def test_wrong_values_are_named(wrong, error, message):
    with pytest.raises(error, match="For 'LocalTransformer.generate', " + message):
        greedy(model(depth=1), PROMPT, 2, **wrong)


# Logits of what is sampled from, and nothing else


shapes = []


@constexpr
def note(shape):
    shapes.append(shape)


class Noted(nn.Cell):
    def __init__(self, to_logits):
        super().__init__()
        self.to_logits = to_logits

    def construct(self, x):
        note(x.shape)
        return self.to_logits(x)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
@pytest.mark.parametrize("settings", [dict(), dict(causal=False)], ids=str)
def test_logits_are_computed_for_the_rows_that_are_sampled_from(settings, mode):
    """From a long prompt, within and past `max_seq_len`, of rows of unequal length too."""
    cell = model(depth=1, **settings)
    mask = Tensor(np.arange(7) >= [[0], [3]])
    wanted = greedy(cell, PROMPT, 15, mask=mask)
    cell.to_logits = Noted(cell.to_logits)
    shapes.clear()
    ms.set_context(mode=mode)
    try:
        np.testing.assert_array_equal(greedy(cell, PROMPT, 15, mask=mask), wanted)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert set(shapes) == {(2, 1, 20)}


# Parameters of one name


def adapted():
    cell = model()
    for attn, _ in cell.layers:
        attn.to_qkv = LowRank(attn.to_qkv)
    return cell


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
def test_parameters_of_one_name_are_named_with_the_way_out(mode):
    cell = adapted()
    wanted = greedy(cell, PROMPT, 6, use_kv_cache=False)
    ms.set_context(mode=mode)
    try:
        with pytest.raises(ValueError, match="those named 'to_qkv.dense.weight' of 'layers.0.0.to_qkv' and 'layers.1.0."
                                             r"to_qkv' are two: call 'update_parameters_name\(\"layers.1.0.to_qkv."):
            greedy(cell, PROMPT, 6)
        cell.layers[1][0].to_qkv.update_parameters_name("layers.1.0.to_qkv.")
        np.testing.assert_array_equal(greedy(cell, PROMPT, 6), wanted)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
