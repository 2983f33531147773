"""Named cases of everything that the package computes with MindSpore's operators.

A case is a function of a dtype and a mode. The mode says whether it runs operator by operator or as one graph. Sizes
are small and values do not matter. What matters is which operators are called with which dtypes, and that graphs
compile.
"""
from types import SimpleNamespace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from local_attention import (
    DynamicPositionBias, LocalAttention, LocalMHA, LocalSelfAttention, LocalTransformer, MultiHeadLocalAttention,
    WindowSpec, explain_attention, export_torch_weights, load_torch_weights, merge_attentions, parallel,
    sliding_window_attention, use_backend, windowed_attention)
from local_attention.cache import reorder_cache
from local_attention.local_attention import l2norm, look_around, max_neg_value, pad_to_multiple
from local_attention.rotary import SinusoidalEmbeddings, apply_rotary_pos_emb, rotate_half
from local_attention.transformer import FeedForward, GEGLU, top_k
from local_attention.zoo import translation

B, H, KV, N, D, W, DIM, TOKENS, RANKS = 2, 4, 2, 37, 16, 8, 16, 32, 2
CASES = {}  # by name: the function, and the dtypes to run it with


def case(name, dtypes=("float32", "float16", "bfloat16")):
    """Register a function as the case of this name."""
    def register(function):
        CASES[name] = function, dtypes
        return function
    return register


# ---- parts of cases


def floats(dtype, *shape):
    return Tensor(np.random.standard_normal(shape).astype(np.float32)).astype(getattr(ms, dtype))


def ints(*shape, below=TOKENS, dtype=np.int32):
    return Tensor(np.random.randint(0, below, shape).astype(dtype))


def mask(b=B, n=N):
    return Tensor(np.arange(b * n).reshape(b, n) % 5 > 0)


def documents(b=B, n=N):
    return Tensor(np.tile(np.arange(n) // 11 - (np.arange(n) >= n - 3) * 9, (b, 1)).astype(np.int32))


def call(function, mode, *arguments):
    return (ms.jit(function) if mode == "graph" else function)(*arguments)


def both(function, mode, *arguments):
    """Run a function and its gradients by every argument of floats."""
    places = tuple(place for place, x in enumerate(arguments) if x.dtype in (ms.float32, ms.float16, ms.bfloat16))

    def total(*arguments):
        out = function(*arguments)
        if isinstance(out, tuple):
            return ops.cast(out[0], ms.float32).sum() + ops.cast(out[1], ms.float32).sum()
        return ops.cast(out, ms.float32).sum()
    return call(ms.value_and_grad(total, places), mode, *arguments)


def train(net, mode, *arguments, optimizer=nn.Adam, **options):
    """Run a training step: the loss, clipped gradients, and an update of the optimizer."""
    net.set_train()
    parameters = net.trainable_params()
    update = optimizer(parameters, 1e-3)

    def loss_of(*arguments):
        loss = net(*arguments, **options)
        return ops.cast(loss, ms.float32).sum()
    gradients_of = ms.value_and_grad(loss_of, None, parameters)

    def step(*arguments):
        loss, gradients = gradients_of(*arguments)
        return ops.depend(loss, update(ops.clip_by_global_norm(gradients, 1.)))
    return call(step, mode, *arguments)


def to(net, dtype):
    return net if dtype == "float32" else net.to_float(getattr(ms, dtype))


# ---- windowed attention, with each backend and option


SPAN, CHUNKS, TWO_SIDED = WindowSpec(1, W, 0, True), WindowSpec(W, W, W, False), WindowSpec(1, W, W, False)
WINDOWED = {  # the spec, (key heads, key length), which other tensors there are, and other options
    "span": (SPAN, (H, N), (), {}),
    "two_sided": (TWO_SIDED, (H, N), (), {}),
    "chunks": (CHUNKS, (H, N), ("mask",), {}),
    "mask": (SPAN, (KV, N), ("mask",), {}),
    "bias": (CHUNKS, (KV, N), ("mask", "bias"), {}),
    "bias_of_offsets": (SPAN, (H, N), ("bias",), dict(softcap=5.)),
    "sinks": (SPAN, (KV, N), ("sinks",), dict(return_lse=True)),
    "sinks_chunks": (CHUNKS, (KV, N), ("sinks", "mask"), {}),
    "prefix": (WindowSpec(1, W, 0, True, 3), (KV, N), ("mask", "sinks"), dict(return_lse=True, softcap=5.)),
    "documents": (SPAN, (KV, N), ("ids",), dict(return_lse=True)),
    "documents_all": (WindowSpec(W, W, 0, True, 3), (KV, N), ("ids", "mask", "sinks"),
                      dict(return_lse=True, softcap=5., dropout_rate=.1)),
    "documents_bias": (CHUNKS, (KV, N), ("ids", "bias"), {}),
    "dropout": (SPAN, (KV, N), ("mask",), dict(dropout_rate=.1, softcap=5.)),
    "cached": (SPAN, (KV, N + 4), ("mask",), dict(dropout_rate=.1)),
    "no_limit": (WindowSpec.from_flash((-1, -1), True), (H, N), (), {})}


def windowed(option, backend):
    spec, (heads, n_k), there, options = WINDOWED[option]
    softcap, dropout, lse = (options.get(name) for name in ("softcap", "dropout_rate", "return_lse"))

    def attention(q, k, v, real, ids, bias, sinks):
        return windowed_attention(
            q, k, v, spec, mask=real if "mask" in there else None, segment_ids=ids if "ids" in there else None,
            attn_bias=bias if "bias" in there else None, sinks=sinks if "sinks" in there else None, softcap=softcap,
            dropout_rate=dropout or 0., return_lse=lse or False, backend=backend)

    def run(dtype, mode):
        columns = spec.backward + spec.bucket + spec.forward if "bias" in there else 1
        bias = floats("float32", H, spec.bucket, columns)
        return both(attention, mode, floats(dtype, B, H, N, D), floats(dtype, B, heads, n_k, D),
                    floats(dtype, B, heads, n_k, D), mask(n=n_k), documents(n=n_k), bias, floats("float32", H))
    return run


for _option in WINDOWED:
    case(f"blocked.{_option}", ("float32", "float16"))(windowed(_option, "blocked"))
    case(f"dense.{_option}", ("float32",))(windowed(_option, "dense"))
for _option in ("span", "two_sided", "chunks", "mask", "no_limit"):
    case(f"ascend.{_option}", ("float16", "bfloat16"))(windowed(_option, "ascend"))


@case("ascend.bias", ("float16", "bfloat16"))
def constant_bias(dtype, mode):
    """A cached token of a block: its bias needs no gradient and hides unseen keys."""
    attn = LocalMHA(dim=DIM, window_size=W, dim_head=D, heads=H, causal=True)
    cache = to(attn, dtype)(floats(dtype, B, N, DIM), return_cache=True)[1]

    def token(x, cache):
        return attn(x, cache=cache)
    return call(token, mode, floats(dtype, B, 1, DIM), ms.mutable(cache))


@case("windowed_attention")
def by_default(dtype, mode):
    """With the backend that is chosen by default."""
    return windowed("mask", None)(dtype, mode)


@case("explain_attention", ("float32",))
def explained(dtype, mode):
    explain_attention((B, H, N, D), TWO_SIDED, options=("mask", "sinks"))


@case("merge_attentions")
def pieces(dtype, mode):
    def merged(q, k):
        out, lse = windowed_attention(q, k, k, TWO_SIDED, return_lse=True)
        other, other_lse = windowed_attention(q, k, -k, TWO_SIDED, return_lse=True)
        return merge_attentions((out, other), (lse, other_lse))
    return both(merged, mode, floats(dtype, B, H, N, D), floats(dtype, B, H, N, D))


SLIDING = {"plain": {}, "emb": {}, "all": dict(softcap=5., dropout_rate=.1, return_lse=True)}


def sliding(option):
    def run(dtype, mode):
        def attention(q, k, v, real, ids, emb, sinks):
            if option == "all":
                return sliding_window_attention(q, k, v, real, None, W, 4, sinks=sinks, segment_ids=ids,
                                                **SLIDING[option])
            return sliding_window_attention(q, k, v, real, emb if option == "emb" else None, W, 4)
        return both(attention, mode, floats(dtype, B, H, N, D), floats(dtype, B, H, N, D), floats(dtype, B, H, N, D),
                    mask(), documents(), floats(dtype, W + 4, D), floats("float32", H))
    return run


for _option in SLIDING:
    case(f"sliding_window_attention.{_option}")(sliding(_option))

LOCAL = {
    "rotary": dict(causal=True, dim=D), "exact": dict(causal=True, exact_windowsize=True, dim=D),
    "xpos": dict(causal=True, dim=D, use_xpos=True), "shared": dict(causal=True, shared_qk=True, dim=D),
    "both_sides": dict(causal=False, prefix=3), "all": dict(causal=True, dim=D, dropout=.1, shared_qk=True, softcap=5.)}


def local(option):
    def run(dtype, mode):
        attn = LocalAttention(W, autopad=True, **LOCAL[option])
        attn.set_train(option == "all")
        size = 4 if option == "xpos" else None

        def attention(q, k, v, real, bias):
            return attn(q, k, v, mask=real, attn_bias=bias if option == "all" else None, window_size=size)
        return both(attention, mode, *(floats(dtype, B, H, N, D) for _ in range(3)), mask(),
                    floats("float32", H, W, 2 * W))
    return run


for _option in LOCAL:
    case(f"LocalAttention.{_option}")(local(_option))


# ---- graphs of unknown lengths


class AnyLength(nn.Cell):
    def __init__(self, net, names):
        super().__init__()
        self.net, self.names = net, names

    def construct(self, q, k, v, beside):
        if self.names == "mask":
            return self.net(q, k, v, mask=beside)
        if self.names == "segment_ids":
            return self.net(q, k, v, segment_ids=beside)
        return self.net(q, k, v)


def in_graph_mode(function):
    def run(dtype, mode):
        ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
        try:
            return function(dtype, mode)
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
    return run


def any_length(names, **options):
    def run(dtype, mode):
        net = AnyLength(LocalAttention(W, autopad=True, causal=True, **options), names)
        beside = documents() if names == "segment_ids" else mask()
        if mode == "graph":
            x = Tensor(shape=[None, None, None, D], dtype=getattr(ms, dtype))
            net.set_inputs(x, x, x, Tensor(shape=[None, None], dtype=beside.dtype))
        return net(*(floats(dtype, B, H, N, D) for _ in range(3)), beside)
    return in_graph_mode(run)


case("any_length.rotary", ("float32", "float16"))(any_length("", dim=D))
case("any_length.mask", ("float32", "float16"))(any_length("mask", shared_qk=True, softcap=5.))
case("any_length.xpos", ("float32", "float16"))(any_length("", dim=D, use_xpos=True))
case("any_length.documents", ("float32", "float16"))(any_length("segment_ids", prefix=3))


@case("any_length.LocalTransformer", ("float32", "float16"))
@in_graph_mode
def any_model(dtype, mode):
    net = to(model(), dtype)
    if mode == "graph":
        net.set_inputs(Tensor(shape=[None, None], dtype=ms.int32))
    return net(ints(B, N))


# ---- blocks and models


@case("LocalMHA")
def block(dtype, mode):
    net = LocalMHA(dim=DIM, window_size=W, dim_head=D, heads=H, kv_heads=KV, causal=True, prenorm=True, qk_rmsnorm=True,
                   gate_values_per_head=True, learned_sinks=True, dropout=.1)
    return train(to(net, dtype), mode, floats(dtype, B, N, DIM), mask())


def cached(tokens, **options):
    def run(dtype, mode):
        net = to(LocalMHA(dim=DIM, window_size=W, dim_head=D, heads=H, causal=True, prenorm=True, **options), dtype)
        cache = reorder_cache(net(floats(dtype, B, N, DIM), return_cache=True)[1], ints(B, below=B))

        def next_tokens(x, cache):
            return net(x, cache=cache, return_cache=True)
        return call(next_tokens, mode, floats(dtype, B, tokens, DIM), ms.mutable(cache))
    return run


case("LocalMHA.cache_one")(cached(1, kv_heads=KV, learned_sinks=True))
case("LocalMHA.cache_many")(cached(3, kv_heads=KV))
case("LocalMHA.cache_xpos")(cached(3, use_xpos=True))


@case("MultiHeadLocalAttention")
def cross(dtype, mode):
    net = to(MultiHeadLocalAttention(DIM, H, window_size_left=W, window_size_right=1, num_kv_heads=KV), dtype)
    return train(net, mode, floats(dtype, B, N, DIM), floats(dtype, B, N, DIM), mask())


@case("LocalSelfAttention")
def self_attention(dtype, mode):
    net = LocalSelfAttention(DIM, H, window_size_left=W, window_size_right=1, use_rel_pos_emb=True, dropout_rate=.1)
    return train(to(net, dtype), mode, floats(dtype, B, N, DIM), mask())


@case("DynamicPositionBias")
def position_bias(dtype, mode):
    net = to(DynamicPositionBias(DIM, H), dtype)

    def bias():
        return net(W, 2 * W, W)
    return call(bias, mode)


def model(with_global=False, **options):
    if with_global:
        options["global_attn_layer"] = LocalMHA(dim=DIM, window_size=64, causal=True, dim_head=8, heads=2)
    return LocalTransformer(**{"num_tokens": TOKENS, "max_seq_len": 64, "dim": DIM, "depth": 2, "heads": 2,
                               "dim_head": 8, "local_attn_window_size": W, **options})


MODELS = {
    "plain": {}, "dropout": dict(attn_dropout=.1, ff_dropout=.1), "xpos": dict(use_xpos=True),
    "bias": dict(use_dynamic_pos_bias=True), "hyper": dict(num_residual_streams=3),
    "norms": dict(qk_rmsnorm=True, gate_values_per_head=True, shared_qk=True),
    "today": dict(heads=4, kv_heads=2, learned_sinks=True, softcap=5., prefix=2, local_attn_window_size=(W, None)),
    "global": dict(with_global=True)}


def step(option):
    def run(dtype, mode):
        return train(to(model(**MODELS[option]), dtype), mode, ints(B, N + 1), return_loss=True,
                     optimizer=nn.AdamWeightDecay if option == "xpos" else nn.Adam)
    return run


for _option in MODELS:
    case(f"training.{_option}")(step(_option))


@case("training.documents")
def packed(dtype, mode):
    def loss(x, ids):
        return net(x, return_loss=True, segment_ids=ids)
    net = to(model(), dtype).set_train()
    return call(ms.value_and_grad(loss, None, net.trainable_params()), mode, ints(B, N, dtype=np.int64), documents())


@case("training.mask")
def not_causal(dtype, mode):
    return train(to(model(causal=False), dtype), mode, ints(B, N + 1), mask(n=N + 1), return_loss=True)


def decoding(rows=None, **options):
    def run(dtype, mode):
        net = to(model(**{name: options[name] for name in options if name != "use_kv_cache"}), dtype)
        return net.generate(ints(B, 11), 4, use_kv_cache=options.get("use_kv_cache", True),
                            mask=Tensor(rows) if rows is not None else None)
    return in_graph_mode(run)


RAGGED = np.arange(11) >= np.array([[0], [4]])
case("generate")(decoding())
case("generate.whole")(decoding(use_kv_cache=False))
case("generate.ragged")(decoding(RAGGED))
case("generate.ragged_whole")(decoding(RAGGED, use_kv_cache=False))
for _option in ("xpos", "bias", "hyper", "norms", "today", "global"):
    case(f"generate.{_option}", ("float32", "float16"))(decoding(**MODELS[_option]))


# ---- the rest


@case("layers")
def layers(dtype, mode):
    net = FeedForward(DIM, dropout=.1)
    return train(to(net, dtype), mode, floats(dtype, B, N, DIM)), call(GEGLU(), mode, floats(dtype, N, DIM))


@case("helpers", ("float32", "float16"))
def helpers(dtype, mode):
    embeddings = SinusoidalEmbeddings(D, scale_base=4, use_xpos=True)

    def rotated(q):
        frequencies, scale = embeddings(q)
        return apply_rotary_pos_emb(q, rotate_half(q), frequencies, scale)

    def others(x):
        windows = pad_to_multiple(x, W, -2)[1].reshape(B, -1, W, D)
        return look_around(windows), l2norm(x) + max_neg_value(x), top_k(x)
    return call(rotated, mode, floats(dtype, B, H, N, D)), call(others, mode, floats(dtype, B, N, D))


@case("weights", ("float32",))
def weights(dtype, mode):
    load_torch_weights(model(), export_torch_weights(model()))


@case("use_backend", ("float32",))
def second_order(dtype, mode):
    """Plain operators alone, also in the layers beside attention."""
    with use_backend("dense"):
        return train(model(), mode, ints(B, N), return_loss=True)


@case("zoo")
def zoo(dtype, mode):
    """A layer of a model, with a window and right padding, and then a token with a cache."""
    layer = SimpleNamespace(is_causal=True, layer_idx=0, sliding_window=W, config=None)
    real = Tensor((np.arange(N) < np.array([[N], [N - 5]])).astype(np.int32))
    places = translation.positions(B, Tensor(np.arange(N)), N, attention_mask=real)
    q, k, sinks = floats(dtype, B, H, N, D), floats(dtype, B, KV, N, D), floats(dtype, H)

    def attention(q, k, v, sinks):
        return translation.attention(layer, q, k, v, places, scaling=.3, softcap=5., s_aux=sinks)[0]
    both(attention, "pynative", q, k, k, sinks)
    return attention(q[:, :, -1:], k, k, sinks)


def sliced(function):
    """Register a case of a rank that has a slice of a sequence."""
    return case(f"sequence_parallel.{function.__name__}")(function)


@sliced
def attention(dtype, mode):
    attn = LocalAttention(W, causal=True, dim=D, sequence_parallel=True)

    def out(q, k, v, real):
        return attn(q, k, v, mask=real)
    return both(out, mode, *(floats(dtype, B, H, 2 * W, D) for _ in range(3)), mask(n=2 * W))


@sliced
def training(dtype, mode):
    net = to(model(sequence_parallel=True, causal=False), dtype).set_train()
    average = parallel.AverageGradients()

    def loss_of(x):
        return net(x, return_loss=True)
    gradients_of = ms.value_and_grad(loss_of, None, net.trainable_params())

    def step(x):
        loss, gradients = gradients_of(x)
        return loss, average(gradients)
    return call(step, mode, ints(B, 2 * W))


STAND_IN = "of_cpu_alone"


@case(STAND_IN, ("float32",))
def of_cpu_alone(dtype, mode):
    """An operator that only CPU has and the package does not call: each platform must refuse it."""
    def largest(x):
        return ops.fmax(x, -x)
    return call(largest, mode, floats(dtype, N))
