"""Exported files, run elsewhere: each Cell and each option by onnxruntime, against the Cell itself.

A line of `CASES` is a case: what is called, the names of its last inputs, and all of its inputs. Those in `QUICK` have
every option; `pytest -m export` runs each by itself.
"""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import local_attention
from local_attention import (LocalAttention, LocalMHA, LocalSelfAttention, LocalTransformer, MultiHeadLocalAttention,
                             WindowSpec, merge_attentions, windowed_attention)
from local_attention.backends import portable
from local_attention.transformer import DynamicPositionBias

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

B, H, N, D, W = 2, 3, 13, 10, 5
OPSET = 11
DRAWN = np.random.RandomState(7)


def floats(*shape):
    return Tensor(DRAWN.randn(*shape).astype(np.float32))


Q, K, V, X, GROUPED = floats(B, H, N, D), floats(B, H, N, D), floats(B, H, N, D), floats(B, N, 12), floats(B, 6, N, D)
TOKENS = Tensor(DRAWN.randint(0, 23, (B, N)).astype(np.int32))
PADDED = Tensor(np.arange(N) < np.array([[N - 2], [N]]))
PADDED_LEFT = Tensor(np.arange(N) >= np.array([[3], [0]]))
DOCUMENTS = Tensor(np.array([[0] * 4 + [1] * 6 + [2] * 3, [5] * 7 + [6] * 4 + [-1] * 2], np.int32))
OFFSETS, PLACES, SINKS = floats(H, 1, W), floats(H, W, 2 * W), floats(H)
MOVING, PREFIXED, ALIGNED = WindowSpec(1, W - 1, 0, True), WindowSpec(1, W - 1, 0, True, 2), WindowSpec(W, W, 0, True)
WITH = "mask", "attn_bias", "sinks"


class Call(nn.Cell):
    """Calls a Cell or a function; its last inputs are those of these names."""

    def __init__(self, called, *names, **options):
        super().__init__()
        self.called, self.names, self.options = called, names, options

    def construct(self, *x):
        count, named = len(x) - len(self.names), {}
        for index in range(len(self.names)):
            named[self.names[index]] = x[count + index]
        return self.called(*x[:count], **named, **self.options)


class Distances(nn.Cell):
    def __init__(self):
        super().__init__()
        self.bias = DynamicPositionBias(6, 3)

    def construct(self, x):
        return self.bias(5, 10, 2) + x[0, 0, 0]


def merged(a, b, lse_a, lse_b):
    return merge_attentions((a, b), (lse_a, lse_b))


def windowed(*names, spec=MOVING, **options):
    return Call(windowed_attention, *names, spec=spec, **options)


def sliding(*names, **options):
    return Call(local_attention.sliding_window_attention, *names, window_size_left=3, window_size_right=2, **options)


def windows(*names, **options):
    return Call(LocalAttention(W, autopad=True, **{"causal": True, "dim": D, **options}), *names)


def block(*names, **options):
    return Call(LocalMHA(**{**dict(dim=12, window_size=W, dim_head=D, heads=4, causal=True), **options}), *names)


def language_model(**options):
    return LocalTransformer(**{**dict(num_tokens=23, max_seq_len=41, dim=12, depth=1, heads=4, dim_head=D,
                                      local_attn_window_size=W), **options})


def model(*names, **options):
    return Call(language_model(**options), *names)


CASES = {
    "windowed_attention": lambda: (windowed(), Q, K, V),
    "grouped heads": lambda: (windowed(), GROUPED, K, V),
    "fewer queries": lambda: (windowed(), Q[:, :, 9:], K, V),
    "both sides": lambda: (windowed(spec=WindowSpec(W, W, W, False)), Q, K, V),
    "float16": lambda: (windowed(), *(ops.cast(x, ms.float16) for x in (Q, K, V))),
    "lse": lambda: (windowed(return_lse=True), Q, K, V),
    "mask": lambda: (windowed("mask"), Q, K, V, PADDED),
    "segment_ids": lambda: (windowed("segment_ids"), Q, K, V, DOCUMENTS),
    "attn_bias": lambda: (windowed("attn_bias"), Q, K, V, OFFSETS),
    "attn_bias of places": lambda: (windowed("attn_bias", spec=ALIGNED), Q, K, V, PLACES),
    "sinks": lambda: (windowed("sinks"), Q, K, V, SINKS),
    "softcap": lambda: (windowed(softcap=2.), Q, K, V),
    "prefix": lambda: (windowed(spec=PREFIXED), Q, K, V),
    "many": lambda: (windowed(*WITH, softcap=2., return_lse=True), Q, K, V, PADDED, OFFSETS, SINKS),
    "prefix of documents": lambda: (windowed("mask", "segment_ids", spec=PREFIXED), Q, K, V, PADDED, DOCUMENTS),
    "bias of documents": lambda: (windowed("attn_bias", "segment_ids", spec=ALIGNED), Q, K, V, PLACES, DOCUMENTS),
    "dense": lambda: (windowed(*WITH, "segment_ids", softcap=2., backend="dense"), Q, K, V, PADDED, OFFSETS, SINKS,
                      DOCUMENTS),
    "dense, prefix": lambda: (windowed(spec=PREFIXED, backend="dense"), Q, K, V),
    "dense, shared_qk": lambda: (windows(shared_qk=True, backend="dense"), Q, Q, V),
    "dense, rel_pos_emb": lambda: (sliding("rel_pos_emb", backend="dense"), Q, K, V, floats(5, D)),
    "merge_attentions": lambda: (Call(merged), Q, K, floats(B, H, N), floats(B, H, N)),
    "sliding_window_attention": lambda: (sliding("rel_pos_emb", "mask"), Q, K, V, floats(5, D), PADDED),
    "LocalAttention": lambda: (windows(causal=False), Q, K, V),
    "exact_windowsize": lambda: (windows(exact_windowsize=True), Q, K, V),
    "shared_qk": lambda: (windows(shared_qk=True), Q, Q, V),
    "xpos": lambda: (windows("mask", use_xpos=True), Q, K, V, PADDED),
    "LocalMHA": lambda: (block("mask", causal=False), X, PADDED),
    "LocalMHA, many": lambda: (block(prenorm=True, qk_rmsnorm=True, gate_values_per_head=True, kv_heads=2, prefix=2,
                                     learned_sinks=True, softcap=3.), X),
    "LocalSelfAttention": lambda: (Call(LocalSelfAttention(12, 3, window_size_left=3, window_size_right=2,
                                                           use_rel_pos_emb=True), "segment_ids"), X, DOCUMENTS),
    "MultiHeadLocalAttention": lambda: (Call(MultiHeadLocalAttention(
        12, 4, window_size_left=3, window_size_right=2, num_kv_heads=2), "mask"), X, floats(B, N, 12), PADDED),
    "DynamicPositionBias": lambda: (Distances(), X),
    "LocalTransformer": lambda: (model(depth=2, local_attn_window_size=(W, None)), TOKENS),
    "LocalTransformer, many": lambda: (model(kv_heads=2, prefix=2, softcap=3., qk_rmsnorm=True), TOKENS),
    "LocalTransformer, streams": lambda: (model("mask", use_dynamic_pos_bias=True, num_residual_streams=2), TOKENS,
                                          PADDED_LEFT),
    "LocalTransformer, xpos": lambda: (model(use_xpos=True), TOKENS),
    "LocalTransformer, moved rows": lambda: (model("mask", exact_windowsize=False), TOKENS, PADDED_LEFT),
    "LocalTransformer, documents": lambda: (model("mask", "segment_ids"), TOKENS, PADDED, DOCUMENTS),
    "LocalTransformer, a global layer": lambda: (model(global_attn_layer=LocalMHA(
        dim=12, window_size=N, look_backward=0, exact_windowsize=False, causal=True)), TOKENS),
    "LocalTransformer of vectors": lambda: (model(num_tokens=None), X),
}
QUICK = {"many", "bias of documents", "xpos", "LocalTransformer"}


def flat(x):
    return [one.asnumpy() for one in x] if isinstance(x, tuple) else [x.asnumpy()]


def exported(cell, path, *inputs):
    """Export a Cell, check the file, and return a function that runs it."""
    ms.export(cell, *inputs, file_name=str(path), file_format="ONNX")
    file = onnx.load(str(path))
    onnx.checker.check_model(file)
    assert [(one.domain, one.version) for one in file.opset_import] == [("", OPSET)]
    assert {node.domain for node in file.graph.node} == {""}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*inputs):
        assert len(inputs) == len(names)
        return session.run(None, dict(zip(names, inputs)))
    return run


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.export)
                                  for name in CASES])
def test_onnxruntime_computes_the_same(name, tmp_path):
    cell, *inputs = CASES[name]()
    expected = flat(cell(*inputs))
    found = exported(cell, tmp_path / "file.onnx", *inputs)(*[x.asnumpy() for x in inputs])
    assert len(found) == len(expected) and any(np.abs(x).max() > 0.1 for x in expected)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=2e-3 if b.dtype == np.float16 else 1e-5, rtol=1e-5)


def test_a_file_has_no_number_for_each_pair_of_positions(tmp_path):
    n = 509
    x, offsets = floats(1, 1, n, 4), floats(1, 1, n)
    exported(windowed("attn_bias", spec=WindowSpec(1, n - 1, 0, True)), tmp_path / "file.onnx", x, x, x, offsets)
    assert (tmp_path / "file.onnx").stat().st_size < n * n / 4


@pytest.mark.parametrize("options", [
    dict(prefix=2, kv_heads=2, exact_windowsize=False),
    pytest.param(dict(use_dynamic_pos_bias=True, num_residual_streams=2), marks=pytest.mark.export),
    pytest.param(dict(use_xpos=True, softcap=3., learned_sinks=True), marks=pytest.mark.export),
    pytest.param(dict(shared_qk=True, qk_rmsnorm=True, gate_values_per_head=True), marks=pytest.mark.export),
    pytest.param(dict(depth=2, layers_insert_global_attn=(2,), global_attn_layer=LocalMHA(
        dim=12, window_size=41, look_backward=0, exact_windowsize=False, causal=True)), marks=pytest.mark.export)],
    ids=lambda options: next(iter(options)))
def test_a_step_generates_by_onnxruntime_alone(options, tmp_path):
    lm = language_model(**options)
    names = [parameter.name for parameter in lm.get_parameters()]
    step = lm.exportable_step(2)
    rings = step.rings()
    run = exported(step, tmp_path / "step.onnx", TOKENS[:, 0], Tensor([0], ms.int32), *rings)
    assert names == [parameter.name for parameter in lm.get_parameters()]
    prime, kept, tokens = TOKENS.asnumpy(), [ring.asnumpy() for ring in rings], []
    for position in range(N + 16):
        token = prime[:, position] if position < N else tokens[-1]
        logits, *kept = run(token, np.array([position], np.int32), *kept)
        if position >= N - 1:
            tokens.append(logits.argmax(-1).astype(np.int32))
    np.testing.assert_array_equal(np.stack(tokens, 1), lm.generate(TOKENS, 17, temperature=0.).asnumpy())


def test_a_step_as_mindir_and_its_inputs(tmp_path):
    step = language_model().exportable_step()
    inputs = Tensor([4], ms.int32), Tensor([0], ms.int32), *step.rings()
    expected = flat(step(*inputs))
    ms.export(step, *inputs, file_name=str(tmp_path / "step"), file_format="MINDIR")
    for a, b in zip(flat(nn.GraphCell(ms.load(str(tmp_path / "step.mindir")))(*inputs)), expected):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="'rings' must be those of 'rings' or of the step before"):
        step(*inputs[:3])
    with pytest.raises(ValueError, match=r"'token' must be of shape \(1,\)"):
        step(Tensor([4, 4], ms.int32), *inputs[1:])


@pytest.mark.parametrize("options, message", [(dict(num_tokens=None), "tokens"), (dict(causal=False), "causal"),
                                              (dict(global_attn_layer=nn.Dense(12, 12)), "global_attn_layer")])
def test_models_without_a_step(options, message):
    with pytest.raises(ValueError, match=f"'LocalTransformer.exportable_step', the model must be .*{message}"):
        language_model(**options).exportable_step()


@pytest.mark.parametrize("cell, message", [
    (lambda: windowed(backend="native"), "'native' cannot run this call: it is a library of this machine"),
    (lambda: windowed(dropout_rate=0.1), "exported to ONNX must have no dropout")])
def test_what_a_file_cannot_have(cell, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ms.export(cell(), Q, K, V, file_name=str(tmp_path / "file"), file_format="ONNX")


def test_open_lengths_are_refused_by_mindspore_s_newer_function_too(tmp_path):
    if not hasattr(ms, "onnx"):
        pytest.skip("MindSpore has no mindspore.onnx before 2.8")
    some = Tensor(shape=[B, H, None, D], dtype=ms.float32)
    with pytest.raises(ValueError, match="exported to ONNX must have known lengths"):
        ms.onnx.export(windowed(), some, some, some, file_name=str(tmp_path / "file"))


def test_portable_forms_outside_an_export_are_mindspore_s_operators():
    """And the exact GELU of an export is MindSpore's within 1e-6."""
    x = Tensor(np.linspace(-9, 9, 1201).astype(np.float32))
    np.testing.assert_array_equal(portable.gelu(x).asnumpy(), ops.gelu(x).asnumpy())
    np.testing.assert_array_equal(portable.rsqrt(ops.abs(x) + 1).asnumpy(), ops.rsqrt(ops.abs(x) + 1).asnumpy())


def test_gelu_of_an_export(tmp_path):
    x = np.linspace(-9, 9, 1201).astype(np.float32)
    found, = exported(Call(portable.gelu), tmp_path / "file.onnx", Tensor(x))(x)
    np.testing.assert_allclose(found, ops.gelu(Tensor(x)).asnumpy(), atol=1e-6)
