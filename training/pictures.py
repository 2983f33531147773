"""The pictures of a run: its loss curve, and the attention weights of each head."""
import matplotlib
import numpy as np
from mindspore import Tensor

from local_attention.plot import attention_weights, plot_weights


def draw_curve(path, records, entropy):
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, label, style in (("loss", "training", {"linewidth": 0.8}), ("validation", "validation", {"marker": "o"})):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points), label=label, **style)
    axes.axhline(entropy, color="grey", linestyle=":", label="order-0 entropy")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_heads(path, model, text):
    """Draw the attention weights of each head of each layer over a text."""
    names = []
    for number, place in enumerate(model.global_places, 1):
        names += [f"layer {number}, global"] * (place > 0) + [f"layer {number}"]
    plot_weights(attention_weights(model, Tensor(text[None].astype(np.int32))), names).savefig(path, dpi=120)
