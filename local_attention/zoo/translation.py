"""The two entries of a zoo's tables, by the names that they have had."""
from .huggingface import attention
from .masks import positions

__all__ = ["attention", "positions"]
