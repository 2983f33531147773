"""MindSpore's fused attention operator of Ascend, `ops.flash_attention_score`. Not yet run on Ascend hardware.

Written from the operator's documentation and tested on CPU against an emulation of it (tests/flash_emulation.py). A
span that moves with its query is the operator's band. Everything else, what is seen through a key mask included, goes
in blocks of queries, each with the keys of its own, as further batch entries under an explicit mask.
"""
from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from .spans import repeated

AS_GIVEN = ("Float16", "BFloat16")  # the dtypes that are handed to `run` as they are
LARGEST_BATCH, MOST_HEADS, LONGEST, LARGEST_HEAD = 2048, 256, 512 * 1024, 512  # the operator's own limits
BAND = 2048  # the side of its compressed mask; spans to both sides that are wider are reported to come out wrong
ROWS = 128  # queries in a block, at least
LARGEST_SHIFT = {"float16": 6e4, "bfloat16": 1e30}  # of a bias: what hides a key must not become an infinity


def device():
    """Where MindSpore runs."""
    return ms.get_context("device_target")


def why_not(problem):
    """Why the operator cannot run a problem as it is meant."""
    if device() != "Ascend":
        return f"runs on Ascend alone, and the device is {device()}"
    return _refusal(problem)


@lru_cache(maxsize=64)
def _refusal(problem):
    if problem.dtype not in AS_GIVEN:
        return f"takes float16 and bfloat16, and the inputs are {problem.dtype.lower()}"
    if problem.any_length:
        return "makes its masks before a graph runs, which does not know a length here"
    for name, there in (("documents", problem.documents), ("sinks", problem.sinks), ("a prefix", problem.spec.prefix),
                        ("a softcap", problem.scoring.softcap is not None), ("the log-sum-exp", problem.lse)):
        if there:
            return f"has no place for {name} yet"
    if problem.bias_shape and not problem.bias_is_constant:
        return "gives a bias no gradient"
    if problem.by_offset:
        return "has no place for embeddings of offsets"
    if problem.scoring.hide_self:
        return "gives a query's own key no score of its own"
    if problem.scoring.dropout > 0:
        return "draws dropout that no seed repeats"
    if problem.head_dim > LARGEST_HEAD:
        return f"takes heads of at most {LARGEST_HEAD} dimensions"
    if max(problem.n_q, problem.n_k) > LONGEST:
        return f"takes sequences of at most {LONGEST} tokens"
    if max(problem.heads, problem.share) > MOST_HEADS:
        return f"takes at most {MOST_HEADS} heads"
    if problem.heads > 1 and problem.heads % problem.share:
        return "wants a bias for each of the heads that share a key head"
    batch = problem.groups // _heads(problem) * (1 if band(problem) else len(fold(problem)[0]))
    if batch > LARGEST_BATCH:
        return f"takes a batch of at most {LARGEST_BATCH}, and this would be one of {batch}"
    return None


def _heads(problem):
    """How many groups are the heads of one batch entry: of one row of the key mask, and as many as a bias has."""
    if problem.bias_shape:
        return problem.heads
    alike, share = problem.groups // max(problem.batch, 1), problem.share
    return max(heads for heads in range(share, min(alike, MOST_HEADS) + 1, share) if alike % heads == 0)


def band(problem):
    """`(pre_tokens, next_tokens)`, both inclusive and counted with the last query at the last key; None where the span
    is not such a band."""
    spec, shift = problem.spec, problem.offset - (problem.n_k - problem.n_q)
    forward = min(spec.forward, 0) if spec.causal else spec.forward
    before, after = min(spec.backward - shift, problem.n_k), min(forward + shift, problem.n_k)
    first, last = spec.span(np.arange(problem.n_q) + problem.offset)
    if spec.bucket > 1 or problem.batch or problem.bias_shape or min(before, after) < 0 or \
            (after > 0 and before + after >= BAND) or (np.maximum(first, 0) > np.minimum(last, problem.n_k - 1)).any():
        return None
    return before, after


def fold(problem):
    """Positions `(blocks, rows)` of queries and `(blocks, width)` of the keys they see, every block at the same place
    among its keys; those outside of the sequence are among them."""
    spec, n_q, n_k, offset = problem.spec, problem.n_q, problem.n_k, problem.offset
    backward, forward = min(spec.backward, offset + n_q), min(spec.forward, n_k)
    unit = max(spec.bucket, problem.bias_period)
    units = -(-(offset % unit + n_q) // unit)
    rows = unit * min(units, max(1, max(ROWS, (backward + spec.bucket + forward) // 2) // unit))
    starts = offset // unit * unit + np.arange(0, units * unit, rows)[:, None]
    keys = starts - backward + np.arange(rows + backward + forward)
    return starts + np.arange(rows), keys[:, _within(keys, n_k).any(0)]


def _within(positions, n):
    return (positions >= 0) & (positions < n)


def scores(problem):
    """How many scores are computed, and how many at once: the operator writes none of them to memory."""
    if band(problem):
        first, last = problem.spec.span(np.arange(problem.n_q) + problem.offset)
        seen = np.minimum(last, problem.n_k - 1) - np.maximum(first, 0) + 1
        return problem.groups * int(seen.sum()), 0
    queries, keys = fold(problem)
    return problem.groups * queries.size * keys.shape[1], 0


@lru_cache(maxsize=1)
def _compressed_mask():
    return Tensor(np.triu(np.ones((BAND, BAND), np.uint8), 1))


def prepare(problem):
    """The problem, its heads, its band or None, the mask, and of blocks their indices and a bias's entries."""
    if band(problem):
        return problem, _heads(problem), band(problem), _compressed_mask(), None, None, None
    queries, keys = fold(problem)
    visible = problem.spec.visible(queries[0], keys[0]) & _within(keys, problem.n_k)[:, None]
    bias_index = _int32(problem.bias_index(queries[0][:, None], keys[0])) if problem.bias_shape else None
    queries, keys = np.clip(queries - problem.offset, 0, problem.n_q - 1), np.clip(keys, 0, problem.n_k - 1)
    return problem, _heads(problem), None, Tensor(~visible), _int32(queries), _int32(keys), bias_index


def _int32(index):
    return Tensor(index.reshape(-1).astype(np.int32))


def run(constants, q, k, v, tensors):
    """The band, or blocks under a mask. A row with nothing to see, where the operator's result is undefined, is shown
    everything there and is zero here."""
    problem, heads, tokens, mask, queries, keys, bias_index = constants
    key_mask, _, bias, _, _, _ = tensors
    key_heads = heads // problem.share
    dtype, scale = _dtype(problem.dtype), problem.scoring.scale
    if key_mask is not None:
        hidden = repeated(ops.logical_not(key_mask), k.shape[0])
        k, v = ops.masked_fill(k, hidden, 0.), ops.masked_fill(v, hidden, 0.)
    if bias is not None:  # whether the operator scales a bias too is told in two ways: so neither of them is scaled
        q, scale = ops.mul(ops.cast(q, ms.float32), scale), 1.
        limit = LARGEST_SHIFT[problem.dtype.lower()]
        bias = ops.gather(ops.clamp(ops.cast(bias, ms.float32), -limit, limit).reshape(heads, -1), bias_index, 1)
    q, k, v = _padded(ops.cast(q, dtype)), _padded(ops.cast(k, dtype)), _padded(ops.cast(v, dtype))
    if tokens is not None:
        out = ops.flash_attention_score(
            _by_head(q, heads), _by_head(k, key_heads), _by_head(v, key_heads), heads, attn_mask=mask,
            scalar_value=scale, pre_tokens=tokens[0], next_tokens=tokens[1], input_layout="BNSD", sparse_mode=4)
        return out.reshape(q.shape)[..., :problem.head_dim], None
    blocks, rows, width = mask.shape
    mask = ops.expand_dims(mask, 1)  # no slice: the device has none of bool
    if key_mask is not None:
        real = ops.gather(key_mask, keys, 1).reshape(problem.batch, blocks, 1, width).swapaxes(0, 1)
        mask = ops.logical_or(mask, ops.logical_not(real))
    alike = problem.groups // heads // mask.shape[1]
    mask = ops.tile(ops.expand_dims(mask, 2), (1, 1, alike, 1, 1)).reshape(-1, 1, rows, width)
    nothing = mask.all(-1, True)
    if bias is not None:
        bias = ops.cast(bias, dtype).reshape(1, heads, rows, width)
    out = ops.flash_attention_score(
        _blocks(q, queries, blocks, heads), _blocks(k, keys, blocks, key_heads), _blocks(v, keys, blocks, key_heads),
        heads, real_shift=bias, attn_mask=ops.logical_and(mask, ops.logical_not(nothing)), scalar_value=scale,
        input_layout="BNSD", sparse_mode=0)
    out = ops.masked_fill(out, nothing, 0.).reshape(blocks, problem.groups, rows, -1).swapaxes(0, 1)
    first = problem.offset % max(problem.spec.bucket, problem.bias_period)  # where in its block the first query stands
    return out.reshape(problem.groups, blocks * rows, -1)[:, first:first + problem.n_q, :problem.head_dim], None


@constexpr
def _dtype(name):
    return getattr(ms, name.lower())


def _padded(x):
    """Heads of a multiple of 16 dimensions: zeros change no product."""
    missing = -x.shape[-1] % 16
    return x if missing == 0 else ops.cat((x, ops.cast(ops.zeros(x.shape[:-1] + (missing,), ms.float32), x.dtype)), -1)


def _by_head(x, heads):
    return x.reshape(-1, heads, x.shape[1], x.shape[2])


def _blocks(x, index, blocks, heads):
    """`(g, n, d)`, gathered, as `(blocks * g / heads, heads, n', d)`."""
    groups, _, head_dim = x.shape
    x = ops.gather(x, index, 1).reshape(groups, blocks, -1, head_dim).swapaxes(0, 1)
    return x.reshape(blocks * groups // heads, heads, -1, head_dim)
