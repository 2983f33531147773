"""MindSpore's fused attention operator of Ascend, `ops.flash_attention_score`. Not yet run on Ascend hardware.

Written from the operator's documentation and tested on CPU against an emulation of it (tests/flash_emulation.py). A
span that moves with its query is the operator's band, with a key mask too. Everything else goes in blocks of queries,
each with the keys of its own, as further batch entries under an explicit mask: documents among it, since of layout TND,
which is made for them, MindSpore documents whole lower triangles alone and no window.
"""
from dataclasses import replace
from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr
from mindspore.ops.auto_generate import FlashAttentionScore, FlashAttentionScoreGrad

from ..cells import AsGiven, last
from .spans import HIDDEN, bounds_of, in_span, reach, repeated, sees_something, with_prefix, without_padding

AS_GIVEN = ("Float16", "BFloat16")  # the dtypes that are handed to `run` as they are
LARGEST_BATCH, MOST_HEADS, LONGEST, LARGEST_HEAD = 2048, 256, 512 * 1024, 512  # the operator's own limits
COLUMNS = 16  # of which the dimensions of a head are a multiple
BAND = 2048  # the side of its compressed mask; spans to both sides that are wider are reported to come out wrong
ROWS = 128  # queries in a block, at least
LARGEST_SHIFT = {"float16": 6e4, "bfloat16": 1e30}  # of a bias: what hides a key must not become an infinity
HIDING = 4096.  # one more entry of queries, and, negative, of hidden keys: exact in 16 bits
SMALLEST_SCALE = 1e-3  # with which that still hides a key from everything
NO_LIMIT = 2147483647  # of tokens before or after, as the operator has it


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
    if problem.scoring.softcap is not None:
        return "caps no scores"
    if problem.bias_shape and not problem.bias_is_constant:
        return "gives a bias no gradient"
    if problem.bias_shape and problem.documents:
        return "takes one bias for a whole batch, and in documents each row has its own"
    if problem.by_offset:
        return "has no place for embeddings of offsets"
    if problem.scoring.hide_self:
        return "gives a query's own key no score of its own"
    if problem.scoring.dropout > 0:
        return "draws dropout that no seed repeats"
    if problem.head_dim + _more_columns(problem) > LARGEST_HEAD:
        more = _more_columns(problem)
        return f"takes heads of at most {LARGEST_HEAD - more} dimensions" + (" with these options" if more else "")
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


def _more_columns(problem):
    """What the gradient of a log-sum-exp takes of a head's dimensions."""
    return COLUMNS if problem.lse or problem.spec.prefix > 0 else 0


def _heads(problem):
    """How many groups are the heads of one batch entry: of one row of the key mask, and as many as a bias has."""
    if problem.bias_shape:
        return problem.heads
    alike, share = problem.groups // max(problem.batch, problem.documents, 1), problem.share
    return max(heads for heads in range(share, min(alike, MOST_HEADS) + 1, share) if alike % heads == 0)


def band(problem):
    """`(pre_tokens, next_tokens)`, both inclusive and counted with the last query at the last key; None where the span
    is not such a band."""
    spec, shift = problem.spec, problem.offset - (problem.n_k - problem.n_q)
    forward = min(spec.forward, 0) if spec.causal else spec.forward
    before, after = min(spec.backward - shift, problem.n_k), min(forward + shift, problem.n_k)
    first, last = spec.span(np.arange(problem.n_q) + problem.offset)
    if spec.bucket > 1 or problem.documents or problem.bias_shape or min(before, after) < 0 or \
            (after > 0 and before + after >= BAND) or (np.maximum(first, 0) > np.minimum(last, problem.n_k - 1)).any():
        return None
    if problem.batch and (problem.scoring.scale < SMALLEST_SCALE or
                          problem.head_dim + 1 + _more_columns(problem) > LARGEST_HEAD):
        return None
    return before, after


def fold(problem):
    """Positions `(blocks, rows)` of queries and `(blocks, width)` of the keys they see, every block at the same place
    among its keys; those outside of the sequence are among them."""
    n_q, n_k, offset = problem.n_q, problem.n_k, problem.offset
    backward, forward, unit = reach(problem)
    backward, forward = min(backward, offset + n_q), min(forward, n_k)
    units = -(-(offset % unit + n_q) // unit)
    rows = unit * min(units, max(1, max(ROWS, (backward + problem.spec.bucket + forward) // 2) // unit))
    starts = offset // unit * unit + np.arange(0, units * unit, rows)[:, None]
    keys = starts - backward + np.arange(rows + backward + forward)
    return starts + np.arange(rows), keys[:, _within(keys, n_k).any(0)]


def _within(positions, n):
    return (positions >= 0) & (positions < n)


def _first_and_last(problem):
    """Of each query, the first and the last key of its span that there is."""
    first, last = problem.spec.span(np.arange(problem.n_q) + problem.offset)
    return np.clip(first, 0, problem.n_k), np.clip(last, -1, problem.n_k - 1)


def scores(problem):
    """How many scores are computed, and how many at once: the operator writes none of them to memory."""
    prefix = problem.groups * problem.n_q * min(problem.spec.prefix, problem.n_k)
    if band(problem):
        first, last = _first_and_last(problem)
        return problem.groups * int((last - first + 1).sum()) + prefix, prefix
    queries, keys = fold(problem)
    return problem.groups * queries.size * keys.shape[1] + prefix, prefix


def prepare(problem):
    """The problem, how many heads an entry has, the operator, and the constants of a band or of blocks."""
    heads, tokens = _heads(problem), band(problem)
    flash = Flash(problem, heads, tokens) if problem.lse or problem.sinks or problem.spec.prefix else None
    return problem, heads, flash, tokens, *(_of_band(problem) if tokens else _of_blocks(problem))


@lru_cache(maxsize=1)
def _compressed_mask():
    return Tensor(np.triu(np.ones((BAND, BAND), np.uint8), 1))


def _of_band(problem):
    """Its mask, and the first key that each query sees and the one after the last."""
    first, last = _first_and_last(problem)
    return _compressed_mask(), _int32(first), _int32(last + 1)


def _of_blocks(problem):
    """Their mask, None where it is made of documents, indices of queries and keys, a bias's entries, and positions."""
    queries, keys = fold(problem)
    hidden = bias_index = positions = None
    if problem.documents:
        positions = _int32(queries, queries.shape), _int32(keys, keys.shape)
    else:
        visible = replace(problem.spec, prefix=0).visible(queries[0], keys[0])
        hidden = Tensor(~(visible & _within(keys, problem.n_k)[:, None])[:, None])
    if problem.bias_shape:
        bias_index = _int32(problem.bias_index(queries[0][:, None], keys[0]))
    queries, keys = np.clip(queries - problem.offset, 0, problem.n_q - 1), np.clip(keys, 0, problem.n_k - 1)
    return hidden, _int32(queries), _int32(keys), bias_index, positions


def _int32(index, shape=-1):
    return Tensor(index.reshape(shape).astype(np.int32))


# ---- around the operator


def run(constants, q, k, v, tensors):
    """The band, or blocks under a mask; then the prefix."""
    problem, heads, flash, tokens, *more = constants
    mask, documents, bias, sinks, _, _ = tensors
    if documents is not None:
        q, mask = without_padding(q, mask, documents, problem.offset)
    if mask is not None:
        hidden = repeated(ops.logical_not(mask), k.shape[0])
        k, v = ops.masked_fill(k, hidden, 0.), ops.masked_fill(v, hidden, 0.)
    if tokens is not None:
        out, lse = _band(problem, heads, flash, tokens, more, q, k, v, mask, sinks)
    else:
        out, lse = _blocks(problem, heads, flash, more, q, k, v, mask, documents, bias, sinks)
    if problem.spec.prefix > 0:
        q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
        out, lse = with_prefix(problem, q, k, v, out, lse, (mask, documents, bias, sinks, None, None))
    return out, lse


def _band(problem, heads, flash, tokens, constants, q, k, v, mask, sinks):
    """All queries at once. A key mask is one more entry of queries and keys."""
    compressed, first, after = constants
    dtype, key_heads, nothing = _dtype(problem.dtype), heads // problem.share, None
    if mask is not None:
        hidden = ops.cast(repeated(ops.logical_not(mask), k.shape[0]), ms.float32)
        q = ops.cat((ops.cast(q, dtype), ops.cast(ops.full(q.shape[:-1] + (1,), HIDING, dtype=ms.float32), dtype)), -1)
        k = ops.cat((ops.cast(k, dtype), ops.cast(ops.mul(hidden, -HIDING), dtype)), -1)
        nothing = ops.logical_not(sees_something(mask, first, after))  # (batch, n_q)
        nothing = repeated(nothing, problem.groups // heads).reshape(-1, 1, problem.n_q, 1)
    q, k, v = _padded(ops.cast(q, dtype)), _padded(ops.cast(k, dtype)), _padded(ops.cast(v, dtype), mask is not None)
    out, lse = _called(problem, heads, flash, tokens, _by_head(q, heads), _by_head(k, key_heads),
                       _by_head(v, key_heads), None, compressed, nothing, sinks)
    out = out.reshape(problem.groups, problem.n_q, -1)[..., :problem.head_dim]
    return out, None if lse is None else lse.reshape(problem.groups, problem.n_q)


def _blocks(problem, heads, flash, constants, q, k, v, mask, documents, bias, sinks):
    """Blocks as batch entries. A row with nothing to see, where the operator's result is undefined, is shown everything
    there and is zero here."""
    hidden, queries, keys, bias_index, positions = constants
    dtype, key_heads, scale = _dtype(problem.dtype), heads // problem.share, None
    if documents is not None:
        hidden = _hidden_by_documents(problem, documents, *positions)
    blocks, _, rows, width = hidden.shape
    if mask is not None:
        real = ops.gather(mask, keys, 1).reshape(-1, blocks, 1, width).swapaxes(0, 1)
        hidden = ops.logical_or(hidden, ops.logical_not(real))
    nothing = hidden.all(-1, True)
    hidden = ops.logical_and(hidden, ops.logical_not(nothing))
    alike = problem.groups // heads // hidden.shape[1]
    if bias is not None:  # whether the operator scales a bias too is told in two ways: so neither of them is scaled
        q, scale = ops.mul(ops.cast(q, ms.float32), problem.scoring.scale), 1.
        limit = LARGEST_SHIFT[problem.dtype.lower()]
        bias = ops.gather(ops.clamp(ops.cast(bias, ms.float32), -limit, limit).reshape(heads, -1), bias_index, 1)
        bias = ops.cast(bias, dtype).reshape(1, heads, rows, width)
    q, k, v = _padded(ops.cast(q, dtype)), _padded(ops.cast(k, dtype)), _padded(ops.cast(v, dtype))
    out, lse = _called(
        problem, heads, flash, None, _gathered(q, queries, blocks, heads), _gathered(k, keys, blocks, key_heads),
        _gathered(v, keys, blocks, key_heads), bias, _for_each(hidden, alike), _for_each(nothing, alike), sinks, scale)
    out = _in_order(problem, out, blocks)[..., :problem.head_dim]
    return out, None if lse is None else _in_order(problem, lse, blocks)[..., 0]


def _called(problem, heads, flash, tokens, q, k, v, bias, mask, nothing, sinks, scale=None):
    """The operator as MindSpore's function, or, where its statistics are needed, as `Flash`."""
    if flash is not None:
        if sinks is not None:
            sinks = ops.cast(sinks, ms.float32)
            sinks = ops.tile(sinks, (q.shape[0] * heads // problem.sinks,)).reshape(-1, heads, 1, 1)
        return flash(q, k, v, _there(bias, ms.float16), mask, _there(nothing, ms.bool_), _there(sinks, ms.float32))
    before, after = tokens or (NO_LIMIT, NO_LIMIT)
    out = ops.flash_attention_score(
        q, k, v, heads, real_shift=bias, attn_mask=mask, scalar_value=scale or problem.scoring.scale,
        pre_tokens=before, next_tokens=after, input_layout="BNSD", sparse_mode=4 if tokens else 0)
    return out if nothing is None else ops.masked_fill(out, nothing, 0.), None


def _there(x, dtype):
    """A tensor, or something in its place that is not read."""
    return ops.zeros((1,), dtype) if x is None else x


def _hidden_by_documents(problem, documents, positions, places):
    """Of each block, `(blocks, batch, rows, width)`, what its queries do not see."""
    blocks, rows = positions.shape
    first, last = bounds_of(documents, ops.clamp(positions, 0, problem.n_k - 1).reshape(-1))
    first, last = first.reshape(-1, blocks, rows), last.reshape(-1, blocks, rows)
    seen = in_span(problem.spec, positions.reshape(1, blocks, rows), places.reshape(1, blocks, 1, -1), first, last)
    return ops.logical_not(seen).swapaxes(0, 1)


@constexpr
def _dtype(name):
    return getattr(ms, name.lower())


def _padded(x, more=0):
    """Heads of a multiple of 16 dimensions, with at least so many more: zeros change no product."""
    missing = -(x.shape[-1] + more) % COLUMNS + more
    return x if missing == 0 else ops.cat((x, ops.cast(ops.zeros(x.shape[:-1] + (missing,), ms.float32), x.dtype)), -1)


def _by_head(x, heads):
    return x.reshape(-1, heads, x.shape[1], x.shape[2])


def _for_each(mask, alike):
    """A mask `(blocks, batch, rows, ...)` for each of the entries that share one."""
    blocks, batch, rows, width = mask.shape
    return ops.tile(mask.reshape(blocks * batch, 1, rows, width), (1, alike, 1, 1)).reshape(-1, 1, rows, width)


def _gathered(x, index, blocks, heads):
    """`(g, n, d)`, gathered, as `(blocks * g / heads, heads, n', d)`."""
    groups, _, head_dim = x.shape
    x = ops.gather(x, index, 1).reshape(groups, blocks, -1, head_dim).swapaxes(0, 1)
    return x.reshape(blocks * groups // heads, heads, -1, head_dim)


def _in_order(problem, x, blocks):
    """Blocks back to `(g, n_q, d)`."""
    groups, last_axis = problem.groups, x.shape[-1]
    x = x.reshape(blocks, groups, -1, last_axis).swapaxes(0, 1).reshape(groups, -1, last_axis)
    first = problem.offset % reach(problem)[2]  # where in its block the first query stands
    return x[:, first:first + problem.n_q]


# ---- the operator with its statistics


class Flash(AsGiven):
    """The operator and its gradient, by MindSpore's primitives: the output and the log-sum-exp, a sink included.

    The weights that the gradient primitive computes are `exp(score - max) / sum` of the statistics that it is handed.
    Handed the log-sum-exp as `max`, and 1 as `sum`, it has those of a softmax with a sink; so MindSpore's own ring
    attention has those of all keys while it is given some. Of the output that it is handed it takes the sum over
    `dout * output` and nothing else, which it subtracts from the gradients of weights: so what has to be subtracted
    from that sum, the gradient of the log-sum-exp, is further entries of both, where values have zeros.
    """

    def __init__(self, problem, heads, tokens):
        super().__init__()
        before, after = tokens or (NO_LIMIT, NO_LIMIT)
        self.with_bias, self.with_sinks = problem.bias_shape is not None, problem.sinks > 0
        self.some_see_nothing = tokens is None or problem.batch > 0
        self.lse_has_gradient = problem.lse or problem.spec.prefix > 0
        numbers = heads, 1., 1. if self.with_bias else problem.scoring.scale, before, after, 0, "BNSD", \
            4 if tokens else 0
        self.forward, self.backward = FlashAttentionScore(*numbers), FlashAttentionScoreGrad(*numbers)

    def construct(self, q, k, v, bias, mask, nothing, sinks):
        top, total, _, out = self.forward(q, k, v, bias if self.with_bias else None, None, None, mask)
        lse = ops.add(top[..., :1], ops.log(total[..., :1]))
        if self.some_see_nothing:
            out, lse = ops.masked_fill(out, nothing, 0.), ops.masked_fill(lse, nothing, float("-inf"))
        if self.with_sinks:
            largest = ops.maximum(ops.maximum(lse, sinks), HIDDEN)
            own = ops.exp(ops.sub(lse, largest))
            total = ops.add(own, ops.exp(ops.sub(sinks, largest)))
            out = ops.cast(ops.mul(ops.cast(out, ms.float32), ops.div(own, ops.maximum(total, 1.))), q.dtype)
            lse = ops.add(largest, ops.log(total))
        return out, lse

    def bprop(self, q, k, v, bias, mask, nothing, sinks, outs, douts):
        out, lse = outs
        head_dim, dout, dlse = q.shape[-1], ops.cast(last(douts[0]), q.dtype), last(douts[1])
        dsinks = sinks
        if self.with_sinks:
            along = ops.mul(ops.cast(dout, ms.float32), ops.cast(out, ms.float32)).sum(-1, keepdims=True)
            weight = ops.exp(ops.sub(sinks, ops.maximum(lse, HIDDEN)))
            dsinks = ops.mul(weight, ops.sub(dlse, along)).sum(2, keepdims=True)
        if self.some_see_nothing:
            lse = ops.masked_fill(lse, nothing, -HIDDEN)  # beside which no score weighs anything
        if self.lse_has_gradient:
            q, k, v = _padded(q, COLUMNS), _padded(k, COLUMNS), _padded(v, COLUMNS)
            dout, out = _with_lse_gradient(dout, out, dlse)
        eight = ops.tile(lse, (1, 1, 1, 8))
        dq, dk, dv, _ = self.backward(q, k, v, dout, bias if self.with_bias else None, None, None, mask, eight,
                                      ops.ones_like(eight), None, out)
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim], bias, mask, nothing, dsinks


def _with_lse_gradient(dout, out, dlse):
    """Both with further entries whose products add up to `-dlse`, which one number of 16 bits does not hold."""
    more_dout, more_out = [dout], [out]
    for factor in (256., 1., 1 / 256):
        part = ops.cast(ops.mul(dlse, 1 / factor), dout.dtype)
        dlse = ops.sub(dlse, ops.mul(ops.cast(part, ms.float32), factor))
        more_dout.append(ops.cast(ops.full(dout.shape[:-1] + (1,), factor, dtype=ms.float32), dout.dtype))
        more_out.append(ops.neg(part))
    return _padded(ops.cat(more_dout, -1)), _padded(ops.cat(more_out, -1))
