"""Local (windowed) attention for MindSpore."""
import numpy

if int(numpy.__version__.split(".")[0]) >= 2:
    raise ImportError(f"local_attention runs on MindSpore, which fails with NumPy 2 and found {numpy.__version__}: "
                      "install an earlier one with  pip install 'numpy>=1.25,<2'")

from .attend import use_backend  # noqa: E402
from .functional import merge_attentions, sliding_window_attention, windowed_attention  # noqa: E402
from .local_attention import LocalAttention  # noqa: E402
from .sliding_window import LocalSelfAttention, MultiHeadLocalAttention  # noqa: E402
from .spec import WindowSpec  # noqa: E402
from .transformer import DynamicPositionBias, LocalMHA, LocalTransformer  # noqa: E402

__version__ = "0.2.0"
__all__ = ["DynamicPositionBias", "LocalAttention", "LocalMHA", "LocalSelfAttention", "LocalTransformer",
           "MultiHeadLocalAttention", "WindowSpec", "export_torch_weights", "load_torch_weights", "merge_attentions",
           "sliding_window_attention", "use_backend", "windowed_attention"]


def __getattr__(name):
    """The functions on weights, imported when asked for: `python -m local_attention.weights` wants to come first."""
    if name in ("export_torch_weights", "load_torch_weights"):
        from . import weights
        return getattr(weights, name)
    raise AttributeError(f"module 'local_attention' has no attribute '{name}'")
