"""The pictures of runs: their loss curves, and the attention weights of each head."""
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from mindspore import Tensor

from local_attention.plot import attention_weights, plot_weights

from .folder import read_metrics


def running_mean(values):
    """Return the mean of each value and of those before it, of at most a twentieth of all."""
    sums = np.cumsum([0, *values])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - max(1, len(values) // 20), 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _figure():
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set(xlabel="step", ylabel="bits per byte")
    return figure, axes


def _add_run(axes, records, colors, name=""):
    """Draw the loss of each step, its running mean, and the validations of a run."""
    steps, losses = zip(*((record["step"], record["loss"]) for record in records))
    validations = [(record["step"], record["validation"]) for record in records if "validation" in record]
    axes.plot(steps, losses, color=colors[0], alpha=0.25, linewidth=0.6)
    axes.plot(steps, running_mean(losses), color=colors[0], label=f"{name}training, running mean")
    if validations:
        axes.plot(*zip(*validations), color=colors[1], linestyle="--", marker="o", label=f"{name}validation")


def _save(figure, axes, path):
    axes.set_ylim(0, None)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    matplotlib.pyplot.close(figure)


def draw_curve(path, records, entropy):
    figure, axes = _figure()
    _add_run(axes, records, ("C0", "C1"))
    axes.axhline(entropy, color="grey", linestyle=":", label="order-0 entropy")
    _save(figure, axes, path)


def draw_comparison(path, folders):
    """Draw the curves of several runs. The legend names the settings in which they differ."""
    runs = [_read_run(Path(folder)) for folder in folders]
    own = {name for settings, _ in runs for name in settings} - {"out", "resume", "device", "text_checksum"}
    differing = sorted(name for name in own if len({str(settings.get(name)) for settings, _ in runs}) > 1)
    figure, axes = _figure()
    for number, (folder, (settings, records)) in enumerate(zip(folders, runs)):
        name = ", ".join([folder, *(f"{name} {settings.get(name)}" for name in differing)])
        _add_run(axes, records, [f"C{number % 10}"] * 2, f"{name}: ")
    try:
        _save(figure, axes, path)
    except (OSError, ValueError) as error:  # the folder does not exist, or the name has no known ending
        sys.exit(f"train.py: {path} cannot be drawn: {error}")


def _read_run(folder):
    try:
        settings = json.loads((folder / "settings.json").read_text())
        records = read_metrics(folder / "metrics.jsonl", float("inf"))
    except OSError as error:
        sys.exit(f"train.py: {folder} holds no run: {error.strerror}.")
    if not records:
        sys.exit(f"train.py: {folder} holds no finished step.")
    return settings, records


def draw_heads(path, model, text):
    """Draw the attention weights of each head of each layer over a text."""
    names = []
    for number, place in enumerate(model.global_places, 1):
        names += [f"layer {number}, global"] * (place > 0) + [f"layer {number}"]
    plot_weights(attention_weights(model, Tensor(text[None].astype(np.int32))), names).savefig(path, dpi=120)
