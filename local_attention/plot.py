"""Pictures of masks and of attention weights. matplotlib is optional, and imported only to draw."""
import functools
import inspect

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from . import checks, padding
from .local_attention import LocalAttention
from .sliding_window import MultiHeadLocalAttention
from .spec import WindowSpec
from .stack import Stack


def attention_weights(model, *inputs, **keywords):
    """
    Return the attention weights of every `LocalAttention` , `MultiHeadLocalAttention` and
    `LocalSelfAttention` in a model, in one call of the model without dropout. In Graph mode, too, the
    call is made outside of graphs.

    Args:
        model (Cell): One of these Cells, or a Cell that contains one.
        inputs (tuple): The arguments of the call.
        keywords (dict): Its arguments by name, such as `mask` or `segment_ids`.

    Returns:
        list of arrays `(..., n, n)`, one for each call of such a Cell, in order. A row is one query and sums to
        1, or to 0 if the query sees nothing.

    Raises:
        TypeError: If `model` is not a Cell.
        ValueError: If `model` contains none of these Cells, or calls none, as with a cache or where it is compiled.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import LocalMHA
        >>> from local_attention.plot import attention_weights
        >>> block = LocalMHA(dim=16, window_size=4, heads=2, dim_head=8, causal=True)
        >>> print(attention_weights(block, ops.randn((1, 10, 16)))[0].shape)
        (1, 2, 10, 10)
    """
    if not isinstance(model, nn.Cell):
        raise checks.type_error("attention_weights", "model", "a Cell", model)
    cells = [cell for _, cell in model.cells_and_names() if isinstance(cell, (LocalAttention, MultiHeadLocalAttention))]
    if not cells:
        raise checks.value_error("attention_weights", "model", "one with attention of this package",
                                 type(model).__name__)
    calls, places = [], [None]
    modes = [(cell, cell.training) for _, cell in model.cells_and_names()]

    def note(cell, args, kwargs):
        calls.append((cell, _bound(cell, args, kwargs), places[-1]))

    def enter(stack, args, kwargs):
        places.append(_places_of_moved(stack, _bound(stack, args, kwargs)))

    def leave(stack, inputs, out):
        places.pop()
    mode = ms.get_context("mode")
    hooks = [cell.register_forward_pre_hook(note, with_kwargs=True) for cell in cells]
    for stack in [cell for _, cell in model.cells_and_names() if isinstance(cell, Stack)]:
        hooks += [stack.register_forward_pre_hook(enter, with_kwargs=True), stack.register_forward_hook(leave)]
    model.set_train(False)
    try:
        ms.set_context(mode=ms.PYNATIVE_MODE)  # a graph would compile the hooks
        model(*inputs, **keywords)
        for hook in hooks:
            hook.remove()
        if not calls:
            raise checks.value_error("attention_weights", "model", "one that calls attention of this package, neither "
                                     "with a cache nor in a compiled method", type(model).__name__)
        return [_moved_back(_weights(*_of_values(cell, given)), at) for cell, given, at in calls]
    finally:
        for hook in hooks:
            hook.remove()
        ms.set_context(mode=mode)
        for cell, training in modes:
            cell.training = training


def _bound(cell, args, kwargs):
    return inspect.signature(cell.construct).bind(*args, **kwargs).arguments


def _places_of_moved(stack, given):
    """Return where a model moves the tokens of each row of a call, an array `(b, n)`; None if it leaves them."""
    mask = given.get("mask")
    if mask is None or given.get("segment_ids") is not None or not stack.moves_tokens:
        return None
    if given.get("return_loss") and stack.group is None:
        mask = mask[:, :-1]
    return padding.orders(mask)[1].asnumpy() % mask.shape[1]


def _moved_back(weights, places):
    """Return weights `(..., n, n)` by the places of tokens before they were moved."""
    if places is None:
        return weights
    b, n = places.shape
    rows = weights.reshape(b, -1, n, n).swapaxes(0, 1)
    moved = rows[:, np.arange(b)[:, None, None], places[:, :, None], places[:, None, :]]
    return moved.swapaxes(0, 1).reshape(weights.shape)


def _of_values(cell, given):
    """Return a call as a function of its values alone, and the values."""
    if isinstance(cell, LocalAttention):
        def attend(v):
            return cell(**{**given, "v": v})
        return attend, given["v"]
    q, k = (given["x"],) * 2 if "x" in given else (given["inputs_q"], given["inputs_kv"])
    return functools.partial(
        cell._of_heads, cell._heads(cell.query(q)), cell._heads(cell.key(k)), mask=given.get("mask"),
        segment_ids=given.get("segment_ids")), cell._heads(cell.value(k))


def _weights(attend, v):
    """Compute attention weights: if values are 1 for one key and 0 for the others, the output is the weight of that
    key. Each call gives the weights of as many keys as a head is wide."""
    n, width = v.shape[-2:]
    columns = []
    for start in range(0, n, width):
        one_hot = Tensor(np.eye(n, width, -start, np.float32)).astype(v.dtype)
        columns.append(attend(ops.broadcast_to(one_hot, v.shape)).astype("float32").asnumpy())
    return np.concatenate(columns, -1)[..., :n]


def plot_mask(spec, n, axes=None, order=None):
    """
    Draw which keys (columns) each query (row) of an `n`-token sequence sees.

    Args:
        spec (WindowSpec): Which keys a query sees, for example `attn.spec`.
        n (int): Length of the sequence.
        axes (matplotlib.axes.Axes): Where to draw; ``None`` is a figure of its own. Default: ``None`` .
        order (Sequence[int]): The number of each token, as `windowed_attention` takes them. Default: ``None`` .

    Returns:
        matplotlib.axes.Axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `spec` is not a WindowSpec or `n` not an int.
        ValueError: If `n` is not positive, or `order` not `n` ints or `spec` causal.
    """
    if not isinstance(spec, WindowSpec):
        raise checks.type_error("plot_mask", "spec", "a WindowSpec", spec)
    visible = spec.drawn("plot_mask", n, order)
    if axes is not None and not hasattr(axes, "imshow"):
        raise checks.type_error("plot_mask", "axes", "None or a matplotlib Axes", axes)
    axes = _figure(1, 1, 4).axes[0] if axes is None else axes
    axes.imshow(visible, cmap="Blues", vmin=0, vmax=1.5, interpolation="nearest")
    axes.set(xlabel="key", ylabel="query", xticks=[], yticks=[])
    return axes


def plot_weights(weights, names=None):
    """
    Draw attention weights, a row of pictures for each call and a column for each head: query by key, darker for more.

    Colours follow the square root of a weight, so that small ones show. Keys that no head of a call sees are white.
    Lines mark the first and the last key that each query sees.

    Args:
        weights (list): The result of `attention_weights`; only the first sequence of a batch is drawn.
        names (list): The title of each call; ``None`` is "layer 1" and so on. Default: ``None`` .

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `weights` is no list of arrays of two axes or more, or `names` no list.
        ValueError: If `weights` is empty, or there are not as many names as weights.
    """
    if not isinstance(weights, (list, tuple)) or not all(getattr(each, "ndim", 0) > 1 for each in weights):
        raise checks.type_error("plot_weights", "weights", "a list of arrays (..., n, n)", weights)
    if len(weights) == 0:
        raise checks.value_error("plot_weights", "weights", "a list of at least one array", weights)
    if names is None:
        names = [f"layer {number}" for number in range(1, len(weights) + 1)]
    if not isinstance(names, (list, tuple)):
        raise checks.type_error("plot_weights", "names", "None or a list", names)
    if len(names) != len(weights):
        raise checks.value_error("plot_weights", "names", f"as many as weights, {len(weights)}", len(names))
    weights = [np.asarray(each).reshape(-1, *each.shape[-3:])[0] if each.ndim > 2 else each[None] for each in weights]
    figure = _figure(len(weights), max(len(each) for each in weights), 3)
    grid = np.reshape(figure.axes, (len(weights), -1))
    from matplotlib.colors import PowerNorm
    norm = PowerNorm(0.5, vmin=0, vmax=max(each.max() for each in weights), clip=True)
    for row, name, each in zip(grid, names, weights):
        seen = (each > 0).any(0)
        for axes, head in zip(row, each):
            image = axes.imshow(np.where(seen, head, np.nan), cmap="magma_r", norm=norm, interpolation="nearest")
            _draw_edges(axes, seen)
        for number, axes in enumerate(row, 1):
            if number > len(each):
                axes.remove()
                continue
            axes.set_title(f"{name}, head {number}", fontsize="medium")
            axes.set(xlabel="key position", ylabel="query position")
            axes.locator_params(nbins=4, integer=True)
            axes.tick_params(labelsize="small")
    figure.colorbar(image, ax=figure.axes, label="weight", shrink=min(1., 2 / len(weights)), aspect=30)
    figure.suptitle("What each head looks at\n(lines: the edges of what a query sees)", fontsize="medium")
    return figure


def _draw_edges(axes, seen):
    """Draw lines at the first and the last column that is True in each row, along the edges of pixels."""
    rows, columns = seen.shape
    first, last = np.argmax(seen, 1) - 0.5, columns - 0.5 - np.argmax(seen[:, ::-1], 1)
    for edge in (first, last):
        axes.stairs(np.where(seen.any(1), edge, np.nan), np.arange(rows + 1) - 0.5, baseline=None,
                    orientation="horizontal", color="tab:blue", linewidth=0.8)


def _figure(rows, columns, size):
    """Return a figure with axes in rows. It is made without pyplot, which would keep it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("local_attention.plot needs matplotlib, which is not installed here.") from error
    figure = Figure(figsize=(columns * size, rows * size), layout="constrained")
    figure.subplots(rows, columns)
    return figure
