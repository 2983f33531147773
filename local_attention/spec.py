"""Which keys a query sees, and how a score is made, as numbers. Every mask, plan and picture is derived from them."""
import numbers
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

    With `start = i // bucket * bucket`, query `i` sees the keys from
    `start - backward` to `start + bucket - 1 + forward`, both included, and the first `prefix` keys of the
    sequence. When `causal`, it sees no key after `i`. Keys outside the sequence do not exist.

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

    @property
    def sees_everything(self):
        """Whether every query sees every key, so that positions mean nothing."""
        return not self.causal and self.backward >= NO_LIMIT and self.forward >= NO_LIMIT

    def span(self, i):
        """Return the first and the last key of the span of query `i`, an int or an array of ints; both are included."""
        start = i // self.bucket * self.bucket
        first, last = start - min(self.backward, FARTHEST), start + min(self.bucket - 1 + self.forward, FARTHEST)
        return first, np.minimum(last, i) if self.causal else last

    def within(self, end):
        """Return the spec that shows the same of a sequence of `end` positions, with no number larger than it needs."""
        bucket = min(self.bucket, end + 1)  # one more, as `forward` may be -1
        return WindowSpec(bucket, min(self.backward, end), min(self.forward, end), self.causal,
                          min(self.prefix, end))

    def visible(self, queries, keys):
        """Return a bool array `(len(queries), len(keys))`: whether the query at a position sees the key at another."""
        queries, keys = np.asarray(queries)[:, None], np.asarray(keys)[None, :]
        first, last = self.span(queries)
        in_prefix = (keys >= 0) & (keys < self.prefix) & ((keys <= queries) | (not self.causal))
        return (first <= keys) & (keys <= last) | in_prefix

    def show(self, n, order=None):
        """Draw the mask of an `n`-token sequence: a row for each query, a column for each key. `order` are `n` ints, as
        `windowed_attention` takes them."""
        visible = self.drawn("WindowSpec.show", n, order)
        return "\n".join(" ".join("■" if seen else "·" for seen in row) for row in visible)

    def drawn(self, owner, n, order=None):
        """Return the mask of an `n`-token sequence, bool `(n, n)`."""
        positions = np.arange(checks.positive_int(owner, "n", n))
        visible = self.visible(positions, positions)
        if order is None:
            return visible
        checks.together(owner, ("order", True), ("causal", self.causal))
        order = np.asarray(order)
        if order.shape != (n,) or order.dtype.kind not in "iu":
            raise checks.value_error(owner, "order", f"{n} ints", checks.shown(order.tolist()))
        return visible & (order[None, :] <= order[:, None])

    @classmethod
    def from_sliding_window(cls, sliding_window):
        """Return Hugging Face's `sliding_window`: causal, with so many keys in all, including the query's own.

        Examples:
            >>> print(WindowSpec.from_sliding_window(3).show(5))
            ■ · · · ·
            ■ ■ · · ·
            ■ ■ ■ · ·
            · ■ ■ ■ ·
            · · ■ ■ ■
        """
        window = checks.positive_int("WindowSpec.from_sliding_window", "sliding_window", sliding_window)
        return cls(bucket=1, backward=window - 1, forward=0, causal=True)

    @classmethod
    def from_flash(cls, window_size, causal=False):
        """Return flash-attention's `window_size=(left, right)`: the keys `i - left … i + right`, both included.

        -1 is no limit. An int is `(int, int)`, as in JAX and Paddle. When `causal`, the right one has no effect.

        Examples:
            >>> print(WindowSpec.from_flash((2, 1)).show(5))
            ■ ■ · · ·
            ■ ■ ■ · ·
            ■ ■ ■ ■ ·
            · ■ ■ ■ ■
            · · ■ ■ ■
        """
        owner = "WindowSpec.from_flash"
        if isinstance(window_size, numbers.Integral) and not isinstance(window_size, bool):
            window_size = (window_size, window_size)
        if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
            raise checks.type_error(owner, "window_size", "an int or a pair (left, right)", window_size)
        checks.boolean(owner, "causal", causal)
        left, right = (NO_LIMIT if checks.integer(owner, "window_size", size, -1) == -1 else int(size)
                       for size in window_size)
        return cls(bucket=1, backward=left, forward=0 if causal else right, causal=causal)

    @classmethod
    def from_centered(cls, width, extra="left"):
        """Return a window of `width` keys in all around the query, to both sides. If `width` is even, the side `extra`,
        ``"left"`` or ``"right"`` , has one key more.

        Examples:
            >>> print(WindowSpec.from_centered(4).show(5))
            ■ ■ · · ·
            ■ ■ ■ · ·
            ■ ■ ■ ■ ·
            · ■ ■ ■ ■
            · · ■ ■ ■
        """
        owner = "WindowSpec.from_centered"
        beside = checks.positive_int(owner, "width", width) - 1
        if not isinstance(extra, str):
            raise checks.type_error(owner, "extra", "'left' or 'right'", extra)
        if extra not in ("left", "right"):
            raise checks.value_error(owner, "extra", "'left' or 'right'", repr(extra))
        less, more = beside // 2, beside - beside // 2
        return cls(1, *((more, less) if extra == "left" else (less, more)), causal=False)

    @classmethod
    def from_streaming(cls, chunk, left, right):
        """Return the chunks of a streaming model (Emformer, NeMo): every query sees all of its own chunk, `left` keys
        before the chunk's start and `right` keys after its end.

        Examples:
            >>> print(WindowSpec.from_streaming(chunk=2, left=1, right=1).show(6))
            ■ ■ ■ · · ·
            ■ ■ ■ · · ·
            · ■ ■ ■ ■ ·
            · ■ ■ ■ ■ ·
            · · · ■ ■ ■
            · · · ■ ■ ■
        """
        owner = "WindowSpec.from_streaming"
        return cls(checks.positive_int(owner, "chunk", chunk), checks.non_negative_int(owner, "left", left),
                   checks.non_negative_int(owner, "right", right), causal=False)

    @classmethod
    def from_sinks(cls, window, keep):
        """Return the window of a cache that keeps the first tokens (mlx-lm, StreamingLLM): causal, with `window` keys
        in all. The first `keep` keys of the sequence are among them.

        Examples:
            >>> print(WindowSpec.from_sinks(window=3, keep=1).show(5))
            ■ · · · ·
            ■ ■ · · ·
            ■ ■ ■ · ·
            ■ · ■ ■ ·
            ■ · · ■ ■
        """
        owner = "WindowSpec.from_sinks"
        window, keep = checks.positive_int(owner, "window", window), checks.non_negative_int(owner, "keep", keep)
        if keep >= window:
            raise checks.value_error(owner, "keep", f"less than 'window', which is {window}", keep)
        return cls(bucket=1, backward=window - keep - 1, forward=0, causal=True, prefix=keep)

    @classmethod
    def from_chunks(cls, chunk_size):
        """Return Llama 4's `attention_chunk_size`: causal, and a query sees nothing before its own chunk.

        Examples:
            >>> print(WindowSpec.from_chunks(2).show(4))
            ■ · · ·
            ■ ■ · ·
            · · ■ ·
            · · ■ ■
        """
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
