"""Windowed attention over given queries, keys and values."""
import mindspore as ms
from mindspore import ops
from mindspore.ops import constexpr

from . import checks, parallel, settings
from .attend import Frame, check_backend, new_salt, problem_of
from .backends.spans import SELF_SCORE
from .explanation import explain
from .rotary import SinusoidalEmbeddings, exists  # noqa: F401 - upstream has it here too
from .windows import Windowed, Windows, l2norm  # noqa: F401 - for the same reason

TOKEN_SELF_ATTN_VALUE = SELF_SCORE
LARGEST = {"Float32": checks.LARGEST_FLOAT32, "Float16": 65504., "BFloat16": (2 - 2.**-7) * 2.**127,
           "Float64": (2 - 2.**-52) * 2.**1023}


def default(value, instead):
    """Return a value, or another one if it is None."""
    return instead if value is None else value


@constexpr
def _lowest(got):
    checks.tensor("max_neg_value", "tensor", got, tuple(LARGEST))
    return -LARGEST[checks.dtype_name(got[1])]


def max_neg_value(tensor):
    """Return the most negative finite number of a tensor's dtype."""
    def got():  # a function within, so that MindSpore's O1 leaves this one as it is (see `cells`)
        return checks.described(tensor)
    return _lowest(got())


def pad_to_multiple(tensor, multiple, dim=-1, value=0):
    """Pad an axis at its end to a multiple; return `(whether it was needed, the tensor)`."""
    missing = -tensor.shape[dim] % multiple
    if missing == 0:
        return False, tensor
    axis = dim % tensor.ndim
    padding = ops.full(tensor.shape[:axis] + (missing,) + tensor.shape[axis + 1:], value, dtype=tensor.dtype)
    return True, ops.cat((tensor, padding), axis)


def look_around(x, backward=1, forward=0, pad_value=-1, dim=2):
    """Put the neighbours of each window of `x (b, windows, n, ...)` beside it: `(b, windows, (backward + 1 + forward) *
    n, ...)`.

    Windows that do not exist are filled with `pad_value`; `dim` is the axis that grows.
    """
    windows = x.shape[1]
    before, after = (ops.full(x.shape[:1] + (count,) + x.shape[2:], pad_value, dtype=x.dtype)
                     for count in (backward, forward))
    padded = ops.cat([part for part in (before, x, after) if part.shape[1] > 0], 1)
    return ops.cat([padded[:, start:start + windows] for start in range(backward + 1 + forward)], dim)


class LocalAttention(Windowed):
    r"""
    Attention in which each query sees the keys of its own window of the sequence and of the windows beside it.

    Query `i` of window `w = i // W` sees the keys from the start of window
    `w - look_backward` to the end of window `w + look_forward`; with `exact_windowsize`, the keys
    `i - W * look_backward` to `i + W * look_forward`, both included. When `causal`, it sees no
    key after `i`. ``print(attn.spec.show(16))`` draws the mask. Cost and memory are linear in the sequence.

    The arguments and results are those of the PyTorch package `local-attention` 1.11.2 by Phil Wang.

    Args:
        window_size (int): Positions in a window, W.
        causal (bool): Whether a query sees no key after itself. Default: ``False`` .
        look_backward (int): Windows seen before the query's own. Default: ``1`` .
        look_forward (int): Windows seen after it; ``None`` is 0 when causal and 1 otherwise. Default: ``None`` .
        dropout (float): Rate in [0, 1) at which attention weights are dropped in training. Default: ``0.`` .
        shared_qk (bool): Whether queries and keys are the same vectors. Keys are L2-normalised, and a query attends
            to itself only if it sees nothing else. Default: ``False`` .
        rel_pos_emb_config (tuple): Earlier form of `dim`, which is its first entry. Default: ``None`` .
        dim (int): Head dimension; it turns rotary position embedding on. Default: ``None`` .
        autopad (bool): Whether any sequence length is accepted, not only multiples of the window. Default: ``False`` .
        exact_windowsize (bool): Whether every query sees the same number of keys. Default: ``False`` .
        scale (float): Multiplies the products of queries and keys; ``None`` is `d ** -0.5`. Default: ``None`` .
        use_rotary_pos_emb (bool): Whether `dim` turns rotary embedding on. Default: ``True`` .
        use_xpos (bool): Whether rotary embedding, if it is on, is xpos. Default: ``False`` .
        xpos_scale_base (float): The scale base of xpos, in positions; ``None`` is `W // 2`.
            Default: ``None`` .
        prefix (int): How many positions at the start of a sequence every query sees, wherever its window is. When
            `causal`, a query sees none of them after itself. Default: ``0`` .
        softcap (float): Scaled products become `softcap * tanh(x / softcap)`, before bias and masks
            (Gemma 2); ``None`` caps nothing. Default: ``None`` .
        backend (str): The name of a backend: ``"native"`` , ``"ascend"`` , ``"blocked"`` , ``"any_length"`` or
            ``"dense"`` ; ``None`` is the fastest one that can run the call. Default: ``None`` .
        sequence_parallel (Union[bool, str]): Whether q, k, v, mask and output are this rank's slice of sequences that
            the ranks of a communication group hold together, in the order of the ranks. ``True`` is all ranks, a str
            the name of a group made by `mindspore.communication.create_group`. Neighbours exchange keys, values, mask
            and documents as far as spans reach, for as many heads as k has; backward, they exchange gradients.
            Documents then need `exact_windowsize` and exclude `attn_bias`. All ranks call it with slices of one
            length `n`, a multiple of W (with `autopad` too) and at least `W * look_backward` and
            `W * look_forward`. Two independent calls in one compiled function may run in different orders
            on different ranks: put them into two functions. Default: ``False`` .

    Inputs:
        - **q**, **k**, **v** (Tensor) - `(..., n, d)` with any leading axes, heads fastest, of one shape and
          dtype: float32, float16 or bfloat16. k and v may have fewer heads, a divisor of q's: query head `i` of `h`
          reads key head `i // (h / h_kv)`. v may have another width. The softmax is computed in
          float32.
        - **mask** (Tensor) - Padding mask, bool `(batch, n)`, True = a real key; `batch` divides the product of
          the leading axes. Default: ``None`` .
        - **input_mask** (Tensor) - Another name of `mask`; if both are given, `mask` is used. Default: ``None`` .
        - **attn_bias** (Tensor) - `(h, W, W * (1 + look_backward + look_forward))`, added to the scores.
          The row is the place of the query in its window, the column the place of the key in the window's span. With
          `exact_windowsize` also `(h, 1, W * (look_backward + look_forward) + 1)`, a number for each
          offset. Or with a row for each query, `(batch or 1, h or 1, n, ...)`, and the same
          columns. -inf, anything below -1e29 and the lowest number of its dtype hide the key. Default: ``None`` .
        - **window_size** (int) - W for this call; needs `use_xpos`. Default: ``None`` .
        - **segment_ids** (Tensor) - int `(batch, n)`. Consecutive tokens with the same id are a document. The
          result is that of a separate call on each document. A negative id is padding: it sees nothing, and no query
          sees it. Default: ``None`` .
        - **sinks** (Tensor) - `(h,)`, for each head a score that joins the softmax of all its queries and has no
          value (gpt-oss); or one for each query, `(..., n)`. Default: ``None`` .
        - **order** (Tensor) - int `(batch, n)`, in place of `causal`: of its span, a query sees the keys whose
          number is at most its own. Default: ``None`` .

    Outputs:
        Tensor of the shape of `q`, with the width of `v`, and of q's dtype. A query that sees no real key gets zeros,
        with zero gradient.

    Raises:
        TypeError: If an argument or input is of another type or dtype, or an argument has a name not known here.
        ValueError: If an argument is out of its range; if shapes do not agree; if the sequence is not a multiple of the
            window, without `autopad`; or if, with `sequence_parallel`, there is no such group, a slice is too short, or
            the ranks' calls differ in a shape or in which tensors they have.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import LocalAttention
        >>> q, k, v = (ops.randn((2, 8, 1000, 64)) for _ in range(3))
        >>> attn = LocalAttention(dim=64, window_size=128, causal=True, autopad=True)
        >>> print(attn(q, k, v, mask=ops.ones((2, 1000)).bool()).shape)
        (2, 8, 1000, 64)
    """

    def __init__(self, window_size, causal=False, look_backward=1, look_forward=None, dropout=0., shared_qk=False,
                 rel_pos_emb_config=None, dim=None, autopad=False, exact_windowsize=False, scale=None,
                 use_rotary_pos_emb=True, use_xpos=False, xpos_scale_base=None, *, prefix=0, softcap=None,
                 backend=None, sequence_parallel=False, **unknown):
        super().__init__()
        owner = type(self).__name__
        checks.arguments(owner, unknown, checks.parameters(LocalAttention), {"head_dim": "dim", "dim_head": "dim"})
        self.window_size = checks.positive_int(owner, "window_size", window_size)
        self.causal = checks.boolean(owner, "causal", causal)
        self.look_backward = checks.non_negative_int(owner, "look_backward", look_backward)
        if look_forward is None:
            look_forward = 0 if causal else 1
        self.look_forward = checks.non_negative_int(owner, "look_forward", look_forward)
        if causal and look_forward:
            raise checks.value_error(owner, "look_forward", "0 when causal", look_forward)
        self.exact_windowsize = checks.boolean(owner, "exact_windowsize", exact_windowsize)
        self.prefix = checks.non_negative_int(owner, "prefix", prefix)
        self.softcap = checks.softcap(owner, softcap)
        settings.keep_cores()
        self.windows = Windows(self.window_size, self.look_backward, self.look_forward, causal, exact_windowsize,
                               self.prefix)
        self.spec = self.windows.spec
        self.dropout = checks.rate(owner, "dropout", dropout)
        self.salt = new_salt(dropout)
        self.shared_qk = checks.boolean(owner, "shared_qk", shared_qk)
        self.autopad = checks.boolean(owner, "autopad", autopad)
        self.scale = None if scale is None else checks.scale(owner, "scale", scale)
        checks.boolean(owner, "use_xpos", use_xpos)
        self.backend = check_backend(owner, backend)
        self.sequence_parallel = sequence_parallel
        self.group = parallel.sequence_group(owner, sequence_parallel)
        self.sees_all = False  # whether it is in a model with no sequence that is longer than a window
        self.must_agree = self.group is not None  # unless the ranks have agreed on a whole model's call

        for other in (("use_xpos", use_xpos), ("sequence_parallel", self.group)):
            checks.together(owner, ("prefix", prefix), other)

        if rel_pos_emb_config is not None:
            if not isinstance(rel_pos_emb_config, (tuple, list)) or not rel_pos_emb_config:
                raise checks.type_error(owner, "rel_pos_emb_config", "a tuple of at least the head dimension",
                                        rel_pos_emb_config)
            dim = rel_pos_emb_config[0]
        self.dim = None if dim is None else checks.positive_int(owner, "dim", dim)
        if xpos_scale_base is not None:
            checks.positive_number(owner, "xpos_scale_base", xpos_scale_base)
        self.rel_pos, self.rotary_dim = None, None
        if checks.boolean(owner, "use_rotary_pos_emb", use_rotary_pos_emb) and dim is not None:
            if dim % 2:
                raise checks.value_error(owner, "dim", "even for rotary embeddings", dim)
            if use_xpos and xpos_scale_base is None:
                xpos_scale_base = checks.positive_number(owner, "xpos_scale_base", window_size // 2)
            self.rotary_dim = dim
            self.rel_pos = SinusoidalEmbeddings(dim, scale_base=xpos_scale_base, use_xpos=use_xpos)
        self.use_rotary_pos_emb = use_rotary_pos_emb
        self.use_xpos = use_xpos and self.rel_pos is not None  # xpos is a kind of rotary embedding

    def extend_repr(self):
        return checks.settings(self)

    def explain(self, n, dtype=None, mask=False, attn_bias=False, *, segment_ids=False, sinks=False, share=1,
                device=None):
        """Describe which backend would run a sequence of n, why the others would not, and what one key head of one row
        costs.

        Args:
            n (int): Sequence length.
            dtype (mindspore.dtype): Of q, k and v; ``None`` is float32. Default: ``None`` .
            mask (bool): Whether the call has a mask. Default: ``False`` .
            attn_bias (bool): Whether the call has a bias. Default: ``False`` .
            segment_ids (bool): Whether the call has documents; costs are those of one document. Default: ``False`` .
            sinks (bool): Whether the call has sinks. Default: ``False`` .
            share (int): How many query heads share a key head. Default: ``1`` .
            device (str): ``"CPU"`` , ``"GPU"`` or ``"Ascend"`` , whether or not it is there; ``None`` is MindSpore's.
                Default: ``None`` .

        Returns:
            str, a line for each backend, the options, the multiply-adds, the bytes of the scores and of the inputs and
            the output, and what makes a compiled function compile again.
        """
        owner = "LocalAttention.explain"
        checks.positive_int(owner, "n", n)
        checks.positive_int(owner, "share", share)
        for name, value in dict(mask=mask, attn_bias=attn_bias, segment_ids=segment_ids, sinks=sinks).items():
            checks.boolean(owner, name, value)
        checks.float_dtype(owner, "dtype", dtype)
        checks.device(owner, device)
        windows, head_dim = self.windows, self.rotary_dim or 64
        groups, n_q, n_k, offset, halo = share, n, n, 0, ""
        if self.group is not None:
            offset, after = self.group.before(windows.backward), self.group.after(windows.forward)
            n_k = offset + n + after
            halo = f"\nhalo: {offset + after} keys and values of other ranks, whatever n"
        if self.use_xpos:
            windows = windows if attn_bias else windows.within(n_k)
            groups, n_q, n_k, offset = len(windows.folded(n)[0]) * share, windows.size, windows.span, windows.backward
        spec, scoring, _ = self._numbers_of(windows, head_dim)
        batch = groups // share if self.use_xpos else 1
        shapes = (("mask", (batch, n_k), mask or self.use_xpos), ("documents", (1, n_k, 2), segment_ids),
                  ("bias", (share, windows.size, windows.span), attn_bias), ("sinks", (share,), sinks))
        leading = groups // share
        text = explain(problem_of(
            spec, scoring, Frame(offset), (leading, share, n_q, head_dim), (leading, 1, n_k, head_dim),
            (leading, 1, n_k, head_dim), dtype or ms.float32,
            tuple((name, shape) for name, shape, there in shapes if there), device), self.backend)
        text, _, compiles = text.rpartition("\n")
        return f"{text}\nthese numbers are for {share} head{'s' if share > 1 else ''} of one row\n{compiles}{halo}"
