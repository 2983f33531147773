"""The native kernel reads and writes float16 and bfloat16 itself: its results are what it makes of the same numbers in
float32, rounded."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from local_attention import WindowSpec, sliding_window_attention, windowed_attention
from local_attention.attend import ALONE, WHOLE, attend
from local_attention.backends.native import library
from local_attention.spec import Scoring
from test_wide import computed, draw

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason="the kernel was not built")
B, H, N, D = 2, 4, 70, 10
IDS = np.repeat(np.arange(10), 7)[None].repeat(B, 0).astype(np.int32)
CASES = {
    "plain": dict(spec=WindowSpec(1, 20, 0, True)),
    "many": dict(spec=WindowSpec(16, 16, 16, False, prefix=2), order=IDS, softcap=3., width=3, sinks=(H,)),
    "bias of rows": dict(spec=WindowSpec(1, 5, 2, False), segment_ids=IDS, attn_bias=(1, H, N, 8), sinks=(B, H, N)),
    "offsets": dict(rel_pos_emb=(8, D), rel_pos_query=(B, H, N, D), window_size_left=5, window_size_right=3)}


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_float32_rounded(name, dtype, mode):
    case = dict(CASES[name])
    shapes = {word: case.pop(word) for word in ("sinks", "attn_bias", "rel_pos_emb", "rel_pos_query") if word in case}
    width = case.pop("width", D)
    tensors = draw(1, q=(B, H, N, D), k=(B, 2, N, D), v=(B, 2, N, width), **shapes)
    douts = draw(2, dout=(B, H, N, width), dlse=(B, H, N))
    tensors = {word: Tensor(x).astype(dtype).astype(ms.float32).asnumpy() for word, x in tensors.items()}
    plain = {word: Tensor(x) if isinstance(x, np.ndarray) else x for word, x in case.items()}
    attention = windowed_attention if "spec" in case else sliding_window_attention

    def call(**named):
        return attention(**named, **plain, backend="native", return_lse=True)

    def in_halves(**named):
        typed = {}
        for word in shapes_of:
            typed[word] = named[word] if word == "rel_pos_emb" else named[word].astype(dtype)
        out, lse = call(**typed)
        return out.astype(ms.float32), lse
    shapes_of = tuple(tensors)
    want, got = (computed(function, tensors, **douts, mode=mode) for function in (call, in_halves))
    rounded = Tensor(want.pop("out")).astype(dtype).astype(ms.float32).asnumpy()
    np.testing.assert_array_equal(got.pop("out"), rounded)
    np.testing.assert_array_equal(got.pop("lse"), want.pop("lse"))
    step = 2.**-10 if dtype == ms.float16 else 2.**-7
    for word, x in want.items():  # they depend on dout and out, which are rounded, too
        assert np.abs(x).max() > 1e-2
        np.testing.assert_allclose(got[word], x, atol=2 * step * np.abs(x).max(), rtol=2 * step, err_msg=word)


def test_types_that_differ_are_computed_in_float32():
    q, k = (Tensor(x) for x in draw(3, q=(1, 2, 9, D), k=(1, 2, 9, D)).values())
    spec = WindowSpec(1, 3, 0, True)
    want = windowed_attention(q, k, k, spec, backend="native").asnumpy()
    half = Tensor(k.asnumpy().astype(np.float16))
    got = attend(q, k, half, spec, Scoring(D**-.5), ALONE, WHOLE, "native")
    np.testing.assert_allclose(got.asnumpy(), want, atol=2e-3)
