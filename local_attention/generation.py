"""Generation: sampling, and a token at a time of a model that is handed in, whatever keeps its cache."""
import operator
from contextlib import contextmanager
from functools import cache, wraps
from itertools import count as numbers

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import checks
from .backends import native
from .cache import Rings, clock_and_rows

# What MindSpore keeps of a Cell's calls, from the beginning on, and once it has compiled the Cell in Graph mode.
BOOKKEEPING = frozenset(vars(nn.Cell())) - {"mixed_precision_type"} | {
    "current_phase", "sequence_modified", "_func_graph_flags", "__parse_method__", "__compile_cell_hook__"}


def _kept_count(thres, vocabulary):
    return max(1, int((1 - thres) * vocabulary))


@constexpr
def _kept(thres, logits):
    """How many logits are kept."""
    checks.fraction("top_k", "thres", thres)
    shape = checks.tensor("top_k", "logits", logits, checks.FLOATS)
    if 0 in shape or not shape:
        raise checks.value_error("top_k", "logits", "of shape (..., vocabulary), not empty", shape)
    return _kept_count(thres, shape[-1])


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


def sample(logits, temperature, thres):
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


def check(model, prime, seq_len, temperature, filter_thres, use_kv_cache, mask, callback):
    """The rules of `generate`, and its prompts as `runs`."""
    owner = f"{model.cls_name}.generate"
    if model.num_tokens is None:
        raise ValueError(f"For '{owner}', the model must have tokens, but its 'num_tokens' is None.")
    if model.group is not None:
        raise ValueError(f"For '{owner}', the model must be one without 'sequence_parallel', which its weights "
                         "load into.")
    checks.non_negative_int(owner, "seq_len", seq_len)
    checks.non_negative_number(owner, "temperature", temperature)
    checks.fraction(owner, "filter_thres", filter_thres)
    checks.boolean(owner, "use_kv_cache", use_kv_cache)
    if callback is not None and not callable(callback):
        raise checks.type_error(owner, "callback", "None or a function", callback)
    checks.tokens(owner, "prime", checks.described(prime), checks.described(mask))
    smallest, largest = prime.asnumpy().min(), prime.asnumpy().max()
    if smallest < 0 or largest >= model.num_tokens:
        raise checks.value_error(owner, "prime", f"of tokens in [0, {model.num_tokens})", f"{smallest} to {largest}")
    return runs(owner, mask, prime.shape)


def runs(owner, mask, shape):
    """Where the tokens of each row begin and how many they are, one run each: two arrays."""
    if mask is None:
        return np.zeros(shape[0], np.int64), np.full(shape[0], shape[1])
    mask = mask.asnumpy()
    begin, lengths = mask.argmax(1), mask.sum(1)
    if not lengths.all():
        raise checks.value_error(owner, "mask", "of at least one real token in each row",
                                 f"none in row {lengths.argmin()}")
    whole = mask[:, ::-1].argmax(1) + lengths + begin == shape[1]
    if not whole.all():
        raise checks.value_error(owner, "mask", "of one run of real tokens in each row",
                                 f"a hole in row {whole.argmin()}")
    return begin, lengths


def longest_window(model):
    return max(size or model.max_seq_len for size in model.window_sizes)


def padded(model, n):
    """A length of at least n: one for many n, as each new length is planned, and in Graph mode compiled, anew."""
    if not model.global_takes_cache:  # nothing is known of what such a layer sees
        return n
    step = min(longest_window(model), 1 << int(n - 1).bit_length())
    return min(-(-n // step) * step, model.max_seq_len)


def whole_logits(model, tokens, ends):
    """Logits of the token after the first `ends` of each row of `tokens`, by a call on the last `max_seq_len`."""
    starts = np.maximum(0, ends - model.max_seq_len)
    lengths = ends - starts
    even = (lengths == lengths[0]).all()
    if not (even or model.global_takes_mask or model.global_takes_cache):  # such a layer would see the padding
        return np.concatenate([whole_logits(model, tokens[row:row + 1], ends[row:row + 1])
                               for row in range(len(ends))])
    places = np.arange(padded(model, lengths.max()))
    seen = np.take_along_axis(tokens, starts[:, None] + places, 1)
    unneeded = model.causal and (even or model.global_takes_cache)  # what is causal does not see what comes after it
    logits = model(Tensor(seen), None if unneeded else Tensor(places < lengths[:, None]))
    return as_array(logits)[np.arange(len(ends)), lengths - 1]


def as_array(logits):
    return (logits if logits.dtype == ms.float32 else ops.cast(logits, ms.float32)).asnumpy()


def next_logits(model, token, position, rings, sizes, *flat):
    """A step of decoding: logits of the token after `token (b, 1)` at a `position`, as caches have it, and the caches
    of global layers as flat as they came, behind the model's biases.

    Flat, as a tuple that goes into a compiled function is a constant of it, and every token would compile anew.
    """
    clock, rows = clock_and_rows(position)
    layers, start = [], len(model.bias_distances)
    biases = flat[:start]
    for number in range(len(model.layers)):
        layers.append((rings.keys[number], rings.values[number], clock, rows))
    for size in sizes:
        layers.append(flat[start:start + size])
        start += size
    x = model.token_emb(token) + model.pos_emb(rows[:, None])
    x, layers = model._through_layers(x, None, biases, layers, True)
    flat = []
    for layer in layers[len(model.layers):]:
        flat += list(layer)
    return (model.to_logits(x)[:, 0], *flat)


@cache
def _compound(kind):
    return issubclass(kind, (nn.Cell, Tensor, tuple, list, dict))


def _collect(values, parts, places, met):
    for x in values:
        parts.append(x)
        if not _compound(type(x)) or id(x) in met:
            continue
        met.add(id(x))
        if isinstance(x, nn.Cell):
            _collect([setting for name, setting in vars(x).items() if name not in BOOKKEEPING], parts, places, met)
            for held in (x._cells, x._params, x._buffers):
                _collect(held.values(), parts, places, met)
        elif isinstance(x, Tensor):
            places.append(x.data_ptr())
        else:
            _collect(x.values() if isinstance(x, dict) else x, parts, places, met)


class State:
    """What a model is made of: its Cells, their settings and Parameters, where the data of these is, and the backend
    that is wanted.

    `Parameter.set_data` and what is built on it, such as loading a checkpoint, put other data in the place of a
    Parameter's, and a compiled function goes on with the former; optimizers and `ops.assign` change the data itself.
    """

    def __init__(self, model):
        self.parts, self.places = [native.wanted[0]], []  # the parts themselves: an identity could come back
        _collect((model,), self.parts, self.places, set())

    def __eq__(self, other):
        return (self.places == other.places and len(self.parts) == len(other.parts)
                and all(map(operator.is_, self.parts, other.parts)))


class Steps:
    """The compiled steps of a model, one for each kind of batch, as long as it is what they were compiled of.

    Functions around the model, as a Cell with a compiled method is compiled to that method wherever it is called later.
    Rings outlive steps: what MindSpore has compiled, it holds with its Parameters until the process ends.
    """

    def __init__(self):
        self.state, self.steps, self.rings = None, {}, {}

    def __deepcopy__(self, memo):
        return Steps()

    def after(self, model, layers):
        """`next_logits`, compiled at its first call, its rings filled with the caches of a prompt."""
        state = State(model)
        if self.state is None or state != self.state:
            self.state, self.steps = state, {}
        local, others = layers[:len(model.layers)], layers[len(model.layers):]
        prefix = model.windows.prefix
        kind = prefix, tuple((cache[0].shape, str(cache[0].dtype)) for cache in local)
        if kind not in self.rings:
            self.rings[kind] = filled_rings(local, prefix)
        rings, fill = self.rings[kind]
        if kind not in self.steps:
            self.steps[kind] = compiled_step(model, rings, tuple(len(cache) for cache in others))
        fill(clock_and_rows(local[0][2])[0], *[x for keys, values, _ in local for x in (keys, values)])
        return self.steps[kind]


_numbers = numbers()


def _compiled(function):
    """A function by a name of its own: MindSpore warns of one that was compiled before, for another model."""
    function.__name__ += f"_{next(_numbers)}"
    return ms.jit(function)


def filled_rings(caches, prefix):
    """Rings for such caches, and what fills them."""
    rings = Rings(caches, prefix)

    def fill(*caches):
        return rings(*caches)
    return rings, _compiled(fill)


def compiled_step(model, rings, sizes):
    """`next_logits` with the rings that it keeps; of so many tensors are the caches of global layers."""
    def step(token, position, *flat):
        return next_logits(model, token, position, rings, sizes, *flat)
    if hasattr(model, "amp_strategy"):  # of `amp` at "auto", which MindSpore gives to the model's own calls
        step.amp_strategy = model.amp_strategy
    return _compiled(step)


@contextmanager
def evaluating(model):
    """A model in evaluation, and after that each of its Cells in the mode that it was in."""
    modes = [(cell, cell.training) for _, cell in model.cells_and_names()]
    trains = any(training for _, training in modes)
    if trains:
        model.set_train(False)
    try:
        yield
    finally:
        for cell, training in modes if trains else ():
            cell.set_train(training)


def eval_decorator(function):
    """A function of a model, and of whatever else, that runs with the model in evaluation."""
    @wraps(function)
    def inner(model, *args, **kwargs):
        with evaluating(model):
            return function(model, *args, **kwargs)
    return inner


def generate(model, prime, seq_len, temperature, filter_thres, use_kv_cache, mask, callback):
    """What `LocalTransformer.generate` gives: tokens of each row moved to the left, and then one at a time."""
    begin, lengths = check(model, prime, seq_len, temperature, filter_thres, use_kv_cache, mask, callback)
    given, rows = prime.asnumpy(), np.arange(len(lengths))
    even = (lengths == lengths[0]).all()
    tokens = np.zeros((len(rows), lengths.max() + seq_len + longest_window(model)), given.dtype)
    for row in rows:
        tokens[row, :lengths[row]] = given[row, begin[row]:begin[row] + lengths[row]]
    cached = use_kv_cache and model.causal and model.global_takes_cache
    cached = cached and (even or model.global_cache_is_ours)
    with evaluating(model):
        step, biases, flat = None, (), []
        for count in range(seq_len):
            ends = lengths + count
            if not cached or ends.max() > model.max_seq_len:
                logits = whole_logits(model, tokens, ends)
            elif step is not None:
                position = Tensor(np.array([ends.max() - 1, *(ends - 1)], np.int32))
                logits, *flat = step(Tensor(tokens[rows, ends - 1][:, None]), position, *biases, *flat)
                logits = as_array(logits)
            else:
                begun = None
                if not even:
                    begun = ((Tensor(np.array([ends.max(), *ends], np.int32)),),) * model.cached_cells, (), 0
                logits, (layers, biases, _) = model(Tensor(tokens[:, :ends.max()]), cache=begun, return_cache=True)
                logits, step = as_array(logits)[rows, ends - 1], model.steps.after(model, layers)
                flat = [x for layer in layers[len(model.layers):] for x in layer]
            tokens[rows, ends] = sample(logits, temperature, filter_thres)
            if callback is not None:
                callback(count + 1)
    return Tensor(np.take_along_axis(tokens, lengths[:, None] + np.arange(seq_len), 1))
