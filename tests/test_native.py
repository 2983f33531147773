"""What only the native kernel has: widths of vectors, threads, sizes around its tiles, and memory it must not read."""
import shutil
import threading

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from local_attention import LocalAttention, LocalTransformer, settings
from local_attention import attend as pipe
from calls import attend_to
from local_attention.attend import Problem
from local_attention.backends import native, spans
from local_attention.backends.native import library, rows
from local_attention.layers import _FusedLayerNorm
from local_attention.spec import NO_LIMIT, Scoring, WindowSpec
from test_attend import SPECS, Case, assert_close
from test_native_calls import call as call_operator

BUILT = library.load()[0] is not None


def test_it_is_built_where_there_is_a_compiler():
    assert BUILT or shutil.which("g++") is None, library.load()[1]


if BUILT:  # these tests need the kernel; without a compiler, the package works and is tested without it

    @pytest.fixture(autouse=True)
    def anew():
        pipe._prepared.cache_clear()
        yield
        pipe._prepared.cache_clear()

    @pytest.mark.parametrize("seed", range(200, 212))
    @pytest.mark.parametrize("level", range(library.machine_level() + 1))
    def test_every_width_of_vectors(monkeypatch, level, seed):
        monkeypatch.setattr(settings, "level", level)
        case = Case(seed, n=150 if seed % 3 == 0 else 23)
        assert_close(case.got("native", "pynative"), case.wanted(), 2e-5)

    def both(shape, spec, seed=0, mask=False, bias_period=None, grad=True, **options):
        """Return (out, dq, dk, dv, dbias) of native and of dense, for batch 2 and 3 heads."""
        rng = np.random.default_rng(seed)
        n, d = shape

        def draw(*shape):
            return Tensor(rng.standard_normal(shape).astype(np.float32))
        q, k, v, dout = (draw(6, n, d) for _ in range(4))
        key_mask = Tensor(rng.random((2, n)) > .3) if mask else None
        inputs = (q, k, v)
        if bias_period:
            columns = spec.backward + bias_period + spec.forward
            inputs += (draw(3, bias_period, columns),)

        def results(backend):
            def forward(*inputs):
                bias = inputs[3] if len(inputs) > 3 else None
                out = attend_to(*inputs[:3], spec, d ** -0.5, key_mask=key_mask, bias=bias, backend=backend, **options)
                return (out * dout).sum(), out
            (_, out), grads = ms.value_and_grad(forward, tuple(range(len(inputs))), has_aux=True)(*inputs)
            return [x.asnumpy() for x in (out, *grads)]
        return results("native"), results("dense")

    @pytest.mark.parametrize("shape", [(1, 10), (2, 1), (63, 3), (64, 16), (65, 257), (129, 20), (200, 64)])
    @pytest.mark.parametrize("spec", [WindowSpec(1, 70, 0, True), WindowSpec(16, 32, 16, False)])
    def test_sizes_around_tiles_and_vectors(spec, shape):
        got, wanted = both(shape, spec, mask=True)
        assert_close(got, wanted, 5e-5)  # float32 against float32
        assert shape[0] < 10 or all(np.abs(x).max() > 1e-3 for x in got)

    @pytest.mark.parametrize("bucket", [1, 7, 16, 40, 64])
    def test_a_bias_whose_period_fits_vectors_or_does_not(bucket):
        period = bucket if bucket > 1 else 23
        got, wanted = both((150, 10), WindowSpec(bucket, 2 * bucket, 0, True), bias_period=period)
        assert_close(got, wanted, 5e-5)
        assert np.abs(got[4]).max() > 1e-2

    @pytest.mark.parametrize("mask, bias_period", [(False, None), (True, 32)])
    def test_chunks_of_a_long_sequence_meet_at_their_keys(mask, bias_period):
        """1,500 queries are six chunks with overlapping spans; even and odd ones take turns."""
        got, wanted = both((1500, 8), WindowSpec(1, 48, 16, False), mask=mask, bias_period=bias_period)
        assert_close(got, wanted, 1e-4)

    @pytest.mark.parametrize("mode", ["pynative", "graph"])
    @pytest.mark.parametrize("dtype", [np.int32, np.int64])
    def test_documents_are_found_as_plain_operators_find_them(dtype, mode):
        ids = np.array([[3, 3, 7, -1, -1, -2, 0, 0, 0, 3, -1], [5] * 11, range(11), [-4] * 11], dtype)
        if dtype is np.int64:
            ids[1, 4:] += 2**32  # another number with the same lower half

        def loss(x, ids):
            bounds = spans.document_bounds(ids)
            return x * bounds.sum(), bounds
        function = ms.value_and_grad(loss, 0, has_aux=True)
        (_, got), gradient = (ms.jit(function) if mode == "graph" else function)(Tensor(1.), Tensor(ids))
        wanted = spans._found_bounds(Tensor(ids)).asnumpy()
        assert got.dtype == ms.int32 and wanted[:2, 5].tolist() == [[5, 4], [4 * (dtype is np.int64), 10]]
        np.testing.assert_array_equal(got.asnumpy(), wanted)
        assert float(gradient) == wanted.sum()

    def test_the_number_of_threads_does_not_change_a_bit(monkeypatch):
        results = []
        for count in ("1", "2", "5"):
            monkeypatch.setenv("OMP_NUM_THREADS", count)
            pipe._prepared.cache_clear()
            results.append(both((700, 16), WindowSpec(1, 48, 0, True))[0])
        for other in results[1:]:
            for a, b in zip(results[0], other):
                np.testing.assert_array_equal(a, b)

    def test_a_change_of_the_number_of_threads_reaches_attention_and_layers(monkeypatch):
        problem = Problem(WindowSpec(1, 13, 0, True), Scoring(.3), 2, 29, 29, 16, 16)
        found = []
        for count in ("1", "3"):
            monkeypatch.setenv("OMP_NUM_THREADS", count)
            attention, _ = pipe.prepared(problem, "native")[3]
            found.append([cell.numbers.asnumpy() for cell in (attention, rows.made(_FusedLayerNorm, 1e-5))])
        for one, three in zip(*found):
            assert [(a, b) for a, b in zip(one.tolist(), three.tolist()) if a != b] == [(1, 3)]

    def test_settings_of_the_number_of_threads(monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
        assert settings.threads() == 3
        for unset in ("", "0", "many"):
            monkeypatch.setenv("OMP_NUM_THREADS", unset)
            assert 1 <= settings.threads() <= ms.get_context("runtime_num_threads")

    def test_calls_from_several_threads_at_once_do_not_meet():
        """Calls the kernel itself, without the lock of its operators."""
        rng = np.random.default_rng(0)
        numbers = native.Fused(Problem(WindowSpec(1, 70, 0, True), Scoring(.25), 4, 700, 700, 16, 16)).numbers.asnumpy()
        q, k, v, dout = (rng.standard_normal((4, 700, 16)).astype(np.float32) for _ in range(4))
        absent = np.zeros(1, np.float32)
        results = []

        def call():
            unused = absent.astype(np.int32)
            inputs = [q, k, v, absent > 0, unused, unused, *4 * [absent], unused, numbers]
            statistics = np.empty((4, 700, 2), np.float32)
            out, lse = np.empty_like(q), np.empty((4, 700), np.float32)
            backward = [np.empty_like(q), np.empty_like(k), np.empty_like(v), *(absent.copy() for _ in range(4))]
            assert call_operator("attention_forward", [*inputs, out, statistics, lse]) == 0
            assert call_operator("attention_backward", [*inputs, out, statistics, dout, 0 * lse, *backward]) == 0
            results.append([out, *backward[:3]])
        threads = [threading.Thread(target=lambda: [call() for _ in range(5)]) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 30 and np.abs(results[0][1]).max() > 1e-2
        for result in results:
            for a, b in zip(result, results[0]):
                np.testing.assert_array_equal(a, b)

    def test_views_are_read_as_what_they_are():
        rng = np.random.default_rng(0)
        whole = Tensor(rng.standard_normal((5, 6, 14)).astype(np.float32))

        def loss(whole, backend):
            view = whole.swapaxes(0, 1)[..., ::2]
            return (attend_to(view, view, view, SPECS[0], .3, backend=backend) ** 2).sum()
        got, wanted = (ms.grad(loss)(whole, backend).asnumpy() for backend in ("native", "dense"))
        assert np.abs(wanted).max() > 1e-2
        np.testing.assert_allclose(got, wanted, atol=5e-5, rtol=1e-4)

    @pytest.mark.parametrize("factor", [1e4, -1e4])
    def test_huge_scores(factor):
        case = Case(6, spec=SPECS[2], n=150, offset=0, mask=False, bias=False, hide_self=False)
        case.q, case.k = case.q * 0 + factor, case.k * 0 + 1 + np.arange(150, dtype=np.float32)[None, :, None] / 150
        got = case.got("native", "pynative")
        assert all(np.isfinite(x).all() for x in got)
        np.testing.assert_allclose(got[0], case.wanted()[0], atol=2e-3)  # scores of 6e5 are precise to 1/32

    @pytest.mark.parametrize("what", ["q", "k", "v"])
    @pytest.mark.parametrize("spec", [WindowSpec(1, 20, 0, True), WindowSpec(16, 16, 0, True)])
    def test_nan_reaches_what_sees_it_and_nothing_else(spec, what):
        n, at = 150, 75
        case = Case(9, spec=spec, n=n, offset=0, mask=False, bias=False, hide_self=False, emb=False)
        clean = case.got("native", "pynative")
        getattr(case, what)[:, at] = np.nan
        out, dq, dk, dv = case.got("native", "pynative")
        places = np.arange(n)
        sees = spec.visible(places, places)
        touched = places == at if what == "q" else sees[:, at]
        for got, before in ((out, clean[0]), (dq, clean[1])):
            assert np.isnan(got[:, touched]).any(-1).all()
            np.testing.assert_allclose(got[:, ~touched], before[:, ~touched], atol=1e-6)
        seen_by_touched = sees[touched].any(0)
        for got, before in ((dk, clean[2]), (dv, clean[3])):
            np.testing.assert_allclose(got[:, ~seen_by_touched], before[:, ~seen_by_touched], atol=1e-6)

    def test_nothing_at_all():
        for shape in ((0, 8, 4), (2, 0, 4)):
            assert attend_to(*[Tensor(np.zeros(shape, np.float32))] * 3, SPECS[0], 1.).shape == shape

    def test_recomputed_it_gives_the_same_gradients():
        class Block(nn.Cell):
            def __init__(self):
                super().__init__()
                self.attn = LocalAttention(7, causal=True, autopad=True, backend="native")

            def construct(self, x):
                return self.attn(x, x, x)
        x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 23, 10)).astype(np.float32))
        plain, again = Block(), Block()
        again.recompute()

        def gradient(block):
            def loss(x):
                return (block(x) ** 2).sum()
            return ms.jit(ms.grad(loss))(x).asnumpy()
        np.testing.assert_array_equal(gradient(plain), gradient(again))

    def test_a_compiled_training_step_with_it_and_with_blocked_are_one():
        tokens = Tensor(np.random.default_rng(0).integers(0, 11, (2, 41)).astype(np.int32))

        def losses(backend):
            ms.set_seed(1)
            model = LocalTransformer(num_tokens=11, max_seq_len=64, dim=16, depth=1, heads=2, dim_head=8,
                                     local_attn_window_size=8, backend=backend)
            optimizer = nn.Adam(model.trainable_params(), 1e-2)

            def forward(tokens):
                return model(tokens, return_loss=True)
            gradient = ms.value_and_grad(forward, None, model.trainable_params())

            def step(tokens):
                loss, grads = gradient(tokens)
                optimizer(grads)
                return loss
            step = ms.jit(step)
            return [float(step(tokens).asnumpy()) for _ in range(4)]
        got = losses("native")
        np.testing.assert_allclose(got, losses("blocked"), atol=1e-4)
        assert got[-1] < got[0]

    def test_scores_are_counted_by_the_tile():
        problem = Problem(WindowSpec(1, 512, 0, True), Scoring(.125), 16, 2048, 2048, 64, 64)
        assert native.scores(problem)[0] == 16 * 64 * 64 * (sum(range(1, 9)) + 24 * 9)
        everything = Problem(WindowSpec(1, NO_LIMIT, NO_LIMIT, False), Scoring(.125), 1, 128, 128, 64, 64)
        assert native.scores(everything)[0] == 128 * 128


def test_a_machine_without_the_kernel_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library.load.cache_clear()
    try:
        text = LocalAttention(8, causal=True).explain(64)
        assert text.startswith("blocked: runs this")
        assert "native: was not built: that takes a C++ compiler" in text
        (tmp_path.parent / "_native.cpython-39.so").touch()
        library.load.cache_clear()
        assert f"{tmp_path.parent / '_native.cpython-39.so'} is of an earlier version" in library.load()[1]
        (tmp_path / "_native.so").write_bytes(b"not a library")
        library.load.cache_clear()
        assert "native: could not be loaded" in LocalAttention(8, causal=True).explain(64)
    finally:
        library.load.cache_clear()
