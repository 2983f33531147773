"""What the files of all zoos share: a layer in this package's words, and how the values of tensors are read."""
import sys
from dataclasses import dataclass
from typing import Optional

from mindspore.ops import constexpr

from ..spec import WindowSpec

OWNER = "local_attention"


@dataclass(frozen=True)
class Layer:
    """What a layer of a model says to each of its calls; the words are those of `windowed_attention`."""
    spec: WindowSpec
    scale: Optional[float]
    softcap: Optional[float]
    dropout_rate: float


# ---- values of tensors


class _Pass:
    """What is kept with a tensor for the layers of a model that share it, in one forward pass."""

    def __init__(self, module):
        self.config, self.layer, self.modules, self.found = getattr(module, "config", None), -1, set(), {}

    def goes_on(self, module):
        """Return whether a layer of this model asks that comes after those that have asked."""
        layer = getattr(module, "layer_idx", None)
        later = id(module) not in self.modules if layer is None else layer > self.layer
        return later and self.config is not None and self.config is getattr(module, "config", None)

    def asked(self, module):
        layer = getattr(module, "layer_idx", None)
        self.modules.add(id(module))
        self.layer = self.layer if layer is None else layer


def once(tensor, module):
    """Return a dict that is kept with a tensor until the model's next forward pass, in which the tensor may have other
    values. Call it once for a tensor in each call of a layer. To read values stalls a device, so one layer does it for
    all."""
    kept = getattr(tensor, "_kept_by_local_attention", None)
    if kept is None or not kept.goes_on(module):
        kept = tensor._kept_by_local_attention = _Pass(module)
    kept.asked(module)
    return kept.found


def values(tensor, found):
    """Return the values of a tensor; `found` is what `once` returned for it."""
    if "values" not in found:
        found["values"] = tensor.asnumpy()
    return found["values"]


# ---- graphs


def in_graph():
    """Return whether this is called by the compiler of a graph, from a `constexpr` function."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "__infer__":
        frame = frame.f_back
    return frame is not None


@constexpr
def compiling():
    return in_graph()
