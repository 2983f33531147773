"""Compare sliding windows with results of their formula in JAX, saved by tests/reference/make_sliding_reference.py."""
import mindspore as ms
import numpy as np
from mindspore import Tensor

from local_attention import LocalSelfAttention, MultiHeadLocalAttention, sliding_window_attention
from test_reference import cases, differentiate, in_both_modes, load, reference, results, tensors

FILE = "sliding_window"
# The largest error, relative to the largest value of the array. The saved values are float64, rounded to float32
# (6e-8). The values computed here are float32, each a sum of up to 61 products with a few roundings. 1.4e-6 was
# measured; the rest is for other processors. A key too many or a wrong scale shows at 1e-2 and more.
TOLERANCE = 1e-5


def check(name, found):
    settings, arrays = load(FILE, name)
    expected = results(arrays)
    assert set(found) == set(expected)
    for key, theirs in expected.items():
        ours, largest = found[key].asnumpy(), np.abs(theirs).max()
        assert ours.shape == theirs.shape, key
        if key in settings["zero"]:
            assert np.abs(ours).max() < TOLERANCE, key
        else:
            assert largest > 0.1, f"{key}: nothing to compare"
            assert np.abs(ours - theirs).max() <= TOLERANCE * largest, key


@in_both_modes(cases(FILE, start="function"), graphs=2)
def test_function(name, compiled):
    settings, arrays = load(FILE, name)
    shape = (*settings["lead"], settings["n"], 10)
    inputs = tensors({key: reference(FILE)[f"inputs/{key}"][:np.prod(shape)].reshape(shape)
                      for key in ("q", "k", "v", "cotangent")})
    cotangent = inputs.pop("cotangent")
    span = {"window_size_left": settings["left"], "window_size_right": settings["right"]}
    if "grad_rel_pos_emb" in arrays:
        inputs |= tensors({"rel_pos_emb": reference(FILE)["inputs/rel_pos_emb"][:sum(span.values())]})
    mask = Tensor(arrays["mask"]) if "mask" in arrays else None

    def forward(q, k, v, rel_pos_emb=None):
        return sliding_window_attention(q, k, v, mask, rel_pos_emb, **span)

    out, grads, _ = differentiate(forward, list(inputs.values()), cotangent, None, compiled)
    check(name, {"out": out} | {f"grad_{key}": grad for key, grad in zip(inputs, grads)})


@in_both_modes(cases(FILE, holding="inputs_q"), graphs=2)
def test_cell(name, compiled):
    settings, arrays = load(FILE, name)
    cell = (MultiHeadLocalAttention if "inputs_kv" in arrays else LocalSelfAttention)(**settings["args"])
    weights = {key.split("/")[1]: ms.Parameter(x) for key, x in tensors(
        {key: x for key, x in arrays.items() if key.startswith("weight/")}).items()}
    assert ms.load_param_into_net(cell, weights, strict_load=True) == ([], [])
    mask = Tensor(arrays["mask"]) if "mask" in arrays else None
    inputs = tensors({key: arrays[key] for key in ("inputs_q", "inputs_kv") if key in arrays})
    cotangent, parameters = tensors({"cotangent": arrays["cotangent"]})["cotangent"], cell.trainable_params()

    def forward(*inputs):
        return cell(*inputs, mask=mask)

    out, by_input, grads = differentiate(forward, list(inputs.values()), cotangent, parameters, compiled)
    found = {"out": out} | {f"grad_{key}": grad for key, grad in zip(inputs, by_input)}
    check(name, found | {f"grad_{parameter.name}": grad for parameter, grad in zip(parameters, grads)})
