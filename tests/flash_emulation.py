"""An emulation of Ascend's fused attention, as documented, in plain operators, so that it runs on a CPU: MindSpore's
function `ops.flash_attention_score`, the primitive under it with its statistics, and the primitive of its gradient.

What the documentation forbids is an error here. What is undefined there, a row that sees nothing, is NaN here.
"""
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

CALLS = []  # in both modes: shapes and all arguments that are not tensors, of each call
NO_LIMIT = 2147483647


@constexpr
def _band(n_q, n_k, pre_tokens, next_tokens):
    """Return what the band hides: the last query stands at the last key, and both counts are inclusive."""
    i, j = np.arange(n_q)[:, None] + n_k - n_q, np.arange(n_k)
    return Tensor((j < i - pre_tokens) | (j > i + next_tokens))


@constexpr
def _check(name, q, k, v, dtypes, numbers, shift, mask):
    heads, keep_prob, scale, pre_tokens, next_tokens, inner_precise, layout, mode = numbers
    CALLS.append(dict(name=name, shape=q, key=k, sparse_mode=mode, pre_tokens=pre_tokens, next_tokens=next_tokens,
                      scale=scale, mask=mask))
    assert keep_prob == 1 and inner_precise == 0
    if layout == "TND":
        tokens, n_heads, head_dim = q
        assert k == v == (tokens, k[1], head_dim) and shift is None and mode == 4
    else:
        batch, n_heads, n_q, head_dim = q
        assert layout == "BNSD" and batch <= 2048
        assert k == v == (batch, k[1], k[2], head_dim)
    assert heads == n_heads <= 256 and n_heads % k[1] == 0 and head_dim % 16 == 0 and head_dim <= 512
    assert set(map(str, dtypes[:3])) in ({"Float16"}, {"BFloat16"})
    assert isinstance(scale, float)
    if shift is not None:
        assert shift in ((batch, n_heads, n_q, k[2]), (1, n_heads, n_q, k[2])) and dtypes[3] == dtypes[0]
    assert str(dtypes[4]) in ("Bool", "UInt8")
    if mode == 4:
        assert mask == (2048, 2048) and 0 <= pre_tokens <= NO_LIMIT and 0 <= next_tokens <= NO_LIMIT
        assert next_tokens == 0 or pre_tokens + next_tokens < 2048  # a field report says that wider ones are wrong
    else:
        assert mode == 0 and pre_tokens == next_tokens == NO_LIMIT
        assert mask in ((batch, n_heads, n_q, k[2]), (batch, 1, n_q, k[2]), (n_q, k[2]))


@constexpr
def _check_grad(q, dy, softmax_max, softmax_sum, attention_in, dtypes):
    assert dy == attention_in == q and softmax_max == softmax_sum == (*q[:3], 8)
    assert str(dtypes[0]) == str(dtypes[1]) == str(dtypes[2]) and str(dtypes[3]) == str(dtypes[4]) == "Float32"


@constexpr
def _compressed():
    return Tensor(np.triu(np.ones((2048, 2048), np.int32), 1))


def _scores(name, numbers, query, key, value, real_shift, unused, attn_mask):
    """Return the masked scores in float32, and k and v repeated."""
    *unused, ends, _ = unused
    assert all(x is None for x in unused)
    packed = ends is not None
    dtypes = (query.dtype, key.dtype, value.dtype, None if real_shift is None else real_shift.dtype, attn_mask.dtype)
    _check(name, query.shape, key.shape, value.shape, dtypes, numbers,
           None if real_shift is None else real_shift.shape, attn_mask.shape)
    _, _, scale, pre_tokens, next_tokens, _, _, mode = numbers
    if packed:  # (tokens, heads, d) becomes (1, heads, tokens, d)
        query, key, value = (x.swapaxes(0, 1).expand_dims(0) for x in (query, key, value))
    share = query.shape[1] // key.shape[1]
    key, value = (ops.repeat_interleave(ops.cast(x, ms.float32), share, 1) for x in (key, value))
    scores = ops.matmul(ops.cast(query, ms.float32), key.swapaxes(2, 3))
    if real_shift is not None:
        scores = scores + ops.cast(real_shift, ms.float32)
    scores = scores * scale
    hidden = ops.cast(attn_mask, ms.bool_)
    if mode == 4:
        hidden = _band(query.shape[2], key.shape[2], pre_tokens, next_tokens)
        scores = ops.masked_fill(scores, (ops.cast(attn_mask, ms.int32) != _compressed()).any(), float("nan"))
    if packed:
        ends = ops.cast(ends, ms.int32)
        document = (ops.arange(0, query.shape[2], 1).reshape(-1, 1) >= ends.reshape(1, -1)).astype(ms.int32).sum(1)
        hidden = ops.logical_or(hidden, document.reshape(-1, 1) != document)
    return ops.masked_fill(scores, hidden, float("-inf")), key, value


def flash_attention_score(query, key, value, head_num, real_shift=None, drop_mask=None, padding_mask=None,
                          attn_mask=None, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, keep_prob=1.0,
                          scalar_value=1.0, pre_tokens=2147483647, next_tokens=2147483647, inner_precise=0,
                          input_layout="BSH", sparse_mode=0):
    numbers = head_num, keep_prob, scalar_value, pre_tokens, next_tokens, inner_precise, input_layout, sparse_mode
    unused = drop_mask, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen
    scores, key, value = _scores("function", numbers, query, key, value, real_shift, unused, attn_mask)
    out = ops.cast(ops.matmul(ops.softmax(scores, -1), value), query.dtype)
    return out[0].swapaxes(0, 1) if input_layout == "TND" else out


class FlashAttentionScore(nn.Cell):
    """The primitive: `(softmax_max, softmax_sum, softmax_out, attention_out)`."""

    def __init__(self, head_num, keep_prob=1.0, scale_value=1.0, pre_tokens=2147483647, next_tokens=2147483647,
                 inner_precise=0, input_layout='BSH', sparse_mode=0):
        super().__init__()
        self.numbers = (head_num, keep_prob, scale_value, pre_tokens, next_tokens, inner_precise, input_layout,
                        sparse_mode)

    def construct(self, query, key, value, real_shift=None, drop_mask=None, padding_mask=None, attn_mask=None,
                  prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None):
        unused = drop_mask, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen
        scores, key, value = _scores("forward", self.numbers, query, key, value, real_shift, unused, attn_mask)
        top = ops.amax(scores, -1, keepdims=True)
        weights = ops.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = ops.cast(ops.matmul(weights / total, value), query.dtype)
        return ops.tile(top, (1, 1, 1, 8)), ops.tile(total, (1, 1, 1, 8)), ops.zeros((), query.dtype), out


class FlashAttentionScoreGrad(nn.Cell):
    """The primitive of its gradient: `(dq, dk, dv, dpse)`, from the given statistics and output."""

    def __init__(self, head_num, keep_prob=1.0, scale_value=1.0, pre_tokens=65536, next_tokens=65536, inner_precise=1,
                 input_layout='BSH', sparse_mode=0):
        super().__init__()
        self.numbers = (head_num, keep_prob, scale_value, pre_tokens, next_tokens, inner_precise, input_layout,
                        sparse_mode)
        self.scale = scale_value

    def construct(self, query, key, value, dy, pse_shift=None, drop_mask=None, padding_mask=None, atten_mask=None,
                  softmax_max=None, softmax_sum=None, softmax_in=None, attention_in=None, prefix=None,
                  actual_seq_qlen=None, actual_seq_kvlen=None):
        _check_grad(query.shape, dy.shape, softmax_max.shape, softmax_sum.shape, attention_in.shape,
                    (query.dtype, dy.dtype, attention_in.dtype, softmax_max.dtype, softmax_sum.dtype))
        unused = drop_mask, padding_mask, softmax_in, prefix, actual_seq_qlen, actual_seq_kvlen
        dtype, kv_shape = query.dtype, key.shape
        scores, key, value = _scores("backward", self.numbers, query, key, value, pse_shift, unused, atten_mask)
        query, dy, out = ops.cast(query, ms.float32), ops.cast(dy, ms.float32), ops.cast(attention_in, ms.float32)
        weights = ops.exp(scores - softmax_max[..., :1]) / softmax_sum[..., :1]
        dscores = weights * (ops.matmul(dy, value.swapaxes(2, 3)) - (dy * out).sum(-1, keepdims=True)) * self.scale
        dq = ops.matmul(dscores, key)
        shared = (kv_shape[0], kv_shape[1], -1, *kv_shape[2:])
        dk = ops.matmul(dscores.swapaxes(2, 3), query).reshape(shared).sum(2)
        dv = ops.matmul(weights.swapaxes(2, 3), dy).reshape(shared).sum(2)
        return ops.cast(dq, dtype), ops.cast(dk, dtype), ops.cast(dv, dtype), ops.zeros((), dtype)
