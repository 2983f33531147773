"""Reads masks of four axes, as older models make them: which keys are real, and which window the layer has."""
import numpy as np

from .. import checks
from ..spec import NO_LIMIT, WindowSpec

ROWS = 128  # rows of a mask that are compared at once


def four_axes(mask, spec, n_q, n_k, configured=None):
    """Read a mask `(b, 1, n_q, n_k)`; return the position of each key among its row's real keys, `(b, n_k)`, and the
    WindowSpec of the layer.

    A position is -1 for padding and -2 for places of a cache that are not filled yet. The WindowSpec is `spec`. It is
    `configured`, the window of the model's config, if the layer has no window and the mask shows that one. A mask may
    hold causality, the layer's window and padding; any other raises a ValueError.
    """
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
    # a key before all queries is real if the first query sees it; any other is real if the query at its position does
    real = np.zeros((len(seen.values), n_k), bool)
    real[:, :n_k if not causal and n_q < n_k else offset] = seen[:, 0, :n_k if not causal and n_q < n_k else offset]
    if causal or n_q == n_k:
        real[:, offset:used] = seen[:, rows, rows + offset]
    if causal:  # many models let padding see every key: a query that sees the key after its own is padding
        real[:, offset:used - 1] &= ~seen[:, rows[:-1], rows[:-1] + offset + 1]
    fingerprint = (spec, configured, n_q, n_k, real.tobytes(), seen[:, 0].tobytes(), seen[:, -1].tobytes())
    read = getattr(mask, "_read_by_local_attention", (None, None))
    if read[0] != fingerprint:  # once for all layers that share the mask
        read = mask._read_by_local_attention = fingerprint, _matched(seen, real, spec, configured, offset)
    places = np.where(real, np.arange(n_k) - real.argmax(1)[:, None], -1)
    places[:, used:] = -2
    return places, read[1]


class _Seen:
    """Indexes a mask: True where it lets a key be seen."""

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


def _matched(seen, real, spec, configured, offset):
    """Compare a mask, ROWS rows at a time, with what it may be: padding, with the layer's window or without a window.
    Return the layer's WindowSpec."""
    batch, n_q, n_k = seen.values.shape
    wide = WindowSpec(1, NO_LIMIT, 0 if spec.causal else NO_LIMIT, spec.causal)
    wanted, wrong = [spec, wide], None
    if configured is not None and spec == wide:
        wanted = [wide, configured]
    own = offset + np.arange(n_q)
    for start in range(0, n_q, ROWS):
        part = own[start:start + ROWS]
        got = seen[:, start:start + ROWS]
        # what a query of padding sees does not matter
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
    return configured if wanted == [configured] else spec


def _refused(got):
    return checks.value_error("local_attention", "attention_mask", "causal, the layer's window and padding", got)
