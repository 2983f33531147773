"""What calls the library beside attention: layers, rotary embeddings, rings of keys and bounds of documents."""
from functools import lru_cache

from ... import settings
from . import library


def made(cell, *args):
    """Return a Cell of operators that work row by row, `cell(*args)`, for the threads and the widest vectors allowed
    now; None if the library cannot run or is not wanted."""
    if settings.backend not in (None, "native") or library.unavailable(settings.device()) is not None:
        return None
    return _made(cell, settings.of_kernel(), *args)


@lru_cache(maxsize=256)
def _made(cell, of_kernel, *args):
    return cell(*args)


def row_numbers(*more):
    """Return the numbers that such an operator gets."""
    return library.integers(*settings.of_kernel(), *more)
