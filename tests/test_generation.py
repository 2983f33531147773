"""Generation continues each row as if it were alone, with the weights and the parts that the model has now."""
import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from local_attention import LocalMHA, LocalTransformer, decoding, export_torch_weights, generation, load_torch_weights

W, TOKENS, LONGEST, COUNT = 5, 31, 20, 12
MODEL = dict(num_tokens=TOKENS, dim=20, depth=2, heads=3, dim_head=10, local_attn_window_size=W, max_seq_len=LONGEST)


def model(**settings):
    """Return a model whose attention weighs as much as its embeddings, so that it changes the tokens."""
    cell = LocalTransformer(**{**MODEL, **settings})
    for attn, _ in cell.layers:
        for dense in (attn.to_qkv, attn.to_out):
            dense.weight.set_data(dense.weight * 4)
    return cell


def greedy(cell, prime, count, **kwargs):
    return cell.generate(Tensor(np.asarray(prime, np.int32)), count, temperature=0, **kwargs).asnumpy()


# Prompts of unequal length


class Mean(nn.Cell):
    """A global layer that sees all tokens and takes a mask."""

    def construct(self, x, mask=None):
        shown = ops.ones(x.shape[:2], x.dtype) if mask is None else ops.cast(mask, x.dtype)
        mean = (x * shown[..., None]).sum(1, keepdims=True) / shown.sum(1).reshape(-1, 1, 1)
        return mean.broadcast_to(x.shape)


class MeanOfAll(Mean):
    """The same without a mask."""

    def construct(self, x):
        return x.mean(1, keep_dims=True).broadcast_to(x.shape)


class Remembering(nn.Cell):
    """A global layer with its own cache: the sum, and the number, of the tokens so far."""

    def construct(self, x, cache=None, return_cache=False):
        before, count = (ops.zeros_like(x[:, :1]), ops.zeros((1, 1, 1), ms.float32)) if cache is None else cache
        sums = before + ops.cumsum(x, 1)
        counts = count + ops.arange(1, x.shape[1] + 1).astype(ms.float32).reshape(1, -1, 1)
        out = sums / counts
        return (out, (sums[:, -1:], counts[:, -1:])) if return_cache else out


def full():
    """Return a global layer: attention to all earlier tokens."""
    return LocalMHA(dim=20, heads=3, dim_head=10, window_size=LONGEST, look_backward=0, causal=True,
                    exact_windowsize=False, prenorm=True)


def ragged(lengths, pads, width):
    """Return prompts of these lengths after so many pads, and their mask; padding is random too."""
    prime = np.random.randint(0, TOKENS, (len(lengths), width))
    columns = np.arange(width)
    begin = np.array(pads)[:, None]
    return prime, (columns >= begin) & (columns < begin + np.array(lengths)[:, None])


@pytest.mark.parametrize("settings", [
    dict(), dict(exact_windowsize=False), dict(use_dynamic_pos_bias=True, exact_windowsize=False),
    dict(use_xpos=True), dict(shared_qk=True), dict(qk_rmsnorm=True, look_backward=2, num_residual_streams=2),
    dict(look_backward=0), dict(causal=False), dict(prefix=3, exact_windowsize=False, local_attn_window_size=2),
    dict(prefix=7, shared_qk=True, local_attn_window_size=2),  # rows grow beyond this prefix while they have a cache
    dict(use_dynamic_pos_bias=True, local_attn_window_size=(3, None)),
    dict(global_attn_layer=full(), layers_insert_global_attn=(2,)),
    dict(global_attn_layer=Mean()), dict(global_attn_layer=MeanOfAll()), dict(global_attn_layer=Remembering())],
    ids=lambda settings: ",".join(settings) or "exact")
def test_each_row_is_continued_as_if_it_were_alone(settings, monkeypatch):
    """Padding left, right and on both sides; lengths around windows and caches; also past `max_seq_len`. The prompts
    are read in a piece of 12 tokens and one of 5, and some rows end in the first."""
    monkeypatch.setattr(decoding, "PIECES", (12, 5))
    cell = model(**settings)
    prime, mask = ragged([1, 9, 4, 13], [3, 2, 0, 0], 13)
    with_cache, without = (greedy(cell, prime, COUNT, mask=Tensor(mask), use_kv_cache=use) for use in (True, False))
    for row in range(len(prime)):
        alone = greedy(cell, prime[row:row + 1, mask[row]], COUNT, use_kv_cache=False)
        np.testing.assert_array_equal(without[row:row + 1], alone)
        np.testing.assert_array_equal(with_cache[row:row + 1], alone)


def test_prompts_longer_than_the_model_sees():
    cell = model(depth=1)
    prime, mask = ragged([30, 3, 21], [0, 27, 4], 30)
    found = greedy(cell, prime, 6, mask=Tensor(mask))
    for row in range(3):
        np.testing.assert_array_equal(found[row:row + 1], greedy(cell, prime[row:row + 1, mask[row]], 6))


calls = []


@constexpr
def count_a_call_or_compilation():
    calls.append(1)


def test_ragged_and_even_prompts_share_one_compiled_step():
    cell = model(depth=1)
    through_layers = cell._through_layers

    def counted(*args):
        count_a_call_or_compilation()
        return through_layers(*args)
    cell._through_layers = counted
    calls.clear()
    prime, mask = ragged([1, 11, 8], [3, 0, 0], 11)
    greedy(cell, prime, 9, mask=Tensor(mask))
    assert len(calls) == 2  # the compilations of a piece of a prompt and of the step
    greedy(cell, prime, 9)
    greedy(cell, prime[:, :4], 9, mask=Tensor(mask[:, 2:6]))
    greedy(cell, prime[:, :1], 9)
    assert len(calls) == 2


@pytest.mark.parametrize("row, message", [
    ([1, 0, 1], "'mask' must be of one run of real tokens in each row, but got a hole in row 1"),
    ([0, 0, 0], "'mask' must be of at least one real token in each row, but got none in row 1")])
def test_a_hole_and_an_empty_row_are_named(row, message):
    with pytest.raises(ValueError, match="For 'LocalTransformer.generate', " + message):
        greedy(model(), [[1, 2, 3], [4, 5, 6]], 2, mask=Tensor([[True, True, False], [bool(x) for x in row]]))


def test_ragged_prompts_in_graph_mode():
    cell = model(depth=1)
    prime, mask = ragged([1, 7, 4], [3, 0, 2], 7)
    wanted = greedy(cell, prime, 4, mask=Tensor(mask))
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        np.testing.assert_array_equal(greedy(cell, prime, 4, mask=Tensor(mask)), wanted)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


# What has changed since the last call


class LowRank(nn.Cell):
    """A low-rank adapter around a projection."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense
        self.down = nn.Dense(dense.in_channels, 2, has_bias=False)
        self.up = nn.Dense(2, dense.out_channels, has_bias=False)

    def construct(self, x):
        return self.dense(x) + self.up(self.down(x)) * 5


def load_checkpoint(cell, other, path):
    ms.save_checkpoint(other, str(path / "other.ckpt"))
    ms.load_checkpoint(str(path / "other.ckpt"), cell)


def assign_values(cell, other, path):
    for mine, its in zip(cell.get_parameters(), other.get_parameters()):
        mine.assign_value(its)


def assign_operator(cell, other, path):
    for mine, its in zip(cell.get_parameters(), other.get_parameters()):
        ops.assign(mine, its)


def one_parameter(cell, other, path):
    cell.to_logits[1].weight.set_data(other.to_logits[1].weight)


def of_each_block(change):
    def changed(cell, other, path):
        for attn, _ in cell.layers:
            change(attn)
    return changed


def another_output(cell, other, path):
    cell.to_logits[1] = other.to_logits[1]


def train(cell, other, path):
    optimizer = nn.Adam(cell.trainable_params(), 0.1)
    step = ms.value_and_grad(lambda x: cell(x, return_loss=True), None, optimizer.parameters)
    optimizer(step(ops.randint(0, TOKENS, (2, 12)))[1])


CHANGES = {
    "load_torch_weights": lambda cell, other, path: load_torch_weights(cell, export_torch_weights(other)),
    "load_checkpoint": load_checkpoint,
    "load_param_into_net": lambda cell, other, path: ms.load_param_into_net(cell, other.parameters_dict()),
    "assign_value": assign_values, "set_data of one": one_parameter,
    "another Parameter": lambda cell, other, path: setattr(cell.pos_emb, "embedding_table",
                                                           ms.Parameter(other.pos_emb.embedding_table.value())),
    "an adapter": of_each_block(lambda attn: setattr(attn, "to_qkv", LowRank(attn.to_qkv))),
    "another output": another_output,
    "no rotation": of_each_block(lambda attn: setattr(attn.attn_fn, "rel_pos", None)),
    "other frequencies": of_each_block(lambda attn: setattr(attn.attn_fn.rel_pos, "inv_freq", np.full(5, 2.))),
    "another scale": of_each_block(lambda attn: setattr(attn.attn_fn, "scale", 5.)),
    "half precision": lambda cell, other, path: cell.to_float(ms.float16),
}


def assert_up_to_date(cell, prime):
    np.testing.assert_array_equal(greedy(cell, prime, COUNT), greedy(cell, prime, COUNT, use_kv_cache=False))


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_counts(name, tmp_path):
    cell, other, prime = model(depth=1), model(depth=1), np.arange(14).reshape(2, 7)
    before = greedy(cell, prime, COUNT)
    CHANGES[name](cell, other, tmp_path)
    assert_up_to_date(cell, prime)
    assert name == "half precision" or (greedy(cell, prime, COUNT) != before).any()


@pytest.mark.parametrize("change", [train, assign_operator])
def test_what_is_assigned_in_place_compiles_nothing(change, tmp_path):
    cell, prime = model(depth=1), np.arange(14).reshape(2, 7)
    before = greedy(cell, prime, COUNT)
    kept = cell.steps.steps.copy()
    change(cell, model(depth=1), tmp_path)
    assert_up_to_date(cell, prime)
    assert (greedy(cell, prime, COUNT) != before).any()
    assert cell.steps.steps == kept


def test_in_graph_mode_a_second_call_compiles_nothing():
    cell, prime = model(depth=1), np.arange(14).reshape(2, 7)
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        first = greedy(cell, prime, COUNT)
        kept = cell.steps.steps.copy()
        np.testing.assert_array_equal(greedy(cell, prime, COUNT), first)
    finally:
        ms.set_context(mode=before)
    assert len(kept) == 1 and cell.steps.steps == kept


def test_rings_outlive_the_steps_of_what_is_past():
    cell = model(depth=1)
    for rows in (1, 2):
        greedy(cell, np.ones((rows, 3)), 2)
    assert len(cell.steps.steps) == len(cell.steps.rings) == 2
    kept = cell.steps.rings.copy()
    one_parameter(cell, model(depth=1), None)
    greedy(cell, np.ones((1, 3)), 2)
    assert len(cell.steps.steps) == 1 and cell.steps.rings == kept
    assert not copy.deepcopy(cell).steps.rings


# Half precision


def fed_logits(cell, prime, monkeypatch, use_kv_cache):
    """Return the logits of each token, with the same tokens drawn every time."""
    seen = []

    def draw(logits, *args):
        seen.append(logits)
        return np.arange(len(logits)) + len(seen)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "sample", draw)
        greedy(cell, prime, COUNT, use_kv_cache=use_kv_cache)
    return np.stack(seen)


@pytest.mark.parametrize("level, settings", [
    *[(level, settings) for level in ("to_float", "auto") for settings in (
        dict(qk_rmsnorm=True, gate_values_per_head=True), dict(use_xpos=True),
        dict(shared_qk=True, exact_windowsize=False), dict(use_dynamic_pos_bias=True, num_residual_streams=2),
        dict(global_attn_layer=full(), layers_insert_global_attn=(1,)))],
    *[(level, dict(qk_rmsnorm=True)) for level in ("O1", "O2", "O3")]],
    ids=lambda value: value if isinstance(value, str) else ",".join(value))
def test_half_precision_with_a_cache_is_as_without(level, settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MindSpore writes the rewritten network here
    cell, prime = model(depth=1, **settings), np.arange(14).reshape(2, 7)
    single = fed_logits(cell, prime, monkeypatch, True)
    mixed = cell.to_float(ms.float16) if level == "to_float" else ms.amp.auto_mixed_precision(cell, level)
    cell = cell if level in ("O2", "O3") else mixed  # these levels wrap it
    with_cache, without = (fed_logits(cell, prime, monkeypatch, use) for use in (True, False))
    assert np.abs(with_cache - without).max() < 0.01 * np.abs(without).max()
    assert level == "O1" or (with_cache != single).any()
