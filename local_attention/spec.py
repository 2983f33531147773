"""Which keys a query sees, and how a score is made, as numbers. Every mask, plan and picture is derived from them."""
from dataclasses import dataclass
from typing import Optional

import numpy as np

from . import checks

NO_LIMIT = 2**31 - 1
FARTHEST = 2**62  # farther than any key, and still an int64 when added to a position


@dataclass(frozen=True)
class WindowSpec:
    r"""
    The span of keys that each query of a sequence sees.

    With :math:`start = \lfloor i / bucket \rfloor \cdot bucket`, query :math:`i` sees the keys from
    :math:`start - backward` to :math:`start + bucket - 1 + forward`, both included, and the first `prefix` keys of the
    sequence. When `causal`, it sees no key after :math:`i`. Keys outside the sequence do not exist.

    Args:
        bucket (int): How many consecutive queries share a span. With 1, the span moves with the query.
        backward (int): Keys before the start of the bucket, in positions.
        forward (int): Keys after the end of the bucket, in positions. -1 with a bucket of 1 hides the query's own key.
        causal (bool): Whether a query sees no key after itself.
        prefix (int): How many keys at the start of the sequence every query sees, wherever its span is (StreamingLLM,
            Xiao et al., 2023). A key that is also in the span counts once. Default: ``0`` .

    Raises:
        TypeError: If a count is not an int or `causal` is not a bool.
        ValueError: If `bucket` is less than 1, `backward` or `prefix` less than 0, or `forward` less than -1.

    Supported Platforms:
        Plain Python, the same everywhere.

    Examples:
        >>> from local_attention import WindowSpec
        >>> spec = WindowSpec(bucket=4, backward=4, forward=0, causal=True)
        >>> tuple(map(int, spec.span(6)))
        (0, 6)
        >>> print(WindowSpec.from_sliding_window(2).show(4))
        ■ · · ·
        ■ ■ · ·
        · ■ ■ ·
        · · ■ ■
    """
    bucket: int
    backward: int
    forward: int
    causal: bool
    prefix: int = 0

    def __post_init__(self):
        checks.positive_int("WindowSpec", "bucket", self.bucket)
        checks.non_negative_int("WindowSpec", "backward", self.backward)
        checks.integer("WindowSpec", "forward", self.forward, -1)
        checks.boolean("WindowSpec", "causal", self.causal)
        checks.non_negative_int("WindowSpec", "prefix", self.prefix)

    def span(self, i):
        """Return the first and the last key of the span of query `i`, an int or an array of ints; both are included."""
        start = i // self.bucket * self.bucket
        first, last = start - min(self.backward, FARTHEST), start + min(self.bucket - 1 + self.forward, FARTHEST)
        return first, np.minimum(last, i) if self.causal else last

    def within(self, end):
        """Return the spec that shows the same of a sequence of `end` positions, with no number larger than it needs."""
        return WindowSpec(min(self.bucket, end), min(self.backward, end), min(self.forward, end), self.causal,
                          min(self.prefix, end))

    def visible(self, queries, keys):
        """Return a bool array `(len(queries), len(keys))`: whether the query at a position sees the key at another."""
        queries, keys = np.asarray(queries)[:, None], np.asarray(keys)[None, :]
        first, last = self.span(queries)
        in_prefix = (keys >= 0) & (keys < self.prefix) & ((keys <= queries) | (not self.causal))
        return (first <= keys) & (keys <= last) | in_prefix

    def show(self, n):
        """Draw the mask of an `n`-token sequence: a row for each query, a column for each key."""
        positions = np.arange(checks.positive_int("WindowSpec.show", "n", n))
        return "\n".join(" ".join("■" if seen else "·" for seen in row) for row in self.visible(positions, positions))

    @classmethod
    def from_sliding_window(cls, sliding_window):
        """Return Hugging Face's `sliding_window`: causal, with so many keys in all, including the query's own."""
        window = checks.positive_int("WindowSpec.from_sliding_window", "sliding_window", sliding_window)
        return cls(bucket=1, backward=window - 1, forward=0, causal=True)

    @classmethod
    def from_flash(cls, window_size, causal=False):
        """flash-attention's `window_size=(left, right)`: keys `i - left … i + right`, inclusive; -1 is no limit."""
        owner = "WindowSpec.from_flash"
        if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
            raise checks.type_error(owner, "window_size", "a pair (left, right)", window_size)
        checks.boolean(owner, "causal", causal)
        left, right = (NO_LIMIT if checks.integer(owner, "window_size", size, -1) == -1 else int(size)
                       for size in window_size)
        return cls(bucket=1, backward=left, forward=0 if causal else right, causal=causal)

    @classmethod
    def from_chunks(cls, chunk_size):
        """Return Llama 4's `attention_chunk_size`: causal, and a query sees nothing before its own chunk."""
        return cls(checks.positive_int("WindowSpec.from_chunks", "chunk_size", chunk_size), 0, 0, causal=True)


@dataclass(frozen=True)
class Scoring:
    """How the product of a query and a key becomes an attention weight, apart from the tensors of a call.

    The steps, in this order: multiply by `scale`; cap to `softcap * tanh(score / softcap)`; add the bias and the
    embeddings of offsets; set the score of a query's own key to -5e4 if `hide_self`; apply the masks; softmax; drop
    weights at the rate `dropout`.
    """
    scale: float
    softcap: Optional[float] = None
    hide_self: bool = False
    dropout: float = 0.
