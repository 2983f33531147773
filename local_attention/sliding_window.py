"""Sliding-window attention as self- and cross-attention Cells."""
from mindspore import Parameter, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import constexpr

from . import checks, settings
from .attend import draw_seed, new_salt
from .functional import check_seed, sliding_window_attention


INSTEAD = {"window_size": "window_size_left' and 'window_size_right", "dim": "in_features", "heads": "num_heads",
           "kv_heads": "num_kv_heads", "causal": "window_size_right", "dropout": "dropout_rate"}


@constexpr
def _checked_inputs(owner, features, name_q, name_kv, inputs_q, inputs_kv, mask, segment_ids):
    shape = checks.tensor(owner, name_q, inputs_q, checks.FLOATS)
    if len(shape) != 3 or shape[2] not in (None, features):
        raise checks.value_error(owner, name_q, f"of shape (b, n, {features})", shape)
    checks.tensor(owner, name_kv, inputs_kv, (checks.dtype_name(inputs_q[1]),), shape,
                  f"of the shape of {name_q}, {shape}")
    if mask is not None:
        checks.tensor(owner, "mask", mask, ("Bool",), shape[:2], f"of shape (b, n), {shape[:2]}")
    if segment_ids is not None:
        checks.segment_ids(owner, segment_ids, *shape[:2])


class _Heads(nn.Cell):
    """What MultiHeadLocalAttention does between its projections. In a base class, so that MindSpore's O1 does not
    rewrite it (see `cells`)."""

    def _check(self, name_q, name_kv, inputs_q, inputs_kv, mask, seed, segment_ids):
        """Check the inputs of a call."""
        _checked_inputs(self.cls_name, self.in_features, name_q, name_kv, checks.described(inputs_q),
                        checks.described(inputs_kv), checks.described(mask), checks.described(segment_ids))
        check_seed(self.cls_name, checks.described(seed))

    def _attend(self, q, k, v, mask, seed, segment_ids):
        """Compute attention of projected inputs, `(b, n, heads * d)`."""
        out = self._of_heads(self._heads(q), self._heads(k), self._heads(v), mask, seed, segment_ids)
        return out.swapaxes(1, 2).reshape(q.shape)

    def _of_heads(self, q, k, v, mask=None, seed=None, segment_ids=None):
        """Compute attention of `(b, heads, n, d)`."""
        rate = self.dropout_rate if self.training else 0.
        if rate > 0 and seed is None:
            seed = draw_seed(self.salt)
        return sliding_window_attention(q, k, v, mask, self.rel_pos_emb, self.window_size_left, self.window_size_right,
                                        rate, seed, segment_ids=segment_ids)

    def _heads(self, x):
        head_dim = self.qkv_features // self.num_heads
        return x.reshape(x.shape[0], x.shape[1], x.shape[2] // head_dim, head_dim).swapaxes(1, 2)


class MultiHeadLocalAttention(_Heads):
    r"""
    Multi-head sliding-window cross-attention: queries from one sequence, keys and values from another of equal length.

    Args:
        in_features (int): Size of the last axis of the inputs.
        num_heads (int): Number of heads.
        qkv_features (int): Size of all heads' queries together, a multiple of `num_heads`; ``None`` is `in_features`.
            Default: ``None`` .
        out_features (int): Size of the last axis of the output; ``None`` is `in_features`. Default: ``None`` .
        window_size_left (int): Keys seen before the query. Default: ``128`` .
        window_size_right (int): Keys seen from the query on, itself among them. Default: ``128`` .
        dropout_rate (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        use_bias (bool): Whether the projections have a bias. Default: ``True`` .
        use_rel_pos_emb (bool): Whether offsets have learned embeddings, shared by the heads. Default: ``False`` .
        num_kv_heads (int): Heads of keys and values, a divisor of `num_heads`; ``None`` is `num_heads`.
            Default: ``None`` .

    Inputs:
        - **inputs_q** (Tensor) - `(b, n, in_features)`.
        - **inputs_kv** (Tensor) - `(b, n, in_features)`.
        - **mask** (Tensor) - bool `(b, n)`, True = a real key. Default: ``None`` .
        - **seed** (Union[int, Tensor]) - What the weights dropped in training are a function of. Default: ``None`` .
        - **segment_ids** (Tensor) - int `(b, n)`: consecutive tokens of one id are a document that sees no other,
          a negative id is padding. Default: ``None`` .

    Outputs:
        Tensor of shape `(b, n, out_features)`.

    Raises:
        TypeError: If an argument or input is of another type or dtype, or an argument has a name not known here.
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
                 window_size_right=128, dropout_rate=0., use_bias=True, use_rel_pos_emb=False, *,
                 num_kv_heads=None, **unknown):
        super().__init__()
        owner = type(self).__name__
        checks.arguments(owner, unknown, checks.parameters(MultiHeadLocalAttention), INSTEAD)
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
        self.num_kv_heads = checks.positive_int(owner, "num_kv_heads",
                                                num_heads if num_kv_heads is None else num_kv_heads)
        if num_heads % self.num_kv_heads:
            raise checks.value_error(owner, "num_kv_heads", f"a divisor of the {num_heads} heads", num_kv_heads)
        settings.keep_cores()
        kv_features = qkv_features // num_heads * self.num_kv_heads
        self.query, self.key, self.value = (nn.Dense(in_features, features, has_bias=use_bias)
                                            for features in (qkv_features, kv_features, kv_features))
        self.out = nn.Dense(qkv_features, out_features, has_bias=use_bias)
        self.rel_pos_emb = None
        self.use_rel_pos_emb = checks.boolean(owner, "use_rel_pos_emb", use_rel_pos_emb)
        if use_rel_pos_emb:
            span = window_size_left + window_size_right
            checks.positive_int(owner, "window_size_left + window_size_right", span)
            self.rel_pos_emb = Parameter(initializer(Normal(0.02), (span, qkv_features // num_heads)), "rel_pos_emb")

    def extend_repr(self):
        return checks.settings(self)

    def construct(self, inputs_q, inputs_kv, mask=None, seed=None, segment_ids=None):
        """Compute attention of one sequence to another. The class describes each input, under Inputs."""
        self._check("inputs_q", "inputs_kv", inputs_q, inputs_kv, mask, seed, segment_ids)
        return self.out(self._attend(self.query(inputs_q), self.key(inputs_kv), self.value(inputs_kv), mask, seed,
                                     segment_ids))


class LocalSelfAttention(MultiHeadLocalAttention):
    r"""
    Multi-head sliding-window self-attention: `MultiHeadLocalAttention` of a sequence with itself.

    Args:
        in_features (int): Size of the last axis of the input.
        num_heads (int): Number of heads.
        qkv_features (int): Size of all heads' queries together; ``None`` is `in_features`. Default: ``None`` .
        out_features (int): Size of the last axis of the output; ``None`` is `in_features`. Default: ``None`` .
        window_size_left (int): Keys seen before the query. Default: ``128`` .
        window_size_right (int): Keys seen from the query on, itself among them. Default: ``128`` .
        dropout_rate (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        use_bias (bool): Whether the projections have a bias. Default: ``True`` .
        use_rel_pos_emb (bool): Whether offsets have learned embeddings, shared by the heads. Default: ``False`` .
        num_kv_heads (int): Heads of keys and values, a divisor of `num_heads`; ``None`` is `num_heads`.
            Default: ``None`` .

    Inputs:
        - **x** (Tensor) - `(b, n, in_features)`.
        - **mask** (Tensor) - bool `(b, n)`, True = a real key. Default: ``None`` .
        - **seed** (Union[int, Tensor]) - What the weights dropped in training are a function of. Default: ``None`` .
        - **segment_ids** (Tensor) - int `(b, n)`: consecutive tokens of one id are a document that sees no other,
          a negative id is padding. Default: ``None`` .

    Outputs:
        Tensor of shape `(b, n, out_features)`.

    Raises:
        TypeError: If an argument or input is of another type or dtype, or an argument has a name not known here.
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

    def construct(self, x, mask=None, seed=None, segment_ids=None):
        """Compute attention of a sequence to itself. The class describes each input, under Inputs."""
        self._check("x", "x", x, x, mask, seed, segment_ids)
        return self.out(self._attend(self.query(x), self.key(x), self.value(x), mask, seed, segment_ids))
