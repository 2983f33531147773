"""Generation: sampling, and decoding a token at a time from a given model, whatever keeps its cache."""
import inspect
import operator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from itertools import count as numbers
from threading import RLock

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import checks, settings
from .cache import MOST_KEPT, clock_and_rows
from .decoding import end_of, of_model, piece_of, pieces_of, prompt_logits, reads_in_pieces, ring_forms, step_of
from .rings import Rings

# MindSpore's notes of a Cell's calls: from the beginning, and once it has compiled the Cell in Graph mode.
BOOKKEEPING = frozenset(vars(nn.Cell())) - {"mixed_precision_type"} | {
    "current_phase", "sequence_modified", "_func_graph_flags", "__parse_method__", "__compile_cell_hook__"}


def _kept_count(thres, vocabulary):
    return max(1, int((1 - thres) * vocabulary))


@constexpr
def _kept(thres, logits):
    """Check the arguments of `top_k`; return how many logits are kept."""
    checks.fraction("top_k", "thres", thres)
    shape = checks.tensor("top_k", "logits", logits, checks.FLOATS)
    if 0 in shape or not shape:
        raise checks.value_error("top_k", "logits", "of shape (..., vocabulary), not empty", shape)
    return _kept_count(thres, shape[-1])


def top_k(logits, thres=0.9):
    """
    Keep the largest logits, `max(1, int((1 - thres) * vocabulary))` of them, and set the others to -inf.

    Args:
        logits (Tensor): float `(..., vocabulary)`.
        thres (float): The share, in [0, 1], that is dropped. Default: ``0.9`` .

    Returns:
        Tensor of the shape and dtype of `logits`. Exactly that many are kept, also among equal logits.
    """
    values, indices = ops.topk(logits, _kept(thres, checks.described(logits)))
    return ops.tensor_scatter_elements(ops.full_like(logits, float("-inf")), indices, values, -1)


def sample(logits, temperature, thres):
    """Sample a token for each row of float32 logits: the largest logit plus Gumbel noise, which is a draw from the
    softmax.

    This is NumPy, whose global generator `mindspore.set_seed` also seeds. Tokens are on the host anyway, and for one
    row of logits, launching an operator costs more than running it.
    """
    count = _kept_count(thres, logits.shape[-1])
    kept = np.argpartition(-logits, count - 1)[:, :count]
    values = np.take_along_axis(logits, kept, -1)
    if temperature > 0:
        largest = values.max(-1, keepdims=True)  # so that even the smallest temperature does not make two infinities
        values = (values - largest) / temperature + np.random.gumbel(size=values.shape)
    return np.take_along_axis(kept, values.argmax(-1)[:, None], -1)[:, 0]


def takes_tokens(owner, callback):
    """Return whether a callback takes the new tokens after the count. A second argument with a default value is its
    own affair, unless it is named `tokens`."""
    if not callable(callback):
        raise checks.type_error(owner, "callback", "None or a function", callback)
    try:
        signature = inspect.signature(callback)
    except ValueError:  # a builtin that does not say
        return False
    arguments = [one for one in signature.parameters.values() if one.kind is not one.KEYWORD_ONLY]
    second = arguments[1] if len(arguments) > 1 else None
    told = any(one.kind is one.VAR_POSITIONAL for one in arguments[:2]) or (
        second is not None and second.kind is not second.VAR_KEYWORD
        and (second.default is second.empty or second.name == "tokens"))
    try:
        signature.bind(*range(1 + told))
    except TypeError:
        raise checks.type_error(owner, "callback", "None or a function of the count, or of the count and the tokens",
                                callback) from None
    return told


def check(model, prime, seq_len, temperature, filter_thres, use_kv_cache, mask, stop_token):
    """Check the arguments of `generate`, but for its callback; return its prompts as `runs`."""
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
    rule = f"a token in [0, {model.num_tokens})"
    if stop_token is not None and checks.non_negative_int(owner, "stop_token", stop_token) >= model.num_tokens:
        raise checks.value_error(owner, "stop_token", rule, stop_token)
    checks.tokens(owner, "prime", checks.described(prime), checks.described(mask))
    smallest, largest = prime.asnumpy().min(), prime.asnumpy().max()
    if smallest < 0 or largest >= model.num_tokens:
        raise checks.value_error(owner, "prime", f"of tokens in [0, {model.num_tokens})", f"{smallest} to {largest}")
    return runs(owner, mask, prime.shape)


def runs(owner, mask, shape):
    """Return where the tokens of each row begin and how many there are, as two arrays; they must be contiguous."""
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
    return max(min(size or model.max_seq_len, model.max_seq_len) for size in model.window_sizes)


def padded(model, n):
    """Return a length of at least n, the same for many n: each length is planned, and in Graph mode compiled, anew."""
    if not model.global_takes_cache:  # it is unknown what such a layer sees
        return n
    step = min(longest_window(model), 1 << int(n - 1).bit_length())
    return min(-(-n // step) * step, model.max_seq_len)


def whole_logits(model, tokens, ends):
    """Return the logits after the first `ends` tokens of each row, computed from the last `max_seq_len` of these."""
    starts = np.maximum(0, ends - model.max_seq_len)
    lengths = ends - starts
    even = (lengths == lengths[0]).all()
    if not (even or model.global_takes_mask or model.global_takes_cache):  # this layer would see the padding
        return np.concatenate([whole_logits(model, tokens[row:row + 1], ends[row:row + 1])
                               for row in range(len(ends))])
    places = np.arange(padded(model, lengths.max()))
    seen = np.take_along_axis(tokens, starts[:, None] + places, 1)
    unneeded = model.causal and (even or model.global_takes_cache)  # a causal model does not see what comes later
    mask = None if unneeded else Tensor(places < lengths[:, None])
    logits, *_ = model.steps.prompt(model, False)(Tensor(seen), places_of(lengths, len(places)), mask, None)
    return as_array(logits)


def places_of(ends, n):
    """Return where the last token of each row is among those of all rows, `(b, 1)`, for rows of n tokens."""
    return Tensor((np.arange(len(ends)) * n + ends - 1)[:, None].astype(np.int32))


def as_array(logits):
    return (logits if logits.dtype == ms.float32 else ops.cast(logits, ms.float32)).asnumpy()


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
    """What a model consists of: its Cells, their settings and Parameters, the addresses of their data, and the
    requested backend.

    `Parameter.set_data`, and what uses it, such as loading a checkpoint, replace the data of a Parameter, while a
    compiled function keeps using the old data. Optimizers and `ops.assign` change the data in place.
    """

    def __init__(self, model):
        self.parts, self.places = [settings.backend], []  # not their ids, which are reused once a part is freed
        _collect((model,), self.parts, self.places, set())

    def __eq__(self, other):
        return (self.places == other.places and len(self.parts) == len(other.parts)
                and all(map(operator.is_, self.parts, other.parts)))


class Steps:
    """The compiled functions of a model, a step for each kind of batch, valid as long as the model is what they were
    compiled from.

    They are functions around the model: a Cell with a compiled method would be compiled to that method wherever it is
    called later. Rings outlive steps, because MindSpore keeps whatever it compiled, and its Parameters, until the
    process ends. A generation within the callback of another one has rings, and so steps, of its own.
    """

    def __init__(self):
        self.state, self.steps, self.prompts, self.rings, self.level = None, {}, {}, {}, 0
        self.in_pieces = False

    def __deepcopy__(self, memo):
        return Steps()

    @contextmanager
    def deeper(self):
        self.level += 1
        try:
            yield
        finally:
            self.level -= 1

    def forget_the_past(self, model):
        """Drop what was compiled from a model that has changed."""
        state = State(model)
        if self.state is None or state != self.state:
            check_names(model)
            self.state, self.steps, self.prompts = state, {}, {}
            self.in_pieces = reads_in_pieces(model)

    def prompt(self, model, cached):
        """Return `prompt_logits`, compiled in Graph mode."""
        def prompt(*args):
            return prompt_logits(model, *args, cached)
        if ms.get_context("mode") == ms.GRAPH_MODE:
            self.forget_the_past(model)
            if cached not in self.prompts:
                self.prompts[cached] = _compiled(of_model(model, prompt))
            return self.prompts[cached]

        def call(*args):
            with precision(model):
                return prompt(*args)
        return call

    def after(self, model, layers):
        """Return `next_logits`, compiled at its first call, with its rings filled with the caches of a prompt."""
        self.forget_the_past(model)
        local, others = layers[:len(model.layers)], layers[len(model.layers):]
        kind, (rings, fill) = self._rings(model, tuple((cache[0].shape, cache[0].dtype) for cache in local))
        fill(clock_and_rows(local[0][2])[0], *[x for keys, values, _ in local for x in (keys, values)])
        return self._made(kind, lambda: step_of(model, rings, tuple(len(cache) for cache in others)))

    def after_pieces(self, model, tokens, lengths):
        """Read prompts, the first `lengths` of `tokens (b, n)`; return the logits after them, the biases, and what
        `after` returns."""
        rows, longest, even = len(lengths), lengths.max(), (lengths == lengths[0]).all()
        kind, (rings, _) = self._rings(model, ring_forms(model, rows))
        logits, start = np.zeros((rows, model.num_tokens), np.float32), 0
        for size in pieces_of(longest):
            part = np.zeros((rows, size), np.int32)
            part[:, :min(size, longest - start)] = tokens[:, start:min(start + size, longest)]
            counts = np.clip(lengths - start, 0, size).astype(np.int32)
            piece = self._made((kind, size), lambda: piece_of(model, rings), self.prompts)
            found, *biases = piece(Tensor(part), Tensor(np.array([start], np.int32)), Tensor(counts))
            start += size
            end = (counts > 0) & (lengths <= start)
            if end.any():
                logits[end] = as_array(found)[end]
        shifts = () if even else (Tensor((longest - lengths).astype(np.int32)),)
        self._made((kind, even), lambda: end_of(model, rings, even), self.prompts)(
            Tensor(np.array([longest], np.int32)), *shifts)
        return logits, biases, self._made(kind, lambda: step_of(model, rings, ()))

    def _rings(self, model, forms):
        """Return a kind of rings, such rings, and the function that fills them."""
        kind = self.level, model.windows.prefix, tuple((shape, checks.dtype_name(dtype)) for shape, dtype in forms)
        if kind not in self.rings:
            self.rings[kind] = filled_rings(forms, model.windows.prefix)
        return kind, self.rings[kind]

    def _made(self, kind, make, made=None):
        made = self.steps if made is None else made
        if kind not in made:
            made[kind] = _compiled(make())
        return made[kind]


_numbers = numbers()


def _compiled(function):
    """Compile a function under a unique name, else MindSpore warns of one compiled before, for another model."""
    function.__name__ += f"_{next(_numbers)}"
    return ms.jit(function)


def filled_rings(forms, prefix):
    """Return rings of these shapes and dtypes, and a function that fills them."""
    rings = Rings(forms, prefix)

    def fill(*caches):
        return rings(*caches)
    return rings, _compiled(fill)


def precision(model):
    """Return the context that "auto" of `amp` puts around the model's own calls."""
    strategy = getattr(model, "amp_strategy", None)
    if strategy is None:
        return nullcontext()
    from mindspore.train.amp import AmpDecorator
    return AmpDecorator(strategy.get_amp_level(), strategy.get_amp_dtype(), strategy.get_white_list(),
                        strategy.get_black_list())


def check_names(model):
    """Check that no two Parameters have one name, which nothing that is compiled may have."""
    owners = {}
    for path, cell in model.cells_and_names():
        for parameter in cell._params.values():
            name = "" if parameter is None else parameter.name
            where, other = owners.setdefault(name, (path, parameter))
            if other is not parameter:
                inner = name.partition(".")[2].rpartition(".")[0]  # within the Cell that was put in place of another
                one, two = (whole.removesuffix(f".{inner}") for whole in (where, path))
                raise ValueError(
                    f"For '{model.cls_name}.generate', Parameters must have names of their own, but those named "
                    f"'{name}' of '{one}' and '{two}' are two: call 'update_parameters_name(\"{two}.\")' of '{two}'.")


@contextmanager
def evaluating(model):
    """Switch a model to evaluation; afterwards, return each of its Cells to its former mode."""
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
    """Make a function, whose first argument is a model, run with the model in evaluation."""
    @wraps(function)
    def inner(model, *args, **kwargs):
        with evaluating(model):
            return function(model, *args, **kwargs)
    return inner


def each_logits(model, tokens, lengths, cached):
    """Yield the logits after the tokens of each row, again and again: before it asks for more, the caller writes the
    next token of each row behind its `lengths` first ones."""
    rows, even = np.arange(len(lengths)), (lengths == lengths[0]).all()
    step, biases, flat = None, (), []
    if cached:
        model.steps.forget_the_past(model)
    for count in numbers():
        ends = lengths + count
        longest = ends.max()
        if not cached or longest > model.max_seq_len:
            yield whole_logits(model, tokens, ends)
        elif step is not None:
            position = Tensor(np.array([longest - 1, *(ends - 1)], np.int32))
            logits, *flat = step(Tensor(tokens[rows, ends - 1]), position, *biases, *flat)
            yield as_array(logits)
        elif model.steps.in_pieces:
            logits, biases, step = model.steps.after_pieces(model, tokens, ends)
            yield logits
        else:
            position = None if even else Tensor(np.array([longest, *ends], np.int32))
            logits, layers, biases = model.steps.prompt(model, True)(
                Tensor(tokens[:, :longest]), places_of(ends, longest), None, position)
            step = model.steps.after(model, layers)
            flat = [x for layer in layers[len(model.layers):] for x in layer]
            yield as_array(logits)


# MindSpore's compiled functions are not safe in several threads; a callback may generate, too
_one_thread = RLock()


def generate(model, prime, seq_len, temperature, filter_thres, use_kv_cache, mask, stop_token, callback):
    """Implement `LocalTransformer.generate`: move the tokens of each row to the left, then generate one at a time."""
    with _one_thread, model.steps.deeper():
        begin, lengths = check(model, prime, seq_len, temperature, filter_thres, use_kv_cache, mask, stop_token)
        told = callback is not None and takes_tokens(f"{model.cls_name}.generate", callback)
        given, rows = prime.asnumpy(), np.arange(len(lengths))
        tokens = np.zeros((len(rows), lengths.max() + seq_len + longest_window(model)), given.dtype)
        for row in rows:
            tokens[row, :lengths[row]] = given[row, begin[row]:begin[row] + lengths[row]]
        cached = use_kv_cache and model.causal and model.global_takes_cache and model.most_kept <= MOST_KEPT
        cached = cached and (model.global_cache_is_ours or (lengths == lengths[0]).all())
        count, ended = 0, np.zeros(len(rows), bool)
        with evaluating(model):
            logits = each_logits(model, tokens, lengths, cached)
            while count < seq_len and not ended.all():
                new = sample(next(logits), temperature, filter_thres)
                if stop_token is not None:
                    new[ended] = stop_token
                    ended |= new == stop_token
                tokens[rows, lengths + count] = new
                count += 1
                if callback is not None:
                    answer = callback(count, Tensor(new.astype(given.dtype))) if told else callback(count)
                    if told and is_true(answer):
                        break
        return Tensor(np.take_along_axis(tokens, lengths[:, None] + np.arange(count), 1))


def is_true(answer):
    """Whether a callback returned True, also as an array or a Tensor: not any number, such as `write` returns."""
    if isinstance(answer, Tensor):
        answer = answer.asnumpy()
    return (isinstance(answer, (bool, np.bool_, np.ndarray)) and np.size(answer) == 1
            and np.asarray(answer).dtype == bool and bool(answer))
