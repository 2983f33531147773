"""A language model of local attention."""
import copy
import inspect
from numbers import Integral

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal
from mindspore.ops import constexpr

from . import checks, generation, parallel
from .backends.any_length import unknown
from .backends.spans import document_bounds
from .cache import form
from .cells import Float32
from .generation import eval_decorator, top_k  # noqa: F401 - where upstream has it
from .hyper_connections import HyperConnections, add_output, expand, reduce
from .layers import GEGLU, FeedForward, LayerNorm  # noqa: F401 - GEGLU likewise
from .local_attention import default, exists, l2norm  # noqa: F401 - likewise
from .mha import DynamicPositionBias, LocalMHA, check_cacheable, checked_block


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


def _window_sizes(owner, given, depth, sequence_parallel):
    """The window of each layer, None for one that sees all there is."""
    if not isinstance(given, (tuple, list)):
        return (checks.positive_int(owner, "local_attn_window_size", given),) * depth
    if len(given) != depth:
        raise checks.value_error(owner, "local_attn_window_size", f"an int or a tuple of {depth}, one for each layer",
                                 given)
    if None in given and sequence_parallel:
        raise checks.value_error(owner, "local_attn_window_size", "without None with 'sequence_parallel', where "
                                 "no layer sees all", given)
    return tuple(None if size is None else checks.positive_int(owner, "local_attn_window_size", size)
                 for size in given)


def _seen(size, max_seq_len, causal, by_distance):
    """What a layer of a window sees, as LocalMHA's arguments; without one, a single window as long as a sequence, or,
    as a bias of distances is then a single row, a span that moves and reaches as far."""
    if size is not None:
        return dict(window_size=size)
    if by_distance:
        return dict(window_size=max_seq_len, look_backward=1, look_forward=0 if causal else 1, exact_windowsize=True)
    return dict(window_size=max_seq_len, look_backward=0, look_forward=0, exact_windowsize=False)


def _takes(layer):
    """Whether a global layer takes a mask and documents, and keeps a cache; one that is not there does it all."""
    if layer is None:
        return True, True, True
    taken = inspect.signature(layer.construct).parameters
    takes_cache = "cache" in taken and "return_cache" in taken and getattr(layer, "causal", True)
    return "mask" in taken, "segment_ids" in taken, takes_cache


@constexpr
def _checked_shape(owner, out, shape):
    """The rule of what a global layer returns, a tensor as `checks.described`, and its shape: used, as in a graph, what
    is not used may come after what it should come before."""
    is_tensor = isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], tuple)
    if not is_tensor or out[0] != shape:
        raise checks.value_error(owner, "global_attn_layer", "a Cell that returns a Tensor of its input's shape "
                                 f"{shape}", out[0] if is_tensor else type(out).__name__)
    return shape


def _form(cache):
    """How many layers a model's cache has, its biases as `form`, and how many tokens it has seen; None of others."""
    if isinstance(cache, tuple) and len(cache) == 3 and isinstance(cache[0], tuple):
        return len(cache[0]), form(cache[1]), cache[2]
    return None


@constexpr
def _check_cached_call(owner, n, cache, kind, depth, return_loss):
    rule = "what a call of this model with 'return_cache' returned, or None"
    if cache is None:
        raise TypeError(f"For '{owner}', 'cache' must be {rule}, but got one of type {kind}.")
    layers, biases, seen = cache
    if isinstance(seen, bool) or not isinstance(seen, int) or not isinstance(biases, tuple):
        raise checks.type_error(owner, "cache", rule, (biases, seen))
    if return_loss:
        raise checks.value_error(owner, "return_loss", "False with a cache", return_loss)
    if layers != depth:
        raise checks.value_error(owner, "cache", f"of {depth} layers, from a call of this model", layers)
    if n <= seen:
        raise checks.value_error(owner, "x", f"the whole sequence, longer than the {seen} tokens that the cache has "
                                 "seen", n)


@constexpr
def _checked_call(owner, num_tokens, max_seq_len, dim, x, mask, return_loss, return_cache, group):
    """The rules of a call: its batch, and the length of what goes through the layers."""
    checks.boolean(owner, "return_loss", return_loss)
    checks.boolean(owner, "return_cache", return_cache)
    if num_tokens is None:
        if return_loss:
            raise checks.value_error(owner, "return_loss", "False where 'num_tokens' is None", return_loss)
        return checked_block(owner, dim, x, mask, return_cache)
    b, n = checks.tokens(owner, "x", x, mask)
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


@constexpr
def _checked_documents(owner, segment_ids, shape, global_takes_segments, sliced, exact, biased):
    """The rules of documents in a model."""
    checks.segment_ids(owner, segment_ids, *shape)
    for name, given in (("sequence_parallel' without 'exact_windowsize", not exact),
                        ("use_dynamic_pos_bias' with 'sequence_parallel", biased)):
        checks.together(owner, ("segment_ids", True), (name, sliced and given))
    if not global_takes_segments:
        raise checks.value_error(owner, "segment_ids", "None where the 'construct' of 'global_attn_layer' does not "
                                 "take it", "documents")


def _within(before, after, labels, ignore_index):
    """Labels that are left out where they are padding, or of another document than the token before them."""
    outside = ops.logical_or(after != before, after < 0)
    labels, outside = ops.cast(labels, ms.int32), ops.cast(outside, ms.int32)
    return ops.add(labels, ops.mul(outside, ops.sub(ignore_index, labels)))  # GPU fills no int32 under a mask


def _given_back(x, out, beta):
    """A residual connection, or hyper-connection: what went past a part of a layer, and its output."""
    return x + out if beta is None else add_output(x, out, beta)


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
        local_attn_window_size (Union[int, tuple]): Positions in a window; a tuple has one for each layer, ``None`` in
            it for a layer that sees all of `max_seq_len`, within `causal`. Default: ``512`` .
        dim_head (int): Dimension of a head. Default: ``64`` .
        heads (int): Number of heads. Default: ``8`` .
        ff_mult (float): Width of the feed-forward, see :class:`FeedForward`. Default: ``4`` .
        attn_dropout (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        ff_dropout (float): The same of feed-forward activations. Default: ``0.`` .
        ignore_index (int): The label that the loss leaves out. Default: ``-1`` .
        use_xpos (bool): Whether rotary embedding, where it is on, is xpos's. Default: ``False`` .
        xpos_scale_base (float): In positions; ``None`` is half the window. Default: ``None`` .
        use_dynamic_pos_bias (bool): Whether a learned bias of the distance, one for all layers, takes the place of
            rotary embedding, xpos included. Default: ``False`` .
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
        - **segment_ids** (Tensor) - int :math:`(b, n)`: consecutive tokens of one id are a document, each as if it were
          alone: positions start anew, and no loss is taken across an edge. A negative id is padding. Not with a cache,
          nor with a global layer whose `construct` does not take it. Default: ``None`` .

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
        self.depth = checks.positive_int(owner, "depth", depth)
        self.window_sizes = _window_sizes(owner, local_attn_window_size, depth, kwargs.get("sequence_parallel"))
        self.local_attn_window_size = local_attn_window_size
        checks.positive_number(owner, "ff_mult", ff_mult)
        checks.rate(owner, "attn_dropout", attn_dropout)
        checks.rate(owner, "ff_dropout", ff_dropout)
        self.ignore_index = checks.integer(owner, "ignore_index", ignore_index, -2**31)
        checks.boolean(owner, "use_xpos", use_xpos)
        checks.boolean(owner, "use_dynamic_pos_bias", use_dynamic_pos_bias)
        checks.together(owner, ("use_dynamic_pos_bias", use_dynamic_pos_bias), ("prefix", kwargs.get("prefix")))
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
            LocalMHA(dim=dim, dim_head=dim_head, heads=heads, dropout=attn_dropout, causal=causal, prenorm=True,
                     use_xpos=use_xpos and not use_dynamic_pos_bias, xpos_scale_base=xpos_scale_base,
                     use_rotary_pos_emb=not use_dynamic_pos_bias,
                     **{**kwargs, **_seen(size, max_seq_len, causal, use_dynamic_pos_bias)}),
            FeedForward(dim, ff_mult, ff_dropout)]) for size in self.window_sizes])
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
        self.global_takes_mask, self.global_takes_segments, self.global_takes_cache = _takes(global_attn_layer)
        self.global_cache_is_ours = global_attn_layer is None or isinstance(global_attn_layer, LocalMHA)
        self.hyper_connections = None
        if num_residual_streams > 1:
            self.hyper_connections = HyperConnections(num_residual_streams, dim, depth, global_numbers)
        self.dynamic_pos_bias = DynamicPositionBias(dim // 2, heads) if use_dynamic_pos_bias else None
        # what the bias of each window that differs is asked for, and which of these a layer's is
        distances = [attn.attn_fn.windows.distances for attn, _ in self.layers] if use_dynamic_pos_bias else []
        self.bias_distances = tuple(dict.fromkeys(distances))
        self.bias_places = tuple(map(self.bias_distances.index, distances))
        self.steps = generation.Steps()

    def extend_repr(self):
        return checks.settings(self)

    def recompute(self, **options):
        """Every block recomputed, each for itself: of a whole model that returns its loss, MindSpore makes a gradient
        with a cycle in it."""
        for number in range(self.depth):
            attn, ff = self.layers[number]
            attn.recompute(**options)
            ff.recompute(**options)
            if self.global_places[number] > 0:
                self.global_layers[number].recompute(**options)

    def construct(self, x, mask=None, cache=None, return_loss=False, return_cache=False, segment_ids=None):
        b, n = _checked_call(self.cls_name, self.num_tokens, self.max_seq_len, self.dim, checks.described(x),
                             checks.described(mask), return_loss, return_cache, self.group)
        seen, layers, biases = 0, None, ()  # on Ascend no None may leave a graph
        if cache is not None or return_cache:
            check_cacheable(self.cls_name, self.causal, mask is not None, n, self.group is not None,
                            segment_ids is not None, self.global_takes_cache)
        if segment_ids is not None:
            _checked_documents(self.cls_name, checks.described(segment_ids), x.shape[:2], self.global_takes_segments,
                               self.group is not None, self.windows.exact, self.dynamic_pos_bias is not None)
        if cache is not None:
            _check_cached_call(self.cls_name, n, _form(cache), type(cache).__name__, self.cached_cells, return_loss)
            layers, biases, seen = cache  # of each block, of each window, and how many tokens they were fed
            x = x[:, seen:]
        labels = None
        if return_loss and self.group is None:
            x, labels = x[:, :-1], x[:, 1:]
            mask = None if mask is None else ops.cast(ops.cast(mask, ms.int32)[:, :-1], ms.bool_)  # sliced as numbers
            if segment_ids is not None:
                labels = _within(segment_ids[:, :-1], segment_ids[:, 1:], labels, self.ignore_index)
                segment_ids = segment_ids[:, :-1]
        elif return_loss:  # slices stay of one length: the very last token has no label, and none may see it
            labels = parallel.next_tokens(self.group, x, self.ignore_index)
            if segment_ids is not None:
                after = parallel.next_tokens(self.group, ops.depend(segment_ids, labels), -1)
                labels = _within(segment_ids, after, labels, self.ignore_index)
                segment_ids = ops.depend(segment_ids, labels)
            x = ops.depend(x, labels)
            if not self.causal:
                mask = parallel.without_last(self.group, mask, b, n)
        if self.num_tokens is not None:
            start = seen if self.group is None else self.group.rank * n
            if unknown((b, n)):  # which max_seq_len has to be at least: a compiled graph does not look
                places = ops.arange(0, x.shape[1], 1)[None]
                if segment_ids is not None:
                    places = places - document_bounds(segment_ids)[..., 0]
                x = self.token_emb(x) + self.pos_emb(places)
            elif segment_ids is not None and self.group is not None:
                places = parallel.places(self.group, segment_ids)
                x = self.token_emb(ops.depend(x, places)) + self.pos_emb(places)
            elif segment_ids is not None:
                places = _positions(b, 0, n, self.max_seq_len) - document_bounds(segment_ids)[..., 0]
                x = self.token_emb(x) + self.pos_emb(places)
            else:
                x = self.token_emb(x) + self.pos_emb(_positions(b, start, start + n - seen, self.max_seq_len))
        if self.bias_distances and not biases:
            for queries, keys, after in self.bias_distances:
                biases += (self.dynamic_pos_bias(queries, keys, after),)
        x, layers = self._through_layers(x, mask, biases, layers, return_cache, segment_ids)
        if self.num_tokens is not None:
            x = self.to_logits(x)
        if return_loss:
            return self.cross_entropy(x.reshape(-1, self.num_tokens), ops.cast(labels, ms.int32).reshape(-1))
        return (x, (layers, biases, n)) if return_cache else x

    def _through_layers(self, x, mask, biases, layers, return_cache, segment_ids=None):
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
                                   return_cache, segment_ids)
                if return_cache:
                    out, cache = out
                    global_caches.append(cache)
                shape = _checked_shape(self.cls_name, checks.described(out), taken.shape)
                x = _given_back(x, out if unknown(shape) else out.reshape(shape), beta)
            taken, x, beta = self._taken(x, number, 0)
            attn_bias = biases[self.bias_places[number]] if self.bias_places else None
            out = attn(taken, mask=mask, attn_bias=attn_bias, cache=None if layers is None else layers[number],
                       return_cache=return_cache, segment_ids=segment_ids)
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

    def _global(self, layer, x, mask, cache, return_cache, segment_ids):
        if segment_ids is not None:
            return (layer(x, mask=mask, segment_ids=segment_ids) if self.global_takes_mask else
                    layer(x, segment_ids=segment_ids))
        if cache is not None or return_cache:
            return layer(x, cache=cache, return_cache=return_cache)
        return layer(x, mask=mask) if self.global_takes_mask else layer(x)

    def generate(self, prime, seq_len, temperature=1., filter_thres=0.9, use_kv_cache=True, *, mask=None,
                 callback=None):
        r"""
        Continue sequences, each as if it were alone, a token at a time; past `max_seq_len` the model sees the last
        `max_seq_len` tokens, of which the first are then its prefix, if it has one.

        Whatever has changed since the last call counts: weights, however they were set, Cells and their settings. What
        an optimizer or `ops.assign` changes costs nothing, other changes a compilation.

        Args:
            prime (Tensor): int :math:`(b, n)`, `n` at least 1: what is continued.
            seq_len (int): How many tokens are generated.
            temperature (float): What logits are divided by before they are sampled from; at 0 the likeliest token is
                taken. Default: ``1.`` .
            filter_thres (float): The share of the vocabulary that is never sampled, see :func:`top_k`.
                Default: ``0.9`` .
            use_kv_cache (bool): Whether a causal model computes each token once, in a step that is compiled once for a
                batch size, as long as all fit in `max_seq_len`; not where a global layer keeps no cache, nor in rows of
                unequal length where that is another Cell than :class:`LocalMHA`. Default: ``True`` .
            mask (Tensor): bool :math:`(b, n)`, True = a real token of `prime`, which are one run in each row, padded
                before, after or both. Default: ``None`` .
            callback (function): Called with the number of tokens generated so far after each of them.
                Default: ``None`` .

        Returns:
            Tensor of shape :math:`(b, seq\_len)` and the dtype of `prime`: the new tokens. `mindspore.set_seed` makes
            them the same again.

        Raises:
            TypeError: If an argument is of another type or dtype.
            ValueError: If an argument is out of its range, the model has no tokens, or a row of the mask has a hole or
                nothing real.
        """
        return generation.generate(self, prime, seq_len, temperature, filter_thres, use_kv_cache, mask, callback)
