"""Generation: sampling, and a token at a time of a model that is handed in, whatever keeps its cache."""
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from . import checks
from .cache import Rings, place_in_rings


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


def check(model, prime, seq_len, temperature, filter_thres, use_kv_cache, mask):
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
    checks.tokens(owner, "prime", checks.described(prime), checks.described(mask))
    smallest, largest = prime.asnumpy().min(), prime.asnumpy().max()
    if smallest < 0 or largest >= model.num_tokens:
        raise checks.value_error(owner, "prime", f"of tokens in [0, {model.num_tokens})", f"{smallest} to {largest}")


def padded(model, n):
    """A length of at least n: one for many n, as each new length is planned, and in Graph mode compiled, anew."""
    if not model.global_takes_cache:  # nothing is known of what such a layer sees
        return n
    step = min(model.local_attn_window_size, 1 << (n - 1).bit_length())
    return min(-(-n // step) * step, model.max_seq_len)


def next_logits(model, token, position, attn_bias, rings, sizes, *flat):
    """A step of decoding: logits of the token after `token (b, 1)`, which stands at `position (1,)`, and the caches
    of global layers as flat as they came.

    Flat, as a tuple that goes into a compiled function is a constant of it, and every token would compile anew.
    """
    groups, kept, _ = rings.keys[0].shape
    place = place_in_rings(position, groups, kept)
    layers = []
    for number in range(len(model.layers)):
        layers.append((rings.keys[number], rings.values[number], position, place))
    start = 0
    for size in sizes:
        layers.append(flat[start:start + size])
        start += size
    x = model.token_emb(token) + model.pos_emb(position)
    x, layers = model._through_layers(x, None, attn_bias, layers, True)
    flat = []
    for layer in layers[len(model.layers):]:
        flat += list(layer)
    return (model.to_logits(x)[:, 0], *flat)


def compiled_step(model, layers):
    """`next_logits`, compiled at its first call for a batch size, and the rings that it keeps, after a prompt.

    A function around it, as a Cell with a compiled method is compiled to that method wherever it is called later;
    kept beside whose it is, as a copy of the model has steps of its own.
    """
    if model._steps is None or model._steps[0] != id(model):
        model._steps = id(model), {}
    local = layers[:len(model.layers)]
    kind = local[0][0].shape, str(local[0][0].dtype)
    if kind not in model._steps[1]:
        rings = Rings(local)
        sizes = tuple(len(layer) for layer in layers[len(local):])

        def step(token, position, attn_bias, *flat):
            return next_logits(model, token, position, attn_bias, rings, sizes, *flat)

        def fill(*caches):
            return rings(*caches)
        model._steps[1][kind] = ms.jit(step), ms.jit(fill)
    step, fill = model._steps[1][kind]
    fill(local[0][2], *[x for keys, values, _ in local for x in (keys, values)])
    return step


def generate(model, prime, seq_len, temperature, filter_thres, use_kv_cache, mask, callback):
    """What `LocalTransformer.generate` gives."""
    check(model, prime, seq_len, temperature, filter_thres, use_kv_cache, mask)
    b, n = prime.shape
    tokens = np.zeros((b, n + seq_len + model.local_attn_window_size), prime.asnumpy().dtype)
    real = np.zeros(tokens.shape, bool)
    tokens[:, :n], real[:, :n] = prime.asnumpy(), True if mask is None else mask.asnumpy()
    modes = [(cell, cell.training) for _, cell in model.cells_and_names()]
    model.set_train(False)
    try:
        step, attn_bias, flat = None, None, []
        for end in range(n, n + seq_len):
            start = max(0, end - model.max_seq_len)
            if start or not (use_kv_cache and model.causal and model.global_takes_cache and mask is None):
                seen = slice(start, start + padded(model, end - start))
                keys = None if model.causal and mask is None else Tensor(real[:, seen])
                logits = model(Tensor(tokens[:, seen]), keys)[:, end - start - 1]
            elif step is not None:
                position = Tensor(np.array([end - 1], np.int32))
                logits, *flat = step(Tensor(tokens[:, end - 1:end]), position, attn_bias, *flat)
            else:
                logits, (layers, attn_bias, _) = model(Tensor(tokens[:, :end]), return_cache=True)
                logits, step = logits[:, -1], compiled_step(model, layers)
                flat = [x for layer in layers[len(model.layers):] for x in layer]
            if logits.dtype != ms.float32:
                logits = ops.cast(logits, ms.float32)
            tokens[:, end] = sample(logits.asnumpy(), temperature, filter_thres)
            real[:, end] = True
            if callback is not None:
                callback(end - n + 1)
    finally:
        for cell, training in modes:
            cell.set_train(training)
    return Tensor(tokens[:, n:n + seq_len])
