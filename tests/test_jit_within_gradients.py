"""Gradients of a function that is not compiled and calls one that is: they pass from one to the other.

MindSpore differentiates the compiled graph on its own then. If a function with a branch is called by a `construct` and
its `bprop`, it loses one of the two: "get_return() is null". Smallest inputs, with each backend, Cell and option.
"""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from local_attention import LocalAttention, LocalMHA, LocalTransformer, WindowSpec, windowed_attention
from local_attention.attend import Problem, refusals
from local_attention.spec import Scoring

SPAN, CHUNKS = WindowSpec(1, 5, 0, True), WindowSpec(5, 5, 5, False)
B, H, N, D = 2, 4, 17, 6
BACKENDS = [name for name, reason in refusals(Problem(SPAN, Scoring(1.), B * H, N, N, D, D)).items() if reason is None]
OPTIONS = {  # a spec, tensors beside q, k and v, and numbers
    "plain": (SPAN, (), {}), "chunks": (CHUNKS, ("mask",), {}), "two_lengths": (SPAN, ("mask",), {}),
    "bias": (CHUNKS, ("mask", "attn_bias"), {}),
    "documents": (SPAN, ("segment_ids",), dict(softcap=3.)),
    "documents_bias": (CHUNKS, ("segment_ids", "attn_bias"), {}),
    "all": (WindowSpec(1, 5, 0, True, prefix=2), ("mask", "segment_ids", "sinks"), dict(softcap=3., return_lse=True))}


def draw(*shape):
    return Tensor(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


def gradients(function, inputs):
    def loss(*inputs):
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        return sum(ops.square(ops.masked_fill(x, x < -1e9, 0.)).sum() for x in out)
    return [x.asnumpy() for x in ms.grad(loss, tuple(range(len(inputs))))(*inputs)]


def assert_same_within(function, *inputs):
    wanted, got = gradients(function, inputs), gradients(ms.jit(function), inputs)
    for a, b in zip(got, wanted):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend, option", [
    (backend, option) for backend in BACKENDS for option in OPTIONS if backend != "dense" or option == "all"])
def test_backends(backend, option):
    spec, there, numbers = OPTIONS[option]
    tensors = {"mask": Tensor(np.arange(B * N).reshape(B, N) % 5 > 0), "sinks": draw(H),
               "segment_ids": Tensor(np.tile(np.arange(N) // 7, (B, 1)).astype(np.int32)),
               "attn_bias": draw(H, spec.bucket, spec.backward + spec.bucket + spec.forward)}
    tensors = {name: tensors[name] for name in there}

    def attention(q, k, v):
        return windowed_attention(q, k, v, spec, backend=backend, **numbers, **tensors)
    assert_same_within(attention, draw(B, H, N - 4 if option == "two_lengths" else N, D), draw(B, 2, N, D),
                       draw(B, 2, N, D))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_calls_of_one_problem(backend):
    """Two layers alike. MindSpore hands the `bprop` of a Cell that is called twice the `out` of its last call."""
    def attention(q, k, v):
        return windowed_attention(windowed_attention(q, k, v, SPAN, backend=backend), k, v, SPAN, backend=backend)
    assert_same_within(attention, *(draw(B, H, N, D) for _ in range(3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    attn = LocalAttention(5, dim=D, causal=True, autopad=True, dropout=.3, backend=backend).set_train()

    @ms.jit
    def attention(q, k, v):
        return attn(q, k, v)
    found = gradients(attention, [draw(B, H, N, D) for _ in range(3)])
    assert all(np.isfinite(x).all() and np.abs(x).max() > 1e-3 for x in found)


@pytest.mark.parametrize("options", [dict(shared_qk=True, exact_windowsize=True), dict(use_xpos=True)])
def test_local_attention(options):
    attn = LocalAttention(5, dim=D, causal=True, autopad=True, backend="blocked", **options)

    def attention(q, k, v):
        return attn(q, k, v)
    assert_same_within(attention, *(draw(B, H, N, D) for _ in range(3)))


def test_local_mha():
    net = LocalMHA(dim=12, window_size=5, dim_head=D, heads=H, kv_heads=2, causal=True, prenorm=True,
                   gate_values_per_head=True, learned_sinks=True)

    def out(x):
        return net(x)
    assert_same_within(out, draw(B, N, 12))




@pytest.mark.parametrize("options", [dict(num_residual_streams=2, use_dynamic_pos_bias=True), dict(prefix=2)])
def test_weights_of_a_model(options):
    ms.set_seed(0)
    net = LocalTransformer(num_tokens=11, max_seq_len=N, dim=12, depth=1, heads=2, dim_head=D,
                           local_attn_window_size=5, causal=True, **options)
    tokens = Tensor((np.arange(B * (N + 1)) % 11).reshape(B, -1).astype(np.int32))

    def loss(tokens):
        return net(tokens, return_loss=True)
    weights = net.trainable_params()
    wanted = ms.value_and_grad(loss, None, weights)(tokens)
    compiled = ms.jit(loss)

    def around(tokens):
        return compiled(tokens) * 1.
    got = ms.value_and_grad(around, None, weights)(tokens)
    for weight, a, b in zip(weights, got[1], wanted[1]):
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), atol=1e-5, rtol=1e-4, err_msg=weight.name)
    assert any(np.abs(x.asnumpy()).max() > 1e-3 for x in got[1])
