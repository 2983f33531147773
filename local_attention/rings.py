"""Decoding in place: keys and values of the last tokens as ring buffers, which `generate` and exported steps fill."""
import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import constexpr

from . import checks
from .backends.native.library import FLOATS, INT32, INT64, custom
from .backends.native.rows import made, row_numbers
from .cache import _next_token, _of_heads, _range, as_kept, recent, rotated
from .cells import Float32

_update = ops.ScatterNdUpdate()


class Rings(nn.Cell):
    """Each block's cache as two Parameters `(groups, capacity, d)`. Behind the first `prefix` places is a ring buffer
    of `kept` places; the token of clock p is at its place p % kept. While a prompt is read in pieces, they are in the
    order of a cache."""

    def __init__(self, forms, prefix):
        super().__init__()
        self.prefix = prefix
        self.keys = ms.ParameterTuple([_ring(f"key{number}", *form) for number, form in enumerate(forms)])
        self.values = ms.ParameterTuple([_ring(f"value{number}", *form) for number, form in enumerate(forms)])

    def construct(self, fed, *caches):
        """Copy keys and values, of one cache after the other, into the rings, after `fed` tokens."""
        for number in range(len(self.keys)):
            self.enter(number, fed, caches[2 * number], caches[2 * number + 1])
        return fed

    def enter(self, number, fed, keys, values):
        kept = self.keys[number].shape[1] - self.prefix
        order = (_range(kept, 2 * kept) - fed % kept) % kept  # the last token, last in a cache, is fed - 1
        order = _behind(self.prefix, order)
        ops.assign(self.keys[number], ops.gather(keys, order, 1))
        ops.assign(self.values[number], ops.gather(values, order, 1))

    def enter_pieces(self, attentions, fed, shifts):
        """Turn the order of a cache into that of rings, and if rows have unequal lengths, keys by `shifts (b,)`, so
        that all have the clock of the longest row."""
        for number in range(len(self.keys)):
            keys = self.keys[number]
            if shifts is not None:
                keys = shifted(attentions[number], keys, shifts)
            self.enter(number, fed, keys, self.values[number])
        return fed


def shifted(attn, keys, shifts):
    """Rotate the kept keys of each row by a number of positions, `(b,)`."""
    if attn.rel_pos is None or attn.use_xpos:
        return keys
    shifts = _of_heads(shifts[:, None], keys.shape[0])[:, :, None]
    return ops.cast(attn.rel_pos.rotate_rows(ops.cast(keys, ms.float32), shifts), keys.dtype)


def _behind(prefix, order):
    """Return an order of places behind a prefix, which stays in place."""
    return ops.cat((_range(0, prefix), order + prefix)) if prefix > 0 else order


def _ring(name, shape, dtype):
    return ms.Parameter(ops.zeros(shape, dtype), name=name, requires_grad=False)


class _Entry(Float32):
    """Writes the key and the value of a token, projected as `qkv (b, 1, (heads + 2 * kv_heads) * d)`, to a ring, and
    returns its query `(g, 1, d)`. The native kernel does it; attention to the ring waits for its output, the query."""

    def __init__(self, prefix, frequencies):
        super().__init__()
        self.numbers = row_numbers(prefix, *frequencies)
        self.enter = custom("enter_rings", [*3 * [FLOATS], *2 * [INT32], INT64], [FLOATS])

    def construct(self, qkv, keys, values, clock, rows):
        return self.enter(qkv, keys, values, clock, rows, self.numbers)


@constexpr
def _fused_entry(prefix, frequencies, dtype):
    """Return the kernel as a Cell, None if it cannot run."""
    return made(_Entry, prefix, frequencies) if checks.dtype_name(dtype) == "Float32" else None


def fused_entry(attn, dtype):
    """Return a Cell that writes a projected token to a ring, None if `entered` has to do it."""
    if attn.shared_qk or attn.use_xpos:
        return None
    return _fused_entry(attn.prefix, () if attn.rel_pos is None else attn.rel_pos.frequencies, dtype)


def entered(attn, q, k, v, ring):
    """Write a token `q, k, v (g, 1, d)` to a ring; return its query and the ring `(keys, values, clock, rows)`."""
    keys, values, clock, rows = ring
    groups, total, head_dim = keys.shape
    prefix = attn.windows.prefix
    q, k = rotated(attn, q, clock), as_kept(attn, k, clock)
    place = prefix + clock % (total - prefix)
    places = ops.stack((_range(0, groups), ops.tile(place, (groups,))), 1)
    if prefix > 0:  # a token beyond the prefix is written to its place twice
        own = _of_heads(ops.where(rows < prefix, rows, place)[:, None], groups)
        places = ops.cat((places, ops.cat((_range(0, groups)[:, None], own), 1)))
        k, v = ops.cat((k, k)), ops.cat((v, v))
    keys, values = _update(keys, places, k.reshape(-1, head_dim)), _update(values, places, v.reshape(-1, head_dim))
    return q, (keys, values, clock, rows)


def attend_in_place(attn, q, ring, attn_bias=None, sinks=None):
    """Compute what `attend_cached` does, for one new token whose key and value are already in the ring."""
    keys, values, clock, rows = ring
    kept = recent(attn.windows)
    if attn.shared_qk or attn.use_xpos:  # these depend on the places of keys
        order = _behind(attn.windows.prefix, (clock + 1 + _range(0, kept)) % kept)
        return _next_token(attn, q, ops.gather(keys, order, 1), ops.gather(values, order, 1), rows, attn_bias, sinks)
    return _next_token(attn, q, keys, values, rows, attn_bias, sinks, (clock + kept - _range(0, kept)) % kept)
