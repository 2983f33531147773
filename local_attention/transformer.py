"""Blocks of local attention, and a language model made of them."""
import copy
import inspect
import math
from numbers import Integral

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal
from mindspore.ops import constexpr

from . import checks, parallel
from .any_length import unknown
from .attend import Float32, draw_seed
from .backends.dropout import column_hash, keep_factors, row_hash, seeded_rows
from .cache import (Rings, attend_cached, attend_in_place, checked_cache, entered, first_cache, fused_entry,
                    place_in_rings)
from .hyper_connections import HyperConnections, add_output, expand, reduce
from .layers import GEGLU, LayerNorm, reorder, take
from .local_attention import LocalAttention, l2norm

INTEGERS = ("Int32", "Int64")


def top_k(logits, thres=0.9):
    """
    Keep the largest logits, `max(1, int((1 - thres) * vocabulary))` of them, and set the others to -inf.

    Args:
        logits (Tensor): float :math:`(..., vocabulary)`.
        thres (float): The share, in [0, 1], that is dropped. Default: ``0.9`` .

    Returns:
        Tensor of the shape and dtype of `logits`. Exactly that many are kept, where logits are equal too.
    """
    values, indices = ops.topk(logits, _kept(thres, checks.described(logits)))
    return ops.tensor_scatter_elements(ops.full_like(logits, float("-inf")), indices, values, -1)


@constexpr
def _kept(thres, logits):
    """How many logits are kept."""
    checks.fraction("top_k", "thres", thres)
    shape = checks.tensor("top_k", "logits", logits, checks.FLOATS)
    if 0 in shape or not shape:
        raise checks.value_error("top_k", "logits", "of shape (..., vocabulary), not empty", shape)
    return _kept_count(thres, shape[-1])


def _kept_count(thres, vocabulary):
    return max(1, int((1 - thres) * vocabulary))


def _sample(logits, temperature, thres):
    """A token for each row of float32 logits: the largest of logits with Gumbel noise, which is a draw by softmax.

    In NumPy, whose global generator `mindspore.set_seed` seeds too: tokens are on the host anyway, and for one row of
    logits an operator costs more to launch than to run.
    """
    count = _kept_count(thres, logits.shape[-1])
    kept = np.argpartition(-logits, count - 1)[:, :count]
    values = np.take_along_axis(logits, kept, -1)
    if temperature > 0:
        largest = values.max(-1, keepdims=True)  # so that no temperature, however small, makes two infinities
        values = (values - largest) / temperature + np.random.gumbel(size=values.shape)
    return np.take_along_axis(kept, values.argmax(-1)[:, None], -1)[:, 0]


class _CrossEntropy(Float32):
    """The mean of -log softmax over the labels, of all ranks of a group, that are not `ignore_index`; 0 where all are.
    """

    def __init__(self, ignore_index, group=None):
        super().__init__()
        self.total = ops.NLLLoss(reduction="sum", ignore_index=ignore_index)
        self.mean = None if group is None else parallel.MeanOfRanks(group)

    def construct(self, logits, labels):
        weights = ops.ones((logits.shape[1],), ms.float32)
        total, count = self.total(ops.log_softmax(ops.cast(logits, ms.float32), -1), labels, weights)
        if self.mean is None:
            return total / ops.maximum(count, 1.)
        mean_count = self.mean(ops.stop_gradient(count))
        return self.mean(ops.depend(total, mean_count) / ops.maximum(mean_count, 1. / self.mean.size))


class _Dropout(nn.Cell):
    """Dropout in training that a seed repeats: which numbers `nn.Dropout` drops on CPU depends on its threads too."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def construct(self, x):
        if self.rate == 0 or not self.training:
            return x
        rows, columns = _hashes(x.shape)
        keep = keep_factors(seeded_rows(rows, draw_seed()), columns, self.rate)
        return ops.mul(x, ops.cast(keep.reshape(x.shape), x.dtype))


@constexpr
def _hashes(shape):
    if None in shape:
        raise checks.value_error("FeedForward", "dropout", "0 in training in a graph for every length", "another")
    rows = row_hash([0], np.arange(math.prod(shape[:-1])))
    return Tensor(rows.reshape(-1, 1)), Tensor(column_hash(np.arange(shape[-1])))


class FeedForward(nn.SequentialCell):
    r"""
    The feed-forward half of a layer: LayerNorm, a projection to twice `int(dim * mult * 2 / 3)`, GEGLU, dropout, back.

    Args:
        dim (int): Size of the last axis.
        mult (float): How many times wider than `dim` a plain feed-forward of as many weights would be.
            Default: ``4`` .
        dropout (float): Rate in [0, 1), in training alone. Default: ``0.`` .

    Inputs:
        - **x** (Tensor) - :math:`(..., dim)`.

    Outputs:
        Tensor of the shape of `x`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of its range.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention.transformer import FeedForward
        >>> print(FeedForward(8)(ops.ones((2, 5, 8))).shape)
        (2, 5, 8)
    """

    def __init__(self, dim, mult=4, dropout=0.):
        owner = type(self).__name__  # before there is a `cls_name`
        inner = int(checks.positive_int(owner, "dim", dim) * checks.positive_number(owner, "mult", mult) * 2 / 3)
        if inner < 1:
            raise checks.value_error(owner, "mult", "large enough for int(dim * mult * 2 / 3) to be positive", mult)
        super().__init__(LayerNorm(dim), nn.Dense(dim, inner * 2, has_bias=False), GEGLU(),
                         _Dropout(checks.rate(owner, "dropout", dropout)), nn.Dense(inner, dim, has_bias=False))


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
        Tensor of shape :math:`(heads, i, j + after)`; it depends on the distance alone, not on its sign.

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

    def __init__(self, dim, heads):
        super().__init__()
        checks.positive_int(self.cls_name, "dim", dim)
        checks.positive_int(self.cls_name, "heads", heads)
        self.mlp = nn.SequentialCell(nn.Dense(1, dim), nn.SiLU(), nn.Dense(dim, dim), nn.SiLU(), nn.Dense(dim, heads))

    def construct(self, i, j, after=0):
        distances, index = _distances(self.cls_name, i, j, after)
        return ops.gather(self.mlp(distances).swapaxes(0, 1), index, 1).reshape(-1, i, j + after)


@constexpr
def _distances(owner, i, j, after):
    """Every distance there is, as a column, and which of them each query and key are apart, flattened."""
    checks.positive_int(owner, "i", i)
    if checks.positive_int(owner, "j", j) < i:
        raise checks.value_error(owner, "j", f"at least i ({i})", j)
    checks.non_negative_int(owner, "after", after)
    apart = np.abs(np.arange(j - i, j)[:, None] - np.arange(j + after))
    return Tensor(np.arange(apart.max() + 1, dtype=np.float32)[:, None]), Tensor(apart.reshape(-1).astype(np.int32))


class LocalMHA(nn.Cell):
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
        qk_scale (float): Used with `qk_rmsnorm` alone. Default: ``8`` .
        use_xpos (bool): Whether rotary embedding is xpos's. Default: ``False`` .
        xpos_scale_base (float): In positions; ``None`` is half the window. Default: ``None`` .
        exact_windowsize (bool): Whether every query sees the same number of keys; ``None`` is ``True`` .
            Default: ``None`` .
        gate_values_per_head (bool): Whether each head's output is multiplied by a gate, computed from the input.
            Default: ``False`` .
        kwargs (dict): Further arguments of :class:`LocalAttention`. With its `sequence_parallel`, inputs and output are
            this rank's slice, and gradients of weights are its part.

    Inputs:
        - **x** (Tensor) - :math:`(b, n, dim)`, any `n`.
        - **mask** (Tensor) - bool :math:`(b, n)`, True = a real token. Default: ``None`` .
        - **attn_bias** (Tensor) - :math:`(heads, W, W \cdot (1 + look\_backward + look\_forward))`, as
          :class:`LocalAttention` takes it. Default: ``None`` .
        - **cache** - What an earlier call returned, of a causal block without a mask: `x` holds the tokens that come
          next, one or more. Its size does not grow with what has been fed. Default: ``None`` .
        - **return_cache** (bool) - Whether the cache for the next call is returned too. Default: ``False`` .

    Outputs:
        Tensor of the shape of `x`: with a cache, the same rows that one call on all the tokens gives. With
        `return_cache` a tuple of it and the cache.

    Raises:
        TypeError: If an argument or input is of another type or dtype.
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
                 gate_values_per_head=False, **kwargs):
        super().__init__()
        owner = self.cls_name
        self.dim = checks.positive_int(owner, "dim", dim)
        self.dim_head = checks.positive_int(owner, "dim_head", dim_head)
        self.heads = checks.positive_int(owner, "heads", heads)
        if dim_head % 2 and kwargs.get("use_rotary_pos_emb", True):
            raise checks.value_error(owner, "dim_head", "even for rotary embeddings", dim_head)
        self.qk_rmsnorm = checks.boolean(owner, "qk_rmsnorm", qk_rmsnorm)
        checks.number(owner, "qk_scale", qk_scale)
        self.attn_fn = LocalAttention(
            dim=dim_head, window_size=window_size, causal=causal, autopad=True, scale=qk_scale if qk_rmsnorm else None,
            exact_windowsize=True if exact_windowsize is None else exact_windowsize, use_xpos=use_xpos,
            xpos_scale_base=xpos_scale_base, dropout=dropout, **kwargs)
        self.causal, self.window_size = self.attn_fn.causal, self.attn_fn.window_size
        self.exact_windowsize = self.attn_fn.exact_windowsize

        self.norm = LayerNorm(dim) if checks.boolean(owner, "prenorm", prenorm) else None
        self.to_qkv = nn.Dense(dim, dim_head * heads * 3, has_bias=False)
        if qk_rmsnorm:
            self.q_scale = ms.Parameter(ops.ones((dim_head,), ms.float32), name="q_scale")
            self.k_scale = ms.Parameter(ops.ones((dim_head,), ms.float32), name="k_scale")
        gated = checks.boolean(owner, "gate_values_per_head", gate_values_per_head)
        self.to_v_gate = nn.SequentialCell(nn.Dense(dim, heads)) if gated else None
        self.to_out = nn.Dense(dim_head * heads, dim, has_bias=False)

    def construct(self, x, mask=None, attn_bias=None, cache=None, return_cache=False):
        b, n = _checked_block(self.cls_name, self.dim, checks.described(x), checks.described(mask))
        if cache is not None or return_cache:
            _check_cacheable(self.cls_name, self.causal, mask is not None, n, self.attn_fn.group is not None)
        if self.norm is not None:
            x = self.norm(x)
        if unknown((b, n)):
            return self._any_length(x, mask, attn_bias)
        qkv = self.to_qkv(x)
        entry = None
        if cache is not None and len(cache) == 4 and not self.qk_rmsnorm:
            entry = fused_entry(self.attn_fn, qkv.dtype)
        if entry is not None:
            out = attend_in_place(self.attn_fn, entry(qkv, cache[0], cache[1], cache[2]), cache, attn_bias)
        else:
            out, cache = self._attend(qkv, b, n, mask, attn_bias, cache, return_cache)
        out = reorder((b, self.heads, n), (0, 2, 1))(out.reshape(-1, self.dim_head))
        if self.to_v_gate is not None:
            gates = ops.sigmoid(self.to_v_gate(x)).reshape(-1, 1)
            out = ops.mul(out, ops.matmul(gates, ops.ones((1, self.dim_head), gates.dtype)))
        out = self.to_out(out.reshape(b, n, -1))
        return (out, cache) if return_cache else out

    def _attend(self, qkv, b, n, mask, attn_bias, cache, return_cache):
        """Attention of what is projected, heads before positions, and the next cache."""
        q, k, v = take((b, n, 3, self.heads), (2, 0, 3, 1), 3)(qkv.reshape(-1, self.dim_head))
        if self.qk_rmsnorm:
            q, k = l2norm(q, self.q_scale), l2norm(k, self.k_scale)
        if cache is None:
            shape = (b, self.heads, n, self.dim_head)
            out = self.attn_fn(q.reshape(shape), k.reshape(shape), v.reshape(shape), mask=mask, attn_bias=attn_bias)
            if return_cache:
                shape = (b * self.heads, n, self.dim_head)
                cache = first_cache(self.attn_fn, k.reshape(shape), v.reshape(shape))
        else:
            shape = (b * self.heads, n, self.dim_head)
            checked_cache(self.cls_name, checks.described(cache[0]), shape[0], self.attn_fn.windows, self.dim_head,
                          k.dtype)
            q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
            if len(cache) == 3:
                out, cache = attend_cached(self.attn_fn, q, k, v, cache, attn_bias)
            else:
                q, cache = entered(self.attn_fn, q, k, v, cache)
                out = attend_in_place(self.attn_fn, q, cache, attn_bias)
        return out, cache

    def _any_length(self, x, mask, attn_bias):
        """A call, past its norm, in a graph that is compiled for every length."""
        b, n, _ = x.shape
        q, k, v = ops.split(self.to_qkv(x).reshape(b, n, 3 * self.heads, self.dim_head), self.heads, 2)
        if self.qk_rmsnorm:
            q, k = l2norm(q, self.q_scale), l2norm(k, self.k_scale)
        out = self.attn_fn(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask, attn_bias=attn_bias)
        out = out.swapaxes(1, 2)
        if self.to_v_gate is not None:
            out = ops.mul(out, ops.sigmoid(self.to_v_gate(x))[..., None])
        return self.to_out(out.reshape(b, n, self.heads * self.dim_head))


@constexpr
def _check_cacheable(owner, causal, masked, n, sliced, global_takes_cache=True):
    """A cache is for what comes next: where nothing that came before could have seen it, or have been hidden."""
    if sliced:
        raise checks.value_error(owner, "cache", "None, and 'return_cache' False, with 'sequence_parallel'", "a cache")
    if not global_takes_cache:
        raise checks.value_error(owner, "cache", "None, and 'return_cache' False, where 'global_attn_layer' is not "
                                 "causal or its 'construct' does not take both", "a cache")
    if not causal:
        raise checks.value_error(owner, "cache", "None, and 'return_cache' False, where 'causal' is False", "a cache")
    if masked:
        raise checks.value_error(owner, "mask", "None with a cache", "a mask")
    if n is None:
        raise checks.value_error(owner, "cache", "None in a graph for every length, and 'return_cache' False", "one")


@constexpr
def _checked_block(owner, dim, x, mask):
    """The rules of a call on vectors: its batch and length."""
    shape = checks.tensor(owner, "x", x, checks.FLOATS)
    if len(shape) != 3 or shape[2] != dim or 0 in shape:
        raise checks.value_error(owner, "x", f"of shape (batch, n, {dim}), not empty", shape)
    return _checked_mask(owner, mask, shape[:2])


def _checked_tokens(owner, name, x, mask):
    """The rules of token sequences: their batch and length."""
    shape = checks.tensor(owner, name, x, INTEGERS)
    if len(shape) != 2 or 0 in shape:
        raise checks.value_error(owner, name, "of shape (batch, n), not empty", shape)
    return _checked_mask(owner, mask, shape)


def _checked_mask(owner, mask, shape):
    if mask is not None:
        checks.tensor(owner, "mask", mask, ("Bool",), shape)
    return shape


def _global_numbers(owner, layer, numbers, depth, sequence_parallel):
    """The rules of global layers: the numbers, from 0, of the layers that one stands before, in order."""
    if layer is None:
        if numbers is not None:
            raise checks.value_error(owner, "layers_insert_global_attn", "None without 'global_attn_layer'", numbers)
        return ()
    if not isinstance(layer, nn.Cell):
        raise checks.type_error(owner, "global_attn_layer", "a Cell", layer)
    if sequence_parallel:
        raise checks.value_error(owner, "global_attn_layer", "None with 'sequence_parallel', where it would see the "
                                 "tokens of one rank", type(layer).__name__)
    if numbers is None:
        return tuple(range(depth))
    name, rule = "layers_insert_global_attn", f"a tuple of numbers of layers, from 1 to {depth}"
    if not isinstance(numbers, (tuple, list, range)):
        raise checks.type_error(owner, name, rule, numbers)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise checks.type_error(owner, name, rule, number)
        if not 1 <= number <= depth:
            raise checks.value_error(owner, name, rule, number)
    return tuple(sorted({int(number) - 1 for number in numbers}))


def _takes(layer):
    """Whether a global layer takes a mask, and whether it keeps a cache; one that is not there does both."""
    if layer is None:
        return True, True
    taken = inspect.signature(layer.construct).parameters
    return "mask" in taken, "cache" in taken and "return_cache" in taken and getattr(layer, "causal", True)


@constexpr
def _checked_shape(owner, out, shape):
    """The rule of what a global layer returns, a tensor as `checks.described`, and its shape: used, as in a graph, what
    is not used may come after what it should come before."""
    is_tensor = isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], tuple)
    if not is_tensor or out[0] != shape:
        raise checks.value_error(owner, "global_attn_layer", "a Cell that returns a Tensor of its input's shape "
                                 f"{shape}", out[0] if is_tensor else type(out).__name__)
    return shape


def _given_back(x, out, beta):
    """A residual connection, or hyper-connection: what went past a part of a layer, and its output."""
    return x + out if beta is None else add_output(x, out, beta)


class LocalTransformer(nn.Cell):
    r"""
    A language model of local attention: embeddings, layers of :class:`LocalMHA` and :class:`FeedForward`, logits.

    The arguments and results are those of the PyTorch package `local-attention` 1.11.2 by Phil Wang.

    Args:
        num_tokens (int): Size of the vocabulary; ``None`` is a model from vectors to vectors, without embeddings or
            logits.
        max_seq_len (int): The longest sequence, in tokens.
        dim (int): Size of a token's vector.
        depth (int): Number of layers.
        causal (bool): Whether a token sees none after itself. Default: ``True`` .
        local_attn_window_size (int): Positions in a window. Default: ``512`` .
        dim_head (int): Dimension of a head. Default: ``64`` .
        heads (int): Number of heads. Default: ``8`` .
        ff_mult (float): Width of the feed-forward, see :class:`FeedForward`. Default: ``4`` .
        attn_dropout (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        ff_dropout (float): The same of feed-forward activations. Default: ``0.`` .
        ignore_index (int): The label that the loss leaves out. Default: ``-1`` .
        use_xpos (bool): Whether rotary embedding is xpos's. Default: ``False`` .
        xpos_scale_base (float): In positions; ``None`` is half the window. Default: ``None`` .
        use_dynamic_pos_bias (bool): Whether a learned bias of the distance takes the place of rotary embedding, xpos
            included. Default: ``False`` .
        global_attn_layer (Cell): From vectors :math:`(b, n, dim)` to as many, with a residual connection around it;
            attention to all tokens, a memory, anything. Copies of it, each with parameters of its own, stand before
            local layers. If its `construct` takes `mask`, it is given the model's; if it takes `cache` and
            `return_cache` as :class:`LocalMHA` does, the model can be decoded with a cache, of which this layer's part
            is a tuple of Tensors. Default: ``None`` .
        layers_insert_global_attn (tuple): The numbers, from 1 to `depth`, of the layers with such a copy before them;
            ``None`` is all of them. Default: ``None`` .
        num_residual_streams (int): Above 1, the residual connections become hyper-connections of that many streams
            (Zhu et al., 2024). Default: ``1`` .
        kwargs (dict): Further arguments of :class:`LocalMHA` and :class:`LocalAttention`. With `sequence_parallel`,
            which the latter describes, rank :math:`r` holds the tokens :math:`r n` to :math:`r n + n - 1`: inputs and
            outputs are that slice, the loss is the mean over the labels of all ranks, and gradients are those of one
            process once averaged over the ranks: within a compiled step by
            :class:`local_attention.parallel.AverageGradients`, outside of one also by `nn.DistributedGradReducer`.
            There is no cache then and no `generate`. Dropout of attention weights is that of one process where the
            global seed is; that of the feed-forward each rank draws for itself.

    Inputs:
        - **x** (Tensor) - int :math:`(b, n)`, each in [0, `num_tokens`), or float :math:`(b, n, dim)` when `num_tokens`
          is ``None`` .
        - **mask** (Tensor) - bool :math:`(b, n)`, True = a real token. Default: ``None`` .
        - **cache** - What an earlier call returned, of a causal model without a mask: `x` is the whole sequence so
          far, and what was not in it then is computed. Default: ``None`` .
        - **return_loss** (bool) - Whether the loss is returned. Default: ``False`` .
        - **return_cache** (bool) - Whether the cache for the next call is returned too. Default: ``False`` .

    Outputs:
        Tensor, logits of shape :math:`(b, n, num\_tokens)`, or :math:`(b, n, dim)` when `num_tokens` is ``None`` .

        With a cache, the rows of the new tokens alone. With `return_cache` a tuple of it and the cache.

        With `return_loss` a scalar in float32: the cross-entropy of each token after the first given those before it,
        averaged over those that are not `ignore_index`. Where all are, it is 0 with zero gradient, and not NaN.

    Raises:
        TypeError: If an argument or input is of another type or dtype.
        ValueError: If an argument is out of its range, shapes do not agree, the sequence is longer than `max_seq_len`,
            or a loss is asked of a model without tokens or of fewer than 2.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import LocalTransformer
        >>> model = LocalTransformer(num_tokens=256, max_seq_len=512, dim=64, depth=2, local_attn_window_size=128)
        >>> x = ops.randint(0, 256, (2, 300))
        >>> print(model(x).shape, model(x, return_loss=True).shape, model.generate(x[:, :5], 3).shape)
        (2, 300, 256) () (2, 3)
    """

    def __init__(self, *, num_tokens, max_seq_len, dim, depth, causal=True, local_attn_window_size=512, dim_head=64,
                 heads=8, ff_mult=4, attn_dropout=0., ff_dropout=0., ignore_index=-1, use_xpos=False,
                 xpos_scale_base=None, use_dynamic_pos_bias=False, global_attn_layer=None,
                 layers_insert_global_attn=None, num_residual_streams=1, **kwargs):
        super().__init__()
        owner = self.cls_name
        self.num_tokens = None if num_tokens is None else checks.positive_int(owner, "num_tokens", num_tokens)
        self.max_seq_len = checks.positive_int(owner, "max_seq_len", max_seq_len)
        self.dim = checks.positive_int(owner, "dim", dim)
        checks.positive_int(owner, "depth", depth)
        self.local_attn_window_size = checks.positive_int(owner, "local_attn_window_size", local_attn_window_size)
        checks.positive_number(owner, "ff_mult", ff_mult)
        checks.rate(owner, "attn_dropout", attn_dropout)
        checks.rate(owner, "ff_dropout", ff_dropout)
        self.ignore_index = checks.integer(owner, "ignore_index", ignore_index, -2**31)
        checks.boolean(owner, "use_xpos", use_xpos)
        checks.boolean(owner, "use_dynamic_pos_bias", use_dynamic_pos_bias)
        if use_dynamic_pos_bias and dim < 2:
            raise checks.value_error(owner, "dim", "at least 2 with 'use_dynamic_pos_bias'", dim)
        global_numbers = _global_numbers(owner, global_attn_layer, layers_insert_global_attn, depth,
                                         kwargs.get("sequence_parallel"))
        self.num_residual_streams = checks.positive_int(owner, "num_residual_streams", num_residual_streams)

        if num_tokens is not None:
            self.token_emb = nn.Embedding(num_tokens, dim, embedding_table=Normal(1.))
            self.pos_emb = nn.Embedding(max_seq_len, dim, embedding_table=Normal(1.))
            self.to_logits = nn.SequentialCell(LayerNorm(dim),
                                               nn.Dense(dim, num_tokens, has_bias=False))
        self.layers = nn.CellList([nn.CellList([
            LocalMHA(dim=dim, window_size=local_attn_window_size, dim_head=dim_head, heads=heads, dropout=attn_dropout,
                     causal=causal, prenorm=True, use_xpos=use_xpos and not use_dynamic_pos_bias,
                     xpos_scale_base=xpos_scale_base, use_rotary_pos_emb=not use_dynamic_pos_bias, **kwargs),
            FeedForward(dim, ff_mult, ff_dropout)]) for _ in range(depth)])
        self.causal, self.windows = causal, self.layers[0][0].attn_fn.windows
        self.group = self.layers[0][0].attn_fn.group
        if num_tokens is not None:
            self.cross_entropy = _CrossEntropy(ignore_index, self.group)
        # where among the caches, after those of the local blocks, that of each layer's global layer is; 0 without one
        self.global_places = tuple(depth + global_numbers.index(number) if number in global_numbers else 0
                                   for number in range(depth))
        self.global_layers = nn.CellList([copy.deepcopy(global_attn_layer) if place else nn.Identity()
                                          for place in self.global_places if global_numbers])
        self.cached_cells = depth + len(global_numbers)
        self.global_takes_mask, self.global_takes_cache = _takes(global_attn_layer)
        self.hyper_connections = None
        if num_residual_streams > 1:
            self.hyper_connections = HyperConnections(num_residual_streams, dim, depth, global_numbers)
        self.dynamic_pos_bias = DynamicPositionBias(dim // 2, heads) if use_dynamic_pos_bias else None
        self._steps = None

    def construct(self, x, mask=None, cache=None, return_loss=False, return_cache=False):
        b, n = _checked_call(self.cls_name, self.num_tokens, self.max_seq_len, self.dim, checks.described(x),
                             checks.described(mask), return_loss, self.group)
        seen, layers, attn_bias = 0, None, None
        if cache is not None or return_cache:
            _check_cacheable(self.cls_name, self.causal, mask is not None, n, self.group is not None,
                             self.global_takes_cache)
        if cache is not None:
            layers, attn_bias, seen = cache  # of each block, of all of them, and how many tokens they were fed
            _check_cached_call(self.cls_name, n, seen, len(layers), self.cached_cells, return_loss)
            x = x[:, seen:]
        labels = None
        if return_loss and self.group is None:
            x, labels = x[:, :-1], x[:, 1:]
            mask = None if mask is None else mask[:, :-1]
        elif return_loss:  # slices stay of one length: the very last token has no label, and none may see it
            labels = parallel.next_tokens(self.group, x, self.ignore_index)
            x = ops.depend(x, labels)
            if not self.causal:
                mask = parallel.without_last(self.group, mask, b, n)
        if self.num_tokens is not None:
            start = seen if self.group is None else self.group.rank * n
            if unknown((b, n)):  # which max_seq_len has to be at least: a compiled graph does not look
                x = self.token_emb(x) + self.pos_emb(ops.arange(0, x.shape[1], 1))[None]
            else:
                x = self.token_emb(x) + self.pos_emb(_positions(b, start, start + n - seen, self.max_seq_len))
        if self.dynamic_pos_bias is not None and attn_bias is None:
            size, before = self.windows.size, self.windows.backward
            attn_bias = self.dynamic_pos_bias(size, before + size, self.windows.forward)
        x, layers = self._through_layers(x, mask, attn_bias, layers, return_cache)
        if self.num_tokens is not None:
            x = self.to_logits(x)
        if return_loss:
            return self.cross_entropy(x.reshape(-1, self.num_tokens), ops.cast(labels, ms.int32).reshape(-1))
        return (x, (layers, attn_bias, n)) if return_cache else x

    def _through_layers(self, x, mask, attn_bias, layers, return_cache):
        """Every block in turn, with its cache where there are `layers` of them, and the caches that come next: those of
        the local blocks, and after them those of the global layers."""
        caches, global_caches = [], []
        if self.hyper_connections is not None:
            x = expand(x, self.num_residual_streams)
        for number in range(len(self.layers)):
            attn, ff = self.layers[number]
            place = self.global_places[number]
            if place > 0:
                taken, x, beta = self._taken(x, number, 2)
                out = self._global(self.global_layers[number], taken, mask, None if layers is None else layers[place],
                                   return_cache)
                if return_cache:
                    out, cache = out
                    global_caches.append(cache)
                shape = _checked_shape(self.cls_name, checks.described(out), taken.shape)
                x = _given_back(x, out if unknown(shape) else out.reshape(shape), beta)
            taken, x, beta = self._taken(x, number, 0)
            out = attn(taken, mask=mask, attn_bias=attn_bias, cache=None if layers is None else layers[number],
                       return_cache=return_cache)
            if return_cache:
                out, cache = out
                caches.append(cache)
            x = _given_back(x, out, beta)
            taken, x, beta = self._taken(x, number, 1)
            x = _given_back(x, ff(taken), beta)
        if self.hyper_connections is not None:
            x = reduce(x)
        return x, tuple(caches + global_caches)

    def _taken(self, x, number, part):
        """What a part of a layer (0: local, 1: feed-forward, 2: global) works on, and what its output is added to."""
        if self.hyper_connections is None:
            return x, x, None
        if part == 2:
            return self.hyper_connections.global_layers[number](x)
        return self.hyper_connections.layers[number][part](x)

    def _global(self, layer, x, mask, cache, return_cache):
        if cache is not None or return_cache:
            return layer(x, cache=cache, return_cache=return_cache)
        return layer(x, mask=mask) if self.global_takes_mask else layer(x)

    def _compiled_step(self, layers):
        """`_next_logits`, compiled at its first call for a batch size, and the rings that it keeps, after a prompt.

        A function around it, as a Cell with a compiled method is compiled to that method wherever it is called later;
        kept beside whose it is, as a copy of the model has steps of its own.
        """
        if self._steps is None or self._steps[0] != id(self):
            self._steps = id(self), {}
        local = layers[:len(self.layers)]
        kind = local[0][0].shape, str(local[0][0].dtype)
        if kind not in self._steps[1]:
            model, rings = self, Rings(local)
            sizes = tuple(len(layer) for layer in layers[len(local):])

            def step(token, position, attn_bias, *flat):
                return model._next_logits(token, position, attn_bias, rings, sizes, *flat)

            def fill(*caches):
                return rings(*caches)
            self._steps[1][kind] = ms.jit(step), ms.jit(fill)
        step, fill = self._steps[1][kind]
        fill(local[0][2], *[x for keys, values, _ in local for x in (keys, values)])
        return step

    def _next_logits(self, token, position, attn_bias, rings, sizes, *flat):
        """A step of decoding: logits of the token after `token (b, 1)`, which stands at `position (1,)`, and the caches
        of global layers as flat as they came.

        Flat, as a tuple that goes into a compiled function is a constant of it, and every token would compile anew.
        """
        groups, kept, _ = rings.keys[0].shape
        place = place_in_rings(position, groups, kept)
        layers = []
        for number in range(len(self.layers)):
            layers.append((rings.keys[number], rings.values[number], position, place))
        start = 0
        for size in sizes:
            layers.append(flat[start:start + size])
            start += size
        x = self.token_emb(token) + self.pos_emb(position)
        x, layers = self._through_layers(x, None, attn_bias, layers, True)
        flat = []
        for layer in layers[len(self.layers):]:
            flat += list(layer)
        return (self.to_logits(x)[:, 0], *flat)

    def generate(self, prime, seq_len, temperature=1., filter_thres=0.9, use_kv_cache=True, *, mask=None,
                 callback=None):
        r"""
        Continue sequences, a token at a time; past `max_seq_len` the model sees the last `max_seq_len` tokens.

        Args:
            prime (Tensor): int :math:`(b, n)`, `n` at least 1: what is continued.
            seq_len (int): How many tokens are generated.
            temperature (float): What logits are divided by before they are sampled from; at 0 the likeliest token is
                taken. Default: ``1.`` .
            filter_thres (float): The share of the vocabulary that is never sampled, see :func:`top_k`.
                Default: ``0.9`` .
            use_kv_cache (bool): Whether a causal model without a mask computes each token once, in a step that is
                compiled once for a batch size, as long as all fit in `max_seq_len`; not where a global layer keeps no
                cache. Default: ``True`` .
            mask (Tensor): bool :math:`(b, n)`, True = a real token of `prime`; what is generated is real.
                Default: ``None`` .
            callback (function): Called with the number of tokens generated so far after each of them.
                Default: ``None`` .

        Returns:
            Tensor of shape :math:`(b, seq\_len)` and the dtype of `prime`: the new tokens. `mindspore.set_seed` makes
            them the same again.

        Raises:
            TypeError: If an argument is of another type or dtype.
            ValueError: If an argument is out of its range, or the model has no tokens.
        """
        self._check_generate(prime, seq_len, temperature, filter_thres, use_kv_cache, mask)
        b, n = prime.shape
        tokens = np.zeros((b, n + seq_len + self.local_attn_window_size), prime.asnumpy().dtype)
        real = np.zeros(tokens.shape, bool)
        tokens[:, :n], real[:, :n] = prime.asnumpy(), True if mask is None else mask.asnumpy()
        modes = [(cell, cell.training) for _, cell in self.cells_and_names()]
        self.set_train(False)
        try:
            step, attn_bias, flat = None, None, []
            for end in range(n, n + seq_len):
                start = max(0, end - self.max_seq_len)
                if start or not (use_kv_cache and self.causal and self.global_takes_cache and mask is None):
                    seen = slice(start, start + self._padded(end - start))
                    keys = None if self.causal and mask is None else Tensor(real[:, seen])
                    logits = self(Tensor(tokens[:, seen]), keys)[:, end - start - 1]
                elif step is not None:
                    position = Tensor(np.array([end - 1], np.int32))
                    logits, *flat = step(Tensor(tokens[:, end - 1:end]), position, attn_bias, *flat)
                else:
                    logits, (layers, attn_bias, _) = self(Tensor(tokens[:, :end]), return_cache=True)
                    logits, step = logits[:, -1], self._compiled_step(layers)
                    flat = [x for layer in layers[len(self.layers):] for x in layer]
                if logits.dtype != ms.float32:
                    logits = ops.cast(logits, ms.float32)
                tokens[:, end] = _sample(logits.asnumpy(), temperature, filter_thres)
                real[:, end] = True
                if callback is not None:
                    callback(end - n + 1)
        finally:
            for cell, training in modes:
                cell.set_train(training)
        return Tensor(tokens[:, n:n + seq_len])

    def _check_generate(self, prime, seq_len, temperature, filter_thres, use_kv_cache, mask):
        owner = f"{self.cls_name}.generate"
        if self.num_tokens is None:
            raise ValueError(f"For '{owner}', the model must have tokens, but its 'num_tokens' is None.")
        if self.group is not None:
            raise ValueError(f"For '{owner}', the model must be one without 'sequence_parallel', which its weights "
                             "load into.")
        checks.non_negative_int(owner, "seq_len", seq_len)
        checks.non_negative_number(owner, "temperature", temperature)
        checks.fraction(owner, "filter_thres", filter_thres)
        checks.boolean(owner, "use_kv_cache", use_kv_cache)
        _checked_tokens(owner, "prime", checks.described(prime), checks.described(mask))
        smallest, largest = prime.asnumpy().min(), prime.asnumpy().max()
        if smallest < 0 or largest >= self.num_tokens:
            raise checks.value_error(owner, "prime", f"of tokens in [0, {self.num_tokens})", f"{smallest} to {largest}")

    def _padded(self, n):
        """A length of at least n: one for many n, as each new length is planned, and in Graph mode compiled, anew."""
        if not self.global_takes_cache:  # nothing is known of what such a layer sees
            return n
        step = min(self.local_attn_window_size, 1 << (n - 1).bit_length())
        return min(-(-n // step) * step, self.max_seq_len)


@constexpr
def _check_cached_call(owner, n, seen, layers, depth, return_loss):
    if return_loss:
        raise checks.value_error(owner, "return_loss", "False with a cache", return_loss)
    if layers != depth:
        raise checks.value_error(owner, "cache", f"of {depth} layers, from a call of this model", layers)
    if n <= seen:
        raise checks.value_error(owner, "x", f"the whole sequence, longer than the {seen} tokens that the cache has "
                                 "seen", n)


@constexpr
def _checked_call(owner, num_tokens, max_seq_len, dim, x, mask, return_loss, group):
    """The rules of a call: its batch, and the length of what goes through the layers."""
    checks.boolean(owner, "return_loss", return_loss)
    if num_tokens is None:
        if return_loss:
            raise checks.value_error(owner, "return_loss", "False where 'num_tokens' is None", return_loss)
        return _checked_block(owner, dim, x, mask)
    b, n = _checked_tokens(owner, "x", x, mask)
    if group is not None:
        if n is None:
            raise checks.value_error(owner, "x", "of a known length with 'sequence_parallel'", n)
        longest = (max_seq_len + return_loss) // group.size
        if n > longest:
            raise checks.value_error(owner, "x", f"of at most {longest} tokens on each of the {group.size} ranks "
                                     f"('max_seq_len' is {max_seq_len})", n)
        return b, n
    if n is None:
        return b, n
    if return_loss and n < 2:
        raise checks.value_error(owner, "x", "of at least 2 tokens for a loss", n)
    if n - return_loss > max_seq_len:
        raise checks.value_error(owner, "x", f"of at most {max_seq_len + return_loss} tokens ('max_seq_len' is "
                                 f"{max_seq_len})", n)
    return b, n - return_loss


@constexpr
def _positions(b, start, stop, max_seq_len):
    """Positions; the one that a loss may have too many, of a token that nothing is made of, is as good as any."""
    return Tensor(np.tile(np.minimum(np.arange(start, stop, dtype=np.int32), max_seq_len - 1), (b, 1)))
