"""MindSpore's fused attention operator of Ascend, `ops.flash_attention_score`. Not yet run on Ascend hardware.

Written from the operator's documentation, and tested on CPU against an emulation of it (tests/flash_emulation.py). A
span that moves with its query uses the operator's band, also with a key mask. Everything else becomes blocks of
queries: each block is a batch entry with its own keys and an explicit mask. Documents are among these, unless they are
given by their ends, `cu_seqlens`: then all rows are one call in layout TND, under the band. MindSpore's description of
TND has whole lower triangles alone; CANN's allows the band, and mindformers uses it.
"""
from dataclasses import replace
from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr
from mindspore.ops.auto_generate import FlashAttentionScore, FlashAttentionScoreGrad

from ..cells import AsGiven, compiling, given, last
from . import Backend
from .spans import HIDDEN, bounds_of, in_span, reach, repeated, sees_something, with_prefix, without_padding

DTYPES = ("Float16", "BFloat16")
LARGEST_BATCH, MOST_HEADS, LONGEST, LARGEST_HEAD = 2048, 256, 512 * 1024, 512  # the operator's own limits
COLUMNS = 16  # the number of dimensions of a head is padded to a multiple of this
BAND = 2048  # the side of the operator's compressed mask; wider spans to both sides are reported to give wrong results
ROWS = 128  # the smallest number of queries in a block
LARGEST_SHIFT = {"float16": 6e4, "bfloat16": 1e30}  # bounds of a bias, so that a value that hides a key stays finite
HIDING = 4096.  # the value of one more entry of queries and, negative, of hidden keys; exact in 16 bits
SMALLEST_SCALE = 1e-3  # the smallest scale at which that entry still hides a key completely
NO_LIMIT = 2147483647  # the operator's value for no limit of tokens before or after


def why_not(problem):
    """Return why the operator cannot run a problem exactly, None if it can."""
    if problem.device != "Ascend":
        return f"runs on Ascend alone, and the device is {problem.device}"
    return _refusal(problem)


@lru_cache(maxsize=64)
def _refusal(problem):
    if problem.dtype not in DTYPES:
        return f"takes float16 and bfloat16, and the inputs are {problem.dtype.lower()}"
    if problem.any_length:
        return "makes its masks before a graph runs, which does not know a length here"
    if problem.scoring.softcap is not None:
        return "caps no scores"
    if problem.has("bias") and not problem.frame.bias_is_constant:
        return "gives a bias no gradient"
    if problem.has("bias") and problem.has("documents"):
        return "takes one bias for a whole batch, and in documents each row has its own"
    if problem.has("rel_pos_emb"):
        return "has no place for embeddings of offsets"
    if problem.scoring.hide_self:
        return "gives a query's own key no score of its own"
    if problem.scoring.dropout > 0:
        return "draws dropout that no seed repeats"
    if max(problem.d, problem.d_v) + _more_columns(problem) > LARGEST_HEAD:
        more = _more_columns(problem)
        return f"takes heads of at most {LARGEST_HEAD - more} dimensions" + (" with these options" if more else "")
    if max(problem.n_q, problem.n_k) > LONGEST:
        return f"takes sequences of at most {LONGEST} tokens"
    if max(problem.heads, problem.per_key_head) > MOST_HEADS:
        return f"takes at most {MOST_HEADS} heads"
    if problem.heads > 1 and problem.heads % problem.per_key_head:
        return "wants a bias for each of the heads that share a key head"
    if packed(problem):
        return None
    batch = problem.groups // _heads(problem) * (1 if band(problem) else len(fold(problem)[0]))
    if batch > LARGEST_BATCH:
        return f"takes a batch of at most {LARGEST_BATCH}, and this would be one of {batch}"
    return None


def _more_columns(problem):
    """Return how many dimensions of a head the gradient of the log-sum-exp needs."""
    return COLUMNS if problem.frame.lse or problem.spec.prefix > 0 else 0


def _heads(problem):
    """Return how many groups are the heads of a batch entry: of one row of the key mask, or as many as a bias has. A
    bias of one head is repeated for the query heads of one key head."""
    if problem.has("bias"):
        return max(problem.heads, problem.per_key_head)
    alike, share = problem.groups // max(problem.rows("mask"), problem.rows("documents"), 1), problem.per_key_head
    return max(heads for heads in range(share, min(alike, MOST_HEADS) + 1, share) if alike % heads == 0)


def band(problem):
    """Return `(pre_tokens, next_tokens)`, both inclusive, with the last query at the last key; None if no such band."""
    spec, shift = problem.spec, problem.offset - (problem.n_k - problem.n_q)
    forward = min(spec.forward, 0) if spec.causal else spec.forward
    before, after = min(spec.backward - shift, problem.n_k), min(forward + shift, problem.n_k)
    first, last = spec.span(np.arange(problem.n_q) + problem.offset)
    if spec.bucket > 1 or problem.has("documents") or problem.has("bias") or min(before, after) < 0 or \
            (after > 0 and before + after >= BAND) or (np.maximum(first, 0) > np.minimum(last, problem.n_k - 1)).any():
        return None
    if problem.has("mask") and (problem.scoring.scale < SMALLEST_SCALE or
                          max(problem.d + 1, problem.d_v) + _more_columns(problem) > LARGEST_HEAD):
        return None
    return before, after


def packed(problem):
    """Return the band of a problem whose documents, of all rows, are one call in layout TND; else None."""
    if not problem.has("cu_seqlens") or {"mask", "bias", "sinks", "lse", "prefix"} & problem.uses:
        return None
    return band(replace(problem, shapes=()))


def fold(problem):
    """Return the positions of queries `(blocks, rows)` and of the keys they see `(blocks, width)`. Every block has the
    same place among its keys. Some positions are outside the sequence."""
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
    """Return the first and the last existing key of each query's span."""
    first, last = problem.spec.span(np.arange(problem.n_q) + problem.offset)
    return np.clip(first, 0, problem.n_k), np.clip(last, -1, problem.n_k - 1)


def scores(problem):
    """Return how many scores are computed in all, and how many at once: the operator writes none of them to memory."""
    prefix = problem.groups * problem.n_q * min(problem.spec.prefix, problem.n_k)
    if band(problem) or packed(problem):
        first, last = _first_and_last(problem)
        return problem.groups * int((last - first + 1).sum()) + prefix, prefix
    queries, keys = fold(problem)
    return problem.groups * queries.size * keys.shape[1] + prefix, prefix


def prepare(problem):
    """Return the problem, the heads of a batch entry, the operator, and the constants of a band or of blocks."""
    heads, tokens, flash = _heads(problem), packed(problem) or band(problem), None
    if problem.frame.lse or problem.has("sinks") or problem.spec.prefix:
        flash = Flash(problem, heads, tokens)
        flash = flash, Linked(flash)
    return problem, heads, flash, tokens, *(_of_band(problem) if tokens else _of_blocks(problem))


@lru_cache(maxsize=1)
def _compressed_mask():
    return Tensor(np.triu(np.ones((BAND, BAND), np.uint8), 1))


def _of_band(problem):
    """Return the band's mask, the first key that each query sees, and the one after the last."""
    first, last = _first_and_last(problem)
    return _compressed_mask(), _int32(first), _int32(last + 1)


def _of_blocks(problem):
    """Return the mask (None if documents make it), indices of queries and keys, entries of the bias, and positions."""
    queries, keys = fold(problem)
    hidden = bias_index = positions = None
    if problem.has("documents"):
        positions = _int32(queries, queries.shape), _int32(keys, keys.shape)
    else:
        visible = replace(problem.spec, prefix=0).visible(queries[0], keys[0])
        hidden = Tensor(~(visible & _within(keys, problem.n_k)[:, None])[:, None])
    if problem.has("bias"):
        bias_index = _int32(problem.bias_index(queries[0][:, None], keys[0]))
    queries, keys = np.clip(queries - problem.offset, 0, problem.n_q - 1), np.clip(keys, 0, problem.n_k - 1)
    return hidden, _int32(queries), _int32(keys), bias_index, positions


def _int32(index, shape=-1):
    return Tensor(index.reshape(shape).astype(np.int32))


# ---- inputs and outputs of the operator


def run(constants, q, k, v, tensors):
    """Run the band or the masked blocks, then add the prefix."""
    problem, heads, flash, tokens, *more = constants
    mask, documents, sinks = tensors["mask"], tensors["documents"], tensors["sinks"]
    if documents is not None and tokens is not None:
        return _packed(problem, tokens, more[0], q, k, v, documents.shape[0], tensors["cu_seqlens"]), None
    if documents is not None:
        q, mask = without_padding(q, mask, documents, problem.offset)
    if mask is not None:
        hidden = repeated(ops.logical_not(mask), k.shape[0])
        k, v = ops.masked_fill(k, hidden, 0.), ops.masked_fill(v, hidden, 0.)
    if tokens is not None:
        out, lse = _band(problem, heads, flash, tokens, more, q, k, v, mask, sinks)
    else:
        out, lse = _blocks(problem, heads, flash, more, q, k, v, mask, documents, tensors["bias"], sinks)
    if problem.spec.prefix > 0:
        q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
        out, lse = with_prefix(problem, q, k, v, out, lse, mask, tensors)
    return out, lse


def _packed(problem, tokens, compressed, q, k, v, batch, cu_seqlens):
    """Run the documents of all rows as one call in layout TND."""
    dtype, width, heads = _dtype(problem.dtype), _width(problem), problem.groups // batch
    q, k, v = (_tokens_first(_padded(ops.cast(x, dtype), width), batch) for x in (q, k, v))
    ends = ops.cast(cu_seqlens[1:], ms.int64)
    out = ops.flash_attention_score(
        q, k, v, heads, attn_mask=compressed, actual_seq_qlen=ends, actual_seq_kvlen=ends,
        scalar_value=problem.scoring.scale, pre_tokens=tokens[0], next_tokens=tokens[1], input_layout="TND",
        sparse_mode=4)
    out = out.reshape(batch, problem.n_q, heads, width).swapaxes(1, 2)
    return out.reshape(problem.groups, problem.n_q, width)[..., :problem.d_v]


def _tokens_first(x, batch):
    """Turn `(batch * heads, n, d)` into `(batch * n, heads, d)`."""
    _, n, width = x.shape
    return x.reshape(batch, -1, n, width).swapaxes(1, 2).reshape(batch * n, -1, width)


def _band(problem, heads, flash, tokens, constants, q, k, v, mask, sinks):
    """Run all queries at once. A key mask becomes one more entry of queries and keys."""
    compressed, first, after = constants
    dtype, key_heads, nothing = _dtype(problem.dtype), heads // problem.per_key_head, None
    if mask is not None:
        hidden = ops.cast(repeated(ops.logical_not(mask), k.shape[0]), ms.float32)
        q = ops.cat((ops.cast(q, dtype), ops.cast(ops.full(q.shape[:-1] + (1,), HIDING, dtype=ms.float32), dtype)), -1)
        k = ops.cat((ops.cast(k, dtype), ops.cast(ops.mul(hidden, -HIDING), dtype)), -1)
        nothing = ops.logical_not(sees_something(mask, first, after))  # (batch, n_q)
        nothing = repeated(nothing, problem.groups // heads).reshape(-1, 1, problem.n_q, 1)
    width = _width(problem, 0 if mask is None else 1)
    q, k, v = (_padded(ops.cast(x, dtype), width) for x in (q, k, v))
    out, lse = _called(problem, heads, flash, tokens, _by_head(q, heads), _by_head(k, key_heads),
                       _by_head(v, key_heads), None, compressed, nothing, sinks)
    out = out.reshape(problem.groups, problem.n_q, -1)[..., :problem.d_v]
    return out, None if lse is None else lse.reshape(problem.groups, problem.n_q)


def _blocks(problem, heads, flash, constants, q, k, v, mask, documents, bias, sinks):
    """Run blocks as batch entries. The operator's result is undefined for a row that sees nothing: such a row sees
    everything there, and is set to zero here."""
    hidden, queries, keys, bias_index, positions = constants
    dtype, key_heads, scale = _dtype(problem.dtype), heads // problem.per_key_head, None
    if documents is not None:
        hidden = _hidden_by_documents(problem, documents, *positions)
    blocks, _, rows, width = hidden.shape
    if mask is not None:
        real = ops.gather(mask, keys, 1).reshape(-1, blocks, 1, width).swapaxes(0, 1)
        hidden = ops.logical_or(hidden, ops.logical_not(real))
    nothing = hidden.all(-1, True)
    hidden = ops.logical_and(hidden, ops.logical_not(nothing))
    alike = problem.groups // heads // hidden.shape[1]
    # The operator's descriptions differ in whether a bias is scaled too. So q is scaled here, and the operator's scale
    # is 1.
    if bias is not None:
        q, scale = ops.mul(ops.cast(q, ms.float32), problem.scoring.scale), 1.
        limit = LARGEST_SHIFT[problem.dtype.lower()]
        bias = ops.clamp(ops.cast(bias, ms.float32), -limit, limit).reshape(problem.heads, -1)
        bias = ops.gather(bias, bias_index, 1)
        bias = repeated(ops.cast(bias, dtype), heads).reshape(1, heads, rows, width)
    q, k, v = (_padded(ops.cast(x, dtype), _width(problem)) for x in (q, k, v))
    out, lse = _called(
        problem, heads, flash, None, _gathered(q, queries, blocks, heads), _gathered(k, keys, blocks, key_heads),
        _gathered(v, keys, blocks, key_heads), bias, _for_each(hidden, alike), _for_each(nothing, alike), sinks, scale)
    out = _in_order(problem, out, blocks)[..., :problem.d_v]
    return out, None if lse is None else _in_order(problem, lse, blocks)[..., 0]


def _called(problem, heads, flash, tokens, q, k, v, bias, mask, nothing, sinks, scale=None):
    """Call the operator: as MindSpore's function, or as `Flash` where its statistics are needed."""
    if flash is not None:
        if sinks is not None:
            sinks = ops.cast(sinks, ms.float32)
            sinks = ops.tile(sinks, (q.shape[0] * heads // problem.rows("sinks"),)).reshape(-1, heads, 1, 1)
        flash, linked = flash
        bias, nothing, sinks = given(bias, ms.float16), given(nothing, ms.bool_), given(sinks, ms.float32)
        out, lse = flash(q, k, v, bias, mask, nothing, sinks)
        if compiling():
            return linked(q, k, v, bias, mask, nothing, sinks, ops.stop_gradient(out), ops.stop_gradient(lse))
        return out, lse
    before, after = tokens or (NO_LIMIT, NO_LIMIT)
    out = ops.flash_attention_score(
        q, k, v, heads, real_shift=bias, attn_mask=mask, scalar_value=scale or problem.scoring.scale,
        pre_tokens=before, next_tokens=after, input_layout="BNSD", sparse_mode=4 if tokens else 0)
    return out if nothing is None else ops.masked_fill(out, nothing, 0.), None


def _hidden_by_documents(problem, documents, positions, places):
    """Return what the queries of each block do not see, `(blocks, batch, rows, width)`."""
    blocks, rows = positions.shape
    first, last = bounds_of(documents, ops.clamp(positions, 0, problem.n_k - 1).reshape(-1))
    first, last = first.reshape(-1, blocks, rows), last.reshape(-1, blocks, rows)
    seen = in_span(problem.spec, positions.reshape(1, blocks, rows), places.reshape(1, blocks, 1, -1), first, last)
    return ops.logical_not(seen).swapaxes(0, 1)


@constexpr
def _dtype(name):
    return getattr(ms, name.lower())


def _width(problem, more=0):
    """Return the one width of keys, with `more` entries, and values, which the operator wants alike."""
    return -(-max(problem.d + more, problem.d_v) // COLUMNS) * COLUMNS


def _padded(x, width):
    """Pad heads with zeros to a width. Zeros change no product."""
    missing = width - x.shape[-1]
    return x if missing == 0 else ops.cat((x, ops.cast(ops.zeros(x.shape[:-1] + (missing,), ms.float32), x.dtype)), -1)


def _by_head(x, heads):
    return x.reshape(-1, heads, x.shape[1], x.shape[2])


def _for_each(mask, alike):
    """Repeat a mask `(blocks, batch, rows, ...)` for each of the entries that share it."""
    blocks, batch, rows, width = mask.shape
    return ops.tile(mask.reshape(blocks * batch, 1, rows, width), (1, alike, 1, 1)).reshape(-1, 1, rows, width)


def _gathered(x, index, blocks, heads):
    """Gather from `(g, n, d)`: `(blocks * g / heads, heads, n', d)`."""
    groups, _, head_dim = x.shape
    x = ops.gather(x, index, 1).reshape(groups, blocks, -1, head_dim).swapaxes(0, 1)
    return x.reshape(blocks * groups // heads, heads, -1, head_dim)


def _in_order(problem, x, blocks):
    """Put blocks back into `(g, n_q, d)`."""
    groups, last_axis = problem.groups, x.shape[-1]
    x = x.reshape(blocks, groups, -1, last_axis).swapaxes(0, 1).reshape(groups, -1, last_axis)
    first = problem.offset % reach(problem)[2]  # the place of the first query in its block
    return x[:, first:first + problem.n_q]


# ---- the operator with its statistics


class Flash(AsGiven):
    """The operator and its gradient, by MindSpore's primitives: returns the output and the log-sum-exp, including a
    sink.

    The gradient primitive computes the weights as `exp(score - max) / sum` from the statistics that it gets. With the
    log-sum-exp as `max` and 1 as `sum`, these are the weights of a softmax with a sink. (MindSpore's ring attention
    gives it the statistics of all keys with some of the keys in the same way.) The primitive uses the output only for
    the sum over `dout * output`, which it subtracts from the gradients of the weights. The gradient of the log-sum-exp
    has to be subtracted from that sum. So it travels as more entries of `dout` and of the output, where the values have
    zeros.
    """

    def __init__(self, problem, heads, tokens):
        super().__init__()
        before, after = tokens or (NO_LIMIT, NO_LIMIT)
        self.with_bias, self.with_sinks = problem.has("bias"), problem.has("sinks")
        self.some_see_nothing = tokens is None or problem.has("mask")
        self.lse_has_gradient = problem.frame.lse or problem.spec.prefix > 0
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
        return self.gradients(q, k, v, bias, mask, nothing, sinks, outs[0], outs[1], douts)

    def gradients(self, q, k, v, bias, mask, nothing, sinks, out, lse, douts):
        head_dim, dout, dlse = q.shape[-1], ops.cast(last(douts[0]), q.dtype), last(douts[1])
        dsinks = sinks
        if self.with_sinks:
            along = ops.mul(ops.cast(dout, ms.float32), ops.cast(out, ms.float32)).sum(-1, keepdims=True)
            weight = ops.exp(ops.sub(sinks, ops.maximum(lse, HIDDEN)))
            dsinks = ops.mul(weight, ops.sub(dlse, along)).sum(2, keepdims=True)
        if self.some_see_nothing:
            lse = ops.masked_fill(lse, nothing, -HIDDEN)  # no score weighs anything beside this
        if self.lse_has_gradient:
            q, k, v = (_padded(x, head_dim + COLUMNS) for x in (q, k, v))
            dout, out = _with_lse_gradient(dout, out, dlse)
        eight = ops.tile(lse, (1, 1, 1, 8))
        dq, dk, dv, _ = self.backward(q, k, v, dout, bias if self.with_bias else None, None, None, mask, eight,
                                      ops.ones_like(eight), None, out)
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim], bias, mask, nothing, dsinks


class Linked(AsGiven):
    """Gives the output and the log-sum-exp of a `Flash` their gradients (see `cells.compiling`)."""

    def __init__(self, flash):
        super().__init__()
        self.flash = flash

    def construct(self, q, k, v, bias, mask, nothing, sinks, out, lse):
        return out, lse

    def bprop(self, q, k, v, bias, mask, nothing, sinks, out, lse, outs, douts):
        return self.flash.gradients(q, k, v, bias, mask, nothing, sinks, out, lse, douts) + (out, lse)


def _with_lse_gradient(dout, out, dlse):
    """Return both with more entries, whose products add up to `-dlse`. One number of 16 bits could not hold it."""
    more_dout, more_out = [dout], [out]
    for factor in (256., 1., 1 / 256):
        part = ops.cast(ops.mul(dlse, 1 / factor), dout.dtype)
        dlse = ops.sub(dlse, ops.mul(ops.cast(part, ms.float32), factor))
        more_dout.append(ops.cast(ops.full(dout.shape[:-1] + (1,), factor, dtype=ms.float32), dout.dtype))
        more_out.append(ops.neg(part))
    width = dout.shape[-1] + COLUMNS
    return _padded(ops.cat(more_dout, -1), width), _padded(ops.cat(more_out, -1), width)


ASCEND = Backend(
    "ascend", frozenset(("mask", "documents", "cu_seqlens", "bias", "sinks", "seed", "v_width", "kv_heads", "prefix",
                         "lse")), why_not, scores, prepare, run, dtypes=DTYPES)
