"""A language model of local attention."""
from numbers import Integral

from mindspore import nn
from mindspore.common.initializer import Normal

from . import checks, generation
from .export import ExportableStep
from .generation import eval_decorator, top_k  # noqa: F401 - where upstream has it
from .layers import GEGLU, FeedForward, LayerNorm  # noqa: F401 - likewise
from .local_attention import default, exists, l2norm  # noqa: F401 - likewise
from .mha import ATTENTION_ARGUMENTS, INSTEAD, DynamicPositionBias, LocalMHA  # noqa: F401 - likewise
from .stack import CrossEntropy, Stack


# what LocalTransformer hands on to its blocks; it sets the others itself
BLOCK_ARGUMENTS = tuple(name for name in (*checks.parameters(LocalMHA), *ATTENTION_ARGUMENTS) if name not in (
    "dim", "window_size", "dim_head", "heads", "dropout", "causal", "prenorm", "use_xpos", "xpos_scale_base",
    "use_rotary_pos_emb"))
BLOCK_INSTEAD = {**INSTEAD, "window_size": "local_attn_window_size", "dropout": "attn_dropout' or 'ff_dropout"}


def _global_numbers(owner, layer, numbers, depth, sequence_parallel):
    """Check the global layers; return the numbers, from 0 and in order, of the layers that have one before them."""
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
    """Return the window of each layer, None for a layer that sees everything."""
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


class LocalTransformer(Stack):
    r"""
    A language model of local attention: embeddings, layers of `LocalMHA` and `FeedForward`, logits.

    The arguments and results are those of the PyTorch package `local-attention` 1.11.2 by Phil Wang.

    Args:
        num_tokens (int): Size of the vocabulary; ``None`` is a model from vectors to vectors, without embeddings or
            logits.
        max_seq_len (int): The longest sequence, in tokens.
        dim (int): Size of a token's vector.
        depth (int): Number of layers.
        causal (bool): Whether a token sees none after itself. Default: ``True`` .
        local_attn_window_size (Union[int, tuple]): Positions in a window; a tuple has one for each layer, ``None`` in
            it for a layer that sees all of `max_seq_len`, as far as `causal` allows. Default: ``512`` .
        dim_head (int): Dimension of a head. Default: ``64`` .
        heads (int): Number of heads. Default: ``8`` .
        ff_mult (float): Width of the feed-forward, see `FeedForward`. Default: ``4`` .
        attn_dropout (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        ff_dropout (float): The same for feed-forward activations. Default: ``0.`` .
        ignore_index (int): The label that the loss ignores. Default: ``-1`` .
        use_xpos (bool): Whether rotary embedding, if it is on, is xpos. Default: ``False`` .
        xpos_scale_base (float): The scale base of xpos, in positions; ``None`` is half the window. Default: ``None`` .
        use_dynamic_pos_bias (bool): Whether a learned bias of the distance, shared by all layers, replaces rotary
            embedding, including xpos. Default: ``False`` .
        global_attn_layer (Cell): A Cell from vectors `(b, n, dim)` to vectors of the same shape, for example
            attention to all tokens or a memory. Copies of it, each with its own parameters and with a residual
            connection around it, stand before local layers. If its `construct` takes `mask`, it gets the model's. If
            it takes `cache` and `return_cache` as `LocalMHA` does, the model can decode with a cache; this
            layer's part of the cache is a tuple of Tensors. Default: ``None`` .
        layers_insert_global_attn (tuple): The numbers, from 1 to `depth`, of the layers with such a copy before them;
            ``None`` is all of them. Default: ``None`` .
        num_residual_streams (int): Above 1, the residual connections become hyper-connections of that many streams
            (Zhu et al., 2024). Default: ``1`` .
        kwargs (dict): Further arguments of `LocalMHA` and `LocalAttention`. With `sequence_parallel`
            (see `LocalAttention`), rank `r` holds the tokens `r * n` to `r * n + n - 1`. Inputs
            and outputs are that slice, and the loss is the mean over the labels of all ranks. Gradients averaged over
            the ranks are those of one process. A compiled step averages them by
            `local_attention.parallel.AverageGradients`; outside of one, `nn.DistributedGradReducer` works too.
            There is no cache then, and no `generate`. Dropout of attention weights is that of one process with the
            same global seed; each rank draws the dropout of its feed-forward itself.

    Inputs:
        - **x** (Tensor) - int `(b, n)`, each in [0, `num_tokens`), or float `(b, n, dim)` when `num_tokens`
          is ``None`` .
        - **mask** (Tensor) - Padding mask, bool `(b, n)`, True = a real token. Padding on the left shifts
          nothing: positions count from the first real token of a row, and of a document. Default: ``None`` .
        - **cache** - The cache that an earlier call of a causal model without a mask returned. `x` is the whole
          sequence so far, and only its new tokens are computed. Default: ``None`` .
        - **return_loss** (bool) - Whether the loss is returned. Default: ``False`` .
        - **return_cache** (bool) - Whether the cache for the next call is returned too. Default: ``False`` .
        - **segment_ids** (Tensor) - int `(b, n)`. Consecutive tokens with the same id are a document, computed as
          if it were alone: positions start anew, and the loss predicts no token from another document. A
          negative id is padding. Not with a cache, nor with a global layer whose `construct` does not take it.
          Default: ``None`` .

    Outputs:
        Tensor, logits of shape `(b, n, num_tokens)`, or `(b, n, dim)` when `num_tokens` is ``None`` .

        With a cache, only the rows of the new tokens. With `return_cache`, a tuple of the output and the cache.

        With `return_loss`, a scalar in float32: the cross-entropy of each token after the first, given those before it,
        averaged over those that are not `ignore_index`. If all are, it is 0 with zero gradient, not NaN.

    Raises:
        TypeError: If an argument or input is of another type or dtype, or an argument has a name not known here.
        ValueError: If an argument is out of its range, shapes do not agree, the sequence is longer than `max_seq_len`,
            or a loss is requested from a model without tokens or for fewer than 2 tokens.

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
        checks.arguments(owner, kwargs, [*checks.parameters(LocalTransformer), *BLOCK_ARGUMENTS], BLOCK_INSTEAD)
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
        self._add_layers(
            dict(dim=dim, dim_head=dim_head, heads=heads, dropout=attn_dropout, causal=causal, prenorm=True,
                 use_xpos=use_xpos and not use_dynamic_pos_bias, xpos_scale_base=xpos_scale_base,
                 use_rotary_pos_emb=not use_dynamic_pos_bias, **kwargs),
            dict(dim=dim, mult=ff_mult, dropout=ff_dropout), global_attn_layer, global_numbers,
            use_dynamic_pos_bias)
        if num_tokens is not None:
            self.cross_entropy = CrossEntropy(ignore_index, self.group)
        self.dynamic_pos_bias = DynamicPositionBias(dim // 2, heads) if use_dynamic_pos_bias else None
        self.steps = generation.Steps()

    def extend_repr(self):
        return checks.settings(self)

    def construct(self, x, mask=None, cache=None, return_loss=False, return_cache=False, segment_ids=None):
        """Compute logits or the loss of x. The class describes each input, under Inputs."""
        x, b, n = self._checked(x, mask, cache, return_loss, return_cache, segment_ids)
        seen, layers, biases, labels = 0, None, (), None  # on Ascend no None may leave a graph
        if cache is not None:
            layers, biases, seen = cache  # of each block, of each window, and how many tokens they were fed
            x = x[:, seen:]
        masked, first, back = mask is not None, None, None
        if return_loss:
            x, mask, segment_ids, labels = self._with_labels(x, mask, segment_ids, b, n)
        if masked:
            x, mask, segment_ids, labels, first, back = self._without_shift(x, mask, segment_ids, labels)
        if self.num_tokens is not None:
            x = self._embedded(x, segment_ids, first, b, seen, n)
        if self.bias_distances and not biases:
            biases = self._biases()
        x, layers = self._through_layers(x, mask, biases, layers, return_cache, segment_ids)
        if back is not None and not return_loss:
            x = self._moved_back(x, back)
        if self.num_tokens is not None:
            x = self.to_logits(x)
        if return_loss:
            return self._loss(x, labels)
        return (x, (layers, biases, n)) if return_cache else x

    def generate(self, prime, seq_len, temperature=1., filter_thres=0.9, use_kv_cache=True, *, mask=None,
                 stop_token=None, callback=None):
        r"""
        Continue sequences a token at a time, each as if it were alone. Past `max_seq_len`, the model sees the last
        `max_seq_len` tokens; if it has a prefix, the first of these are the prefix then.

        Every change since the last call takes effect: of weights, however they were set, of Cells and of their
        settings. A change by an optimizer or by `ops.assign` costs nothing, any other costs a compilation, and
        MindSpore keeps what it compiled until the process ends. A callback may call `generate`. Calls from several
        threads are right: one waits until the other has ended.

        Args:
            prime (Tensor): The sequences to continue, int `(b, n)`, `n` at least 1.
            seq_len (int): How many tokens to generate.
            temperature (float): Logits are divided by it before sampling; 0 takes the likeliest token.
                Default: ``1.`` .
            filter_thres (float): The share of the vocabulary that is never sampled, see `top_k`.
                Default: ``0.9`` .
            use_kv_cache (bool): Whether a causal model computes each token only once, as long as all tokens fit in
                `max_seq_len`. The step is compiled once for a batch size. In float32, and if the Cells are this
                package's and MindSpore's, prompts of all lengths are read by one or two more compiled functions, in
                pieces of 512 and 128 tokens. There is no cache if a global layer keeps none, with rows of unequal
                length if it is not a `LocalMHA`, or if windows keep more than 2**24 tokens. Default: ``True`` .
            mask (Tensor): bool `(b, n)`, True = a real token of `prime`. The real tokens of a row are contiguous,
                with padding before, after or both. Default: ``None`` .
            stop_token (int): A row ends with its first one. The rest of the row is filled with it, and the call ends
                once all rows have ended. Default: ``None`` .
            callback (function): Called after each token with the number of tokens generated so far and the new ones, a
                Tensor `(b)` of the dtype of `prime`; if it returns ``True`` , the call ends. A callback of one
                argument gets the number alone, and whatever it returns is ignored. Default: ``None`` .

        Returns:
            Tensor of shape `(b, seq_len)` and the dtype of `prime`: the new tokens; fewer columns if the call
            ended before. `mindspore.set_seed` makes them reproducible.

        Raises:
            TypeError: If an argument is of another type or dtype.
            ValueError: If an argument is out of its range, the model has no tokens, a row of the mask has a hole or
                nothing real, or two Parameters have one name and a function would be compiled.
        """
        return generation.generate(self, prime, seq_len, temperature, filter_thres, use_kv_cache, mask, stop_token,
                                   callback)

    def exportable_step(self, batch=1):
        """
        Return a Cell of one decoded token, for a model whose graph generates elsewhere: `mindspore.export` writes it as
        ONNX and as MINDIR. Export it in evaluation; it has the weights of this model, not copies.

        Args:
            batch (int): The number of rows. Default: ``1`` .

        Returns:
            :class:`local_attention.export.ExportableStep`, from `(token, position, *rings)` to `(logits, *rings)`. Its
            method `rings` returns the rings to start from.

        Raises:
            TypeError: If `batch` is not an int.
            ValueError: If `batch` is not positive, or the model has no tokens, is not causal, or has another global
                layer than :class:`LocalMHA`.
        """
        return ExportableStep(self, batch)
