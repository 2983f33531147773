"""What a model computes of a prompt, of a piece of a prompt, and of one more token: the functions that `generate`
compiles."""
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore._c_expression import MixedPrecisionType
from mindspore.ops import constexpr

from .cache import capacity, clock_and_rows, span_moves

PIECES = (512, 128)  # tokens of a prompt that are read at once
HALF = (MixedPrecisionType.FP16, MixedPrecisionType.BF16)


def is_plain(model):
    """Whether a model consists of Cells of this package and of MindSpore, in float32: then tensors have the dtypes and
    may have the shapes that are expected here."""
    return not hasattr(model, "amp_strategy") and all(
        type(cell).__module__.startswith((f"{__package__}.", "mindspore.nn.")) and cell.mixed_precision_type not in HALF
        and not (cell._forward_pre_hook or cell._forward_hook)
        and all(x is None or x.dtype == ms.float32 for x in cell._params.values())
        for _, cell in model.cells_and_names())


def reads_in_pieces(model):
    """Whether pieces of a prompt cost about as much as in one call: where windows are aligned with positions, a piece
    is extended by as much as a window."""
    return is_plain(model) and model.cached_cells == model.depth and all(
        span_moves(attn.attn_fn) and not model.bias_distances or attn.attn_fn.windows.span <= PIECES[0]
        for attn, _ in model.layers)


def pieces_of(n):
    """Return the sizes of the pieces of a prompt of n tokens; the last is filled up."""
    large, small = PIECES
    sizes = []
    while n > 0:
        sizes.append(large if n > large * 3 // 4 else small)  # a large one is faster than four small ones
        n -= sizes[-1]
    return sizes


def ring_forms(model, batch):
    """Return the shape and the dtype of each block's keys and values."""
    return tuple(((batch * attn.kv_heads, capacity(attn.attn_fn.windows), attn.dim_head), ms.float32)
                 for attn, _ in model.layers)


@constexpr
def _places(n):
    return Tensor(np.arange(n, dtype=np.int32))


def prompt_logits(model, tokens, places, mask, position, cached):
    """Compute a prompt: return the logits of one token of each row, which is at `places`, and if `cached`, the caches
    of all layers and the biases. A `position` in the form of caches is needed for rows of unequal length.

    It is a call of the model but for the logits: with many words, those of a long prompt take more memory than all
    else.
    """
    b, n = tokens.shape
    layers, biases = None, ()
    if position is not None:
        layers = ((position,),) * model.cached_cells
    if model.bias_distances:
        biases = model._biases()
    x = model._embedded(tokens, None, None, b, 0, n)
    x, layers = model._through_layers(x, mask, biases, layers, cached)
    logits = model.to_logits(ops.gather(x.reshape(-1, model.dim), places, 0))
    return logits.reshape(b, model.num_tokens), layers, biases


def piece_logits(model, rings, tokens, clock, counts):
    """Compute a piece of a prompt, `tokens (b, m)` from the position `clock (1,)` on, of which `counts (b,)` are real:
    return the logits after the last real token of each row, and the biases. `rings` hold the caches before and
    after."""
    b, m = tokens.shape
    layers, biases = [], ()
    for number in range(len(model.layers)):
        layers.append((rings.keys[number], rings.values[number], clock, counts))
    if model.bias_distances:
        biases = model._biases()
    places = ops.minimum(clock + _places(m), model.max_seq_len - 1)[None]
    x, layers = model._through_layers(model.token_emb(tokens) + model.pos_emb(places), None, biases, layers, True)
    for number in range(len(model.layers)):
        ops.assign(rings.keys[number], layers[number][0])
        ops.assign(rings.values[number], layers[number][1])
    last = ops.maximum(counts, 1) - 1 + m * _places(b)
    return (model.to_logits(ops.gather(x.reshape(-1, model.dim), last, 0)), *biases)


def next_logits(model, token, position, rings, sizes, flat, without_axis):
    """Compute a step of decoding: return the logits after `token (b,)` at a `position`, in the form of caches, and
    the caches of global layers. `flat` has the model's biases, then the caches of global layers. If a plain model is
    computed `without_axis` of tokens, its projections reshape nothing.

    All are flat, because a tuple that is passed to a compiled function is a constant of it: every token would compile
    anew.
    """
    clock, rows = clock_and_rows(position)
    layers, start = [], len(model.bias_distances)
    biases = flat[:start]
    for number in range(len(model.layers)):
        layers.append((rings.keys[number], rings.values[number], clock, rows))
    for size in sizes:
        layers.append(flat[start:start + size])
        start += size
    if not without_axis:
        token, rows = token[:, None], rows[:, None]
    x = model.token_emb(token) + model.pos_emb(rows)
    x, layers = model._through_layers(x, None, biases, layers, True)
    flat = []
    for layer in layers[len(model.layers):]:
        flat += list(layer)
    logits = model.to_logits(x)
    return (logits if without_axis else logits[:, 0], *flat)


# ---- compiling


def of_model(model, function):
    """Return a function around a model with the precision of the model's own calls."""
    if hasattr(model, "amp_strategy"):  # set by `amp` at "auto"; MindSpore applies it to the model's own calls
        function.amp_strategy = model.amp_strategy
    return function


def step_of(model, rings, sizes):
    """Return `next_logits` with its rings; `sizes` are the numbers of tensors in the caches of global layers."""
    without_axis = is_plain(model) and model.cached_cells == model.depth and model.hyper_connections is None

    def step(token, position, *flat):
        return next_logits(model, token, position, rings, sizes, flat, without_axis)
    return of_model(model, step)


def piece_of(model, rings):
    """Return `piece_logits` with its rings."""
    def piece(tokens, clock, counts):
        return piece_logits(model, rings, tokens, clock, counts)
    return of_model(model, piece)


def end_of(model, rings, even):
    """Return the function that ends a prompt that was read in pieces."""
    attentions = [attn.attn_fn for attn, _ in model.layers]

    def end(fed):
        return rings.enter_pieces(attentions, fed, None)

    def end_of_uneven(fed, shifts):
        return rings.enter_pieces(attentions, fed, shifts)
    return end if even else end_of_uneven
