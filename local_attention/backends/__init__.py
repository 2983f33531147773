"""The backends of `attend`. The last line of each module is its record."""
from dataclasses import dataclass
from typing import Callable, Optional


# what the backends of plain operators take: all there is
PLAIN = frozenset((
    "mask", "documents", "cu_seqlens", "order", "bias", "bias_rows", "sinks", "sink_rows", "rel_pos_emb",
    "rel_pos_query", "seed", "v_width", "kv_heads", "prefix", "lse", "softcap", "hide_self", "dropout"))


@dataclass(frozen=True)
class Backend:
    """What a backend says of itself.

    `why_not(problem)` returns why it cannot run a problem, as a phrase that can follow "it", or None. `scores(problem)`
    returns how many scores it computes in all, and how many at once. `prepare(problem)` returns what `run` needs
    besides tensors. `run(prepared, q, k, v, tensors)` returns the output and, if `problem.frame.lse`, the log-sum-exp;
    `tensors` is the dict of `attend.beside`.
    """
    name: str
    takes: frozenset  # which of `Problem.uses` it has in full; a call that uses anything else is refused
    why_not: Callable
    scores: Callable
    prepare: Callable
    run: Callable
    dtypes: tuple = ("Float32",)  # that `run` takes; it gets all others as float32
    any_axes: bool = False  # whether q, k and v may have more than three axes
    tokens_first: bool = False  # whether `run` writes `problem.heads_in_row` heads side by side in a row of the output
    hides: bool = False  # whether `run` itself hides the keys of biases below -1e29
    shielded: bool = False  # whether `run` may only get finite keys and values: it multiplies hidden ones by 0
    twice: Optional[bool] = False  # whether gradients in a graph can be differentiated; None: it refuses that itself

    def refusal(self, problem):
        """Return why it cannot run a problem, None if it can."""
        unknown = sorted(problem.uses - self.takes)
        return self.why_not(problem) or (f"takes no '{unknown[0]}'" if unknown else None)
