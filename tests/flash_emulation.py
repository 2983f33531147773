"""`ops.flash_attention_score` of Ascend as its documentation has it, in plain operators, so that it runs on a CPU.

What the documentation forbids is an error here. A row that sees nothing is undefined there: here it is NaN.
"""
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

CALLS = []  # of the operator, in both modes: its arguments that are no tensors, and the query's shape


@constexpr
def _band(n_q, n_k, pre_tokens, next_tokens):
    """Hidden, by the band's rule: the last query stands at the last key, and both counts are inclusive."""
    i, j = np.arange(n_q)[:, None] + n_k - n_q, np.arange(n_k)
    return Tensor((j < i - pre_tokens) | (j > i + next_tokens))


@constexpr
def _check(q, k, v, dtypes, heads, shift, mask, scalar_value, layout, mode, pre_tokens, next_tokens):
    CALLS.append(dict(shape=q, key=k, sparse_mode=mode, pre_tokens=pre_tokens, next_tokens=next_tokens,
                      scale=scalar_value))
    batch, n_heads, n_q, head_dim = q
    assert layout == "BNSD" and heads == n_heads and batch <= 2048 and heads <= 256
    assert k == v == (batch, k[1], k[2], head_dim) and n_heads % k[1] == 0 and head_dim % 16 == 0 and head_dim <= 512
    assert set(map(str, dtypes[:3])) in ({"Float16"}, {"BFloat16"})
    assert isinstance(scalar_value, float)
    if shift is not None:
        assert shift in ((batch, n_heads, n_q, k[2]), (1, n_heads, n_q, k[2])) and dtypes[3] == dtypes[0]
    assert str(dtypes[4]) in ("Bool", "UInt8")
    if mode == 4:
        assert mask == (2048, 2048) and 0 <= pre_tokens <= 2**31 - 1 and 0 <= next_tokens <= 2**31 - 1
        assert next_tokens == 0 or pre_tokens + next_tokens < 2048  # what a field report calls wrong
    else:
        assert mode == 0 and pre_tokens == next_tokens == 2**31 - 1
        assert mask in ((batch, n_heads, n_q, k[2]), (batch, 1, n_q, k[2]), (n_q, k[2]))


@constexpr
def _compressed():
    return Tensor(np.triu(np.ones((2048, 2048), np.int32), 1))


def flash_attention_score(query, key, value, head_num, real_shift=None, drop_mask=None, padding_mask=None,
                          attn_mask=None, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, keep_prob=1.0,
                          scalar_value=1.0, pre_tokens=2147483647, next_tokens=2147483647, inner_precise=0,
                          input_layout="BSH", sparse_mode=0):
    dtypes = (query.dtype, key.dtype, value.dtype, None if real_shift is None else real_shift.dtype, attn_mask.dtype)
    _check(query.shape, key.shape, value.shape, dtypes, head_num, None if real_shift is None else real_shift.shape,
           attn_mask.shape, scalar_value, input_layout, sparse_mode, pre_tokens, next_tokens)
    share = query.shape[1] // key.shape[1]
    key, value = (ops.repeat_interleave(ops.cast(x, ms.float32), share, 1) for x in (key, value))
    scores = ops.matmul(ops.cast(query, ms.float32), key.swapaxes(2, 3))
    if real_shift is not None:
        scores = scores + ops.cast(real_shift, ms.float32)
    scores = scores * scalar_value
    hidden = ops.cast(attn_mask, ms.bool_)
    if sparse_mode == 4:
        hidden = _band(query.shape[2], key.shape[2], pre_tokens, next_tokens)
        scores = ops.masked_fill(scores, (ops.cast(attn_mask, ms.int32) != _compressed()).any(), float("nan"))
    weights = ops.softmax(ops.masked_fill(scores, hidden, float("-inf")), -1)
    return ops.cast(ops.matmul(weights, value), query.dtype)
