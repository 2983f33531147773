"""What the native kernel makes of calls at the ends of their ranges: numbers that do not fit, spans of any size, scores
near the largest float32, and several threads."""
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from calls import attend_to
from local_attention import attend as pipe
from local_attention import settings, windowed_attention
from local_attention.attend import Frame, Problem
from local_attention.backends import native
from local_attention.backends.native import library
from local_attention.spec import NO_LIMIT, Scoring, WindowSpec

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason="the kernel was not built")
ROOT = Path(__file__).resolve().parent.parent
TYPES = {"float32": b"float32", "int32": b"int32", "int64": b"int64", "bool": b"bool"}


def call(name, arrays):
    """Call an operator of the library as MindSpore does; return its status."""
    shapes = [np.array(x.shape, np.int64) for x in arrays]
    pointers = (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays))
    axes = (ctypes.c_int * len(arrays))(*(x.ndim for x in arrays))
    lengths = (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in shapes))
    types = (ctypes.c_char_p * len(arrays))(*(TYPES[x.dtype.name] for x in arrays))
    return ctypes.CDLL(library.load()[0])[name](len(arrays), pointers, axes, lengths, types, None, None)


def attention(to_keys=False, **changes):
    """Return the arrays of a call of 4 groups, 7 queries and 9 keys, with some of its numbers changed; with `to_keys`,
    of the backward pass."""
    numbers = native.Fused(Problem(WindowSpec(1, 5, 0, True), Scoring(.5), 4, 7, 9, 8, 8, per_key_head=2,
                                   frame=Frame(2), shapes=(("mask", (2, 9)),))).numbers.asnumpy()
    names = library.names(library.load()[0])["numbers"]
    for name, value in changes.items():
        numbers[names.index(name)] = value

    def floats(*shape):
        return np.zeros(shape, np.float32)
    q, k, rows = floats(4, 7, 8), floats(2, 9, 8), floats(4, 7)
    unused = np.zeros(1, np.int32)
    inputs = [q, k, k.copy(), np.ones((2, 9), bool), unused, unused, *(floats(1) for _ in range(4)),
              np.zeros(1, np.int32), numbers]
    results = [q.copy(), floats(4, 7, 2)]
    if not to_keys:
        return [*inputs, *results, rows]
    return [*inputs, *results, q.copy(), rows, q.copy(), k.copy(), k.copy(), *(floats(1) for _ in range(4))]


@pytest.mark.parametrize("backward", [False, True])
def test_numbers_that_do_not_fit_are_an_error(backward):
    name = "attention_backward" if backward else "attention_forward"
    assert call(name, attention(backward)) == 0
    for number, values in {"groups": (-4, 0, 3, 8, 2**62), "kv_groups": (-1, 0, 3, 4), "n_q": (0, 8, 2**32 + 7),
                           "n_k": (-9, 0, 8, 10, 2**31), "head_dim": (0, 16), "value_dim": (0, 4, 16),
                           "bucket": (-1, 0), "spec_backward": (-1,), "spec_forward": (-2,), "prefix": (-1,),
                           "offset": (-1, 2**31, 2**62), "batch": (-2, 3, 4), "doc_batch": (1, 3),
                           "heads": (0, 3), "period": (0,), "columns": (-1, 5), "offsets": (-1, 6),
                           "sink_heads": (-1, 2, 3), "sink_rows": (1,), "order_batch": (-1, 1, 3),
                           "bias_batch": (-1, 0, 2, 3), "threads": (-1, 0), "beside": (0, 3)}.items():
        for value in values:
            assert call(name, attention(backward, **{number: value})) == 2, (number, value)
    for number, values in {"threads": (2**61,), "bucket": (2**32, 2**62), "spec_backward": (2**62,),
                           "spec_forward": (2**62,), "level": (2**40,)}.items():
        for value in values:
            assert call(name, attention(backward, **{number: value})) == 0, (number, value)
    right = attention(backward)
    for at in range(len(right)):
        for wrong in (right[at][..., :0], right[at].astype(np.int64 if right[at].dtype != np.int64 else np.int32)):
            arrays = list(right)
            arrays[at] = wrong
            used = not (4 <= at < 10 or at >= 19)  # the rest are placeholders
            assert call(name, arrays) == (2 if used else 0), at
    assert call(name, right[:-1 if not backward else 16]) == 2


def floats(*shape):
    return np.zeros(shape, np.float32)


ROWS, ANGLES = np.array([2, 2, 0]), np.array([2, 2, 0, 0, 0])
AT, HEADS = np.zeros(1, np.int32), np.zeros((2, 1), np.int32)
OTHERS = {
    "document_bounds": [np.zeros((2, 5), np.int32), np.zeros((2, 5, 2), np.int32)],
    "layer_norm_forward": [floats(3, 4), floats(4), floats(4), ROWS, floats(3, 4)],
    "layer_norm_backward": [floats(3, 4), floats(4), ROWS, floats(3, 4), floats(3, 4), floats(4), floats(4)],
    "geglu_forward": [floats(3, 4), ROWS, floats(3, 2)],
    "geglu_backward": [floats(3, 4), ROWS, floats(3, 2), floats(3, 4)],
    "rotary": [floats(3, 4), AT, ANGLES, floats(3, 4)],
    "split_heads": [floats(2, 3, 16), HEADS, ANGLES, floats(2, 2, 3, 4), floats(2, 1, 3, 4), floats(2, 1, 3, 4)],
    "join_heads": [floats(2, 2, 3, 4), floats(2, 1, 3, 4), floats(2, 1, 3, 4), ANGLES, floats(2, 3, 16)],
    "enter_rings": [floats(2, 1, 16), floats(2, 5, 4), floats(2, 5, 4), AT, AT, ANGLES, floats(4, 1, 4)],
}


@pytest.mark.parametrize("name", OTHERS)
def test_shapes_and_types_that_do_not_fit_are_an_error(name):
    arrays = OTHERS[name]
    assert call(name, [x.copy() for x in arrays]) == 0
    for at, x in enumerate(arrays):
        other_type = np.float32 if x.dtype.kind == "i" else bool
        for wrong in (x[:0], x[..., :-1], np.concatenate([x, x, x], -1), x.astype(other_type)):
            got = [wrong.copy() if place == at else y.copy() for place, y in enumerate(arrays)]
            if (name, at) == ("split_heads", 1) and wrong.dtype == np.float32:
                continue  # it is a shape alone
            assert call(name, got) == 2, (at, wrong.shape, wrong.dtype)
        assert call(name, arrays[:at]) == 2


@pytest.mark.parametrize("name, place, value", [
    ("layer_norm_forward", 3, [0, 2, 0]), ("rotary", 2, [-1, 2, 0, 0, 0]), ("enter_rings", 5, [2, 2, 5, 0, 0]),
    ("enter_rings", 5, [2, 2, -1, 0, 0]), ("enter_rings", 3, [-1])])
def test_numbers_of_other_operators_that_do_not_fit(name, place, value):
    arrays = [x.copy() for x in OTHERS[name]]
    arrays[place] = np.array(value, arrays[place].dtype)
    assert call(name, arrays) == 2


@pytest.mark.parametrize("far, near", [
    (WindowSpec.from_chunks(2**32), WindowSpec(1, NO_LIMIT, 0, True)),
    (WindowSpec.from_chunks(2**32 + 7), WindowSpec(1, NO_LIMIT, 0, True)),
    (WindowSpec(1, 2**62, 2**62, False), WindowSpec(1, NO_LIMIT, NO_LIMIT, False)),
    (WindowSpec(2**62, 2**62, 2**62, False), WindowSpec(1, NO_LIMIT, NO_LIMIT, False)),
    (WindowSpec(2**32, 0, -1, False), WindowSpec(1, NO_LIMIT, NO_LIMIT, False))])
def test_spans_farther_than_any_sequence(far, near):
    q, k, v = (Tensor(x.astype(np.float32)) for x in np.random.default_rng(0).standard_normal((3, 1, 1500, 4)))

    def results(spec):
        def loss(q, k, v):
            return (attend_to(q, k, v, spec, .5, backend="native") ** 2).sum()
        return [x.asnumpy() for x in ms.grad(loss, (0, 1, 2))(q, k, v)]
    for a, b in zip(results(far), results(near)):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.abs(a).max() > 1e-3


def huge(q, k, **options):
    """Return the output, lse and gradients by v and the rest of 3 queries and keys of one number."""
    q, k, v = (Tensor(np.array(x, np.float32).reshape(1, 1, 3, 1)) for x in (q, k, (1, 2, 4)))
    names = list(options)

    def forward(q, k, v, *more):
        named = dict(zip(names, more))
        out, lse = windowed_attention(q, k, v, WindowSpec(1, 2, 0, True), scale=1., return_lse=True, backend="native",
                                      **named)
        return out.sum(), out, lse
    inputs = q, k, v, *(Tensor(x) for x in options.values())
    (_, out, lse), grads = ms.value_and_grad(forward, tuple(range(len(inputs))), has_aux=True)(*inputs)
    return [x.asnumpy().reshape(-1).tolist() for x in (out, lse, *grads)]


@pytest.fixture(autouse=True)
def anew():
    yield
    pipe._prepared.cache_clear()


@pytest.mark.parametrize("level", range(3))
def test_scores_near_the_largest_float32(monkeypatch, level):
    """In units of log 2, 2.4e38 and more are infinite."""
    monkeypatch.setattr(settings, "level", level)
    pipe._prepared.cache_clear()
    out, lse, dq, dk, dv = huge((1, 1, 1), (2.5e38, 3.3e38, 2.4e38))
    assert out == [1, 2, 2] and dv == [1, 2, 0] and dq == dk == [0, 0, 0]
    np.testing.assert_allclose(lse, [2.5e38, 3.3e38, 3.3e38], rtol=1e-6)
    out, lse, dq, dk, dv = huge((-1, -1, -1), (2.5e38, 3.3e38, 2.4e38))
    assert out == [1, 1, 4] and dv == [2, 0, 1] and dq == dk == [0, 0, 0]
    np.testing.assert_allclose(lse, [-2.5e38, -2.5e38, -2.4e38], rtol=1e-6)
    bias = np.array([[[0, 3e38, 2.9e38]]], np.float32)  # two before, one before, the query's own
    out, lse, *_, dv, dbias = huge((0, 0, 0), (0, 0, 0), attn_bias=bias)
    assert out == [1, 1, 2] and dv == [2, 1, 0] and dbias == [0, 0, 0]
    np.testing.assert_allclose(lse, [2.9e38, 3e38, 3e38], rtol=1e-6)
    out, lse, *_, dv, dsinks = huge((0, 0, 0), (0, 0, 0), sinks=np.array([3e38], np.float32))
    assert out == dv == [0, 0, 0] and dsinks == [0]
    np.testing.assert_allclose(lse, 3e38, rtol=1e-6)
    out, lse, *_ = huge((0, 0, 0), (0, 0, 0), attn_bias=bias * 0 - 2e29)
    assert out == [0, 0, 0] and lse == 3 * [-np.inf]  # such a bias hides


def test_the_number_of_threads_has_an_end(monkeypatch):
    for asked in (2**61, 2**64, 10**30):
        monkeypatch.setenv("OMP_NUM_THREADS", str(asked))
        assert settings.threads() == settings.MOST_THREADS
        library.integers(settings.threads())


FROM_THREADS = """
import sys, threading
import numpy as np
from mindspore import Tensor
from local_attention import WindowSpec, windowed_attention
from local_attention.backends.spans import document_bounds
from local_attention.layers import LayerNorm
rng, norm, wrong = np.random.default_rng(0), LayerNorm(8), []
lengths = (16, 23, 40, 64, 50, 33)
qkv = [[rng.standard_normal((1, 2, n, 8)).astype(np.float32) for _ in range(3)] for n in lengths]
ids = [np.repeat(np.arange(n), 3)[None, :n].astype(np.int32) for n in lengths]

def results(at):
    q, k, v = (Tensor(x) for x in qkv[at])
    return [windowed_attention(q, k, v, WindowSpec(1, 7, 0, True), backend="native").asnumpy(), norm(q).asnumpy(),
            document_bounds(Tensor(ids[at])).asnumpy()]

def work(first):
    for number in range(60):
        at = (first + number) % len(lengths)
        try:
            if not all(np.allclose(a, b, atol=1e-5) for a, b in zip(results(at), wanted[at])):
                wrong.append("another call's numbers")
        except Exception as error:
            wrong.append(str(error))

wanted = [results(at) for at in range(len(lengths))]
sys.setswitchinterval(1e-5)
threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("wrong:", len(wrong), *wrong[:3])
"""


def test_calls_from_several_threads_outside_graphs(tmp_path):
    """MindSpore may hand an operator the inputs of another thread's call; it may also end the process."""
    done = subprocess.run([sys.executable, "-B", "-c", FROM_THREADS], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.stdout.strip() == "wrong: 0", (done.stdout + done.stderr)[-2000:]
