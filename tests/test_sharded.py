"""Attention as one operator of semi-auto parallel, without devices: layouts, the slices of ranks, and errors. Compiled
for devices, it is run by tests/devices; within mindformers, by tests/zoo/mindformers.sh."""
import functools
import re
import sys
import types
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.parallel import Layout

from local_attention import LocalAttention, LocalMHA, WindowSpec, windowed_attention
from local_attention.parallel import Group, layouts, sharded
from local_attention.zoo import mindformers as windows

module = sys.modules["local_attention.parallel.sharded"]
B, H, H_KV, N, D, W = 2, 6, 2, 42, 5, 4
ONE = Layout((1, 1, 1), ("dp", "tp", "cp"))
MANY = Layout((2, 3, 5), ("dp", "tp", "cp"))


def tensors(n=N, heads=(H, H_KV, H_KV)):
    random = np.random.default_rng(0)
    return [Tensor(random.standard_normal((B, h, n, D)).astype(np.float32)) for h in heads]


def attention(layout, **more):
    one = layout("dp", "tp", "cp", "None")
    return {"q": one, "k": one, "v": one, **more}, (one,)


# ---- layouts


def test_the_ranks_along_an_axis():
    slices = layouts.slices_of("test", "layout", MANY("dp", "None", ("cp", "tp")))
    assert slices.axes == (("dp",), (), ("cp", "tp")) and [slices.count(axis) for axis in range(3)] == [2, 1, 15]
    assert layouts.members(slices, 0, 7) == (7, 22)
    assert layouts.members(slices, 1, 7) == (7,)
    assert layouts.members(slices, 2, 47) == tuple(45 + 5 * tp + cp for cp in range(5) for tp in range(3))  # stage 1
    listed = layouts.slices_of("test", "layout", Layout((2, 2), ("a", "b"), rank_list=[3, 1, 2, 0])("a", "None"))
    assert layouts.members(listed, 0, 1) == (1, 0) and layouts.members(listed, 0, 5) == (5, 4)


# ---- the operator, on one rank


def test_equals_what_it_is_made_of():
    (q, k, v), spec = tensors(), WindowSpec.from_sliding_window(W)
    ids = Tensor(np.repeat([[0, 1, 2], [0, 0, 1]], N // 3, 1).astype(np.int32))
    names, out = attention(ONE, segment_ids=ONE("dp", "cp"))
    operator = sharded(functools.partial(windowed_attention, spec=spec, softcap=3.), names, out)
    wanted = windowed_attention(q, k, v, spec, softcap=3., segment_ids=ids)
    np.testing.assert_array_equal(operator(q, k, v, ids).asnumpy(), wanted.asnumpy())

    def loss(q, k, v):
        return (operator(q, k, v, ids) * wanted).sum()

    def plain(q, k, v):
        return (windowed_attention(q, k, v, spec, softcap=3., segment_ids=ids) * wanted).sum()

    for got, right in zip(ms.jit(ms.grad(loss, (0, 1, 2)))(q, k, v), ms.grad(plain, (0, 1, 2))(q, k, v)):
        assert np.abs(right.asnumpy()).max() > .1
        np.testing.assert_allclose(got.asnumpy(), right.asnumpy(), atol=1e-5)


def test_local_attention_with_a_mask_and_sinks():
    (q, k, v), layout = tensors(), ONE("dp", "tp", "cp", "None")
    mask, sinks = Tensor(np.random.default_rng(1).random((B, N)) < .6), Tensor(np.arange(H, dtype=np.float32))
    settings = dict(causal=True, autopad=True, dim=None)
    wanted = LocalAttention(W, **settings)(q, k, v, mask=mask, sinks=sinks).asnumpy()
    names, out = attention(ONE, mask=ONE("dp", "cp"), sinks=ONE("tp"))
    np.testing.assert_array_equal(sharded(LocalAttention(W, **settings), names, out)(q, k, v, mask, sinks), wanted)
    wanted = LocalAttention(W, **settings)(q, k, v, mask).asnumpy()
    four = layout, layout, layout, ONE("dp", "cp")
    np.testing.assert_array_equal(sharded(LocalAttention(W, **settings), four, (layout,))(q, k, v, mask), wanted)


@pytest.mark.parametrize("settings", [{}, dict(learned_sinks=True, prenorm=True)], ids=str)
def test_a_block_whose_attention_is_an_operator(settings):
    block = LocalMHA(dim=D, window_size=W, heads=H, kv_heads=H_KV, dim_head=2, causal=True, **settings)
    x = Tensor(np.random.default_rng(1).standard_normal((B, N, D)).astype(np.float32))
    ids = Tensor(np.repeat([[0, 1, 2], [0, 0, 1]], N // 3, 1).astype(np.int32))
    wanted, names = block(x, segment_ids=ids).asnumpy(), {"x": ONE("dp", "cp", "None"), "segment_ids": ONE("dp", "cp")}
    made = sharded(block, names, (ONE("dp", "cp", "tp"),))
    assert made is block and block.attn_fn.operator is not None
    np.testing.assert_allclose(made(x, segment_ids=ids).asnumpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(ms.jit(made)(x, segment_ids=ids).asnumpy(), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="'in_layouts' must be a dict with a layout for each input of the call"):
        made(x)


# ---- slices


def halo_of(whole, start, n):
    """Return `with_halo` for a rank whose slice begins at `start` of the whole keys."""
    def with_halo(group, k, v, mask, segment_ids, backward, forward):
        first, last = max(0, start - backward), min(N, start + n + forward)
        found = [None if x is None else x[..., first:last, :] if x.ndim > 2 else x[:, first:last] for x in whole]
        return (*(x.reshape(-1, *x.shape[2:]) for x in found[:2]), *found[2:], start - first)
    return with_halo


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("spec", [
    WindowSpec.from_sliding_window(W), WindowSpec.from_flash((3, 5)), WindowSpec(7, 3, 2, False),
    WindowSpec(7, 4, 0, True)], ids=str)
def test_a_slice_of_the_queries(spec, gathered, monkeypatch):
    (q, k, v), ranks, n = tensors(), 3, N // 3
    mask = Tensor(np.random.default_rng(1).random((B, N)) < .8)
    ids = Tensor(np.sort(np.random.default_rng(2).integers(0, 4, (B, N)), 1).astype(np.int32))
    for more in (dict(mask=mask), dict(segment_ids=ids) if spec.bucket == 1 else {}):
        wanted = windowed_attention(q, k, v, spec, **more).asnumpy()
        whole = k, v, more.get("mask"), more.get("segment_ids")
        for rank in range(ranks):
            start = rank * n
            monkeypatch.setattr(module, "with_halo", halo_of(whole, start, n))
            part = [None if x is None else x if gathered else x[:, :, start:start + n] if x.ndim > 2 else
                    x[:, start:start + n] for x in whole]
            found = module.windowed_slice(Group("", rank, ranks), q[:, :, start:start + n], *part[:2], spec, *part[2:])
            np.testing.assert_allclose(found.asnumpy(), wanted[:, :, start:start + n], atol=2e-6)


@pytest.mark.parametrize("spec, text", [
    (WindowSpec.from_flash((-1, 0)), "does not slice its sequence"), (WindowSpec.from_sinks(4, 1), "a prefix"),
    (WindowSpec.from_sliding_window(N), "does not slice its sequence"), (WindowSpec(5, 5, 0, True), "multiple of the")])
def test_a_slice_that_needs_more_than_the_next_ones(spec, text):
    q, k, v = tensors(14)
    with pytest.raises(ValueError, match=text):
        module.windowed_slice(Group("", 1, 3), q, k, v, spec)
    with pytest.raises(ValueError, match="'k' must be as long as q"):
        module.windowed_slice(Group("", 1, 3), q, k[:, :, :13], v[:, :, :13], spec)


# ---- errors


PARTIAL = functools.partial(windowed_attention, spec=WindowSpec.from_sliding_window(W))
GOOD = MANY("dp", "tp", "cp", "None")


def qkv(q, k=None, v=None, **more):
    return {"q": q, "k": k or q, "v": v or k or q, **more}


@pytest.mark.parametrize("cell, given, out, kind, text", [
    (3, (GOOD,) * 3, (GOOD,), TypeError, "'cell' must be a Cell or a function"),
    (PARTIAL, None, (GOOD,), TypeError, "'in_layouts' must be a tuple of layouts"),
    (PARTIAL, ((2, 3, 5, 1),) * 3, (GOOD,), TypeError, "'in_layouts' must be of a mindspore.parallel.Layout"),
    (PARTIAL, (Layout((2,), ("dp",)),) * 3, (GOOD,), TypeError, "called with a name for each axis"),
    (PARTIAL, (GOOD,) * 3, GOOD, TypeError, "'out_layouts' must be a tuple of one layout"),
    (PARTIAL, qkv(MANY("dp", "None", "cp", "None")), (MANY("dp", "None", "cp", "None"),), ValueError,
     "along 'tp', 3 ranks would compute the same"),
    (PARTIAL, qkv(MANY("dp", "tp", "None", "cp")), (GOOD,), ValueError, "for q (b, h, n, d) sliced as"),
    (PARTIAL, qkv(GOOD, MANY("None", "tp", "cp", "None")), (GOOD,), ValueError, "for k (b, h_kv, n, d) sliced as"),
    (PARTIAL, qkv(GOOD, GOOD, MANY("dp", "None", "cp", "None")), (GOOD,), ValueError, "for v, as k, sliced as"),
    (PARTIAL, qkv(GOOD, mask=MANY("dp", "None")), (GOOD,), ValueError, "for mask sliced as (dp, cp)"),
    (PARTIAL, qkv(GOOD, masks=MANY("dp", "cp")), (GOOD,), ValueError, "for inputs out of"),
    (PARTIAL, {"k": GOOD, "q": GOOD, "v": GOOD}, (GOOD,), ValueError, "layouts of q, k and v"),
    (PARTIAL, (GOOD,) * 3, (MANY("dp", "cp", "tp", "None"),), ValueError, "for the output, as q, sliced as"),
    (PARTIAL, (GOOD,) * 3, (GOOD,), ValueError, "before mindspore.communication.init()"),
    (LocalMHA(dim=8, window_size=W), (MANY("dp", "cp", "None"),), (MANY("dp", "cp", "None"),), ValueError,
     "along 'tp', 3 ranks would compute the same"),
    (LocalMHA(dim=8, window_size=W), {"x": MANY("dp", "cp", "None"), "cache": MANY("dp", "cp")},
     (MANY("dp", "cp", "tp"),), ValueError, "for inputs out of ('x', 'mask', 'attn_bias', 'segment_ids')"),
    (nn.Dense(2, 2), (MANY("dp", ("tp", "cp")),), (MANY("dp", ("tp", "cp")),), ValueError, "without Parameters"),
])
def test_what_cannot_be_sharded(cell, given, out, kind, text):
    with pytest.raises(kind, match="^For 'sharded', .*" + re.escape(text)):
        sharded(cell, given, out)


def test_heads_of_keys_that_are_not_sliced():
    check = module._shape_of_attention(2, 1)
    assert check([B, H, N, D], [B, 1, N, D], [B, 1, N, 3]) == [B, H, N, 3]
    with pytest.raises(ValueError, match="'in_layouts' must be of k sliced by heads like q"):
        check([B, H, N, D], [B, 2, N, D], [B, 2, N, D])


def test_what_cannot_be_sliced():
    one = layouts.slices_of("test", "layout", MANY("dp", "tp", "None"))
    module._check_parts([one] * 2, [[2, 3, 1], [4, 6, 5]])
    for bad in ([2, 4, 1], [3, 3, 1], [2, 3]):
        with pytest.raises(ValueError, match=r"'in_layouts' must be of axes that can be sliced, for input 1 of shape"):
            module._check_parts([one] * 2, [[2, 3, 1], bad])


def test_outside_of_a_graph_many_ranks_cannot_compute():
    layout = Layout((2,), ("dp",))("dp", "None")
    with pytest.raises(ValueError, match="a call must be compiled"):
        sharded(ops.relu, (layout,), (layout,))(Tensor(np.ones((2, 2), np.float32)))


# ---- mindformers


def config_of(**more):
    settings = dict(
        num_layers=3, num_attention_heads=H, num_query_groups=H_KV, kv_channels=D, seq_length=N, input_layout="BNSD",
        use_flash_attention=True, attention_dropout=0., window_size=(W - 1, 0), window_attn_skip_freq=None,
        data_parallel_size=1, tensor_model_parallel_size=1, context_parallel_size=1, use_eod_reset=False)
    return SimpleNamespace(**{**settings, **more})


def sbnd(x):
    return ops.transpose(x, (2, 0, 1, 3))


def test_layouts_of_mindformers():
    q, k, v = tensors()
    wanted = sbnd(windowed_attention(q, k, v, WindowSpec.from_sliding_window(W), scale=.3)).reshape(N, B, -1).asnumpy()
    given = [sbnd(x) for x in (q, k, v)]
    cell = windows.CoreAttention(config_of(), 2, softmax_scale=.3)
    np.testing.assert_array_equal(cell(*given, None).asnumpy(), wanted)
    flat = [x.reshape(N, B, -1) for x in given]
    cell = windows.CoreAttention(config_of(input_layout="BSH", window_size=None), 2, W, .3)
    np.testing.assert_array_equal(cell(*flat).asnumpy(), wanted)
    ends = [5, 17, N, N, N + 20, 2 * N]
    cell = windows.CoreAttention(config_of(input_layout="TND"), 2, softmax_scale=.3)
    given = [ops.transpose(x, (0, 2, 1, 3)).reshape(B * N, -1, D) for x in (q, k, v)]
    found = cell(*given, actual_seq_qlen=Tensor(ends))
    ids = Tensor(np.searchsorted(ends, np.arange(B * N), "right").reshape(B, N).astype(np.int32))
    wanted = windowed_attention(q, k, v, WindowSpec.from_sliding_window(W), scale=.3, segment_ids=ids)
    np.testing.assert_allclose(found.asnumpy(), ops.transpose(wanted, (0, 2, 1, 3)).reshape(B * N, -1, D).asnumpy(),
                               atol=1e-6)


def test_ends_count_from_the_first_token_of_a_rank_or_of_all():
    cell = windows.CoreAttention(config_of(input_layout="TND"), 2)
    for ends in ([3, 7, 8], [11, 15, 16]):
        assert cell._ids(Tensor(ends), 8, 8).asnumpy().tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]]
    cell.group = Group("", 1, 2)
    assert cell._ids(Tensor([3, 7, 8]), 4, 4).asnumpy().tolist() == [[1, 1, 1, 2]]
    assert cell._ids(Tensor([3, 7, 8]), 4, 8).asnumpy().tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]]


@pytest.mark.parametrize("pattern, layer, keys", [
    (None, 1, W), (3, 1, W), (3, 2, None), (2, 2, W), ([1, 1, 0], 1, W), ([0, 0, 1], 1, None), ((1, 1, 0), 2, None)])
def test_the_window_of_a_layer(pattern, layer, keys):
    wanted = WindowSpec.from_flash((-1, -1), causal=True) if keys is None else WindowSpec.from_sliding_window(keys)
    assert windows.spec_of(config_of(window_attn_skip_freq=pattern), layer) == wanted


@pytest.mark.parametrize("settings, text", [
    (dict(window_attn_skip_freq=2), "'window_attn_skip_freq' must be the same for the layers 0 and 1"),
    (dict(window_attn_skip_freq=[1, 0, 1]), "with_windows() can give each its own"),
    (dict(window_attn_skip_freq=[1, 1]), "an entry for each of 3 layers"),
    (dict(use_eod_reset=True), "documents in 'attention_mask' alone are not seen, 'actual_seq_qlen' brings them"),
    (dict(use_flash_attention=False), "'use_flash_attention' must be True where 'num_query_groups'"),
    (dict(input_layout="BSND"), "'input_layout' must be BNSD, BSH or TND, but got 'BSND'"),
    (dict(use_ring_attention=True), "'use_ring_attention' must be False"),
    (dict(hierarchical_context_parallel_sizes=2), "'hierarchical_context_parallel_sizes' must be 1"),
])
def test_what_a_config_must_not_say(settings, text):
    with pytest.raises(ValueError, match="^For 'CoreAttention', .*" + re.escape(text)):
        windows.CoreAttention(config_of(**settings), 1)


def test_what_a_call_must_not_have():
    given = [sbnd(x) for x in tensors()]
    cell, hidden = windows.CoreAttention(config_of(), 1), np.triu(np.ones((N, N)), 1)[None, None].repeat(B, 0)
    hidden[:, :, :, N - 3:] = 1  # padding on the right
    cell(*given, Tensor(hidden.astype(np.uint8)))
    hidden[1, :, 20:, :20] = 1  # documents
    for mask in (hidden, np.triu(np.ones((N, N)), 1)[None, None] + (np.arange(N) < 3)):
        with pytest.raises(ValueError, match="'attention_mask' must .* 'actual_seq_qlen' with"):
            cell(*given, Tensor(mask.astype(np.uint8)))
    with pytest.raises(ValueError, match="'attention_bias' must be None"):
        cell(*given, None, attention_bias=given[0])
    with pytest.raises(ValueError, match="'actual_seq_qlen' must be the ends of the documents"):
        windows.CoreAttention(config_of(input_layout="TND"), 1)(*(x.reshape(B * N, -1, D) for x in given))
    with pytest.raises(ValueError, match="'cp_comm_type' must be None, but got 'p2p'"):
        windows.CoreAttention(config_of(), 1, cp_comm_type="p2p")


@pytest.fixture
def recorded(monkeypatch):
    """Put stand-ins of mindformers' modules in place: its layouts on (dp, cp, tp), and its specs."""
    def layout(*axes):
        together = {"dp_cp": ("dp", "cp")}
        return Layout((2, 4, 3), ("dp", "cp", "tp"))(*(together.get(axis, axis) for axis in axes))

    class ModuleSpec(SimpleNamespace):
        pass
    names = ("mindformers", "mindformers.parallel_core", "mindformers.parallel_core.training_graph",
             "mindformers.parallel_core.training_graph.device_matrix", "mindformers.parallel_core.utils",
             "mindformers.parallel_core.utils.spec_utils", "mindformers.parallel_core.training_graph.base_models",
             "mindformers.parallel_core.training_graph.base_models.gpt",
             "mindformers.parallel_core.training_graph.base_models.gpt.gpt_layer_specs")
    made = {name: types.ModuleType(name) for name in names}
    for name, one in made.items():
        if "." in name:
            setattr(made[name.rpartition(".")[0]], name.rpartition(".")[2], one)
        monkeypatch.setitem(sys.modules, name, one)
    made[names[3]].layout, made[names[5]].ModuleSpec, made[names[8]].FlashAttention = layout, ModuleSpec, nn.Cell
    monkeypatch.setattr(windows, "_get_parallel_mode", lambda: "semi_auto_parallel")
    monkeypatch.setattr(windows, "group_along", lambda owner, slices, axis: Group("cp", 1, slices.count(axis)))
    return made[names[8]]


@pytest.mark.parametrize("settings, wanted", [
    (dict(input_layout="BSH"), ("cp dp tp", "cp dp tp", "cp dp tp", "cp dp tp")),
    (dict(input_layout="BSH", num_query_groups=1), ("cp dp tp", "cp dp -", "cp dp -", "cp dp tp")),
    (dict(input_layout="BSH", window_size=(N // 4 + 1, 0)), ("cp dp tp", "- dp tp", "- dp tp", "cp dp tp")),
    (dict(input_layout="BNSD"), ("cp dp tp -", "cp dp tp -", "cp dp tp -", "cp dp tp")),
    (dict(input_layout="TND"), ("dp+cp tp -", "dp+cp tp -", "dp+cp tp -", "dp", "dp+cp tp -")),
    (dict(input_layout="TND", window_size=None), ("dp+cp tp -", "dp tp -", "dp tp -", "dp", "dp+cp tp -"))], ids=str)
def test_how_mindformers_slices(settings, wanted, recorded):
    operator = windows.CoreAttention(config_of(context_parallel_size=4, **settings), 2).operator
    found = [layouts.slices_of("test", "layout", one).axes for one in (*operator.in_layouts, *operator.out_layouts)]
    assert tuple(" ".join("+".join(axis) or "-" for axis in axes) for axes in found) == wanted
    assert windows._merged([7, 2, 3, 5], [7, 2, 1, 5], [7, 2, 1, 4]) == [7, 2, 12]


def test_a_window_for_each_layer(recorded):
    layer = SimpleNamespace(submodules=SimpleNamespace(self_attention=SimpleNamespace(
        submodules=SimpleNamespace(core_attention=nn.Cell))))
    block = SimpleNamespace(layer_specs=[layer] * 3, layer_norm=None)
    made = windows.with_windows(block, [W, None, 1])
    specs = [one.submodules.self_attention.submodules.core_attention for one in made.layer_specs]
    assert [one.params for one in specs] == [{"window": W}, {"window": -1}, {"window": 1}]
    assert layer.submodules.self_attention.submodules.core_attention is nn.Cell
    assert windows.spec_of(config_of(), 1, -1) == WindowSpec.from_flash((-1, -1), causal=True)
    for bad, kind, text in (([W], ValueError, "an entry for each of the 3 layers"), (W, TypeError, "a list with"),
                            ([W, 0, 1], ValueError, "'windows' must be a positive int")):
        with pytest.raises(kind, match=f"^For 'with_windows', .*{text}"):
            windows.with_windows(block, bad)
    with pytest.raises(TypeError, match="'block_spec' must be specs of a decoder block"):
        windows.with_windows(layer, [W])


def test_register(recorded):
    for _ in range(2):
        windows.register()
        assert recorded.FlashAttention is windows.CoreAttention
