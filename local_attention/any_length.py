"""Attention in graphs that are compiled for every length at once: exported with a length of None, or so `set_inputs`.

Lengths are numbers of the running graph there, from which no plan can be made: blocks of one size, each with the keys
of its own, all under masks, in plain operators and with positions counted anew in each block.
"""
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from . import checks
from .backends.dense import HIDDEN, SELF_SCORE
from .rotary import rotation_matrix, rotation_tables

ROWS = 128  # queries in a block, at least


@constexpr
def unknown(shape):
    """Whether a shape is not known where a graph is compiled."""
    return None in shape


@constexpr
def _block(owner, spec, period, head_dim, rotary, bias_columns, bias_backward, hide_self, dropout, backend):
    """Constants of a block: its rows and width, who sees whom, what to add to a score, a bias's entries, rotations."""
    if dropout > 0:
        raise checks.value_error(owner, "dropout", "0 in training in a graph for every length", dropout)
    if backend is not None:
        raise checks.value_error(owner, "backend", "None in a graph for every length", repr(backend))
    unit = max(spec.bucket, period)
    rows = unit * max(1, max(ROWS, (spec.backward + spec.bucket + spec.forward) // 2) // unit)
    queries, keys = np.arange(rows), np.arange(rows + spec.backward + spec.forward) - spec.backward
    add = np.where(hide_self & (queries[:, None] == keys), SELF_SCORE, 0).astype(np.float32)
    bias_index, tables = None, (None, None)
    if bias_columns:
        column = np.clip(keys - (queries[:, None] // period * period - bias_backward), 0, bias_columns - 1)
        bias_index = Tensor((queries[:, None] % period * bias_columns + column).reshape(-1).astype(np.int32))
    if rotary:
        frequencies, scale_base, ahead = rotary
        start, middle = spec.backward + ahead, len(keys) // 2
        q_power = k_power = None
        if scale_base:
            q_power, k_power = ((start - middle) / scale_base, 1 / scale_base), (middle / scale_base, -1 / scale_base)
        tables = tuple(tuple(Tensor(table.astype(np.float32)) for table in rotation_tables(frequencies, *place))
                       for place in ((start, rows, q_power), (0, len(keys), k_power)))
        tables = (*tables[0], *tables[1], rotation_matrix(head_dim))
    return (rows, Tensor(queries.astype(np.int32)), Tensor(keys.astype(np.int32)),
            Tensor(spec.visible(queries, keys).astype(np.float32)), Tensor(add), bias_index, tables)


def attend_any_length(owner, q, k, v, spec, scale, key_mask=None, bias=None, bias_backward=0, hide_self=False,
                      dropout=0., rotary=None, backend=None):
    """What `attend` gives, for `q, k, v (g, n, d)` of an n that is not known.

    `rotary` is None or `(frequencies, scale_base, ahead)`: queries stand `ahead` of their keys.
    """
    period = 1 if bias is None else bias.shape[1]
    rows, queries, keys, visible, add, bias_index, tables = _block(
        owner, spec, period, q.shape[2], rotary, None if bias is None else bias.shape[2], bias_backward, hide_self,
        dropout, backend)
    dtype, n, head_dim = q.dtype, q.shape[1], q.shape[2]
    blocks = (n + rows - 1) // rows
    starts = ops.arange(0, blocks * rows, rows)[:, None]
    positions = starts + keys[None]
    real = ops.cast(ops.logical_and(positions >= 0, positions < n), ms.float32)[None]  # (1, blocks, width)
    positions = ops.clamp(positions, 0, n - 1).reshape(-1)
    q = _gathered(q, ops.clamp(starts + queries[None], 0, n - 1).reshape(-1), rows)
    if key_mask is not None:
        groups, batch = k.shape[0], key_mask.shape[0]
        key_mask = ops.tile(ops.cast(key_mask, ms.float32)[:, None], (1, groups // batch, 1)).reshape(groups, n)
        hidden = key_mask[:, :, None] == 0
        k, v = ops.masked_fill(k, hidden, 0.), ops.masked_fill(v, hidden, 0.)
        real = real * ops.gather(key_mask, positions, 1).reshape(groups, blocks, -1)
    k, v = _gathered(k, positions, keys.shape[0]), _gathered(v, positions, keys.shape[0])
    if rotary is not None:
        q, k = _rotated(q, tables[0], tables[1], tables[4]), _rotated(k, tables[2], tables[3], tables[4])
    scores = ops.matmul(ops.mul(q, scale), k.swapaxes(2, 3))
    if bias is not None:
        heads = bias.shape[0]
        bias = ops.gather(ops.cast(bias, ms.float32).reshape(heads, -1), bias_index, 1).reshape(heads, 1, rows, -1)
        scores = (scores.reshape(-1, heads, blocks, rows, keys.shape[0]) + bias).reshape(scores.shape)
    if hide_self:
        scores = ops.mul(scores, ops.cast(add == 0, ms.float32)) + add
    seen = ops.mul(real[:, :, None], visible)
    weights = ops.mul(ops.softmax(ops.mul(scores, seen) + ops.mul(1. - seen, HIDDEN), -1), seen)
    out = ops.matmul(weights, v).reshape(q.shape[0], -1, head_dim)[:, :n]
    return ops.cast(out, dtype)


def _gathered(x, index, rows):
    """`(g, n, d)` in float32, gathered, as `(g, blocks, rows, d)`."""
    groups, head_dim = x.shape[0], x.shape[2]
    return ops.gather(ops.cast(x, ms.float32), index, 1).reshape(groups, -1, rows, head_dim)


def _rotated(x, cos, sin, half):
    return ops.mul(x, cos) + ops.mul(ops.matmul(x, half), sin)
