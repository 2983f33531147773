"""Other frameworks on top of MindSpore change what `str` returns for its dtypes; nothing here may depend on that."""
import mindspore as ms
import pytest
from mindspore import Tensor, ops

from local_attention import LocalAttention, LocalTransformer, WindowSpec, checks, explain_attention, windowed_attention
from local_attention.local_attention import LARGEST, max_neg_value

DTYPES = {"Float32": ms.float32, "Float16": ms.float16, "BFloat16": ms.bfloat16, "Float64": ms.float64,
          "Int32": ms.int32, "Int64": ms.int64, "Bool": ms.bool_}


@pytest.fixture(params=["mindspore.float", "torch.number", ""])
def patched(request, monkeypatch):
    for kind in {type(dtype) for dtype in DTYPES.values()}:
        for method in ("__str__", "__repr__"):
            monkeypatch.setattr(kind, method, lambda self: request.param)
    assert str(ms.float32) == request.param


def test_names(patched):
    assert {name: checks.dtype_name(dtype) for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}


def test_explain_and_the_lowest_number(patched):
    for dtype in (ms.float32, ms.float16, ms.bfloat16):
        assert "runs this" in LocalAttention(4).explain(8, dtype=dtype)
        assert "runs this" in explain_attention((1, 2, 8, 4), WindowSpec(1, 3, 0, True), dtype=dtype)
    for name, largest in LARGEST.items():
        assert max_neg_value(Tensor(1, DTYPES[name])) == -largest
    for dtype in (ms.int32, "Float32", {}, [ms.float32]):
        with pytest.raises(TypeError, match="For 'LocalAttention.explain', 'dtype' must be None or"):
            LocalAttention(4).explain(8, dtype=dtype)
        with pytest.raises(TypeError, match="For 'explain_attention', 'dtype' must be None or"):
            explain_attention((1, 2, 8, 4), WindowSpec(1, 3, 0, True), dtype=dtype)


def test_calls(patched):
    q = ops.ones((1, 2, 8, 4), ms.float16)
    bias = ops.zeros((2, 1, 4), ms.float16)
    mask = ops.ones((1, 8), ms.bool_)  # no documents: without the kernel they need `ops.arange`, which reads `str`
    assert windowed_attention(q, q, q, WindowSpec(1, 3, 0, True), mask=mask, attn_bias=bias).dtype == ms.float16
    with pytest.raises(TypeError, match="'q' must be a Tensor of .*, but got int32"):
        windowed_attention(q.astype(ms.int32), q, q, WindowSpec(1, 3, 0, True))
    model = LocalTransformer(num_tokens=7, max_seq_len=8, dim=4, depth=1, heads=1, dim_head=4, local_attn_window_size=3)
    assert model.generate(ops.ones((1, 3), ms.int32), 3).shape == (1, 3)
