"""
Local (windowed) attention for MindSpore.

Cells:
    LocalAttention            windowed attention over queries, keys and values that you project yourself
    LocalMHA                  a self-attention block around it: projections, heads, rotary embedding, a cache
    LocalTransformer          a language model of such blocks: loss, generation, training on packed documents
    DynamicPositionBias       a learned bias of the distance between query and key
    LocalSelfAttention        projections around `sliding_window_attention`
    MultiHeadLocalAttention   the same between two sequences

Functions:
    windowed_attention        attention over any window, with the options of today's models; all others go through it
    merge_attentions          attention over all keys from attention over parts of them, by their log-sum-exps
    sliding_window_attention  attention in which every query has a window of its own

What a query sees, and what computes it:
    WindowSpec                which keys a query sees, as five numbers; draws masks, reads other libraries' conventions
    use_backend               sets which backend runs where none is named
    explain_attention         which backend would compute a call of `windowed_attention`, and what it costs

Weights of the PyTorch package `local-attention`:
    load_torch_weights        into a Cell from a mapping or a .safetensors, .npz or .pt file
    export_torch_weights      from a Cell to a dict of arrays by PyTorch's names

Modules:
    local_attention.zoo       `zoo.register()`: models of mindnlp and mindone with this attention, by name
    local_attention.parallel  gradients averaged over processes; goes with `sequence_parallel`
    local_attention.plot      pictures of masks and of attention weights
    local_attention.cache     `reorder_cache`, for beam search
    local_attention.selfcheck `python -m local_attention.selfcheck`: is this machine's result right?
    local_attention.weights   `python -m local_attention.weights`: files of weights from and to PyTorch's
"""
import numpy

if int(numpy.__version__.split(".")[0]) >= 2:
    raise ImportError(f"local_attention runs on MindSpore, which fails with NumPy 2 and found {numpy.__version__}: "
                      "install an earlier one with  pip install 'numpy>=1.25,<2'")

from .attend import use_backend  # noqa: E402
from .explanation import explain_attention  # noqa: E402
from .functional import sliding_window_attention, windowed_attention  # noqa: E402
from .local_attention import LocalAttention  # noqa: E402
from .merging import merge_attentions  # noqa: E402
from .sliding_window import LocalSelfAttention, MultiHeadLocalAttention  # noqa: E402
from .spec import WindowSpec  # noqa: E402
from .transformer import DynamicPositionBias, LocalMHA, LocalTransformer  # noqa: E402

__version__ = "0.2.0"
__all__ = ["DynamicPositionBias", "LocalAttention", "LocalMHA", "LocalSelfAttention", "LocalTransformer",
           "MultiHeadLocalAttention", "WindowSpec", "explain_attention", "export_torch_weights", "load_torch_weights",
           "merge_attentions", "sliding_window_attention", "use_backend", "windowed_attention"]


def __getattr__(name):
    """The functions on weights, imported when asked for: `python -m local_attention.weights` wants to come first."""
    if name in ("export_torch_weights", "load_torch_weights"):
        from . import weights
        return getattr(weights, name)
    raise AttributeError(f"module 'local_attention' has no attribute '{name}'")
