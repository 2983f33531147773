"""Weights to and from PyTorch's package: names, files, what does not fit, and the command."""
import doctest
import json
import os
import subprocess
import sys
import types

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from local_attention import (
    DynamicPositionBias,
    LocalMHA,
    LocalTransformer,
    export_torch_weights,
    load_torch_weights,
)
from local_attention import weight_files
from local_attention import weights as module

TOKENS, LONGEST, DIM, HEADS, DIM_HEAD, WINDOW = 23, 37, 11, 3, 10, 5
CELLS = {
    "transformer": lambda: transformer(),
    "transformer with all": lambda: transformer(qk_rmsnorm=True, gate_values_per_head=True),
    "transformer with bias": lambda: transformer(use_dynamic_pos_bias=True),
    "transformer of vectors": lambda: transformer(num_tokens=None),
    "transformer of streams": lambda: transformer(num_residual_streams=3, qk_rmsnorm=True,
                                                  global_attn_layer=CELLS["mha with rmsnorm"](),
                                                  layers_insert_global_attn=(2,)),
    "mha": lambda: LocalMHA(dim=DIM, window_size=WINDOW, heads=HEADS, dim_head=DIM_HEAD, prenorm=True),
    "mha with rmsnorm": lambda: LocalMHA(dim=DIM, window_size=WINDOW, heads=HEADS, dim_head=DIM_HEAD, prenorm=True,
                                         qk_rmsnorm=True),
    "transformer of today": lambda: transformer(kv_heads=1, learned_sinks=True, local_attn_window_size=(WINDOW, None)),
    "mha without rotary": lambda: LocalMHA(dim=DIM, window_size=WINDOW, use_rotary_pos_emb=False),
    "bias": lambda: DynamicPositionBias(DIM, HEADS),
}
UNUSUAL = 500. ** -(np.arange(0, DIM_HEAD, 2) / DIM_HEAD)  # frequencies of another theta


def transformer(**settings):
    return LocalTransformer(**{**dict(num_tokens=TOKENS, max_seq_len=LONGEST, dim=DIM, depth=2, heads=HEADS,
                                      dim_head=DIM_HEAD, local_attn_window_size=WINDOW), **settings})


def parameters(cell):
    return {name: parameter.asnumpy().copy() for name, parameter in cell.parameters_and_names()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# Names


def test_names_are_those_of_pytorch_s_state_dict():
    """The names of release 1.11.2 with one residual stream."""
    half, other = "layers.0.0.branch.", "layers.0.1.branch."
    cell = transformer(depth=1, qk_rmsnorm=True, gate_values_per_head=True)
    assert {name: array.shape for name, array in export_torch_weights(cell).items()} == {
        "token_emb.weight": (23, 11), "pos_emb.weight": (37, 11), half + "q_scale": (10,), half + "k_scale": (10,),
        half + "norm.weight": (11,), half + "norm.bias": (11,), half + "to_qkv.weight": (90, 11),
        half + "attn_fn.rel_pos.inv_freq": (5,), half + "to_v_gate.0.weight": (3, 11), half + "to_v_gate.0.bias": (3,),
        half + "to_out.weight": (11, 30), other + "0.weight": (11,), other + "0.bias": (11,),
        other + "1.weight": (58, 11), other + "4.weight": (11, 29),
        "to_logits.0.weight": (11,), "to_logits.0.bias": (11,), "to_logits.1.weight": (23, 11)}

    biased = set(export_torch_weights(transformer(use_dynamic_pos_bias=True)))
    assert {f"dynamic_pos_bias.mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")} < biased
    assert not any("inv_freq" in name for name in biased)


def test_names_of_streams_and_global_layers():
    """PyTorch's nesting: a connection contains its branch, which contains the block."""
    names = set(export_torch_weights(CELLS["transformer of streams"]()))
    connections = ["layers.0.0.", "layers.0.1.", "layers.1.0.", "layers.1.1.", "global_layers.1."]
    parts = ["static_alpha", "dynamic_alpha_fn", "dynamic_alpha_scale", "static_beta", "dynamic_beta_fn",
             "dynamic_beta_scale", "norm.gamma"]
    assert {name for name in names if ".branch." not in name and "layers." in name} == {
        connection + part for connection in connections for part in parts}
    assert {name for name in names if name.startswith("global_layers.1.branch.")} == {
        f"global_layers.1.branch.{name}" for name in export_torch_weights(CELLS["mha with rmsnorm"]())}


class Other(nn.Cell):
    """A global layer with its own parameters, and with Cells of MindSpore that PyTorch names differently."""

    def __init__(self):
        super().__init__()
        self.norm, self.memory, self.project = nn.LayerNorm((DIM,)), nn.Embedding(7, DIM), nn.Dense(DIM, DIM)
        self.gamma = Parameter(Tensor(np.random.randn(DIM), ms.float32), name="gamma")


def test_names_in_any_global_layer():
    there, here = transformer(depth=1, global_attn_layer=Other()), transformer(depth=1, global_attn_layer=Other())
    source, start = export_torch_weights(there), "global_layers.0.branch."
    assert {name[len(start):]: array.shape for name, array in source.items() if "global" in name} == {
        "norm.weight": (11,), "norm.bias": (11,), "memory.weight": (7, 11), "project.weight": (11, 11),
        "project.bias": (11,), "gamma": (11,)}
    assert load_torch_weights(here, source) == []
    assert_same(parameters(here), parameters(there))
    with pytest.raises(ValueError, match="'global_layers.0.branch.memory.weight' is missing"):
        load_torch_weights(here, {name: array for name, array in source.items() if "memory" not in name})


@pytest.mark.parametrize("cell", CELLS)
def test_names_go_both_ways(cell):
    for name, _ in CELLS[cell]().parameters_and_names():
        assert module.mindspore_name(module.torch_name(name)) == name


@pytest.mark.parametrize("name", ["", "weight", "norm", "gamma", "norm.gamma.weight", "layers.0.2.norm.weight",
                                  "layers.0.2.norm.gamma", "layers.0.0.branch.static_alpha", "layers.x.0.to_qkv.weight",
                                  "module.token_emb.weight", "to_qkv.bias", "moments.token_emb.weight",
                                  "global_layers.0.branch.memory.weight", "hyper_connections.layers.0.0.static_alpha"])
def test_names_of_other_things(name):
    """They include MindSpore's names of parameters, and names in global layers that the table does not have."""
    assert module.mindspore_name(name) is None


# Into a model and out of it


@pytest.mark.parametrize("cell", CELLS)
def test_round_trip(cell):
    there, here = CELLS[cell](), CELLS[cell]()
    assert load_torch_weights(here, export_torch_weights(there)) == []
    assert_same(parameters(here), parameters(there))
    assert_same(export_torch_weights(here), export_torch_weights(there))


def test_names_of_releases_before_hyper_connections():
    there, here = transformer(), transformer()
    source = {name.replace(".branch", ""): array for name, array in export_torch_weights(there).items()}
    assert load_torch_weights(here, source) == []
    assert_same(parameters(here), parameters(there))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "ema_model.", "_orig_mod.module.", "encoder.layers.0.0."])
@pytest.mark.parametrize("cell", ["transformer", "mha", "bias", "transformer of streams"])
@pytest.mark.parametrize("strict", [True, False])
def test_what_all_names_start_with_is_taken_off(cell, prefix, strict):
    """As with wrapped models, and with a part of a model at its path."""
    there, here = CELLS[cell](), CELLS[cell]()
    source = {prefix + name: array for name, array in export_torch_weights(there).items()}
    assert load_torch_weights(here, source, strict=strict) == []
    assert_same(parameters(here), parameters(there))


def test_a_block_of_a_model_by_its_path_there():
    there, here = transformer(), LocalMHA(dim=DIM, window_size=WINDOW, heads=HEADS, dim_head=DIM_HEAD, prenorm=True)
    source = {name: array for name, array in export_torch_weights(there).items() if name.startswith("layers.1.0.")}
    assert load_torch_weights(here, source) == []
    assert_same(parameters(here), parameters(there.layers[1][0]))


def test_a_start_that_not_all_names_have_stays():
    here, source = transformer(), export_torch_weights(transformer())
    names = [f"module.{name}" for name in source]
    entries = dict(zip(names, source.values()))
    with pytest.raises(ValueError, match="'step' is left over; 'module.token_emb.weight' is left over"):
        load_torch_weights(here, {"step": np.array(7), **entries})
    misfit = "module.pos_emb.weight"  # by the source's name, even if its prefix was removed
    assert load_torch_weights(here, {**entries, misfit: np.ones(3)}, strict=False) == [misfit]


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["state_dict", "model"]])
def test_what_training_scripts_put_around(keys):
    there, here = transformer(), transformer()
    source = export_torch_weights(there)
    for key in reversed(keys):
        source = {key: source, "step": 7}
    assert load_torch_weights(here, source) == []
    assert_same(parameters(here), parameters(there))


class TorchTensor:
    """The part of torch.Tensor that is used: like the real one, it gives NumPy no bfloat16 and no gradient."""

    def __init__(self, array, dtype="torch.float32", detached=False):
        self.array, self.dtype, self.detached = array, dtype, detached

    def detach(self):
        return TorchTensor(self.array, self.dtype, True)

    def cpu(self):
        return self

    def float(self):
        return TorchTensor(self.array, "torch.float32", self.detached)

    def numpy(self):
        if not self.detached or self.dtype == "torch.bfloat16":
            raise TypeError
        return self.array


@pytest.mark.parametrize("tensor", [
    Tensor, lambda array: Tensor(array, ms.bfloat16), TorchTensor, lambda array: TorchTensor(array, "torch.bfloat16"),
    lambda array: array.astype(np.float64)], ids=["mindspore", "mindspore-bf16", "torch", "torch-bf16", "float64"])
def test_tensors_of_every_framework(tensor):
    source = {name: np.round(8 * array) / 8 for name, array in export_torch_weights(transformer()).items()
              if "inv_freq" not in name}  # numbers that bfloat16 holds exactly
    here = transformer()
    load_torch_weights(here, {name: tensor(array) for name, array in source.items()})
    exported = export_torch_weights(here)
    assert_same({name: exported[name] for name in source}, source)


def test_a_parameter_keeps_its_dtype():
    here, source = transformer(), export_torch_weights(transformer())
    for parameter in here.get_parameters():
        parameter.set_dtype(ms.float16)
    load_torch_weights(here, source)
    assert all(parameter.dtype == ms.float16 for parameter in here.get_parameters())
    assert_same(parameters(here), {name: array.astype(np.float16) for name, array in (
        (module.mindspore_name(name), array) for name, array in source.items()) if "inv_freq" not in name})


def test_exported_arrays_are_copies():
    cell = transformer()
    before = parameters(cell)
    for array in export_torch_weights(cell).values():
        array *= 0
    assert_same(parameters(cell), before)


@pytest.mark.parametrize("inv_freq, taken", [
    (None, False), (np.float16, False), (module.SinusoidalEmbeddings(DIM_HEAD).inv_freq, False), (UNUSUAL, True)],
    ids=["missing", "rounded", "the-same", "others"])
def test_frequencies(inv_freq, taken):
    """The source may lack them. They are loaded, and exported, if they are not the usual ones rounded."""
    cell, x = transformer(), Tensor(np.arange(17, dtype=np.int32)[None])
    source, rel_pos = export_torch_weights(cell), cell.layers[1][0].attn_fn.rel_pos
    name = "layers.1.0.branch.attn_fn.rel_pos.inv_freq"
    usual, before = rel_pos.inv_freq, cell(x).asnumpy()
    source[name] = source[name].astype(np.float16) if inv_freq is np.float16 else inv_freq
    if inv_freq is None:
        del source[name]
    assert load_torch_weights(cell, source) == []
    np.testing.assert_array_equal(rel_pos.inv_freq, inv_freq if taken else usual)
    np.testing.assert_allclose(export_torch_weights(cell)[name], rel_pos.inv_freq, rtol=1e-6)
    assert (np.abs(cell(x).asnumpy() - before).max() > 1e-4) == taken


# What does not fit


def misfits():
    """Return sources with one thing wrong: its name, and what the message says."""
    def changed(**entries):
        source = {**export_torch_weights(transformer()), **entries}
        return {name: array for name, array in source.items() if array is not None}

    qkv = "layers.1.0.branch.to_qkv.weight"
    return {
        "missing": (changed(**{qkv: None}), qkv, f"'{qkv}' is missing"),
        "left over": (changed(**{"layers.2.0.to_qkv.weight": np.ones(3)}), "layers.2.0.to_qkv.weight",
                      "'layers.2.0.to_qkv.weight' is left over"),
        "misshapen": (changed(**{qkv: np.ones((11, 90))}), qkv, rf"'{qkv}' is of shape \(11, 90\) and not \(90, 11\)"),
        "no numbers": (changed(**{qkv: "weights"}), qkv, f"'{qkv}' is of type str"),
        "twice": (changed(**{"layers.1.0.to_qkv.weight": np.ones((90, 11))}), "layers.1.0.to_qkv.weight",
                  "'layers.1.0.to_qkv.weight' is given twice"),
        "frequencies": (changed(**{"layers.1.0.branch.attn_fn.rel_pos.inv_freq": np.ones(7)}),
                        "layers.1.0.branch.attn_fn.rel_pos.inv_freq", r"is of shape \(7,\) and not \(5,\)"),
    }


@pytest.mark.parametrize("case", misfits())
def test_strict_changes_nothing_and_names_what_does_not_fit(case):
    source, _, message = misfits()[case]
    cell = transformer()
    before = export_torch_weights(cell)
    with pytest.raises(ValueError, match=message):
        load_torch_weights(cell, source)
    assert_same(export_torch_weights(cell), before)


@pytest.mark.parametrize("there, here", [(4, 1), (1, 4), (4, 2)])
def test_a_message_names_the_number_of_residual_streams(there, here):
    source = export_torch_weights(transformer(num_residual_streams=there))
    with pytest.raises(ValueError, match=rf"residual streams: build the model with num_residual_streams={there}\)"):
        load_torch_weights(transformer(num_residual_streams=here), source)


@pytest.mark.parametrize("case", misfits())
def test_not_strict_loads_what_fits_and_returns_the_names_of_the_rest(case):
    source, name, _ = misfits()[case]
    cell = transformer()
    assert load_torch_weights(cell, source, strict=False) == [name]
    for loaded, array in export_torch_weights(cell).items():
        if loaded in source and loaded != name:
            np.testing.assert_array_equal(array, source[loaded])


def test_a_long_list_is_cut():
    with pytest.raises(ValueError, match=r"'pos_emb.weight' is missing.*; and 1\d more\.$"):
        load_torch_weights(transformer(), {})


# Files


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files(suffix, tmp_path):
    there, here = transformer(), transformer()
    arrays = export_torch_weights(there)
    path = tmp_path / f"weights{suffix}"
    weight_files.TORCH[suffix].write(path, arrays)
    assert_same(weight_files.TORCH[suffix].read(path), arrays)
    assert load_torch_weights(here, path) == load_torch_weights(here, str(path)) == []
    assert_same(parameters(here), parameters(there))


def test_safetensors_byte_by_byte(tmp_path):
    """Written by hand, so that a mistake in both directions does not go unnoticed."""
    path = tmp_path / "weights.safetensors"
    numbers = np.array([[1.5, -2.], [0.25, 3.]], np.float32)
    upper_halves = numbers.view(np.uint16)[:, 1::2]  # of float32, and so of bfloat16, on a little-endian machine
    header = json.dumps({"__metadata__": {"format": "pt"},
                         "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
                         "h": {"dtype": "F16", "shape": [4], "data_offsets": [8, 16]},
                         "s": {"dtype": "F32", "shape": [], "data_offsets": [16, 20]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + upper_halves.tobytes()
                     + numbers.astype(np.float16).tobytes() + np.float32(7).tobytes())
    found = weight_files._read_safetensors(path)
    assert_same(found, {"b": numbers, "h": numbers.ravel().astype(np.float16), "s": np.float32(7)})
    assert (found["b"].dtype, found["h"].dtype) == (np.float32, np.float16)


def test_safetensors_is_that_of_the_library(tmp_path):
    from safetensors import numpy as library
    arrays = {**export_torch_weights(transformer()), "columns": np.asfortranarray(np.arange(6.).reshape(2, 3)),
              "scalar": np.array(7, np.int32), "flags": np.array([True, False])}
    weight_files._write_safetensors(tmp_path / "ours.safetensors", arrays)
    assert_same(library.load_file(tmp_path / "ours.safetensors"), arrays)
    assert_same(weight_files._read_safetensors(tmp_path / "ours.safetensors"), arrays)


def test_pytorch_s_files_are_read_without_running_their_code(tmp_path, monkeypatch):
    there, here, calls = transformer(), transformer(), []
    path = tmp_path / "weights.pt"
    path.touch()

    def load(path, **options):
        calls.append((path, options))
        return {"state_dict": {name: TorchTensor(array) for name, array in export_torch_weights(there).items()}}

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    assert load_torch_weights(here, path) == []
    assert calls == [(path, {"map_location": "cpu", "weights_only": True})]
    assert_same(parameters(here), parameters(there))


# The command


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("cell", ["transformer with all", "transformer with bias", "bias", "transformer of streams"])
def test_command(cell, suffix, tmp_path, capsys):
    there, here = CELLS[cell](), CELLS[cell]()
    source, middle, back = tmp_path / f"in{suffix}", tmp_path / "model.ckpt", tmp_path / f"out{suffix}"
    arrays = export_torch_weights(there)
    weight_files.TORCH[suffix].write(source, arrays)
    module.main([str(source), str(middle)])
    assert ms.load_param_into_net(here, ms.load_checkpoint(str(middle))) == ([], [])
    assert_same(parameters(here), parameters(there))
    module.main([str(middle), str(back), "--reverse"])
    assert_same(weight_files.TORCH[suffix].read(back), arrays)
    first, second = capsys.readouterr().out.splitlines()
    buffers = sum("inv_freq" in name for name in arrays)
    assert first.startswith(f"{source} -> {middle}: {len(arrays) - buffers} arrays")
    assert second.startswith(f"{middle} -> {back}: {len(arrays)} arrays")


def test_command_takes_off_what_all_names_start_with(tmp_path):
    """The prefixes are those of `torch.compile`, and of MindSpore's `amp` at O2."""
    arrays, cell = export_torch_weights(transformer()), transformer()
    weight_files._write_npz(tmp_path / "in.npz", {f"_orig_mod.{name}": array for name, array in arrays.items()})
    module.convert(tmp_path / "in.npz", tmp_path / "model.ckpt")
    values = ms.load_checkpoint(str(tmp_path / "model.ckpt"))
    assert ms.load_param_into_net(cell, values) == ([], [])
    wrapped = {f"_backbone.{name}": parameter.asnumpy() for name, parameter in values.items()}
    weight_files._write_ckpt(tmp_path / "wrapped.ckpt", wrapped)
    module.convert(tmp_path / "wrapped.ckpt", tmp_path / "out.npz", reverse=True, dim_head=DIM_HEAD)
    assert_same(weight_files._read_npz(tmp_path / "out.npz"), arrays)


def test_command_writes_the_buffers_of_a_dim_head(tmp_path, capsys):
    cell = transformer()
    ms.save_checkpoint(cell, str(tmp_path / "model.ckpt"))
    for dim_head, expected in ((DIM_HEAD, set(export_torch_weights(cell))), (0, {
            name for name in export_torch_weights(cell) if "inv_freq" not in name})):
        module.main([str(tmp_path / "model.ckpt"), str(tmp_path / "out.npz"), "--reverse", "--dim-head", str(dim_head)])
        assert set(weight_files._read_npz(tmp_path / "out.npz")) == expected
    with pytest.raises(SystemExit, match="error: .*'dim_head' must be a divisor of 30, .* but got 64"):
        module.main([str(tmp_path / "model.ckpt"), str(tmp_path / "out.npz"), "--reverse"])


def test_command_stops_at_what_is_no_weight_unless_told_otherwise(tmp_path, capsys):
    source, target = str(tmp_path / "in.npz"), tmp_path / "out.ckpt"
    weight_files._write_npz(source, {**export_torch_weights(transformer()), "optimizer.step": np.array(7)})
    with pytest.raises(SystemExit, match="error: .*'optimizer.step' is no weight of these models"):
        module.main([source, str(target)])
    assert not target.exists()
    module.main([source, str(target), "--partial"])
    assert target.exists() and "left out: optimizer.step" in capsys.readouterr().out


def test_command_says_that_a_ckpt_cannot_hold_other_frequencies(tmp_path):
    weight_files._write_npz(tmp_path / "in.npz", {"attn_fn.rel_pos.inv_freq": UNUSUAL})
    with pytest.raises(SystemExit, match="'attn_fn.rel_pos.inv_freq' is not what a model computes"):
        module.main([str(tmp_path / "in.npz"), str(tmp_path / "out.ckpt")])


def test_command_as_a_process(tmp_path):
    weight_files._write_npz(tmp_path / "in.npz", export_torch_weights(DynamicPositionBias(DIM, HEADS)))
    command = [sys.executable, "-m", "local_attention.weights", "in.npz", "out.ckpt"]
    run = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True,
                         env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(module.__file__))})
    assert run.stdout == "in.npz -> out.ckpt: 6 arrays, 190 numbers; 0 inv_freq left for the model to compute\n"
    assert (run.returncode, run.stderr) == (0, "")


def test_examples():
    assert doctest.testmod(module).failed == 0
