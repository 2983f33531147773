"""A block of local attention: projections around `LocalAttention`, and a learned bias of distances."""
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import checks
from .backends import portable
from .backends.any_length import unknown
from .cache import MOST_KEPT, attend_cached, attend_piece, capacity, check_form, checked_cache, first_cache, form
from .layers import LayerNorm, fused_heads, reorder, split_alone, take
from .local_attention import LocalAttention, l2norm
from .rings import attend_in_place, entered, fused_entry


@constexpr
def check_cacheable(owner, causal, masked, n, sliced, documents, kept, global_takes_cache=True):
    """Check that a call can use a cache: no token may see later ones or be hidden, its length must be known, and the
    tokens that are `kept` can be held."""
    if sliced:
        raise checks.value_error(owner, "cache", "None, and 'return_cache' False, with 'sequence_parallel'", "a cache")
    if not global_takes_cache:
        raise checks.value_error(owner, "cache", "None, and 'return_cache' False, where 'global_attn_layer' is not "
                                 "causal or its 'construct' does not take both", "a cache")
    if not causal:
        raise checks.value_error(owner, "cache", "None, and 'return_cache' False, where 'causal' is False", "a cache")
    if kept > MOST_KEPT:
        raise checks.value_error(owner, "cache", "None, and 'return_cache' False, for windows that keep more than "
                                 f"{MOST_KEPT} tokens", f"windows that keep {kept}")
    if masked:
        raise checks.value_error(owner, "mask", "None with a cache", "a mask")
    if documents:
        raise checks.value_error(owner, "segment_ids", "None with a cache", "documents")
    if n is None:
        raise checks.value_error(owner, "cache", "None in a graph for every length, and 'return_cache' False", "one")


@constexpr
def checked_block(owner, dim, x, mask, return_cache):
    """Check a call on vectors; return its batch and length."""
    checks.boolean(owner, "return_cache", return_cache)
    shape = checks.tensor(owner, "x", x, checks.FLOATS)
    if len(shape) != 3 or shape[2] not in (None, dim) or 0 in shape:  # None: a graph does not know it, but we do
        raise checks.value_error(owner, "x", f"of shape (batch, n, {dim}), not empty", shape)
    return checks.key_mask(owner, mask, shape[:2])


@constexpr
def _distances(owner, i, j, after):
    """Return every distance, as a column; the index of the distance of each query and key, flattened; and where queries
    and keys are."""
    checks.positive_int(owner, "i", i)
    if checks.positive_int(owner, "j", j) < i:
        raise checks.value_error(owner, "j", f"at least i ({i})", j)
    checks.non_negative_int(owner, "after", after)
    apart = np.abs(np.arange(j - i, j)[:, None] - np.arange(j + after))
    return (Tensor(np.arange(apart.max() + 1, dtype=np.float32)[:, None]), Tensor(apart.reshape(-1).astype(np.int32)),
            Tensor(np.arange(j - i, j, dtype=np.int32)[:, None]), Tensor(np.arange(j + after, dtype=np.int32)[None]))


class DynamicPositionBias(nn.Cell):
    r"""
    A learned bias of attention scores: a small network of the distance between query and key, an output for each head.

    Args:
        dim (int): Width of the network's two hidden layers.
        heads (int): Number of heads.

    Inputs:
        - **i** (int) - Number of queries.
        - **j** (int) - Number of keys, at least `i`: the queries are the last `i` of these positions.
        - **after** (int) - Number of further keys after the last query. Default: ``0`` .

    Outputs:
        Tensor of shape `(heads, i, j + after)`; it depends on the distance alone, not on its sign.

    Raises:
        TypeError: If an argument or input is not an int.
        ValueError: If `dim`, `heads` or `i` is not positive, `j` less than `i`, or `after` negative.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from local_attention import DynamicPositionBias
        >>> print(DynamicPositionBias(dim=16, heads=8)(5, 10).shape)
        (8, 5, 10)
    """

    def __init__(self, dim, heads, **unknown):
        super().__init__()
        checks.arguments(self.cls_name, unknown, checks.parameters(DynamicPositionBias), {"num_heads": "heads"})
        self.dim = checks.positive_int(self.cls_name, "dim", dim)
        self.heads = checks.positive_int(self.cls_name, "heads", heads)
        self.mlp = nn.SequentialCell(nn.Dense(1, dim), nn.SiLU(), nn.Dense(dim, dim), nn.SiLU(), nn.Dense(dim, heads))

    def extend_repr(self):
        return checks.settings(self)

    def construct(self, i, j, after=0):
        """Compute the bias of `i` queries and `j + after` keys. The class describes it."""
        distances, index, queries, keys = _distances(self.cls_name, i, j, after)
        if portable.exporting():  # a file should hold no number for each pair
            index = ops.abs(ops.sub(queries, keys)).reshape(-1)
        return ops.gather(self.mlp(distances).swapaxes(0, 1), index, 1).reshape(-1, i, j + after)


@constexpr
def not_cached(owner, has_order, attn_bias):
    """Refuse what a cached step could not repeat for its keys."""
    checks.together(owner, ("order", has_order), ("a cache", True))
    checks.together(owner, ("a bias for each query", checks.axes(attn_bias) == 4), ("a cache", True))


@constexpr
def _is_step(x, cache):
    """Whether x, as described, is a token of each row, and the cache, by its `form`, is in place."""
    return checks.axes(x) == 2 and isinstance(cache, tuple) and cache[0] == "tuple" and len(cache[1]) == 4


@constexpr
def checked_segments(owner, segment_ids, b, n):
    """Check the documents of a call of a block or a model."""
    checks.segment_ids(owner, segment_ids, b, n)


# what LocalMHA hands on to LocalAttention; it sets the others itself
ATTENTION_ARGUMENTS = tuple(name for name in checks.parameters(LocalAttention) if name not in (
    "dim", "window_size", "causal", "scale", "exact_windowsize", "use_xpos", "xpos_scale_base", "dropout"))
INSTEAD = {"head_dim": "dim_head", "num_heads": "heads", "num_kv_heads": "kv_heads", "scale": "qk_scale"}


class _Heads(nn.Cell):
    """What LocalMHA does between projections, in a base class, which MindSpore's O1 does not rewrite (see `cells`)."""

    def _checked(self, x, mask, attn_bias, cache, return_cache, segment_ids, order):
        """Check a call; return x, its batch and length. They are used, because a graph drops unused checks. A step of
        decoding may leave out the axis of tokens."""
        if _is_step(checks.described(x), form(cache)):
            return x, x.shape[0], 1
        b, n = checked_block(self.cls_name, self.dim, checks.described(x), checks.described(mask), return_cache)
        if cache is not None:
            check_form(self.cls_name, form(cache), b, self.attn_fn.windows, checks.described(attn_bias))
        if cache is not None or return_cache:
            check_cacheable(self.cls_name, self.causal, mask is not None, n, self.attn_fn.group is not None,
                            segment_ids is not None, capacity(self.attn_fn.windows))
            not_cached(self.cls_name, order is not None, checks.described(attn_bias))
        if segment_ids is not None:
            checked_segments(self.cls_name, checks.described(segment_ids), b, n)
        return x, b, n

    def _attend(self, qkv, mask, attn_bias, cache, return_cache, segment_ids, order):
        """Compute attention of the projection, `(b, n, heads * d)`, and the next cache. In a step of decoding, both may
        be without the axis of n."""
        more = {} if order is None else {"order": order}  # a Cell that stands in for the attention may not know it
        without_axis = len(qkv.shape) == 2
        if without_axis:
            qkv = qkv.reshape(qkv.shape[0], 1, -1)
        b, n, _ = qkv.shape
        if unknown((b, n)):
            return self._attend_any_length(qkv, mask, attn_bias, segment_ids, more), cache
        if cache is None and not return_cache and not self.qk_rmsnorm:
            split = fused_heads(self.attn_fn, self.heads, self.kv_heads)
            if split is not None:
                q, k, v = split(ops.cast(qkv, ms.float32))
                return self.attn_fn._attend_split(q, k, v, mask, attn_bias, segment_ids, self.sinks, order,
                                                 qkv.dtype), None
        entry = None
        if cache is not None and len(cache) == 4 and n == 1 and not self.qk_rmsnorm:
            entry = fused_entry(self.attn_fn, qkv.dtype)
        if entry is not None:
            out = attend_in_place(self.attn_fn, entry(qkv, *cache), cache, attn_bias, self.sinks)
        else:
            out, cache = self._attend_heads(qkv, mask, attn_bias, cache, return_cache, segment_ids, more)
        if n > 1:
            out = reorder((b, self.heads, n), (0, 2, 1))(out.reshape(-1, self.dim_head))
        return out.reshape((b, -1) if without_axis else (b, n, -1)), cache

    def _attend_heads(self, qkv, mask, attn_bias, cache, return_cache, segment_ids, more):
        """Compute the same; the output has heads before positions."""
        b, n, _ = qkv.shape
        sizes = self.heads, self.kv_heads, self.kv_heads
        split = split_alone(self.heads, self.kv_heads) if n > 1 and cache is not None and len(cache) == 4 else None
        if split is None:
            q, k, v = take((b, n, self.heads + 2 * self.kv_heads), sizes, (0, 2, 1))(qkv.reshape(-1, self.dim_head))
        else:  # a piece of a prompt, in float32
            q, k, v = split(qkv)
        if self.qk_rmsnorm:
            q, k = l2norm(q, self.q_scale), l2norm(k, self.k_scale)
        if cache is None or len(cache) == 1:
            shape = (b, self.kv_heads, n, self.dim_head)
            out = self.attn_fn(q.reshape(b, self.heads, n, self.dim_head), k.reshape(shape), v.reshape(shape),
                               mask=mask, attn_bias=attn_bias, segment_ids=segment_ids, sinks=self.sinks, **more)
            if return_cache:
                shape = (b * self.kv_heads, n, self.dim_head)
                cache = first_cache(self.attn_fn, k.reshape(shape), v.reshape(shape), b,
                                    None if cache is None else cache[0])
        else:
            shape = (b * self.kv_heads, n, self.dim_head)
            checked_cache(self.cls_name, form(cache), b, self.kv_heads, self.attn_fn.windows, self.dim_head, k.dtype)
            q, k, v = q.reshape(b * self.heads, n, self.dim_head), k.reshape(shape), v.reshape(shape)
            if n > 1 and len(cache) == 4:
                out, cache = attend_piece(self.attn_fn, q, k, v, cache, attn_bias, self.sinks)
            elif len(cache) == 3:
                out, cache = attend_cached(self.attn_fn, q, k, v, cache, attn_bias, self.sinks)
            else:
                q, cache = entered(self.attn_fn, q, k, v, cache)
                out = attend_in_place(self.attn_fn, q, cache, attn_bias, self.sinks)
        return out, cache

    def _attend_any_length(self, qkv, mask, attn_bias, segment_ids, more):
        """Compute attention of the projection in a graph that is compiled for any length."""
        b, n, _ = qkv.shape
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = ops.split(qkv.reshape(b, n, self.heads + 2 * self.kv_heads, self.dim_head), sizes, 2)
        if self.qk_rmsnorm:
            q, k = l2norm(q, self.q_scale), l2norm(k, self.k_scale)
        out = self.attn_fn(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask, attn_bias=attn_bias,
                           segment_ids=segment_ids, sinks=self.sinks, **more)
        return out.swapaxes(1, 2).reshape(b, n, self.heads * self.dim_head)

    def _gated(self, out, gates):
        """Multiply each head's output `(b, n, heads * d)` by its gate, which is `(b, n, heads)` before the sigmoid."""
        shape, gates = out.shape, ops.sigmoid(gates)
        if unknown(shape[:-1]):
            b, n, _ = shape
            out = ops.mul(out.reshape(b, n, self.heads, self.dim_head), gates[..., None])
        else:
            gates = ops.matmul(gates.reshape(-1, 1), ops.ones((1, self.dim_head), gates.dtype))
            out = ops.mul(out.reshape(-1, self.dim_head), gates)
        return out.reshape(shape[:-1] + (self.heads * self.dim_head,))


class LocalMHA(_Heads):
    r"""
    Multi-head self-attention over local windows: project to queries, keys and values, attend, project back.

    Args:
        dim (int): Size of the last axis of the input.
        window_size (int): Positions in a window.
        dim_head (int): Dimension of a head, even for rotary embeddings. Default: ``64`` .
        heads (int): Number of heads. Default: ``8`` .
        dropout (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        causal (bool): Whether a query sees no key after itself. Default: ``False`` .
        prenorm (bool): Whether LayerNorm comes first. Default: ``False`` .
        qk_rmsnorm (bool): Whether queries and keys are scaled to a learned length, and their products by `qk_scale`.
            Default: ``False`` .
        qk_scale (float): Used only with `qk_rmsnorm`. Default: ``8`` .
        use_xpos (bool): Whether rotary embedding, if it is on, is xpos. Default: ``False`` .
        xpos_scale_base (float): The scale base of xpos, in positions; ``None`` is half the window. Default: ``None`` .
        exact_windowsize (bool): Whether every query sees the same number of keys; ``None`` is ``True`` .
            Default: ``None`` .
        gate_values_per_head (bool): Whether each head's output is multiplied by a gate, computed from the input.
            Default: ``False`` .
        kv_heads (int): Heads of keys and values, a divisor of `heads`: query head `i` reads key head
            `i // (heads / kv_heads)`. ``None`` is `heads`. Default: ``None`` .
        learned_sinks (bool): Whether each head has a learned score that joins the softmax of its queries and has no
            value: a Parameter `sinks` `(heads)`, initially zeros. Default: ``False`` .
        kwargs (dict): Further arguments of `LocalAttention`. With its `sequence_parallel`, inputs and output are
            this rank's slice, and gradients of weights are this rank's part.

    Inputs:
        - **x** (Tensor) - `(b, n, dim)`, any `n`.
        - **mask** (Tensor) - Padding mask, bool `(b, n)`, True = a real token. Default: ``None`` .
        - **attn_bias** (Tensor) - `(heads, W, W * (1 + look_backward + look_forward))`, as
          `LocalAttention` takes it; without a cache, also with a row for each token. Default: ``None`` .
        - **cache** - The cache that an earlier call of a causal block without a mask returned. `x` holds the next
          tokens, one or more. The cache has the prefix and the last tokens; its size does not grow with the sequence.
          Default: ``None`` .
        - **return_cache** (bool) - Whether the cache for the next call is returned too. Default: ``False`` .
        - **segment_ids** (Tensor) - int `(b, n)`. Consecutive tokens with the same id are a document, computed as
          if it were alone; a negative id is padding. Not with a cache. Default: ``None`` .
        - **order** (Tensor) - int `(b, n)`, as `LocalAttention` takes it. Not with a cache. Default:
          ``None`` .

    Outputs:
        Tensor of the shape of `x`; with a cache, the same rows as in one call on all the tokens. With `return_cache`, a
        tuple of the output and the cache.

    Raises:
        TypeError: If an argument or input is of another type or dtype, or an argument has a name not known here.
        ValueError: If an argument is out of its range or shapes do not agree.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import LocalMHA
        >>> mha = LocalMHA(dim=512, window_size=128, causal=True, prenorm=True)
        >>> print(mha(ops.randn((2, 1000, 512)), mask=ops.ones((2, 1000)).bool()).shape)
        (2, 1000, 512)
    """

    def __init__(self, *, dim, window_size, dim_head=64, heads=8, dropout=0., causal=False, prenorm=False,
                 qk_rmsnorm=False, qk_scale=8, use_xpos=False, xpos_scale_base=None, exact_windowsize=None,
                 gate_values_per_head=False, kv_heads=None, learned_sinks=False, **kwargs):
        super().__init__()
        owner = self.cls_name
        checks.arguments(owner, kwargs, [*checks.parameters(LocalMHA), *ATTENTION_ARGUMENTS], INSTEAD)
        self.dim = checks.positive_int(owner, "dim", dim)
        self.dim_head = checks.positive_int(owner, "dim_head", dim_head)
        self.heads = checks.positive_int(owner, "heads", heads)
        self.kv_heads = checks.positive_int(owner, "kv_heads", heads if kv_heads is None else kv_heads)
        if heads % self.kv_heads:
            raise checks.value_error(owner, "kv_heads", f"a divisor of the {heads} heads", kv_heads)
        if dim_head % 2 and kwargs.get("use_rotary_pos_emb", True):
            raise checks.value_error(owner, "dim_head", "even for rotary embeddings", dim_head)
        self.qk_rmsnorm = checks.boolean(owner, "qk_rmsnorm", qk_rmsnorm)
        self.qk_scale = checks.scale(owner, "qk_scale", qk_scale)
        self.attn_fn = LocalAttention(
            dim=dim_head, window_size=window_size, causal=causal, scale=qk_scale if qk_rmsnorm else None,
            exact_windowsize=True if exact_windowsize is None else exact_windowsize, use_xpos=use_xpos,
            xpos_scale_base=xpos_scale_base, dropout=dropout, **{"autopad": True, **kwargs})
        self.causal, self.window_size = self.attn_fn.causal, self.attn_fn.window_size
        self.exact_windowsize = self.attn_fn.exact_windowsize

        self.prenorm = checks.boolean(owner, "prenorm", prenorm)
        self.norm = LayerNorm(dim) if prenorm else None
        self.to_qkv = nn.Dense(dim, dim_head * (heads + 2 * self.kv_heads), has_bias=False)
        self.learned_sinks, self.sinks = checks.boolean(owner, "learned_sinks", learned_sinks), None
        if learned_sinks:
            self.sinks = ms.Parameter(ops.zeros((heads,), ms.float32), name="sinks")
        if qk_rmsnorm:
            self.q_scale = ms.Parameter(ops.ones((dim_head,), ms.float32), name="q_scale")
            self.k_scale = ms.Parameter(ops.ones((dim_head,), ms.float32), name="k_scale")
        self.gate_values_per_head = checks.boolean(owner, "gate_values_per_head", gate_values_per_head)
        self.to_v_gate = nn.SequentialCell(nn.Dense(dim, heads)) if gate_values_per_head else None
        self.to_out = nn.Dense(dim_head * heads, dim, has_bias=False)

    def extend_repr(self):
        return checks.settings(self)

    def construct(self, x, mask=None, attn_bias=None, cache=None, return_cache=False, segment_ids=None, *, order=None):
        """Compute a block of attention on x. The class describes each input, under Inputs."""
        x, _, _ = self._checked(x, mask, attn_bias, cache, return_cache, segment_ids, order)
        if self.norm is not None:
            x = self.norm(x)
        out, cache = self._attend(self.to_qkv(x), mask, attn_bias, cache, return_cache, segment_ids, order)
        if self.to_v_gate is not None:
            out = self._gated(out, self.to_v_gate(x))
        out = self.to_out(out)
        return (out, cache) if return_cache else out
