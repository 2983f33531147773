"""Sliding-window attention: every query its own span of keys, as a function and as self- and cross-attention Cells."""
import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import constexpr

from . import checks
from .attend import attend, check_backend, draw_seed, new_salt
from .spec import WindowSpec


@constexpr
def _checked(owner, q, k, v, mask, rel_pos_emb, left, right, dropout_rate, backend):
    """The rules of a call: its number of groups, its span within the sequence, and the mask's shape to tile."""
    checks.non_negative_int(owner, "window_size_left", left)
    checks.non_negative_int(owner, "window_size_right", right)
    checks.rate(owner, "dropout_rate", dropout_rate)
    check_backend(owner, backend)
    shape = checks.alike(owner, q, k, v)
    if None in shape:
        raise checks.value_error(owner, "q", "of a shape that is known where a graph is compiled", shape)
    *leading, n, head_dim = shape
    if mask is not None:
        got = checks.tensor(owner, "mask", mask, ("Bool",))
        padded = (1,) * (len(shape) - 1 - len(got)) + got
        if len(padded) != len(shape) - 1 or any(a not in (1, b) for a, b in zip(padded, (*leading, n))):
            raise checks.value_error(owner, "mask", f"broadcastable to {(*leading, n)}", got)
        mask = padded, tuple(b // a for a, b in zip(padded, (*leading, n)))
    if rel_pos_emb is not None:
        checks.tensor(owner, "rel_pos_emb", rel_pos_emb, checks.FLOATS, (left + right, head_dim),
                      f"of shape (window_size_left + window_size_right, d), {(left + right, head_dim)}")
    return math.prod(leading), min(left, n), min(right, n), mask


@constexpr
def _check_seed(owner, seed):
    if isinstance(seed, tuple):
        shape = checks.tensor(owner, "seed", seed, checks.INTEGERS)
        if shape not in ((), (1,)):
            raise checks.value_error(owner, "seed", "of one number", shape)
    elif seed is not None:
        checks.integer(owner, "seed", seed, -2**63)


@constexpr
def _seed_tensor(seed):
    return Tensor(np.array([seed % 2**32], np.uint32).view(np.int32))


@constexpr
def _span(left, right):
    return WindowSpec(bucket=1, backward=left, forward=right - 1, causal=False)


def sliding_window_attention(q, k, v, mask=None, rel_pos_emb=None, window_size_left=128, window_size_right=128,
                             dropout_rate=0., seed=None, *, backend=None):
    r"""
    Attention in which query :math:`i` sees the keys :math:`i - left` to :math:`i + right - 1`, both included.

    That is `window_size_left + window_size_right` keys, the query's own the first of the right ones: a
    `window_size_right` of 1 is causal, and with 0 the query does not see itself. `left=2, right=2` on 5 tokens:

    .. code-block::

        ■ ■ · · ·
        ■ ■ ■ · ·
        ■ ■ ■ ■ ·
        · ■ ■ ■ ■
        · · ■ ■ ■

    Scores are scaled by :math:`d^{-0.5}`. Cost and memory are linear in the sequence.

    Args:
        q, k, v (Tensor): :math:`(..., n, d)` of one shape and dtype: float32, float16 or bfloat16. The softmax is
            computed in float32.
        mask (Tensor): bool, broadcastable to :math:`(..., n)`, True = a real key. Default: ``None`` .
        rel_pos_emb (Tensor): :math:`(left + right, d)`; row :math:`r` is scored against q, unscaled, and added for the
            key at offset :math:`r - left` from the query. Default: ``None`` .
        window_size_left (int): Keys seen before the query. Default: ``128`` .
        window_size_right (int): Keys seen from the query on, itself among them. Default: ``128`` .
        dropout_rate (float): Rate in [0, 1) at which attention weights are dropped. Default: ``0.`` .
        seed (Union[int, Tensor]): What the dropped weights are a function of; ``None`` draws one from MindSpore's
            global seed. Default: ``None`` .
        backend (str): What computes it, by name; ``None`` is the fastest that can. Default: ``None`` .

    Returns:
        Tensor of the shape and dtype of `q`. A query that sees no real key gets zeros, with zero gradient.

    Raises:
        TypeError: If an argument is of another type or dtype.
        ValueError: If an argument is out of its range or shapes do not agree.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import sliding_window_attention
        >>> q, k, v = (ops.randn((2, 8, 1000, 64)) for _ in range(3))
        >>> print(sliding_window_attention(q, k, v, window_size_left=127, window_size_right=1).shape)
        (2, 8, 1000, 64)
    """
    groups, left, right, mask_shape = _checked(
        "sliding_window_attention", checks.described(q), checks.described(k), checks.described(v),
        checks.described(mask), checks.described(rel_pos_emb), window_size_left, window_size_right, dropout_rate,
        backend)
    _check_seed("sliding_window_attention", checks.described(seed))
    if groups == 0:
        return q
    if mask is not None:
        mask = ops.tile(mask.reshape(mask_shape[0]), mask_shape[1]).reshape(groups, -1)
    if rel_pos_emb is not None:  # rows of offsets that no key of this sequence is at do nothing
        rel_pos_emb = rel_pos_emb[window_size_left - left:window_size_left + right]
    if seed is not None:
        seed = ops.cast(seed, ms.int32).reshape(1) if isinstance(seed, Tensor) else _seed_tensor(seed)
    return attend(q, k, v, _span(left, right), q.shape[-1] ** -0.5, key_mask=mask, rel_pos_emb=rel_pos_emb,
                  dropout=dropout_rate, seed=seed, backend=backend)


class MultiHeadLocalAttention(nn.Cell):
    r"""
    Multi-head sliding-window cross-attention: queries from one sequence, keys and values from another of its length.

    Args:
        in_features (int): Size of the last axis of the inputs.
        num_heads (int): Heads.
        qkv_features (int): Size of all heads' queries together, a multiple of `num_heads`; ``None`` is `in_features`.
            Default: ``None`` .
        out_features (int): Size of the last axis of the output; ``None`` is `in_features`. Default: ``None`` .
        window_size_left (int): Keys seen before the query. Default: ``128`` .
        window_size_right (int): Keys seen from the query on, itself among them. Default: ``128`` .
        dropout_rate (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        use_bias (bool): Whether the projections have a bias. Default: ``True`` .
        use_rel_pos_emb (bool): Whether offsets have learned embeddings, shared by the heads. Default: ``False`` .

    Inputs:
        - **inputs_q** (Tensor) - :math:`(b, n, in\_features)`.
        - **inputs_kv** (Tensor) - :math:`(b, n, in\_features)`.
        - **mask** (Tensor) - bool :math:`(b, n)`, True = a real key. Default: ``None`` .
        - **seed** (Union[int, Tensor]) - What the weights dropped in training are a function of. Default: ``None`` .

    Outputs:
        Tensor of shape :math:`(b, n, out\_features)`.

    Raises:
        TypeError: If an argument or input is of another type or dtype.
        ValueError: If an argument is out of its range or shapes do not agree.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import MultiHeadLocalAttention
        >>> attn = MultiHeadLocalAttention(64, 4, window_size_left=16, window_size_right=16)
        >>> print(attn(ops.randn((2, 100, 64)), ops.randn((2, 100, 64))).shape)
        (2, 100, 64)
    """

    def __init__(self, in_features, num_heads, qkv_features=None, out_features=None, window_size_left=128,
                 window_size_right=128, dropout_rate=0., use_bias=True, use_rel_pos_emb=False):
        super().__init__()
        owner = type(self).__name__
        checks.positive_int(owner, "in_features", in_features)
        self.num_heads = checks.positive_int(owner, "num_heads", num_heads)
        qkv_features = checks.positive_int(owner, "qkv_features", in_features if qkv_features is None else qkv_features)
        out_features = checks.positive_int(owner, "out_features", in_features if out_features is None else out_features)
        if qkv_features % num_heads:
            raise checks.value_error(owner, "qkv_features", f"a multiple of the {num_heads} heads", qkv_features)
        self.in_features, self.qkv_features, self.out_features = in_features, qkv_features, out_features
        self.window_size_left = checks.non_negative_int(owner, "window_size_left", window_size_left)
        self.window_size_right = checks.non_negative_int(owner, "window_size_right", window_size_right)
        self.dropout_rate = checks.rate(owner, "dropout_rate", dropout_rate)
        self.salt = new_salt(dropout_rate)
        self.use_bias = checks.boolean(owner, "use_bias", use_bias)
        self.query, self.key, self.value = (nn.Dense(in_features, qkv_features, has_bias=use_bias) for _ in range(3))
        self.out = nn.Dense(qkv_features, out_features, has_bias=use_bias)
        self.rel_pos_emb = None
        self.use_rel_pos_emb = checks.boolean(owner, "use_rel_pos_emb", use_rel_pos_emb)
        if use_rel_pos_emb:
            span = window_size_left + window_size_right
            checks.positive_int(owner, "window_size_left + window_size_right", span)
            self.rel_pos_emb = Parameter(initializer(Normal(0.02), (span, qkv_features // num_heads)), "rel_pos_emb")

    def extend_repr(self):
        return checks.settings(self)

    def construct(self, inputs_q, inputs_kv, mask=None, seed=None):
        return self._between("inputs_q", "inputs_kv", inputs_q, inputs_kv, mask, seed)

    def _between(self, name_q, name_kv, inputs_q, inputs_kv, mask, seed):
        _checked_inputs(self.cls_name, self.in_features, name_q, name_kv, checks.described(inputs_q),
                        checks.described(inputs_kv), checks.described(mask))
        _check_seed(self.cls_name, checks.described(seed))
        q, k, v = (self.heads(project(x)) for project, x in
                   ((self.query, inputs_q), (self.key, inputs_kv), (self.value, inputs_kv)))
        return self.out(self.attend(q, k, v, mask, seed).swapaxes(1, 2).reshape(*inputs_q.shape[:2], -1))

    def attend(self, q, k, v, mask=None, seed=None):
        """Attention of what is projected, `(b, heads, n, d)`."""
        rate = self.dropout_rate if self.training else 0.
        if rate > 0 and seed is None:
            seed = draw_seed(self.salt)
        return sliding_window_attention(q, k, v, None if mask is None else mask[:, None], self.rel_pos_emb,
                                        self.window_size_left, self.window_size_right, rate, seed)

    def heads(self, x):
        batch, n, features = x.shape
        return x.reshape(batch, n, self.num_heads, features // self.num_heads).swapaxes(1, 2)


@constexpr
def _checked_inputs(owner, features, name_q, name_kv, inputs_q, inputs_kv, mask):
    shape = checks.tensor(owner, name_q, inputs_q, checks.FLOATS)
    if len(shape) != 3 or shape[2] != features:
        raise checks.value_error(owner, name_q, f"of shape (b, n, {features})", shape)
    checks.tensor(owner, name_kv, inputs_kv, (str(inputs_q[1]),), shape, f"of the shape of {name_q}, {shape}")
    if mask is not None:
        checks.tensor(owner, "mask", mask, ("Bool",), shape[:2], f"of shape (b, n), {shape[:2]}")


class LocalSelfAttention(MultiHeadLocalAttention):
    r"""
    Multi-head sliding-window self-attention: :class:`MultiHeadLocalAttention` of a sequence with itself.

    Args:
        in_features (int): Size of the last axis of the input.
        num_heads (int): Heads.
        qkv_features (int): Size of all heads' queries together; ``None`` is `in_features`. Default: ``None`` .
        out_features (int): Size of the last axis of the output; ``None`` is `in_features`. Default: ``None`` .
        window_size_left (int): Keys seen before the query. Default: ``128`` .
        window_size_right (int): Keys seen from the query on, itself among them. Default: ``128`` .
        dropout_rate (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        use_bias (bool): Whether the projections have a bias. Default: ``True`` .
        use_rel_pos_emb (bool): Whether offsets have learned embeddings, shared by the heads. Default: ``False`` .

    Inputs:
        - **x** (Tensor) - :math:`(b, n, in\_features)`.
        - **mask** (Tensor) - bool :math:`(b, n)`, True = a real key. Default: ``None`` .
        - **seed** (Union[int, Tensor]) - What the weights dropped in training are a function of. Default: ``None`` .

    Outputs:
        Tensor of shape :math:`(b, n, out\_features)`.

    Raises:
        TypeError: If an argument or input is of another type or dtype.
        ValueError: If an argument is out of its range or shapes do not agree.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import LocalSelfAttention
        >>> attn = LocalSelfAttention(64, 4, window_size_left=16, window_size_right=1, use_rel_pos_emb=True)
        >>> print(attn(ops.randn((2, 100, 64))).shape)
        (2, 100, 64)
    """

    def construct(self, x, mask=None, seed=None):
        return self._between("x", "x", x, x, mask, seed)
