"""Every backend against the float64 oracle, forward and backward, over a seeded sweep of options, in both modes."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import oracle
from calls import BACKENDS, COMPLETE, attend_to, skip_what_it_refuses
from local_attention.attend import Problem
from local_attention.backends.dropout import row_hash
from local_attention.spec import NO_LIMIT, Scoring, WindowSpec

W = 7
SPECS = [WindowSpec(1, W, 0, True), WindowSpec(W, W, 0, True), WindowSpec(W, W, W, False),
         WindowSpec(1, 2 * W, W, False), WindowSpec(W, 0, 0, True), WindowSpec(W, 0, 2 * W, False),
         WindowSpec(1, 3, -1, False), WindowSpec(1, NO_LIMIT, NO_LIMIT, False)]
LENGTHS = [1, W - 1, W, W + 1, 3 * W - 1, 3 * W, 3 * W + 1]


class Case:
    """One problem with its inputs, drawn from a seed; batch 2, heads 3, head_dim 10."""

    def __init__(self, seed, **fixed):
        rng = np.random.default_rng(seed)

        def pick(name, choices):
            choice = choices[rng.integers(len(choices))]
            return fixed.get(name, choice)
        self.spec = pick("spec", SPECS)
        n_q = pick("n", LENGTHS + [150])
        offset = pick("offset", [0, 0, 0, 5, W])
        n_k = offset + n_q
        self.options = {"scale": pick("scale", [10 ** -0.5, 0.7]), "hide_self": pick("hide_self", [False, False, True]),
                        "offset": offset}

        def draw(*shape):
            return rng.standard_normal(shape).astype(np.float32)
        self.q, self.k, self.v, self.dout = draw(6, n_q, 10), draw(6, n_k, 10), draw(6, n_k, 10), draw(6, n_q, 10)
        columns = min(self.spec.backward + W + self.spec.forward, 6 * W)
        bias, mask = draw(3, W, columns), rng.random((2, n_k)) > .4
        self.bias = bias if pick("bias", [False, True]) and self.spec.backward <= 2 * W else None
        emb = draw(max(self.spec.backward + 1 + self.spec.forward, 1), 10) if self.spec.backward <= 2 * W else None
        self.emb = emb if pick("emb", [False, True]) and self.spec.bucket == 1 else None
        self.mask = mask if pick("mask", [False, True]) else None

    def wanted(self):
        return oracle.attention(self.q, self.k, self.v, self.spec, key_mask=self.mask, bias=self.bias,
                                rel_pos_emb=self.emb, dout=self.dout, **self.options)

    def got(self, backend, mode, dtype=ms.float32, **more):
        inputs = [Tensor(x).astype(dtype) for x in (self.q, self.k, self.v)]
        inputs += [Tensor(x) for x in (self.bias, self.emb) if x is not None]
        has_bias, has_emb = self.bias is not None, self.emb is not None
        mask, dout = None if self.mask is None else Tensor(self.mask), Tensor(self.dout)
        spec, options = self.spec, {**self.options, **more}

        def forward(q, k, v, *extras):
            bias, emb = extras[0] if has_bias else None, extras[-1] if has_emb else None
            out = attend_to(q, k, v, spec, key_mask=mask, bias=bias, rel_pos_emb=emb, backend=backend, **options)
            return (out.astype(ms.float32) * dout).sum(), out
        skip_what_it_refuses(backend, forward, *inputs)
        step = ms.value_and_grad(forward, tuple(range(len(inputs))), has_aux=True)
        (_, out), grads = (ms.jit(step) if mode == "graph" else step)(*inputs)
        return [x.astype(ms.float32).asnumpy() for x in (out, *grads)]


def assert_close(got, wanted, tolerance):
    wanted = [x for x in wanted if x is not None]
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("backend", BACKENDS)
def test_pynative_sweep(backend, seed):
    case = Case(seed)
    assert_close(case.got(backend, "pynative"), case.wanted(), 2e-5)  # float32 sums of up to 150 terms of size 1


@pytest.mark.parametrize("seed", range(100, 104))
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_sweep(backend, seed):
    case = Case(seed)
    assert_close(case.got(backend, "graph"), case.wanted(), 2e-5)


def test_every_option_at_once_with_gradients_that_are_not_zero():
    case = Case(0, spec=SPECS[3], n=23, bias=True, emb=True, mask=True, hide_self=True, offset=5)
    for backend in COMPLETE:
        got = case.got(backend, "graph")
        assert all(np.abs(grad).max() > 1e-2 for grad in got[1:])
        assert_close(got, case.wanted(), 2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(ms.float16, 1e-2), (ms.bfloat16, 8e-2)])  # some ulps of inputs of size 4
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_half_precision(mode, backend, dtype, tolerance):
    case = Case(1, spec=SPECS[0], n=23, offset=0, mask=True)
    assert_close(case.got(backend, mode, dtype), case.wanted(), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_no_further_from_the_truth_than_its_rounding(backend):
    """The softmax is in float32, so only the result's rounding is left, compared with the oracle on rounded inputs."""
    case = Case(1, spec=SPECS[0], n=23, offset=0, bias=False)
    case.q, case.k, case.v = (x.astype(np.float16).astype(np.float32) for x in (case.q, case.k, case.v))
    np.testing.assert_allclose(case.got(backend, "pynative", ms.float16)[0], case.wanted()[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(mode, backend):
    case = Case(2, spec=SPECS[0], n=23, offset=0, mask=True, hide_self=False, bias=True)
    case.mask[:, :12] = False
    out, dq, dk, dv, *_ = case.got(backend, mode)
    assert (out[:, :12] == 0).all() and (dq[:, :12] == 0).all()
    hidden = ~np.repeat(case.mask, 3, 0)
    assert (dk[hidden] == 0).all() and (dv[hidden] == 0).all()
    assert np.abs(out[:, 20:]).max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strictly_causal_first_query_sees_nothing(backend):
    case = Case(3, spec=SPECS[6], n=23, offset=0, mask=False)
    out, dq, *_ = case.got(backend, "pynative")
    assert (out[:, 0] == 0).all() and (dq[:, 0] == 0).all() and np.abs(dq[:, 1:]).max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [1e4, np.nan])
def test_masked_keys_are_never_read(backend, poison):
    case = Case(4, spec=SPECS[2], n=23, offset=0, mask=True, bias=False)
    clean = case.got(backend, "pynative")
    hidden = ~np.repeat(case.mask, 3, 0)
    case.k[hidden], case.v[hidden] = poison, poison
    for a, b in zip(clean, case.got(backend, "pynative")):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_is_never_read(backend):
    case = Case(5, spec=SPECS[1], n=23, offset=0, mask=False, bias=False, hide_self=False)
    case.dout[:, 11:] = 0
    clean = case.got(backend, "pynative")
    case.k[:, 11:], case.v[:, 11:] = 1e4, 1e4
    for a, b in zip(clean, case.got(backend, "pynative")):
        np.testing.assert_allclose(a[:, :11], b[:, :11], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_finite(backend):
    case = Case(6, spec=SPECS[2], n=23, offset=0, bias=False, hide_self=False)
    case.q *= 1e4
    got = case.got(backend, "pynative")
    assert all(np.isfinite(x).all() for x in got)
    np.testing.assert_allclose(got[0], case.wanted()[0], atol=1e-4)


def test_blocks_of_all_sizes_agree(monkeypatch):
    """With small blocks and small steps, a short sequence goes through every branch of a long one."""
    from local_attention import plan
    from local_attention.backends import blocks
    monkeypatch.setattr(plan, "SMALLEST", 8)
    monkeypatch.setattr(plan, "BLOCK", 8)
    for scores_at_once in (1, 200, 1000):
        monkeypatch.setattr(blocks, "SCORES_AT_ONCE", scores_at_once)
        for seed, spec in enumerate(SPECS):
            case = Case(seed, spec=spec, n=61 + scores_at_once % 7, mask=seed % 2 == 0, bias=seed % 3 == 0)
            assert_close(case.got("blocked", "pynative"), case.wanted(), 2e-5)


def test_steps_depend_on_the_length_linearly_and_chunks_are_bounded():
    from local_attention.backends.blocked import scores
    from local_attention.backends.blocks import CHUNKS, schedule
    counts = []
    for n in (2**14, 2**15, 2**16, 2**17):
        problem = Problem(WindowSpec(1, 512, 0, True), Scoring(0.125), 8, n, n, 64, 64)
        runs, together, steps = schedule(problem)
        assert len(steps) * 8 // together <= 3 * CHUNKS
        counts.append(scores(problem)[0] / n)
    assert max(counts) < 1.02 * min(counts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_dropout_is_a_function_of_the_seed(mode, backend):
    case = Case(7, spec=SPECS[1], n=23, offset=0, bias=True, mask=True)

    def got(seed):
        return case.got(backend, mode, dropout=0.3, seed=Tensor([seed], ms.int32))
    once, again, other = got(11), got(11), got(12)
    for a, b, c in zip(once, again, other):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 1e-2
    if mode == "graph" or backend != "dense":  # the mask is the same everywhere
        for a, b in zip(once, case.got("dense", "pynative", dropout=0.3, seed=Tensor([11], ms.int32))):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("pair", [(602, 3881), (0, 1)])
def test_two_heads_drop_places_of_their_own_wherever_they_begin(pair):
    """The hashes of heads 602 and 3881 are 195 apart."""
    a, b = row_hash(pair, np.arange(2000))
    for shift in range(1, 1000):
        assert (a[shift:] == b[:-shift]).sum() < 3 and (b[shift:] == a[:-shift]).sum() < 3
    n = 400  # drops half of the weights, in the same places for half of them
    zeros, values = Tensor(np.zeros((1, n, n), np.float32)), Tensor(np.eye(n, dtype=np.float32)[None])
    kept = [attend_to(zeros, zeros, values, WindowSpec(1, NO_LIMIT, NO_LIMIT, False), 1., dropout=.5, origin=(group, 0),
                      seed=Tensor([7], ms.int32)).asnumpy()[0] > 0 for group in pair]
    for shift in (0, 195):
        assert abs((kept[0][shift:] == kept[1][:n - shift]).mean() - .5) < .02
        assert abs((kept[1][shift:] == kept[0][:n - shift]).mean() - .5) < .02


def test_dropout_keeps_the_right_share_and_scale():
    """If the values are one-hot, the output is the dropped weights."""
    n, rate = 256, 0.3
    zeros, eye = Tensor(np.zeros((4, n, n), np.float32)), Tensor(np.tile(np.eye(n, dtype=np.float32), (4, 1, 1)))
    weights = attend_to(zeros, zeros, eye, WindowSpec(1, NO_LIMIT, NO_LIMIT, False), 1., dropout=rate,
                     seed=Tensor([5], ms.int32)).asnumpy() * n
    kept = weights > 0
    np.testing.assert_allclose(weights[kept], 1 / (1 - rate), rtol=1e-5)
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 4 * sigma / kept.size ** 0.5
    centred = (kept - (1 - rate)) / sigma
    for shifted in (centred[:, 1:] * centred[:, :-1], centred[..., 1:] * centred[..., :-1], centred[1:] * centred[:-1]):
        assert abs(shifted.mean()) < 4 / shifted.size ** 0.5  # neighbours are independent
    assert np.linalg.svd(centred[0], compute_uv=False)[0] < 2.2 * n ** 0.5  # so are rows, columns: 2 sqrt(n) at random


def test_dropout_follows_the_global_seed_and_differs_from_call_to_call():
    case = Case(8, spec=SPECS[0], n=23, offset=0)

    def two_calls():
        ms.set_seed(3)
        return [case.got("blocked", "pynative", dropout=0.3)[0] for _ in range(2)]
    (a, b), (c, d) = two_calls(), two_calls()
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, d)
    assert np.abs(a - b).max() > 1e-2


def test_a_backend_asked_for_by_name_that_cannot_run_says_why():
    x = Tensor(np.zeros((2, 7, 10), np.float32))  # outside a gradient: an error within leaves MindSpore in a bad state
    with pytest.raises(ValueError, match="ascend.*cannot run this call"):
        attend_to(x, x, x, SPECS[0], 1., backend="ascend")


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_drop_what_the_whole_drops(backend):
    case = Case(9, spec=SPECS[1], n=3 * W, offset=0, mask=False, bias=False, hide_self=False)
    options = dict(spec=case.spec, scale=.3, dropout=.3, seed=Tensor([11], ms.int32), backend=backend)
    inputs = [Tensor(x) for x in (case.q, case.k, case.v)]
    skip_what_it_refuses(backend, lambda: attend_to(*inputs, **options))
    whole = attend_to(*inputs, **options).asnumpy()
    q, k, v = Tensor(case.q[2:, 2 * W:]), Tensor(case.k[2:, W:]), Tensor(case.v[2:, W:])
    part = attend_to(q, k, v, offset=W, origin=(2, W), **options).asnumpy()
    np.testing.assert_allclose(part, whole[2:, 2 * W:], atol=1e-5)
    assert np.abs(attend_to(q, k, v, offset=W, **options).asnumpy() - part).max() > 1e-2
