"""What a call would be computed by, and what it costs, without a tensor."""
import mindspore as ms

from . import checks, settings
from .attend import BACKENDS, Frame, choose, problem_of, refusals
from .spec import NO_LIMIT, Scoring, WindowSpec

def explain(problem, backend=None):
    """Describe which backend runs a problem and why no other does, what it costs, and what compiles it again."""
    chosen = choose(problem, backend)
    computed, at_once = BACKENDS[chosen].scores(problem)
    elements = problem.groups * (problem.n_q + problem.n_k // problem.per_key_head) * (problem.d + problem.d_v)
    size = 4 if problem.dtype == "Float32" else 2
    instead = f"could run it, but {chosen} {'was asked for' if backend or settings.backend else 'comes first'}"
    lines = [f"{chosen}: runs this"]
    lines += [f"{name}: {reason or instead}" for name, reason in refusals(problem).items() if name != chosen]
    lines += [f"options: {', '.join(_options(problem)) or 'none'}",
              f"multiply-adds: {computed * (problem.d + problem.d_v):,} forward",
              f"scores: {computed:,} ({4 * computed:,} bytes), of which {4 * at_once:,} bytes at once",
              f"q, k, v and the output: {elements:,} numbers ({size * elements:,} bytes)",
              "compiles anew for: another shape or dtype of an input, a mask or bias where there was none or none where"
              " there was one, training in place of evaluation or the reverse"]
    return "\n".join(lines)


def _options(problem):
    """Return the options of a problem beside its span, in words."""
    scoring, uses = problem.scoring, problem.uses
    of_offsets = "embeddings of offsets" + (", with queries of their own" if "rel_pos_query" in uses else "")
    named = {
        f"{problem.per_key_head} query heads to a key head": problem.per_key_head > 1,
        f"values of width {problem.d_v}": "v_width" in uses, "a key mask": "mask" in uses,
        "documents": "documents" in uses, "an order": "order" in uses,
        f"a prefix of {problem.spec.prefix}": problem.spec.prefix > 0,
        "a bias for each query" if problem.bias_rows else "a bias": "bias" in uses,
        "sinks of each query" if "sink_rows" in uses else "sinks": "sinks" in uses,
        of_offsets: "rel_pos_emb" in uses, f"softcap {scoring.softcap}": scoring.softcap is not None,
        "shared_qk": scoring.hide_self, f"dropout {scoring.dropout}": scoring.dropout > 0,
        "the log-sum-exp": problem.frame.lse}
    return [name for name, there in named.items() if there]


OPTIONS = ("mask", "segment_ids", "cu_seqlens", "order", "attn_bias", "sinks", "scale", "softcap", "dropout_rate",
           "seed", "return_lse", "backend")


def _checked(q_shape, spec, k_shape, v_width, dtype, device, options):
    """Check the arguments; return the shapes of q and k."""
    owner = "explain_attention"
    if not isinstance(spec, WindowSpec):
        raise checks.type_error(owner, "spec", "a WindowSpec", spec)
    k_shape = q_shape if k_shape is None else k_shape
    for name, shape in (("q_shape", q_shape), ("k_shape", k_shape)):
        if not isinstance(shape, (tuple, list)):
            raise checks.type_error(owner, name, "a tuple of four ints", shape)
        if len(shape) != 4:
            raise checks.value_error(owner, name, "of four axes, (batch, heads, n, d)", shape)
        for size in shape:
            checks.positive_int(owner, name, size)
    q_shape, k_shape = tuple(q_shape), tuple(k_shape)
    (b, h, n_q, d), n_k = q_shape, k_shape[2]
    if checks.shared((b, h, n_k, d), k_shape) is None or (n_k < n_q and not spec.sees_everything):
        raise checks.value_error(owner, "k_shape", f"({b}, h_kv, n_k, {d}), h_kv a divisor of {h} and n_k at least "
                                 f"{n_q}{checks.exchanged(q_shape, k_shape)}", k_shape)
    if v_width is not None:
        checks.positive_int(owner, "v_width", v_width)
    checks.float_dtype(owner, "dtype", dtype)
    checks.device(owner, device)
    if isinstance(options, str) or not isinstance(options, (tuple, list, set, frozenset)):
        raise checks.type_error(owner, "options", "a tuple of names", options)
    checks.together(owner, ("attn_bias", "attn_bias" in options), ("a prefix of 'spec'", spec.prefix))
    checks.together(owner, ("order", "order" in options), ("causal", spec.causal))
    checks.together(owner, ("cu_seqlens", "cu_seqlens" in options), ("segment_ids", "segment_ids" in options))
    if "attn_bias" in options and NO_LIMIT in (spec.backward, spec.forward):
        raise checks.value_error(owner, "options", "without 'attn_bias' where 'spec' has no limit", options)
    for name in options:
        if not isinstance(name, str) or name not in OPTIONS:
            raise checks.value_error(owner, "options", f"names of {', '.join(OPTIONS)}", checks.shown(name))
    return q_shape, k_shape


def explain_attention(q_shape, spec, *, k_shape=None, v_width=None, dtype=None, device=None, options=()):
    r"""
    Describe how `windowed_attention` would compute a call, and what it costs. No tensor is made.

    Args:
        q_shape (tuple): The shape of q, `(b, h, n_q, d)`.
        spec (WindowSpec): Which keys a query sees.
        k_shape (tuple): The shape of k, `(b, h_kv, n_k, d)`; ``None`` is q's. Default: ``None`` .
        v_width (int): The width of v; ``None`` is `d`. Default: ``None`` .
        dtype (mindspore.dtype): Of q, k and v; ``None`` is float32. Default: ``None`` .
        device (str): ``"CPU"`` , ``"GPU"`` or ``"Ascend"`` , whether or not it is there; ``None`` is MindSpore's.
            Default: ``None`` .
        options (Sequence[str]): The names of the other arguments that the call has, as ``"mask"`` or ``"softcap"`` .
            Default: ``()`` .

    Returns:
        str: a line for each backend, the options, the multiply-adds and the bytes of all heads of all rows.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If shapes do not agree, or an option is not the name of an argument.

    Supported Platforms:
        Plain Python, the same everywhere.

    Examples:
        >>> from local_attention import WindowSpec, explain_attention
        >>> text = explain_attention((1, 8, 4096, 64), WindowSpec.from_sliding_window(256), device="Ascend")
        >>> print(text.splitlines()[0])
        blocked: runs this
    """
    q_shape, k_shape = _checked(q_shape, spec, k_shape, v_width, dtype, device, options)
    (b, h, _, d), n_k = q_shape, k_shape[2]
    there = {"mask": ("mask", (b, n_k)), "segment_ids": ("documents", (b, n_k, 2)), "sinks": ("sinks", (h,)),
             "cu_seqlens": ("documents", (b, n_k, 2)), "order": ("order", (b, n_k)),
             "attn_bias": ("bias", (h, spec.bucket, spec.backward + spec.bucket + spec.forward)),
             "seed": ("seed", (1,))}
    scoring = Scoring(d ** -0.5, 1. if "softcap" in options else None, False, .5 if "dropout_rate" in options else 0.)
    frame = Frame(0 if spec.sees_everything else None, lse="return_lse" in options)
    v_shape = k_shape if v_width is None else (*k_shape[:3], v_width)
    problem = problem_of(spec, scoring, frame, q_shape, k_shape, v_shape, dtype or ms.float32,
                         tuple(there[name] for name in there if name in options), device)
    text, compiles = explain(problem).rsplit("\n", 1)
    return f"{text}\nthese numbers are for all heads of all rows: {b} x {h}\n{compiles}"
