"""Compare `windowed_attention` with the float64 oracle: all options combined, in both modes and with every backend."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import oracle
from calls import BACKENDS, COMPLETE, skip_what_it_refuses
from local_attention import WindowSpec, merge_attentions, settings, use_backend, windowed_attention
from local_attention.attend import Frame, Problem
from local_attention.explanation import explain
from local_attention.spec import NO_LIMIT, Scoring

B, H, D, W = 2, 6, 10, 7
SPECS = [WindowSpec(1, W, 0, True), WindowSpec(W, W, 0, True), WindowSpec(W, 2 * W, W, False),
         WindowSpec(1, W, 3, False), WindowSpec.from_chunks(W), WindowSpec(1, W, 0, True, prefix=3),
         WindowSpec(W, 0, 0, True, prefix=W + 2),
         WindowSpec(1, 2, -1, False, prefix=2), WindowSpec.from_flash((-1, 0), causal=True)]


class Case:
    """A call and its inputs, drawn from a seed."""

    def __init__(self, seed, **fixed):
        rng = np.random.default_rng(seed)

        def pick(name, *choices):
            choice = choices[rng.integers(len(choices))]
            return fixed.get(name, choice)
        self.spec = pick("spec", *SPECS)
        n_k = pick("n_k", 1, W - 1, 2 * W, 3 * W + 2, 61, 150)
        n_q = pick("n_q", n_k, n_k, n_k, 1, max(1, n_k // 3))
        self.key_heads = pick("key_heads", 1, 2, 3, 6)

        def draw(*shape):
            return rng.standard_normal(shape).astype(np.float32)
        self.tensors = dict(q=draw(B, H, n_q, D), k=draw(B, self.key_heads, n_k, D), v=draw(B, self.key_heads, n_k, D))
        self.dout, self.dlse = draw(B, H, n_q, D), draw(B, H, n_q)
        lengths = rng.integers(1, 30, (B, n_k))
        ids = np.stack([np.repeat(np.arange(n_k) % 5, row)[:n_k] for row in lengths]).astype(np.int32)
        ids[0, ids[0] == 2] = -1
        mask, bias, sinks = rng.random((B, n_k)) > .3, None, draw(H)
        if not self.spec.prefix and self.spec.backward < NO_LIMIT:
            bias = draw(H, self.spec.bucket, self.spec.backward + self.spec.bucket + self.spec.forward)
        self.plain = dict(segment_ids=ids if pick("documents", False, True) else None,
                          mask=mask if pick("mask", False, False, True) else None)
        if pick("bias", False, True) and bias is not None:
            self.tensors["attn_bias"] = bias
        if pick("sinks", False, True):
            self.tensors["sinks"] = sinks
        self.options = dict(softcap=pick("softcap", None, None, 2.), scale=pick("scale", None, .7))

    def wanted(self):
        q, k, v = (self.tensors[name].reshape(-1, *self.tensors[name].shape[2:]) for name in "qkv")
        scale = self.options["scale"] or D ** -0.5
        numbers = dict(bias=self.tensors.get("attn_bias"), sinks=self.tensors.get("sinks"), key_mask=self.plain["mask"],
                       softcap=self.options["softcap"], dout=self.dout.reshape(q.shape),
                       dlse=self.dlse.reshape(q.shape[:2]))
        if self.plain["segment_ids"] is None:
            got = oracle.everything(q, k, v, self.spec, scale, offset=k.shape[1] - q.shape[1], **numbers)
        else:
            got = oracle.in_documents(q, k, v, self.spec, scale, self.plain["segment_ids"], **numbers)
        got["attn_bias"] = got["bias"]
        return [got["out"], got["lse"], *(got[name] for name in self.tensors)]

    def got(self, backend, mode="pynative", dtype=ms.float32, **more):
        names, inputs = list(self.tensors), [Tensor(x) for x in self.tensors.values()]
        inputs[:3] = [x.astype(dtype) for x in inputs[:3]]
        plain = {name: None if x is None else Tensor(x) for name, x in self.plain.items()}
        spec, options, dout, dlse = self.spec, {**self.options, **more}, Tensor(self.dout), Tensor(self.dlse)

        def forward(*inputs):
            named = {}
            for index in range(3, len(names)):
                named[names[index]] = inputs[index]
            out, lse = windowed_attention(*inputs[:3], spec, return_lse=True, backend=backend, **plain, **named,
                                          **options)
            there = ops.masked_fill(lse, lse == float("-inf"), 0.)
            return (out.astype(ms.float32) * dout).sum() + (there * dlse).sum(), out, lse
        skip_what_it_refuses(backend, forward, *inputs)
        step = ms.value_and_grad(forward, tuple(range(len(inputs))), has_aux=True)
        (_, out, lse), grads = (ms.jit(step) if mode == "graph" else step)(*inputs)
        return [x.astype(ms.float32).asnumpy() for x in (out, lse, *grads)]


def assert_close(got, wanted, tolerance=3e-5):  # float32 sums of up to 150 terms of size 1, times up to 3 heads
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b.reshape(a.shape), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("backend", BACKENDS)
def test_pynative_sweep(backend, seed):
    case = Case(seed)
    assert_close(case.got(backend), case.wanted())


@pytest.mark.parametrize("seed", range(100, 103))
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_sweep(backend, seed):
    case = Case(seed)
    assert_close(case.got(backend, "graph"), case.wanted())


EVERYTHING = [dict(spec=SPECS[1], bias=True), dict(spec=SPECS[5], bias=False), dict(spec=SPECS[3], bias=True)]


@pytest.mark.parametrize("fixed", EVERYTHING, ids=["windows", "prefix", "moving"])
@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_at_once_with_gradients_that_are_not_zero(backend, mode, fixed):
    case = Case(3, **fixed, n_k=61, n_q=43, key_heads=2, documents=True, mask=True, sinks=True, softcap=2.)
    got = case.got(backend, mode)
    assert all(np.abs(grad).max() > 1e-2 for grad in got[2:])
    assert_close(got, case.wanted())


@pytest.mark.parametrize("dtype, tolerance", [(ms.float16, 1e-2), (ms.bfloat16, 8e-2)])  # some ulps of inputs of size 4
@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, mode, dtype, tolerance):
    case = Case(3, spec=SPECS[1], bias=True, n_k=61, n_q=43, key_heads=2, documents=True, mask=True, sinks=True,
                softcap=2.)
    assert_close(case.got(backend, mode, dtype), case.wanted(), 3 * tolerance)  # of 3 heads


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("spec", [SPECS[1], SPECS[5]], ids=["windows", "prefix"])
def test_dropout_is_one_function_of_the_seed_everywhere(spec, mode):
    for documents in (False, True):
        case = Case(4, spec=spec, n_k=61, n_q=43, key_heads=2, documents=documents, sinks=True, mask=True)
        wanted = case.got("dense", "graph", dropout_rate=.3, seed=11)
        assert np.abs(wanted[0] - case.got("dense", dropout_rate=.3, seed=12)[0]).max() > 1e-2
        for backend in COMPLETE[:-1]:
            assert_close(case.got(backend, mode, dropout_rate=.3, seed=11), wanted)


@pytest.mark.parametrize("poison", [1e4, np.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_read(backend, poison):
    """Padding by a negative id, or by the mask."""
    case = Case(5, spec=SPECS[5], n_k=61, n_q=61, key_heads=2, documents=True, mask=True, sinks=True)
    clean = case.got(backend)
    padding = case.plain["segment_ids"] < 0
    assert padding.any()
    hidden = np.repeat((padding | ~case.plain["mask"])[:, None], 2, 1)
    case.tensors["k"][hidden], case.tensors["v"][hidden] = poison, poison
    case.tensors["q"][np.repeat(padding[:, None], H, 1)] = poison
    for a, b in zip(case.got(backend), clean):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_documents_and_what_is_to_come_are_never_read(backend):
    poison = np.nan if backend == "native" else 1e4  # plain operators multiply invisible values by 0
    case = Case(6, spec=WindowSpec(W, W, 0, True, prefix=4), n_k=61, n_q=61, key_heads=2, documents=True, mask=False,
                softcap=None)
    ids = case.plain["segment_ids"] = np.repeat([[0] * 23 + [1] * 20 + [2] * 18], B, 0).astype(np.int32)
    case.dout[:, :, 43:], case.dlse[:, :, 43:] = 0, 0
    case.dout[:, :, :23], case.dlse[:, :, :23] = 0, 0
    clean = case.got(backend)
    for name in "kv":
        case.tensors[name][np.repeat((ids != 1)[:, None], 2, 1)] = poison
    got = case.got(backend)
    for a, b in zip((*got[:2], *got[2:5]), (*clean[:2], *clean[2:5])):
        np.testing.assert_allclose(a[:, :, 23:43], b[:, :, 23:43], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_put_together_are_the_whole(backend):
    case = Case(7, spec=WindowSpec.from_flash((-1, -1)), n_k=61, n_q=23, key_heads=2, documents=False, mask=False,
                bias=False, sinks=False, softcap=None, scale=None)
    q, k, v = (Tensor(case.tensors[name]) for name in "qkv")
    sinks = Tensor(np.arange(H, dtype=np.float32) / 3)

    def whole(q, k, v, sinks):
        out, lse = windowed_attention(q, k, v, case.spec, sinks=sinks, return_lse=True, backend=backend)
        return (out * Tensor(case.dout)).sum() + (lse * Tensor(case.dlse)).sum(), out

    skip_what_it_refuses(backend, whole, q, k, v, sinks)

    def pieces(q, k, v, sinks):
        outs, lses = [], []
        for start, end in ((0, 25), (25, 61)):
            out, lse = windowed_attention(q, k[:, :, start:end], v[:, :, start:end], case.spec, return_lse=True,
                                          sinks=sinks if start else None, backend=backend)
            outs.append(out)
            lses.append(lse)
        out, lse = merge_attentions(tuple(outs), tuple(lses))
        return (out * Tensor(case.dout)).sum() + (lse * Tensor(case.dlse)).sum(), out
    results = [ms.value_and_grad(f, (0, 1, 2, 3), has_aux=True)(q, k, v, sinks) for f in (whole, pieces)]
    for ((_, a), grads_a), ((_, b), grads_b) in [results]:
        for x, y in zip((a, *grads_a), (b, *grads_b)):
            assert np.abs(x.asnumpy()).max() > 1e-2
            np.testing.assert_allclose(x.asnumpy(), y.asnumpy(), atol=3e-5)


def test_merging_what_saw_nothing():
    out, lse = Tensor(np.ones((1, 2, 3), np.float32)), Tensor(np.full((1, 2), -np.inf, np.float32))
    merged, both = merge_attentions((out, out), (lse, lse))
    assert (merged.asnumpy() == 0).all() and np.isneginf(both.asnumpy()).all()
    merged, both = merge_attentions((out, out * 2), (lse, ops.ones((1, 2))))
    np.testing.assert_allclose(merged.asnumpy(), 2)
    np.testing.assert_allclose(both.asnumpy(), 1)


class Windowed(nn.Cell):
    def __init__(self, spec, **options):
        super().__init__()
        self.spec, self.options = spec, options

    def construct(self, q, k, v, mask, ids, sinks):
        out, lse = windowed_attention(q, k, v, self.spec, mask=mask, segment_ids=ids, sinks=sinks, return_lse=True,
                                      **self.options)
        return out, lse


@pytest.mark.parametrize("spec", [SPECS[2], SPECS[5], SPECS[8]], ids=["windows", "prefix", "unlimited"])
def test_lengths_that_a_graph_does_not_know(spec):
    case = Case(8, spec=spec, n_k=150, n_q=70, key_heads=2, documents=True, mask=True, sinks=True, softcap=2.,
                bias=False)
    net = Windowed(spec, softcap=2., scale=case.options["scale"])
    inputs = [Tensor(case.tensors[name]) for name in "qkv"] + [
        Tensor(case.plain["mask"]), Tensor(case.plain["segment_ids"]), Tensor(case.tensors["sinks"])]
    wanted = [x.asnumpy() for x in net(*inputs)]
    assert_close(wanted, case.wanted()[:2])
    net.set_inputs(Tensor(shape=[None, H, None, D], dtype=ms.float32),
                   *2 * [Tensor(shape=[None, 2, None, D], dtype=ms.float32)],
                   Tensor(shape=[None, None], dtype=ms.bool_), Tensor(shape=[None, None], dtype=ms.int32), inputs[5])
    graph = Windowed(spec, softcap=2., scale=case.options["scale"])
    graph.set_inputs(*net.get_inputs())
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        got = [x.asnumpy() for x in graph(*inputs)]
        shorter = [x.asnumpy() for x in graph(inputs[0][:1, :, :20], inputs[1][:1, :, :33], inputs[2][:1, :, :33],
                                              inputs[3][:1, :33], inputs[4][:1, :33], inputs[5])]
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert_close(got, wanted)
    plain = Windowed(spec, softcap=2., scale=case.options["scale"])
    assert_close(shorter, [x.asnumpy() for x in plain(
        inputs[0][:1, :, :20], inputs[1][:1, :, :33], inputs[2][:1, :, :33], inputs[3][:1, :33], inputs[4][:1, :33],
        inputs[5])])


def test_explain_names_the_options_and_counts_what_is_done():
    spec, scoring = WindowSpec(1, 511, 0, True, prefix=4), Scoring(.125, softcap=50.)
    text = explain(Problem(spec, scoring, 8, 2048, 2048, 64, 64, per_key_head=4, frame=Frame(lse=True),
                           shapes=(("documents", (1, 2048, 2)), ("sinks", (8,)))))
    assert ("options: 4 query heads to a key head, documents, a prefix of 4, sinks, softcap 50.0, the log-sum-exp"
            in text)


def test_use_backend_may_be_entered_again_and_within_itself():
    before, dense = settings.backend, use_backend("dense")
    with dense:
        assert settings.backend == "dense"
    assert settings.backend == before
    for _ in range(2):
        with dense:
            assert settings.backend == "dense"
            with use_backend("blocked"), dense:
                assert settings.backend == "dense"
            assert settings.backend == "dense"
        assert settings.backend == before
    late = use_backend("dense")
    use_backend("blocked")  # for good
    with late:
        assert settings.backend == "dense"
    assert settings.backend == "blocked"
    use_backend(before)


def test_use_backend_holds_for_its_block_and_for_good():
    q = ops.ones((1, 1, 4, 2))

    def runs():
        return explain(Problem(SPECS[0], Scoring(1.), 6, 9, 9, 10, 10)).split(":")[0]
    before = runs()
    with use_backend("dense"):
        assert runs() == "dense"
        with use_backend("blocked"):
            assert runs() == "blocked"
        assert runs() == "dense"
        windowed_attention(q, q, q, SPECS[0])
    assert runs() == before
    use_backend("blocked")
    assert runs() == "blocked"
    use_backend(None)
    assert runs() == before


def bad(**change):
    x = Tensor(np.zeros((B, H, 9, D), np.float32))
    return windowed_attention(**{**dict(q=x, k=x, v=x, spec=SPECS[0]), **change})


def zeros(*shape, dtype=np.float32):
    return Tensor(np.zeros(shape, dtype))


@pytest.mark.parametrize("change, error, message", [
    (dict(spec=5), TypeError, "'spec' must be a WindowSpec, but got 5 of type int"),
    (dict(q=zeros(B, H, 9)), ValueError, r"'q' must be of shape \(b, h, n_q, d\)"),
    (dict(q=np.zeros((B, H, 9, D))), TypeError, "'q' must be a Tensor"),
    (dict(k=zeros(B, 4, 9, D)), ValueError,
     r"'k' must be of shape \(2, h_kv, n_k, 10\), h_kv a divisor of 6 and n_k at least 9, but got \(2, 4, 9, 10\)"),
    (dict(k=zeros(B, H, 8, D)), ValueError, r"'k' must be .* n_k at least 9, but got"),
    (dict(q=zeros(B, 1, 6, D), k=zeros(B, 9, 3, D)), ValueError,
     r"'k' must be .* \(heads stand before tokens; here they look exchanged, which swapaxes\(-3, -2\) of q, k and v"),
    (dict(v=zeros(B, 2, 9, D)), ValueError, "'v' must be of k's shape"),
    (dict(v=zeros(B, H, 9, D, dtype=np.float16)), TypeError, "'v' must be a Tensor of float32, but got float16"),
    (dict(mask=zeros(B, 8, dtype=bool)), ValueError, r"'mask' must be of shape \(b, n_k\), \(2, 9\)"),
    (dict(mask=[True]), TypeError, "'mask' must be a Tensor"),
    (dict(segment_ids=zeros(B, 9)), TypeError, "'segment_ids' must be a Tensor of int32 or int64, but got float32"),
    (dict(segment_ids=zeros(3, 9, dtype=np.int32)), ValueError, r"'segment_ids' must be of shape \(2, 9\)"),
    (dict(attn_bias=zeros(H, 2, W + 1)), ValueError, r"'attn_bias' must be of shape .* \(6, 1, 8\), or .*, but got"),
    (dict(attn_bias=zeros(H, 1, W + 1), spec=SPECS[5]), ValueError,
     "'attn_bias' and 'a prefix of 'spec'' cannot go together"),
    (dict(attn_bias=zeros(H, 1, W + 1), spec=SPECS[8]), ValueError,
     "'attn_bias' must be None where 'spec' has no limit"),
    (dict(sinks=zeros(2)), ValueError, r"'sinks' must be of shape \(6,\)"),
    (dict(softcap=0.), ValueError, "'softcap' must be a positive number from 1e-30 to 1e30, but got 0"),
    (dict(scale="1"), TypeError, "'scale' must be a number"),
    (dict(dropout_rate=1.), ValueError, r"'dropout_rate' must be a rate in \[0, 1\)"),
    (dict(seed=.5), TypeError, "'seed' must be an int"),
    (dict(return_lse=1), TypeError, "'return_lse' must be a bool"),
    (dict(backend="fast"), ValueError, "'backend' must be None or one of"),
])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"For 'windowed_attention', {message}"):
        bad(**change)


@pytest.mark.parametrize("outs, lses, error, message", [
    (zeros(2, 3), (zeros(2),), TypeError, "'outs' must be a tuple of Tensors"),
    ((zeros(2, 3),), (), TypeError, "'lses' must be a tuple of Tensors"),
    ((zeros(2, 3),), (zeros(2), zeros(2)), ValueError, "'lses' must be of as many pieces as outs, 1, but got 2"),
    ((zeros(2, 3), zeros(2, 4)), (zeros(2), zeros(2)), ValueError, r"'outs' must be of one shape, \(2, 3\)"),
    ((zeros(2, 3),), (zeros(3),), ValueError, "'lses' must be of the shape of outs without d"),
])
def test_bad_pieces_are_named(outs, lses, error, message):
    with pytest.raises(error, match=f"For 'merge_attentions', {message}"):
        merge_attentions(outs, lses)
