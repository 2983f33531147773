"""From spans to blocks: which queries are computed together, and which keys each block gathers. NumPy only."""
from dataclasses import dataclass

import numpy as np

SMALLEST, BLOCK = 32, 128  # queries in a block: few enough to gather few needless keys, enough to keep a matmul busy


@dataclass(frozen=True, eq=False)
class Run:
    """Blocks of queries that all see their keys in the same pattern.

    `queries (blocks, rows)` and `keys (blocks, width)` are indices, all within the sequence; `visible (rows, width)`
    says which keys of its block a row sees.
    """
    queries: np.ndarray
    keys: np.ndarray
    visible: np.ndarray

    @property
    def scores(self):
        """The number of scores that one head of this run computes."""
        return self.queries.size * self.keys.shape[1]


def block_size(span, unit):
    """Return the queries of a block for a span of keys: a multiple or divisor of `unit`, so that patterns repeat."""
    target = min(max(span // 2, SMALLEST), BLOCK) if span < 16 * BLOCK else span // 8
    if unit <= target:
        return target // unit * unit
    return next((unit // parts for parts in range(2, 2 * unit // target + 1)
                 if unit % parts == 0 and unit // parts <= target), unit)


def make_plan(spec, n_q, n_k, offset=0, period=1):
    """Return the runs that cover `n_q` queries, which stand at `offset … offset + n_q - 1` of the `n_k` keys' sequence.

    `period` is the number of positions after which a bias repeats. Blocks share a run only if they start at the same
    place within a period.
    """
    unit = max(spec.bucket, period)
    rows = block_size(min(spec.backward + spec.bucket + spec.forward, n_k), unit)
    blocks = {}
    for start in range(-(offset % rows), n_q, rows):
        positions = np.arange(max(start, 0), min(start + rows, n_q)) + offset
        first, last = spec.span(positions)
        low, high = max(int(first.min()), 0), min(int(last.max()), n_k - 1)
        low, width = (low, high - low + 1) if low <= high else (0, 1)
        pattern = (len(positions), int(positions[0]) % unit, low - int(positions[0]), width)
        blocks.setdefault(pattern, []).append((int(positions[0]), low))
    return [_run(spec, offset, count, width, members) for (count, _, _, width), members in blocks.items()]


def _run(spec, offset, rows, width, members):
    starts, lows = np.array(members).T
    return Run(queries=starts[:, None] - offset + np.arange(rows), keys=lows[:, None] + np.arange(width),
               visible=spec.visible(starts[0] + np.arange(rows), lows[0] + np.arange(width)))
