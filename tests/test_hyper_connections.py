"""Residual streams against their definition in float64. test_reference compares with PyTorch's package."""
import doctest

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from local_attention import hyper_connections as module
from local_attention.hyper_connections import HyperConnection, add_output, expand, reduce

B, N, DIM = 2, 7, 11
in_both_modes = pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])


def connection(count):
    """Return a connection in which every parameter matters, and its parameters by name in float64."""
    cell = HyperConnection(count, DIM)
    for parameter in cell.get_parameters():
        noise = np.random.randn(*parameter.shape) * 0.3
        parameter.set_data(Tensor(parameter.asnumpy() + noise, ms.float32))
    return cell, {name: parameter.asnumpy().astype(np.float64) for name, parameter in cell.parameters_and_names()}


def by_numpy(x, w, half):
    """Compute the sum of the streams from x, token by token; `half` is any function in place of a half of a layer."""
    out = np.empty_like(x)
    for place in np.ndindex(*x.shape[:2]):
        streams = np.tile(x[place], (len(w["static_beta"]), 1)) * (1 + np.arange(len(w["static_beta"])))[:, None]
        normed = streams / np.linalg.norm(streams, axis=1, keepdims=True) * DIM ** 0.5 * (1 + w["norm.gamma"])
        alpha = np.tanh(normed @ w["dynamic_alpha_fn"]) * w["dynamic_alpha_scale"] + w["static_alpha"]
        beta = np.tanh(normed @ w["dynamic_beta_fn"]) * w["dynamic_beta_scale"] + w["static_beta"]
        mixed = alpha.T @ streams
        out[place] = (mixed[1:] + beta[:, None] * half(mixed[0])).sum(0)
    return out


@in_both_modes
@pytest.mark.parametrize("count", [2, 3, 5])
def test_values_and_gradients(count, compiled):
    """The streams differ before they are mixed. Gradients are compared with differences of the definition."""
    cell, weights = connection(count)
    x, cotangent = np.random.randn(B, N, DIM), np.random.randn(B, N, DIM)
    apart = Tensor((1. + np.arange(count)).reshape(1, 1, -1, 1), ms.float32)

    def forward(x):
        taken, streams, beta = cell(expand(x, count) * apart)
        return reduce(add_output(streams, taken * taken, beta))

    def total(x, cotangent):
        out = forward(x)
        return (out * cotangent).sum(), out

    run = ms.value_and_grad(total, 0, cell.trainable_params(), has_aux=True)
    (_, out), (grad_x, grads) = (ms.jit(run) if compiled else run)(Tensor(x, ms.float32), Tensor(cotangent, ms.float32))
    np.testing.assert_allclose(out.asnumpy(), by_numpy(x, weights, np.square), atol=1e-5 * np.abs(out.asnumpy()).max())

    def loss(x, weights):
        return (by_numpy(x, weights, np.square) * cotangent).sum()

    step = 1e-5
    found = {name: grad.asnumpy() for (name, _), grad in zip(cell.parameters_and_names(), grads)}
    assert set(found) == set(weights)
    for name, grad in found.items():
        direction = np.random.randn(*weights[name].shape)
        difference = (loss(x, {**weights, name: weights[name] + step * direction})
                      - loss(x, {**weights, name: weights[name] - step * direction})) / (2 * step)
        assert np.abs(grad).max() > 1e-3, name
        np.testing.assert_allclose((grad * direction).sum(), difference, rtol=1e-4, atol=1e-4, err_msg=name)
    direction = np.random.randn(*x.shape)
    difference = (loss(x + step * direction, weights) - loss(x - step * direction, weights)) / (2 * step)
    np.testing.assert_allclose((grad_x.asnumpy() * direction).sum(), difference, rtol=1e-4)


def test_at_first_streams_do_what_one_does():
    """At first, one random stream is the input, and every stream gets the output."""
    ms.set_seed(5)
    cell, x = HyperConnection(3, DIM), Tensor(np.random.randn(B, N, DIM), ms.float32)
    taken, streams, beta = cell(expand(x, 3))
    np.testing.assert_allclose(taken.asnumpy(), x.asnumpy(), atol=1e-6)
    np.testing.assert_allclose(reduce(add_output(streams, taken * 2., beta)).asnumpy(), 9 * x.asnumpy(), rtol=1e-5)
    drawn = {tuple(HyperConnection(3, DIM).static_alpha.asnumpy()[:, 0]) for _ in range(30)}
    assert drawn == {(1., 0., 0.), (0., 1., 0.), (0., 0., 1.)}
    np.testing.assert_array_equal(cell.static_alpha.asnumpy()[:, 1:], np.eye(3))


def test_zeros_give_no_nan():
    cell, _ = connection(3)

    def total(x):
        taken, streams, _ = cell(x)
        return (taken.sum() + streams.sum())
    value, grad = ms.value_and_grad(total)(Tensor(np.zeros((B, N, 3, DIM)), ms.float32))
    assert np.isfinite(value.asnumpy()) and np.isfinite(grad.asnumpy()).all()


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_the_dtype_of_streams_is_kept_and_the_weights_are_computed_in_float32(dtype):
    """The sum of squares of 11 numbers near 100 is too large for float16."""
    cell, _ = connection(3)
    x = Tensor(np.random.randn(B, N, 3, DIM) * 100, ms.float32)
    wanted = [out.asnumpy() for out in cell(x)]
    for found, exact in zip(cell(x.astype(dtype)), wanted):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(ms.float32).asnumpy(), exact, atol=2e-3 * np.abs(exact).max())


def test_tanh_is_good_to_a_rounding_of_1():
    x = np.concatenate([np.linspace(-20, 20, 9999), [-1e30, -1e-6, 0., 1e-6, 1e30]]).astype(np.float32)
    found = module._tanh(Tensor(x)).asnumpy()
    np.testing.assert_allclose(found, np.tanh(x.astype(np.float64)), rtol=0, atol=3e-7)


def test_examples():
    assert doctest.testmod(module).failed == 0
