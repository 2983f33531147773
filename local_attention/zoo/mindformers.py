"""mindformers: the Cell between the projections of its training graph, with a window for each layer.

Nothing here computes: layouts of tensors in, `windowed_attention`, layouts out. mindformers is imported when one of the
names is called.
"""
import copy

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops import constexpr
from mindspore.parallel._utils import _get_parallel_mode

from .. import checks
from ..attend import draw_seed
from ..cells import compiling
from ..parallel.layouts import group_along, slices_of
from ..parallel.sharded import Operator, first, salt_of_rank, windowed_slice
from ..spec import WindowSpec

OWNER = "CoreAttention"
NO_WINDOW = -1
REFUSED = {  # fields of a config that change attention, what they must be, and why
    "use_ring_attention": (False, "False, as with context parallel a rank receives the keys of its windows"),
    "hierarchical_context_parallel_sizes": (1, "1, as with context parallel a rank receives the keys of its windows"),
    "use_alibi_mask": (False, "False, as a window has no ALiBi"),
    "track_max_attention_logit": (False, "False, as no score leaves the attention"),
}


# ---- what a config says


def _check_config(config):
    for name, (value, rule) in REFUSED.items():
        got = getattr(config, name, value)
        if got and got != value:
            raise checks.value_error(OWNER, name, rule, got)
    if config.input_layout not in ("BNSD", "BSH", "TND"):
        raise checks.value_error(OWNER, "input_layout", "BNSD, BSH or TND", checks.shown(config.input_layout))
    heads, groups = config.num_attention_heads, config.num_query_groups
    if not config.use_flash_attention and groups != heads:
        raise checks.value_error(OWNER, "use_flash_attention", "True where 'num_query_groups' is not the number of "
                                 "heads, as mindformers repeats keys along the wrong axis without it",
                                 f"False with {groups} groups and {heads} heads")
    if getattr(config, "use_eod_reset", False) and config.input_layout != "TND":
        raise checks.value_error(OWNER, "use_eod_reset", "False without 'use_eod_attn_mask_compression': documents in "
                                 "'attention_mask' alone are not seen, 'actual_seq_qlen' brings them", True)


def _slides(pattern, index):
    if isinstance(pattern, (list, tuple)):
        return bool(pattern[index])
    return (index + 1) % pattern != 0


def spec_of(config, layer_number, window=None):
    """Return the WindowSpec of a layer: of `window` keys, else as its config says.

    mindformers counts layers from 0, and gives the layers 0 and 1 the number 1.
    """
    if window is not None and window != NO_WINDOW:
        return WindowSpec.from_sliding_window(checks.positive_int(OWNER, "window", window))
    if window == NO_WINDOW or not config.window_size:
        return WindowSpec.from_flash((-1, -1), causal=True)
    pattern = config.window_attn_skip_freq
    if pattern is not None:
        last = max(layer_number, config.num_layers - 1)
        if isinstance(pattern, (list, tuple)) and len(pattern) <= last:
            raise checks.value_error(OWNER, "window_attn_skip_freq", f"an entry for each of {last + 1} layers", pattern)
        known = {_slides(pattern, index) for index in (
            range(min(2, config.num_layers)) if layer_number <= 1 else (layer_number,))}
        if len(known) > 1:
            raise checks.value_error(OWNER, "window_attn_skip_freq", "the same for the layers 0 and 1, to which "
                                     "mindformers gives one number; with_windows() can give each its own", pattern)
        if not known.pop():
            return WindowSpec.from_flash((-1, -1), causal=True)
    left, right = config.window_size
    return WindowSpec.from_flash((left, right), causal=right == 0)


@constexpr
def _check_call(given, needs_ends):
    for name, there in given:
        if there:
            raise checks.value_error(OWNER, name, "None", "one")
    if needs_ends:
        raise checks.value_error(OWNER, "actual_seq_qlen", "the ends of the documents with layout TND", None)


def _check_mask(spec, mask, n):
    """Refuse a mask that hides a key in the window of a query that is not padding itself."""
    if mask is None or mask.ndim != 4 or mask.shape[-2:] != (n, n):  # a compressed one says nothing
        return
    hidden = mask.astype(ms.int32).asnumpy()[:, 0] != 0
    real = ~hidden[:, np.arange(n), np.arange(n)]
    if (hidden & spec.visible(np.arange(n), np.arange(n)) & real[:, :, None]).any():
        raise checks.value_error(OWNER, "attention_mask", "of causality and padding on the right alone, as a window "
                                 "takes its place; 'actual_seq_qlen' with use_eod_attn_mask_compression brings "
                                 "documents", "one that hides other keys")


def _merged(q, k, v):
    """Return the output's shape, for queries of four axes or three."""
    return [*q[:2], q[2] * v[3]] if len(q) == 4 else q


class CoreAttention(nn.Cell):
    r"""
    Attention of a layer of mindformers' training graph, with a window: in place of its FlashAttention.

    Args:
        config (TransformerConfig): mindformers' configuration of the model.
        layer_number (int): The number that mindformers gives to the layer.
        window (int): How many keys a query sees, its own included; -1 is all that causality allows. ``None`` means
            `config.window_size`, (left, right), in the layers that `config.window_attn_skip_freq` names.
            Default: ``None`` .
        softmax_scale (float): Multiplies products of queries and keys; ``None`` is :math:`d^{-0.5}`.
            Default: ``None`` .
        unused (dict): What mindformers passes beside these, all ``None`` .

    Inputs:
        - **query**, **key**, **value** (Tensor) - By `config.input_layout`: :math:`(s, b, n, d)` for BNSD,
          :math:`(s, b, n \cdot d)` for BSH, :math:`(b \cdot s, n, d)` for TND. Heads of keys are not repeated.
        - **attention_mask** (Tensor) - The window takes its place. Outside of a graph it is read, and refused if it
          hides more than causality and padding on the right.
        - **actual_seq_qlen** (Tensor) - The ends of the documents, for TND.

    Outputs:
        Tensor, :math:`(s, b, n \cdot d)`, or :math:`(b \cdot s, n, d)` for TND.

    Raises:
        ValueError: If the config has what is not supported, the window of layer 0 or 1 cannot be told, or documents are
            in the mask alone.

    Supported Platforms:
        ``CPU`` with stand-ins for mindformers' own operators; written for ``Ascend``, where it has not been run.

    Examples:
        >>> # in a program with mindformers, for a decoder block's spec
        >>> for layer in spec.layer_specs:
        ...     layer.submodules.self_attention.submodules.core_attention = CoreAttention
    """

    def __init__(self, config, layer_number, window=None, softmax_scale=None, **unused):
        super().__init__()
        for name, got in unused.items():
            if got is not None:
                raise checks.value_error(OWNER, name, "None", checks.shown(got))
        _check_config(config)
        self.spec = spec_of(config, layer_number, window)
        self.layout, self.scale, self.dropout = config.input_layout, softmax_scale, float(config.attention_dropout)
        self.salt = salt_of_rank(self.dropout)
        self.head_dim = config.kv_channels
        if getattr(config, "multi_latent_attention", False):
            self.head_dim = config.qk_head_dim + config.qk_pos_emb_head_dim
        self.group = self.operator = None
        if _get_parallel_mode() in ("semi_auto_parallel", "auto_parallel"):
            self._shard(config)

    def _shard(self, config):
        """Make the attention one operator, sliced as mindformers slices its own, except for the keys of windows."""
        from mindformers.parallel_core.training_graph.device_matrix import layout
        self.group = group_along(OWNER, slices_of(OWNER, "config", layout("cp")), 0)
        one = config.seq_length // config.context_parallel_size  # slices of one sequence
        whole = self.group is None or max(self.spec.backward, self.spec.forward) > one
        heads = "None" if config.num_query_groups == 1 else "tp"
        if self.layout == "TND":
            q = layout("dp_cp", "tp", "None")
            k = layout("dp" if whole else "dp_cp", heads, "None")
            self.operator = Operator(self._documents, (q, k, k, layout("dp")), (q,))
        else:
            more = ("None",) if self.layout == "BNSD" else ()
            k = layout("None" if whole else "cp", "dp", heads, *more)
            self.operator = Operator(self._rows, (layout("cp", "dp", "tp", *more), k, k), (layout("cp", "dp", "tp"),),
                                     _merged if more else first)

    def construct(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None,
                  packed_seq_params=None, alibi_mask=None, prefix=None, padding_mask=None, actual_seq_qlen=None,
                  actual_seq_kvlen=None):
        _check_call((("attn_mask_type", attn_mask_type is not None), ("attention_bias", attention_bias is not None),
                     ("packed_seq_params", packed_seq_params is not None), ("alibi_mask", alibi_mask is not None),
                     ("prefix", prefix is not None), ("padding_mask", padding_mask is not None)),
                    self.layout == "TND" and actual_seq_qlen is None)
        if self.layout == "TND":
            if self.operator is not None:
                return self.operator(query, key, value, actual_seq_qlen)
            return self._documents(query, key, value, actual_seq_qlen)
        if not compiling():
            _check_mask(self.spec, attention_mask, query.shape[0])
        if self.operator is not None:
            return self.operator(query, key, value)
        return self._rows(query, key, value)

    def _rows(self, query, key, value):
        """Attend within rows: BNSD and BSH."""
        n, b = query.shape[:2]
        q, k = query.reshape(n, b, -1, self.head_dim), key.reshape(key.shape[0], b, -1, self.head_dim)
        v = value.reshape(key.shape[0], b, k.shape[2], -1)
        out = self._attended(ops.transpose(q, (1, 2, 0, 3)), ops.transpose(k, (1, 2, 0, 3)),
                             ops.transpose(v, (1, 2, 0, 3)), None)
        return ops.transpose(out, (2, 0, 1, 3)).reshape(n, b, -1)

    def _documents(self, query, key, value, ends):
        """Attend within documents, which are side by side in one row: TND."""
        ids = self._ids(ends, query.shape[0], key.shape[0])
        q, k, v = ops.transpose(query, (1, 0, 2)), ops.transpose(key, (1, 0, 2)), ops.transpose(value, (1, 0, 2))
        out = self._attended(q.expand_dims(0), k.expand_dims(0), v.expand_dims(0), ids)
        return ops.transpose(out[0], (1, 0, 2))

    def _ids(self, ends, n, n_k):
        """Return for each key how many documents end before it, `(1, n_k)`. The last one ends with the rows of this
        rank; if `ends` count the tokens of all ranks, so many come before."""
        ranks, start = (1, 0) if self.group is None else (self.group.size, self.group.rank * n)
        total = n * ranks
        ends = ops.cast(ends, ms.int32).reshape(1, -1)
        ends = ends - ops.relu(ends[:, -1:] - total)
        places = ops.arange(0, n_k, 1).astype(ms.int32).reshape(-1, 1) + (start if n_k == n else 0)
        return ops.cast(ops.cast(places >= ends, ms.int32).sum(-1), ms.int32).reshape(1, n_k)

    def _attended(self, q, k, v, segment_ids):
        rate = self.dropout if self.training else 0.
        seed = draw_seed(self.salt) if rate > 0 else None
        return windowed_slice(self.group, q, k, v, self.spec, segment_ids=segment_ids, scale=self.scale,
                              dropout_rate=rate, seed=seed)


# ---- where it goes


def with_windows(block_spec, windows):
    r"""
    Return a copy of a decoder block's specs in which each layer has a window of its own.

    Args:
        block_spec (TransformerBlockSubmodules): As `get_gpt_decoder_block_spec` of mindformers returns it.
        windows (Union[tuple, list]): For each layer how many keys a query sees, its own included; ``None`` for all that
            causality allows.

    Returns:
        TransformerBlockSubmodules.

    Raises:
        TypeError: If `windows` is no list, an entry is no int, or `block_spec` has no specs of layers.
        ValueError: If there are fewer or more windows than layers, or an entry is not positive.

    Supported Platforms:
        Plain Python, the same everywhere.

    Examples:
        >>> # in a program with mindformers
        >>> spec = with_windows(get_gpt_decoder_block_spec(config), [1024, None] * 12)
        >>> model = GPTModel(config, spec, vocab_size=32000, max_sequence_length=8192)
    """
    from mindformers.parallel_core.utils.spec_utils import ModuleSpec
    owner, layers = "with_windows", getattr(block_spec, "layer_specs", None)
    if not isinstance(layers, (tuple, list)):
        raise checks.type_error(owner, "block_spec", "specs of a decoder block, with 'layer_specs'", block_spec)
    if not isinstance(windows, (tuple, list)):
        raise checks.type_error(owner, "windows", "a list with an entry for each layer", windows)
    if len(windows) != len(layers):
        raise checks.value_error(owner, "windows", f"an entry for each of the {len(layers)} layers", windows)
    made = copy.copy(block_spec)
    made.layer_specs = [copy.deepcopy(layer) for layer in layers]  # one object stands for several layers
    for layer, window in zip(made.layer_specs, windows):
        window = NO_WINDOW if window is None else checks.positive_int(owner, "windows", window)
        layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
            module=CoreAttention, params={"window": window})
    return made


def register():
    r"""
    Makes :class:`CoreAttention` the attention of every model that mindformers builds after this, also from YAML.

    It takes the place of FlashAttention in the specs of mindformers' training graph. Called twice, it changes nothing.

    Supported Platforms:
        Those of mindformers.

    Examples:
        >>> # before a Trainer or a model of mindformers is made
        >>> register()
    """
    from mindformers.parallel_core.training_graph.base_models.gpt import gpt_layer_specs
    gpt_layer_specs.FlashAttention = CoreAttention
