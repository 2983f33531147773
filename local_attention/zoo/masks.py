"""Masks of four axes, as older models make them, read back as which keys are there."""
import numpy as np

from .. import checks
from ..spec import NO_LIMIT, WindowSpec

ROWS = 128  # that are looked at together


def four_axes(mask, spec, n_q, n_k):
    """The position of each key `(b, n_k)` among its row's real ones, -1 for padding and -2 for what a cache has not
    come to; a ValueError where the mask says more than causal, the layer's window and padding."""
    if mask.shape[1] != 1 or mask.shape[2] != n_q or mask.shape[3] < n_k:
        raise _refused(f"one of shape {tuple(mask.shape)} for {n_q} queries and {n_k} keys")
    seen = _Seen(mask.asnumpy()[:, 0, :, :n_k])
    rows, causal = np.arange(n_q), spec.causal
    used = n_k
    if causal and n_q < n_k and seen[:, -1].any():
        used = int(np.flatnonzero(seen[:, -1].any(0))[-1]) + 1
    offset = used - n_q
    if offset < 0:
        raise _refused(f"one whose last query sees nothing after key {used - 1} of {n_k}")
    # a key before the queries is real if the first of them sees it, one beside a query if that does
    real = np.zeros((len(seen.values), n_k), bool)
    real[:, :n_k if not causal and n_q < n_k else offset] = seen[:, 0, :n_k if not causal and n_q < n_k else offset]
    if causal or n_q == n_k:
        real[:, offset:used] = seen[:, rows, rows + offset]
    if causal:  # a query without any key is often let see all of them: padding
        real[:, offset:used - 1] &= ~seen[:, rows[:-1], rows[:-1] + offset + 1]
    fingerprint = (spec, n_q, n_k, real.tobytes(), seen[:, 0].tobytes(), seen[:, -1].tobytes())
    if getattr(mask, "_read_by_local_attention", None) != fingerprint:  # once for the layers that share it
        _check(seen, real, spec, offset)
        mask._read_by_local_attention = fingerprint
    places = np.where(real, np.arange(n_k) - real.argmax(1)[:, None], -1)
    places[:, used:] = -2
    return places


class _Seen:
    """Where a mask lets a key be seen, of the part that is asked for."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, part):
        values = self.values[part]
        if values.dtype == bool:
            return values
        hidden = values <= -1e4
        if not (hidden | (values == 0)).all():
            bias = values[~(hidden | (values == 0))][0]
            raise _refused(f"one that adds {bias:.4g} to a score")
        return ~hidden


def _check(seen, real, spec, offset):
    """Every row of a mask, some at a time: what it is to be, with the layer's window in it or without, is all it is."""
    batch, n_q, n_k = seen.values.shape
    wide = WindowSpec(1, NO_LIMIT, 0 if spec.causal else NO_LIMIT, spec.causal)
    wanted, wrong = [spec, wide], None
    own = offset + np.arange(n_q)
    for start in range(0, n_q, ROWS):
        part = own[start:start + ROWS]
        got = seen[:, start:start + ROWS]
        # what a query that is padding sees is of no interest
        there = real[:, part] if spec.causal or n_q == n_k else np.ones((batch, len(part)), bool)
        left = []
        for one in wanted:
            differs = (got != (one.visible(part, np.arange(n_k)) & real[:, None])) & there[:, :, None]
            if differs.any():
                row, query, key = np.argwhere(differs)[0]
                sees = "sees" if got[row, query, key] else "does not see"
                wrong = f"one in which, in row {row}, query {start + query} {sees} key {key}"
            else:
                left.append(one)
        wanted = left
        if not wanted:
            raise _refused(wrong)


def _refused(got):
    return checks.value_error("local_attention", "attention_mask", "causal, the layer's window and padding", got)
