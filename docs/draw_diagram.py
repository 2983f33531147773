"""Draws diagram.png, which keys a query sees, from `WindowSpec` itself: `python docs/draw_diagram.py [diagram.png]`."""
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402

from local_attention.spec import WindowSpec  # noqa: E402

WINDOW, LENGTH, QUERY = 4, 16, 9
PANELS = (  # title, spec, the call that makes it; the first four see one window back and, if not causal, one forward
    ("window-aligned, causal", WindowSpec(bucket=WINDOW, backward=WINDOW, forward=0, causal=True),
     f"LocalAttention({WINDOW}, causal=True)"),
    ("window-aligned, not causal", WindowSpec(bucket=WINDOW, backward=WINDOW, forward=WINDOW, causal=False),
     f"LocalAttention({WINDOW})"),
    ("exact, causal", WindowSpec(bucket=1, backward=WINDOW, forward=0, causal=True),
     f"LocalAttention({WINDOW}, causal=True,\n               exact_windowsize=True)"),
    ("exact, not causal", WindowSpec(bucket=1, backward=WINDOW, forward=WINDOW, causal=False),
     f"LocalAttention({WINDOW}, exact_windowsize=True)"),
    ("chunks", WindowSpec.from_chunks(WINDOW), f"WindowSpec.from_chunks({WINDOW})"),
    ("exact, causal, a prefix of 2", WindowSpec(bucket=1, backward=WINDOW, forward=0, causal=True, prefix=2),
     f"LocalAttention({WINDOW}, causal=True, prefix=2,\n               exact_windowsize=True)"),
)
HIDDEN, SEEN, SEEN_BY_QUERY, OWN = range(4)
COLOURS = ListedColormap(["#eef0f3", "#8fb3d9", "#f2a541", "#1f3b5c"])


def cells(spec):
    """Return how each (query, key) is drawn: the span of one query, and every query's own key, are highlighted."""
    positions = np.arange(LENGTH)
    seen = np.where(spec.visible(positions, positions), SEEN, HIDDEN)
    seen[QUERY] = np.where(seen[QUERY] == SEEN, SEEN_BY_QUERY, HIDDEN)
    seen[positions, positions] = OWN
    return seen


def draw_panel(axes, title, spec, call):
    axes.pcolormesh(cells(spec), cmap=COLOURS, vmin=0, vmax=3, edgecolors="white", linewidth=1.5)
    axes.set(aspect="equal", xlim=(0, LENGTH), ylim=(LENGTH, 0))
    for edge in range(WINDOW, LENGTH, WINDOW):
        axes.axvline(edge, color="#5b6470", linewidth=1, linestyle=":")
        axes.axhline(edge, color="#5b6470", linewidth=1, linestyle=":")
    first, last = (int(np.clip(key, 0, LENGTH - 1)) for key in spec.span(QUERY))
    axes.set_title(title, fontsize=15, fontweight="bold", pad=8)
    prefix = f"0 to {spec.prefix - 1}, " if spec.prefix else ""
    axes.set_xlabel(f"query {QUERY} sees keys {prefix}{first} to {last}\n\n", fontsize=13, labelpad=6)
    below = axes.text(0.5, -0.085, call, transform=axes.transAxes, ha="center", va="top", fontsize=11)
    below.set(family="monospace", in_layout=False)  # it stands in the empty lines of the label
    axes.set_xticks([])
    axes.set_yticks([QUERY + 0.5], [f"{QUERY}"], fontsize=13)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def main(path):
    figure, grid = plt.subplots(3, 2, figsize=(8, 14.7), layout="constrained")
    for axes, panel in zip(grid.flat, PANELS):
        draw_panel(axes, *panel)
    figure.suptitle(f"Which keys (columns) a query (row) sees, window_size={WINDOW}", fontsize=15)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "diagram.png")
