"""Local (windowed) attention for MindSpore."""
__version__ = "0.1.0"

from .local_attention import LocalAttention
from .spec import WindowSpec

__all__ = ["LocalAttention", "WindowSpec"]
