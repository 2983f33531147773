"""Every option against results of the PyTorch package, saved by tests/reference/make_reference.py, in both modes."""
import json
from functools import cache
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from local_attention import (
    DynamicPositionBias,
    LocalAttention,
    LocalMHA,
    LocalTransformer,
    export_torch_weights,
    load_torch_weights,
)
from local_attention.local_attention import look_around, pad_to_multiple
from local_attention.rotary import SinusoidalEmbeddings, apply_rotary_pos_emb, rotate_half
from local_attention.transformer import top_k

# The largest error, relative to the largest value of the array. Both sides compute in float32 (6e-8 for each rounding),
# with sums in different orders. Upstream's rotary angles, of up to 35 radians, are float32 products: an angle is good
# to 35 * 6e-8 = 2e-6, and so are the scores. 2.5e-6 was measured; the rest is for other processors. A wrong mask, scale
# or position shows at 1e-2 and more.
TOLERANCE = 2e-5
# Residual streams begin as copies of each other, so gradients are sums that cancel. PyTorch's own gradients are up to
# 1.5e-5 from what it computes in float64, and ours were measured to be equally far from PyTorch's.
STREAMS_TOLERANCE = 1e-4
ZERO = 1e-5                 # the limit for gradients that are exactly zero: they are sums of numbers near 1 that cancel


@cache
def reference(file):
    with np.load(Path(__file__).parent / "reference" / f"{file}.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def cases(file, start="", holding="settings"):
    """Return the names of a file's cases that start with `start` and have the array `holding`."""
    return [key.split("/")[0] for key in reference(file) if key.startswith(start) and key.endswith("/" + holding)]


def in_both_modes(names, graphs=None):
    """Parametrize a test by all names in PyNative mode, and by the first `graphs` of them in Graph mode.

    A graph takes seconds to compile. The saved cases of LocalAttention and LocalMHA begin with those that cover most:
    the chosen ones have every value of every option, and three out of four pairs of values.
    """
    runs = [pytest.param(name, compiled, id=f"{name}-{'graph' if compiled else 'pynative'}")
            for compiled in (False, True) for name in names[:graphs if compiled else None]]
    return pytest.mark.parametrize("name, compiled", runs)


def load(file, name):
    """Return the settings of a case and its arrays."""
    settings = json.loads(str(reference(file)[f"{name}/settings"]))
    start = f"{name}/"
    return settings, {key[len(start):]: array for key, array in reference(file).items() if key.startswith(start)}


def single(array):
    return np.asarray(array, np.float32) if array.dtype == np.float16 else array


def tensors(arrays):
    return {name: Tensor(np.ascontiguousarray(single(array))) for name, array in arrays.items()}


def weights(file, names):
    return {name: single(reference(file)[f"weight/{name}"]) for name in names}


def differentiate(forward, inputs, cotangent, parameters, compiled):
    """Return forward(*inputs), and the gradients of sum(forward * cotangent) for the inputs and for the parameters."""
    def total(*inputs):
        out = forward(*inputs)
        return (out * cotangent).sum(), out

    positions = tuple(range(len(inputs))) or None
    run = ms.value_and_grad(total, positions, parameters or None, has_aux=True)
    (_, out), grads = (ms.jit(run) if compiled else run)(*inputs)
    if not inputs or not parameters:
        grads = (grads, ()) if inputs else ((), grads)
    # MindSpore returns the gradient of a single input without a tuple
    by_input, by_parameter = ([part] if isinstance(part, Tensor) else list(part) for part in grads)
    return out, by_input, by_parameter


def gradients_by_upstream_name(cell, parameters, grads):
    """Return {"grad/<state_dict name>": gradient}: a gradient is renamed and reshaped like its weight."""
    for parameter, grad in zip(parameters, grads):
        parameter.set_data(grad)
    return {f"grad/{name}": grad for name, grad in export_torch_weights(cell).items()}


def assert_close(found, expected, zero=(), tolerance=TOLERANCE):
    assert not set(expected) - set(found)
    largest_gradient = max((np.abs(theirs).max() for name, theirs in expected.items() if "grad" in name), default=0)
    for name, theirs in expected.items():
        ours = found[name] if isinstance(found[name], np.ndarray) else found[name].asnumpy()
        assert ours.shape == theirs.shape, name
        if name in zero:
            assert np.abs(ours).max() < ZERO, name
        else:
            largest = np.abs(theirs).max()
            if name.endswith(("alpha_scale", "beta_scale")):  # one number for all tokens and streams: they cancel
                largest = largest_gradient
            assert largest > 5 * ZERO, f"{name}: nothing to compare"
            assert np.abs(ours - theirs).max() <= tolerance * largest, name


def results(arrays):
    return {name: array for name, array in arrays.items() if name == "loss" or name.startswith(("out", "grad"))}


@in_both_modes(cases("local_attention"), graphs=16)
def test_local_attention(name, compiled):
    settings, arrays = load("local_attention", name)
    lead, n = settings["lead"], settings["n"]
    inputs = tensors({key: reference("local_attention")[f"inputs/{key}"][:int(np.prod(lead)), :n].reshape(*lead, n, -1)
                      for key in ("q", "k", "v", "cotangent")})
    cotangent = inputs.pop("cotangent")
    if "grad_attn_bias" in arrays:
        heads, rows, columns = arrays["grad_attn_bias"].shape
        inputs |= tensors({"attn_bias": reference("local_attention")["inputs/attn_bias"][:heads, :rows, :columns]})
    given = tensors({key: arrays[key] for key in ("mask", "input_mask") if key in arrays}) | settings["call"]
    attention = LocalAttention(**settings["args"])

    def forward(q, k, v, attn_bias=None):
        return attention(q, k, v, attn_bias=attn_bias, **given)

    out, grads, _ = differentiate(forward, list(inputs.values()), cotangent, None, compiled)
    found = {"out": out} | {f"grad_{key}": grad for key, grad in zip(inputs, grads)}
    assert_close(found, results(arrays), settings["zero"])


@in_both_modes(cases("mha"), graphs=10)
def test_mha(name, compiled):
    settings, arrays = load("mha", name)
    shared = {key: reference("mha")[f"inputs/{key}"] for key in ("x", "cotangent", "attn_bias")}
    inputs = tensors({"x": shared["x"][:, :settings["n"]]})
    if "grad_attn_bias" in arrays:
        heads, rows, columns = arrays["grad_attn_bias"].shape
        inputs |= tensors({"attn_bias": shared["attn_bias"][:heads, :rows, :columns]})
    cotangent = Tensor(single(shared["cotangent"][:, :settings["n"]]))
    mask = Tensor(arrays["mask"]) if "mask" in arrays else None
    block = LocalMHA(**settings["args"])
    load_torch_weights(block, weights("mha", settings["state"]))
    parameters = block.trainable_params()

    def forward(x, attn_bias=None):
        return block(x, mask=mask, attn_bias=attn_bias)

    out, grads, by_parameter = differentiate(forward, list(inputs.values()), cotangent, parameters, compiled)
    found = {"out": out} | {f"grad_{key}": grad for key, grad in zip(inputs, grads)}
    found |= gradients_by_upstream_name(block, parameters, by_parameter)
    assert_close(found, results(arrays), settings["zero"])


def transformer(file, name):
    settings, arrays = load(file, name)
    args = settings["args"]
    layer = args.get("global_attn_layer")
    if layer == "norm, linear":
        args["global_attn_layer"] = nn.SequentialCell(nn.LayerNorm((args["dim"],), epsilon=1e-5),
                                                      nn.Dense(args["dim"], args["dim"]))
    elif layer:
        args["global_attn_layer"] = LocalMHA(**layer)
    model = LocalTransformer(**args)
    load_torch_weights(model, weights(file, settings["state"]))
    return model, settings, arrays


def check_transformer(file, name, compiled, tolerance=TOLERANCE):
    model, settings, arrays = transformer(file, name)
    parameters = model.trainable_params()
    x, mask = tensors({"x": arrays["x"]})["x"], Tensor(arrays["mask"]) if "mask" in arrays else None

    def forward(x):
        return model(x, mask=mask)

    if "loss" in arrays:
        loss_x = Tensor(arrays["loss_x"])

        def loss():
            return model(loss_x, mask=mask, return_loss=True)

        out = (ms.jit(forward) if compiled else forward)(x)
        value, _, grads = differentiate(loss, [], 1., parameters, compiled)
        found = {"out": out, "loss": value}
    else:
        out, (grad_x,), grads = differentiate(forward, [x], Tensor(single(arrays["cotangent"])), parameters, compiled)
        found = {"out": out, "grad_x": grad_x}
    found |= gradients_by_upstream_name(model, parameters, grads)
    assert_close(found, results(arrays), settings["zero"], tolerance)


@in_both_modes(cases("transformer"))
def test_transformer(name, compiled):
    check_transformer("transformer", name, compiled)


@in_both_modes(cases("transformer_streams"), graphs=3)
def test_streams_and_global_layers(name, compiled):
    check_transformer("transformer_streams", name, compiled, STREAMS_TOLERANCE)


@pytest.mark.parametrize("file, name, use_kv_cache", [
    *(("transformer", name, cached) for name in cases("transformer", holding="greedy7") for cached in (False, True)),
    *(("transformer_streams", name, True) for name in cases("transformer_streams", holding="greedy7"))])
def test_greedy(file, name, use_kv_cache):
    model, settings, arrays = transformer(file, name)
    for length in settings["primes"]:
        prime, theirs = Tensor(arrays[f"prime{length}"]), arrays[f"greedy{length}"]
        ours = model.generate(prime, theirs.shape[1], temperature=0., use_kv_cache=use_kv_cache)
        np.testing.assert_array_equal(ours.asnumpy(), theirs)


@in_both_modes(cases("functions", start="dynamic_position_bias"))
def test_dynamic_position_bias(name, compiled):
    settings, arrays = load("functions", name)
    i, j = settings["i"], settings["j"]
    bias = DynamicPositionBias(dim=5, heads=arrays["out"].shape[0])
    load_torch_weights(bias, weights("functions", settings["state"]))
    parameters = bias.trainable_params()

    def forward():
        return bias(i, j)

    out, _, grads = differentiate(forward, [], Tensor(single(arrays["cotangent"])), parameters, compiled)
    found = {"out": out} | gradients_by_upstream_name(bias, parameters, grads)
    assert_close(found, results(arrays), settings["zero"])


@in_both_modes(cases("functions", holding="grad_x"))
def test_function_of_one_tensor(name, compiled):
    settings, arrays = load("functions", name)

    def forward(x):
        return rotate_half(x) if name == "rotate_half" else look_around(x, **settings)

    given = tensors(arrays)
    out, grads, _ = differentiate(forward, [given["x"]], given["cotangent"], None, compiled)
    assert_close({"out": out, "grad_x": grads[0]}, results(arrays))


@in_both_modes(cases("functions", start="apply"))
def test_apply_rotary_pos_emb(name, compiled):
    settings, arrays = load("functions", name)
    embedding = SinusoidalEmbeddings(**settings)

    def forward(q, k):
        freqs, scale = embedding(k)
        return ops.cat(apply_rotary_pos_emb(q, k, freqs, scale=scale), -2)

    given = tensors(arrays)
    out, (grad_q, grad_k), _ = differentiate(forward, [given["q"], given["k"]], given["cotangent"], None, compiled)
    assert_close({"out": out, "grad_q": grad_q, "grad_k": grad_k}, results(arrays))


@pytest.mark.parametrize("name", cases("functions", start="embedding"))
def test_sinusoidal_embeddings(name):
    settings, arrays = load("functions", name)
    freqs, scale = SinusoidalEmbeddings(**settings)(tensors(arrays)["x"])
    assert_close({"out0": freqs, "out1": scale}, results(arrays))


@pytest.mark.parametrize("name", cases("functions", start="pad_to_multiple"))
def test_pad_to_multiple(name):
    settings, arrays = load("functions", name)
    padded, tensor = pad_to_multiple(tensors(arrays)["tensor"], **settings)
    assert padded == arrays["out0"]
    np.testing.assert_array_equal(tensor.asnumpy(), arrays["out1"])


@pytest.mark.parametrize("name", cases("functions", start="top_k"))
def test_top_k(name):
    settings, arrays = load("functions", name)
    np.testing.assert_array_equal(top_k(tensors(arrays)["logits"], **settings).asnumpy(), arrays["out0"])
