"""Attention as one operator of MindSpore's semi-auto parallel.

There, a program is written for all of the data, and MindSpore slices it by layouts. What it has no layout for, it
computes whole on every rank, without a word. So attention becomes one operator with layouts, `ops.Morph`: inside of it
each rank computes attention of its own rows, heads and slice, and exchanges the halo where sequences are sliced.
"""
import functools

from mindspore import communication, nn, ops
from mindspore.ops import constexpr
from mindspore.parallel import Layout

from .. import checks
from ..attend import Frame, attend, beside, draw_seed, new_salt
from ..backends.spans import document_bounds
from ..cells import compiling
from ..functional import windowed_attention
from ..spec import NO_LIMIT, Scoring
from .halo import with_halo
from .layouts import group_along, slices_of

OWNER = "sharded"
INPUTS = ("q", "k", "v", "mask", "attn_bias", "segment_ids", "sinks")
MOST_INPUTS = 8


# ---- attention of a rank


@constexpr
def _reach(spec, group, n, n_k):
    """Return how many keys of the ranks before and after a slice's queries see, whole windows of them."""
    if n_k != n and n_k != n * group.size:
        raise checks.value_error(OWNER, "k", f"as long as q where sequences are sliced, {n * group.size}", n_k)
    if n % spec.bucket:
        raise checks.value_error(OWNER, "q", f"of slices whose length is a multiple of the window's {spec.bucket} "
                                 "positions", n)
    if n_k != n:
        return 0, 0
    backward = -(-spec.backward // spec.bucket) * spec.bucket
    forward = 0 if spec.causal else max(spec.forward, 0)
    if NO_LIMIT in (spec.backward, forward) or spec.prefix > 0 or max(backward, forward) > n:
        raise checks.value_error(
            OWNER, "k", "of a layout that does not slice its sequence, so that every rank receives all keys, where a "
            f"query sees more than the {n} keys of the next slice, or a prefix", f"{group.size} slices and {spec}")
    return backward, forward


@constexpr
def _numbers(spec, scale, head_dim, softcap, dropout_rate, offset):
    return (spec, Scoring(head_dim ** -0.5 if scale is None else float(scale),
                          None if softcap is None else float(softcap), False, float(dropout_rate)), Frame(offset))


def windowed_slice(group, q, k, v, spec, mask=None, segment_ids=None, attn_bias=None, sinks=None, scale=None,
                   softcap=None, dropout_rate=0., seed=None, backend=None):
    """Compute `windowed_attention` of the slice of the queries that this rank of a group holds; of all queries without
    a group. The keys, and what belongs to them, are the same slice, or those of the whole sequence."""
    if group is None:
        return windowed_attention(q, k, v, spec, mask=mask, segment_ids=segment_ids, attn_bias=attn_bias, sinks=sinks,
                                  scale=scale, softcap=softcap, dropout_rate=dropout_rate, seed=seed, backend=backend)
    b, kv_heads, n_k, head_dim = k.shape
    n = q.shape[2]
    backward, forward = _reach(spec, group, n, n_k)
    offset = group.rank * n
    if n_k == n:
        k, v = k.reshape(b * kv_heads, n, head_dim), v.reshape(b * kv_heads, n, head_dim)
        k, v, mask, segment_ids, offset = with_halo(group, k, v, mask, segment_ids, backward, forward)
        k, v = k.reshape(b, kv_heads, -1, head_dim), v.reshape(b, kv_heads, -1, head_dim)
    spec, scoring, frame = _numbers(spec, scale, head_dim, softcap, dropout_rate, offset)
    documents = None if segment_ids is None else document_bounds(segment_ids)
    tensors = beside(mask=mask, documents=documents, bias=attn_bias, sinks=sinks, seed=seed)
    return attend(q, ops.cast(k, q.dtype), ops.cast(v, q.dtype), spec, scoring, tensors, frame, backend)


def _at(given, place):
    return None if place is None else given[place]


class _Attention(nn.Cell):
    """A LocalAttention, or windowed_attention with these options, that takes its inputs in the order of `names`."""

    def __init__(self, attention, group, names):
        super().__init__()
        self.attention, self.group, self.options = attention, group, None
        if isinstance(attention, functools.partial):
            self.options = {**dict(scale=None, softcap=None, dropout_rate=0., backend=None), **attention.keywords}
            self.salt = salt_of_rank(self.options["dropout_rate"])
        self.places = tuple(names.index(name) if name in names else None for name in INPUTS)

    def construct(self, *given):
        q, k, v = given[self.places[0]], given[self.places[1]], given[self.places[2]]
        mask, attn_bias = _at(given, self.places[3]), _at(given, self.places[4])
        segment_ids, sinks = _at(given, self.places[5]), _at(given, self.places[6])
        if self.options is None:
            return self.attention._attended(q, k, v, mask, attn_bias, segment_ids, sinks)
        options = self.options
        seed = draw_seed(self.salt) if options["dropout_rate"] > 0 else None
        return windowed_slice(
            self.group, q, k, v, options["spec"], mask, segment_ids, attn_bias, sinks, options["scale"],
            options["softcap"], options["dropout_rate"], seed, options["backend"])


def salt_of_rank(dropout, salt=None):
    """Return a salt with which each rank drops other weights, 0 without dropout."""
    if not dropout:
        return 0
    rank = communication.get_rank() if communication.GlobalComm.INITED else 0
    salt = new_salt(dropout) if salt is None else salt
    return type(salt)((salt + 0x9E3779B1 * rank) % 2**31)


# ---- the operator


def first(*given):
    return given[0]


def _fixed(call, count):
    """Return a function of so many arguments, and not of `*given`, which Morph does not take."""
    def one(a):
        return call(a)

    def two(a, b):
        return call(a, b)

    def three(a, b, c):
        return call(a, b, c)

    def four(a, b, c, d):
        return call(a, b, c, d)

    def five(a, b, c, d, e):
        return call(a, b, c, d, e)

    def six(a, b, c, d, e, f):
        return call(a, b, c, d, e, f)

    def seven(a, b, c, d, e, f, g):
        return call(a, b, c, d, e, f, g)

    def eight(a, b, c, d, e, f, g, h):
        return call(a, b, c, d, e, f, g, h)
    return (one, two, three, four, five, six, seven, eight)[count - 1]


class Operator(nn.Cell):
    """One operator: `call` on the slices that a rank holds of its inputs.

    Args:
        call (Union[Cell, function]): What a rank computes. It has no Parameters.
        in_layouts (tuple[Layout]): One for each input.
        out_layouts (tuple[Layout]): One.
        shape (function): From the shapes of all inputs, before they are sliced, to that of the output.
    """

    def __init__(self, call, in_layouts, out_layouts, shape=first):
        super().__init__()
        self.call, self.in_layouts, self.out_layouts = call, in_layouts, out_layouts
        self.ranks = len(in_layouts[0].to_dict()["rank_list"])
        slices = [slices_of(OWNER, "in_layouts", layout) for layout in in_layouts]

        def checked(*shapes):
            _check_parts(slices, shapes)
            return shape(*shapes)
        self.morph = ops.Morph(_fixed(call, len(in_layouts)), checked, first)
        self.morph.add_prim_attr("self_define_shard", True)
        self.morph.shard(in_layouts, out_layouts)

    def construct(self, *given):
        if compiling():
            return self.morph(*given)
        _check_alone(self.ranks)
        return self.call(*given)


def _check_parts(slices, shapes):
    """Check that all inputs, of whole shapes, can be sliced."""
    for number, (one, shape) in enumerate(zip(slices, shapes)):
        parts = [one.count(axis) for axis in range(len(one.axes))]
        if len(parts) != len(shape) or any(n % count for n, count in zip(shape, parts)):
            raise checks.value_error(OWNER, "in_layouts", f"of axes that can be sliced, for input {number} of shape "
                                     f"{tuple(shape)}", f"{tuple(parts)} parts")


@constexpr
def _check_alone(ranks):
    if ranks > 1:
        raise ValueError(f"For '{OWNER}', a call must be compiled, by mindspore.parallel.AutoParallel in graph mode, "
                         f"but got one outside of a graph with layouts of {ranks} ranks.")


# ---- layouts


def _shown(axes):
    return "(" + ", ".join(" and ".join(axis) if axis else "None" for axis in axes) + ")"


def _check_axes(argument, name, got, *allowed):
    if got not in allowed:
        raise checks.value_error(OWNER, argument, f"for {name} sliced as {' or '.join(map(_shown, allowed))}",
                                 _shown(got))


def _check_attention(names, slices, out):
    """Check that the layouts of an attention slice its tensors alike."""
    if names[:3] != INPUTS[:3]:
        raise checks.value_error(OWNER, "in_layouts", "layouts of q, k and v, and then of other inputs", repr(names))
    axes = {name: one.axes for name, one in zip(names, slices)}
    _check_axes("in_layouts", "q (b, h, n, d)", axes["q"], (*(*axes["q"], (), (), ())[:3], ()))
    rows, heads, sequence, _ = axes["q"]
    _check_axes("in_layouts", "k (b, h_kv, n, d)", axes["k"], *dict.fromkeys(
        (rows, some, part, ()) for some in (heads, ()) for part in (sequence, ())))
    _check_axes("in_layouts", "v, as k,", axes["v"], axes["k"])
    wanted = {"mask": (rows, axes["k"][2]), "segment_ids": (rows, axes["k"][2]), "attn_bias": (heads, (), ()),
              "sinks": (heads,)}
    for name in names[3:]:
        if name not in wanted:
            raise checks.value_error(OWNER, "in_layouts", f"for inputs out of {INPUTS}", repr(name))
        _check_axes("in_layouts", name, axes[name], wanted[name])
    _check_axes("out_layouts", "the output, as q,", out.axes, axes["q"])


def _check_all_used(slices, out):
    """Check that no two ranks compute the same."""
    used = {name for one in (slices[0], out) for axis in one.axes for name in axis}
    for name, size in slices[0].directions:
        if size > 1 and name not in used:
            raise checks.value_error(OWNER, "in_layouts", f"of devices of which each direction slices the first input: "
                                     f"along {name!r}, {size} ranks would compute the same", _shown(slices[0].axes))


def _shape_of_attention(heads, keys):
    """Return the function that checks the shapes of q, k, v, before they are sliced, and returns the output's."""
    def shape(q, k, v, *others):
        if heads > 1 and keys == 1 and k[1] > 1:
            raise checks.value_error(OWNER, "in_layouts", "of k sliced by heads like q, unless k has one head, so "
                                     "that query heads find theirs", f"{k[1]} heads of k in one part")
        return [*q[:3], v[3]]
    return shape


def _named(cell, in_layouts):
    """Return the names of the inputs, numbers if they have none, and their layouts."""
    if isinstance(in_layouts, dict):
        return tuple(in_layouts), tuple(in_layouts.values())
    if not isinstance(in_layouts, (tuple, list)) or not in_layouts:
        raise checks.type_error(OWNER, "in_layouts", "a tuple of layouts, or a dict of them by the names of inputs",
                                in_layouts)
    return INPUTS[:len(in_layouts)], tuple(in_layouts)


def sharded(cell, in_layouts, out_layouts):
    r"""
    Makes an attention one operator of MindSpore's semi-auto parallel: each rank computes its own rows, heads and slice.

    Without it, semi-auto parallel computes attention of all rows and heads on every rank, and says nothing. A group for
    the halo is made from the layouts.

    Args:
        cell (Union[LocalAttention, functools.partial, Cell, function]): What to compute. A
            :class:`local_attention.LocalAttention`, which belongs to the new Cell then;
            ``functools.partial(windowed_attention, spec=...)`` with its options; a
            :class:`local_attention.LocalMHA` or :class:`local_attention.LocalTransformer`, each attention of which
            becomes an operator, and which is returned itself; or any other function or Cell without Parameters, whose
            output has the shape and dtype of its first input, and that needs no data of other ranks.
        in_layouts (Union[tuple[Layout], dict[str, Layout]]): A `mindspore.parallel.Layout` for each input, called with
            a name for each axis. A tuple is for `q`, `k`, `v` and `mask`; a dict has any of `mask`, `attn_bias`,
            `segment_ids` and `sinks` after the first three. q :math:`(b, h, n, d)` may be sliced by rows, heads and
            positions, k and v alike. If the layout of k does not slice the positions, every rank receives all keys;
            otherwise it receives those that its outermost queries see. For a block or a model: of `x`, sliced by rows
            and positions, and in a dict also of `mask`, `attn_bias` and `segment_ids`.
        out_layouts (tuple[Layout]): That of the output, sliced as q. For a block or a model, the last axis says how
            heads are sliced.

    Inputs:
        - Tensors, in the order of `in_layouts`, in a compiled function; those of a block or a model are its own.

    Outputs:
        Tensor, what `cell` returns for all of the data.

    Raises:
        TypeError: If a layout is none, or `cell` cannot be called.
        ValueError: If ranks would compute the same, layouts do not agree, a sequence is sliced that cannot be, or
            `cell` has Parameters.

    Supported Platforms:
        Written for ``Ascend``, where it has not been run; MindSpore has no semi-auto parallel on CPU.

    Examples:
        >>> from mindspore import ops
        >>> from mindspore.parallel import Layout
        >>> from local_attention import LocalAttention
        >>> from local_attention.parallel import sharded
        >>> layout = Layout((1, 1, 1), ("dp", "tp", "cp"))("dp", "tp", "cp", "None")  # (4, 2, 2) on 16 devices
        >>> attn = sharded(LocalAttention(128, causal=True, exact_windowsize=True), (layout,) * 3, (layout,))
        >>> q, k, v = ops.randn((2, 8, 512, 64)), ops.randn((2, 2, 512, 64)), ops.randn((2, 2, 512, 64))
        >>> print(attn(q, k, v).shape)
        (2, 8, 512, 64)
    """
    from ..windows import Windowed  # which needs this package
    if not callable(cell):
        raise checks.type_error(OWNER, "cell", "a Cell or a function", cell)
    names, layouts = _named(cell, in_layouts)
    if not isinstance(out_layouts, (tuple, list)) or len(out_layouts) != 1:
        raise checks.type_error(OWNER, "out_layouts", "a tuple of one layout", out_layouts)
    slices = [slices_of(OWNER, "in_layouts", layout) for layout in layouts]
    out = slices_of(OWNER, "out_layouts", out_layouts[0])
    _check_all_used(slices, out)
    if isinstance(cell, Windowed) or isinstance(cell, functools.partial) and cell.func is windowed_attention:
        _check_attention(names, slices, out)
        group = group_along(OWNER, slices[0], 2)
        if isinstance(cell, Windowed):
            _split(cell, group, slices)
        call = _Attention(cell, group, names)
        shape = _shape_of_attention(slices[0].count(1), slices[1].count(1))
        return Operator(call, layouts, tuple(out_layouts), shape)
    if isinstance(cell, nn.Cell) and any(isinstance(one, Windowed) for _, one in cell.cells_and_names()):
        return _within(cell, names, slices, out)
    if isinstance(cell, nn.Cell) and cell.parameters_dict():
        raise checks.value_error(OWNER, "cell", "without Parameters: shard the attention within it",
                                 next(iter(cell.parameters_dict())))
    return Operator(cell, layouts, tuple(out_layouts))


class _Optional(nn.Cell):
    """An Operator in a block, which gives it every input of an attention, or None for it."""

    def __init__(self, operator, names):
        super().__init__()
        self.operator, self.names = operator, names
        self.places = tuple(INPUTS.index(name) for name in names)

    def construct(self, *given):
        found = ()
        for x in given:
            found = found + (x is not None,)
        _check_inputs(self.names, found)
        some = ()
        for place in self.places:
            some = some + (given[place],)
        return self.operator(*some)


@constexpr
def _check_inputs(names, there):
    found = tuple(name for name, one in zip(INPUTS, there) if one)
    if found != tuple(sorted(names, key=INPUTS.index)):
        raise checks.value_error(OWNER, "in_layouts", f"a dict with a layout for each input of the call: its attention "
                                 f"gets {', '.join(found)}", ", ".join(names))


def _within(cell, names, slices, out):
    """Make each attention within a Cell an operator. The vectors `(b, n, dim)` or tokens `(b, n)` of its first input
    are sliced by rows and positions, and the last axis of its output says how heads are."""
    from ..windows import Windowed
    plan = Layout(tuple(size for _, size in slices[0].directions), tuple(name for name, _ in slices[0].directions),
                  list(slices[0].ranks))

    def of(*axes):
        return plan(*(axis if len(axis) > 1 else axis[0] if axis else "None" for axis in axes))
    rows, positions, heads = slices[0].axes[0], slices[0].axes[1], out.axes[-1] if len(out.axes) > 2 else ()
    one, row = of(rows, heads, positions, ()), of(rows, positions)
    known = {"mask": row, "attn_bias": of(heads, (), ()), "segment_ids": row}
    for name in names[1:]:
        if name not in known:
            raise checks.value_error(OWNER, "in_layouts", f"for inputs out of {('x', *known)}", repr(name))
    given = {"q": one, "k": one, "v": one, **{name: known[name] for name in known if name in names[1:]}}
    for _, block in list(cell.cells_and_names()):
        attention = getattr(block, "attn_fn", None)
        if isinstance(attention, Windowed):
            own = {**given, "sinks": of(heads)} if block.learned_sinks else given
            # not a child of the attention, which is a child of the operator
            vars(attention)["operator"] = _Optional(sharded(attention, own, (one,)), tuple(own))
    return cell


def _split(attention, group, slices):
    """Tell a LocalAttention which group its sequences are sliced over."""
    if attention.group is not None:
        raise checks.value_error(OWNER, "cell", "without 'sequence_parallel': layouts say what is sliced",
                                 repr(attention.sequence_parallel))
    if group is not None and not slices[1].axes[2]:
        raise checks.value_error(OWNER, "in_layouts", "of k sliced by positions like q for a LocalAttention",
                                 _shown(slices[1].axes))
    checks.together(OWNER, ("prefix", attention.prefix), ("a sliced sequence", group))
    attention.group, attention.salt = group, salt_of_rank(attention.dropout, attention.salt)
