"""Gradients of gradients: right where they are supported, an error that says so elsewhere, never zeros."""
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from local_attention import LocalTransformer, WindowSpec, use_backend, windowed_attention
from local_attention.backends.native import library

ROOT = Path(__file__).resolve().parent.parent
SPEC = WindowSpec(1, 3, 0, True)


def penalty(function):
    def value(x):
        gradient = ms.grad(function)(x)
        return (gradient * gradient).sum()
    return value


def attention(x):
    return (windowed_attention(x, x * 2, x, SPEC, softcap=3.) ** 2).sum()


def numeric(value, x, step=1e-2):
    """Return the derivative of a compiled function by differences."""
    wanted = np.zeros(x.shape)
    for place in np.ndindex(*x.shape):
        moved = np.zeros(x.shape, np.float32)
        moved[place] = step
        wanted[place] = (float(value(Tensor(x + moved))) - float(value(Tensor(x - moved)))) / (2 * step)
    return wanted


def test_compiled_under_dense_it_is_right():
    x = np.random.default_rng(0).standard_normal((1, 1, 5, 3)).astype(np.float32)
    with use_backend("dense"):
        value = penalty(attention)
        got = ms.jit(ms.grad(value))(Tensor(x)).asnumpy()
        wanted = numeric(ms.jit(value), x)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(got, wanted, atol=2e-3 * np.abs(wanted).max())


def test_a_whole_model_under_dense():
    """LayerNorm, GEGLU, rotation and the rest of a model are also plain operators there."""
    model = LocalTransformer(num_tokens=None, max_seq_len=16, dim=8, depth=1, heads=2, dim_head=4,
                             local_attn_window_size=4)
    x = np.random.default_rng(0).standard_normal((1, 6, 8)).astype(np.float32)

    def loss(x):
        return (model(x) ** 3).sum()
    with use_backend("dense"):
        value = penalty(loss)
        got = ms.jit(ms.grad(value))(Tensor(x)).asnumpy()
        wanted = numeric(ms.jit(value), x)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(got, wanted, atol=1e-2 * np.abs(wanted).max())


def test_a_compiled_function_within_a_gradient_is_no_second_one():
    x = Tensor(np.random.default_rng(0).standard_normal((1, 1, 5, 3)).astype(np.float32))
    compiled = ms.jit(attention)

    def loss(x):
        return compiled(x) * 1.
    np.testing.assert_allclose(ms.grad(loss)(x).asnumpy(), ms.grad(attention)(x).asnumpy(), atol=1e-5)


ELSEWHERE = """
import sys
import mindspore as ms, numpy as np
from mindspore import Tensor
from local_attention import WindowSpec, use_backend, windowed_attention

def attention(x):
    return (windowed_attention(x, x * 2, x, WindowSpec(1, 3, 0, True)) ** 2).sum()

def penalty(x):
    gradient = ms.grad(attention)(x)
    return (gradient * gradient).sum()

backend, mode = sys.argv[1:]
use_backend(backend)
second = ms.grad(penalty)
if mode == "graph":
    second = ms.jit(second)
try:
    print(second(Tensor(np.ones((1, 1, 5, 3), np.float32))).asnumpy())
except NotImplementedError as error:
    print(str(error).splitlines()[0])
"""


ONCE = [("blocked", "pynative"), ("blocked", "graph"), ("dense", "pynative")]
if library.load()[0]:
    ONCE += [("native", "pynative"), ("native", "graph")]


@pytest.mark.parametrize("backend, mode", ONCE)
def test_elsewhere_it_is_an_error_that_names_the_way_out(backend, mode, tmp_path):
    """In a process of its own, because an exception within a gradient leaves MindSpore in a bad state."""
    script = tmp_path / "second.py"
    script.write_text(ELSEWHERE)
    done = subprocess.run([sys.executable, "-B", script, backend, mode], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip().endswith(
        "a gradient of a gradient can be had of a function that is compiled (ms.jit) under "
        "local_attention.use_backend('dense'), and nowhere else."), done.stdout + done.stderr

