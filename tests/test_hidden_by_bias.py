"""An entry of a bias that hides its key: -inf, anything below -1e29, and the lowest number of its dtype."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from calls import COMPLETE
from local_attention import LocalMHA, WindowSpec, windowed_attention

LOWEST = {"float32": -3.4028235e38, "float16": -65504., "bfloat16": -3.3895314e38}
MODES = {"pynative": lambda function: function, "graph": ms.jit}


def both(function, mode, *inputs):
    """Return the outputs of a function and the gradients of the sum of the first, in one mode."""
    def total(*inputs):
        outs = function(*inputs)
        return ops.cast(outs[0], ms.float32).sum(), outs
    (_, outs), grads = MODES[mode](ms.value_and_grad(total, tuple(range(len(inputs))), has_aux=True))(*inputs)
    return [ops.cast(x, ms.float32).asnumpy() for x in outs], [ops.cast(x, ms.float32).asnumpy() for x in grads]


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("hides", [-np.inf, LOWEST["float32"], -1e30])
def test_a_query_of_nothing_else_gives_zeros_and_other_queries_are_right(hides, backend, mode):
    """MindSpore's softmax on CPU stops at a row of -inf, and leaves the rows after it as they were in memory."""
    q, k, v = arrays(*3 * [(1, 1, 4, 2)])
    v[:, :, 1:] += 1e6
    bias = np.array([[[0, 0, hides]]], np.float32)  # a query's own key
    spec = WindowSpec(1, 2, 0, True)

    def call(q, k, v, bias):
        return windowed_attention(q, k, v, spec, attn_bias=bias, backend=backend, return_lse=True)
    (out, lse), grads = both(call, mode, *map(Tensor, (q, k, v, bias)))
    wanted, wanted_lse = np.zeros((4, 2)), np.full(4, -np.inf)
    for i in range(1, 4):
        seen = list(range(max(i - 2, 0), i))
        scores = q[0, 0, i] @ k[0, 0, seen].T * 2**-.5
        weights = np.exp(scores)
        wanted[i], wanted_lse[i] = weights @ v[0, 0, seen] / weights.sum(), np.log(weights.sum())
    np.testing.assert_allclose(out[0, 0], wanted, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(lse[0, 0], wanted_lse, rtol=2e-6, atol=1e-6)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert not grads[0][0, 0, 0].any() and not grads[1][0, 0, 3].any() and not grads[3][0, 0, 2]
    assert grads[3][0, 0, :2].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("dtype, options", [
    ("float32", dict()), ("float32", dict(documents=True)), ("float32", dict(causal=False)),
    ("float32", dict(sinks=True)), ("float32", dict(cap=3.)), ("float16", dict()),
    ("bfloat16", dict(documents=True))], ids=str)
def test_it_is_as_if_the_key_did_not_exist(options, dtype, backend, mode):
    """With every option: the hidden place of a bucket is left out, by a mask that hides those keys."""
    q, k, v = arrays((2, 6, 23, 10), (2, 3, 23, 10), (2, 3, 23, 10))
    bias, = arrays((6, 7, 21))
    spec = WindowSpec(7, 7, 0 if options.get("causal", True) else 7, options.get("causal", True))
    bias = bias if spec.forward else bias[:, :, :14]
    place = 3  # in a bucket, but with documents only their first tokens count from there
    columns = np.arange(bias.shape[2]) % 7 == place
    more = dict(softcap=options.get("cap"), sinks=Tensor(np.ones(6, np.float32)) if "sinks" in options else None)
    if "documents" in options:
        more["segment_ids"] = Tensor(np.repeat(np.arange(4), 7)[None, :23].repeat(2, 0).astype(np.int32))
    mask = np.tile(np.arange(23) % 7 != place, (2, 1))

    def call(q, k, v, bias, mask):
        return windowed_attention(q, k, v, spec, attn_bias=bias, mask=mask, backend=backend, return_lse=True, **more)
    tensors = [Tensor(x).astype(getattr(ms, dtype)) for x in (q, k, v)]
    hidden, plain = bias.copy(), bias
    hidden[:, :, columns] = LOWEST[dtype]
    wanted, wanted_grads = both(lambda *x: call(*x, Tensor(mask)), "pynative", *tensors,
                                Tensor(plain).astype(getattr(ms, dtype)))
    k_poisoned, v_poisoned = k.copy(), v.copy()
    k_poisoned[:, :, ~mask[0]], v_poisoned[:, :, ~mask[0]] = 1e3, -1e4
    tensors = [Tensor(x).astype(getattr(ms, dtype)) for x in (q, k_poisoned, v_poisoned, hidden)]

    def without_mask(q, k, v, bias):
        return call(q, k, v, bias, None)
    got, grads = both(without_mask, mode, *tensors)
    tolerance = 2e-5 if dtype == "float32" else 4e-2
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(grads[:3], wanted_grads[:3]):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(grads[3][:, :, ~columns], wanted_grads[3][:, :, ~columns], tolerance, tolerance)
    assert not grads[3][:, :, columns].any() and all(grad.any() for grad in grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["(h, W, 2W)", "(h, 1, W + 1)"])
def test_a_cached_step_hides_the_same_keys(shape, mode):
    mha = LocalMHA(dim=12, window_size=5, dim_head=4, heads=3, causal=True)
    x, bias = arrays((2, 13, 12), (3, 5, 10) if shape == "(h, W, 2W)" else (3, 1, 6))
    bias[0, :, 2], bias[1], bias[2, :, -3:] = -np.inf, LOWEST["float32"], -np.inf
    x, bias = Tensor(x), Tensor(bias)
    whole = mha(x, attn_bias=bias).asnumpy()
    assert np.isfinite(whole).all()
    for first in (4, 9):
        out, cache = mha(x[:, :first], attn_bias=bias, return_cache=True)
        parts = [out.asnumpy()]

        def step(x, cache, bias):
            return mha(x, attn_bias=bias, cache=cache, return_cache=True)
        for start, end in ((first, first + 1), (first + 1, first + 2), (first + 2, 13)):
            out, cache = MODES[mode](step)(x[:, start:end], ms.mutable(cache), bias)
            parts.append(out.asnumpy())
        np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", COMPLETE)
def test_a_query_does_not_fall_back_on_itself_where_a_bias_hides_it(backend):
    from local_attention import LocalAttention
    attn = LocalAttention(4, causal=True, shared_qk=True, backend=backend)
    x, v = arrays((1, 1, 8, 4), (1, 1, 8, 4))
    bias = np.zeros((1, 4, 8), np.float32)
    bias[0, 0, 4] = -np.inf  # the first query of a window: its own key
    out = attn(Tensor(x), Tensor(x), Tensor(v), attn_bias=Tensor(bias)).asnumpy()
    assert not out[0, 0, 0].any() and out[0, 0, 4].any()


@pytest.mark.parametrize("poison", [1e38, np.nan])
def test_the_kernel_does_not_read_what_a_bias_hides(poison):
    if "native" not in COMPLETE:
        pytest.skip("the kernel was not built")
    q, k, v, bias = arrays((1, 2, 40, 5), (1, 2, 40, 5), (1, 2, 40, 5), (2, 8, 16))
    bias[:, :, np.arange(16) % 8 == 5] = -np.inf
    spec, results = WindowSpec(8, 8, 0, True), []
    for value in (0., poison):
        k[:, :, 5::8], v[:, :, 5::8] = value, value

        def call(q, k, v, bias):
            return windowed_attention(q, k, v, spec, attn_bias=bias, return_lse=True, backend="native")
        outs, grads = both(call, "pynative", *map(Tensor, (q, k, v, bias)))
        results.append([*outs, *grads])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)
