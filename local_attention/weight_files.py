"""Files of weights: how to read names and arrays from each format, and how to write them."""
from collections.abc import Callable
from typing import NamedTuple

import mindspore as ms
import numpy as np
import safetensors.numpy
from mindspore import Tensor


def _read_npz(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _write_npz(path, arrays):
    np.savez(path, **arrays)


_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
           "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


def _read_safetensors(path):
    arrays = {}
    for name, entry in safetensors.deserialize(path.read_bytes()):  # NumPy's own reader of this format has no bfloat16
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"'{name}' is of dtype {entry['dtype']}, which is none of {', '.join(_DTYPES)}")
        array = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype("<u4") << 16).view("<f4")
        arrays[name] = array.reshape(entry["shape"])
    return arrays


def _write_safetensors(path, arrays):
    safetensors.numpy.save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)


def _read_torch(path):
    return _torch(path).load(path, map_location="cpu", weights_only=True)


def _write_torch(path, arrays):
    torch = _torch(path)
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def _torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"'{path}' needs PyTorch, which is not installed here; a .safetensors or .npz file does not."
                          ) from error
    return torch


def _read_ckpt(path):
    return ms.load_checkpoint(str(path))


def _write_ckpt(path, arrays):
    ms.save_checkpoint([{"name": name, "data": Tensor(array)} for name, array in arrays.items()], str(path))


class _Format(NamedTuple):
    """A kind of file: how to read names and arrays from a path, and how to write them."""
    read: Callable
    write: Callable


TORCH = {".safetensors": _Format(_read_safetensors, _write_safetensors), ".npz": _Format(_read_npz, _write_npz),
          ".pt": _Format(_read_torch, _write_torch), ".pth": _Format(_read_torch, _write_torch)}
MINDSPORE = {".ckpt": _Format(_read_ckpt, _write_ckpt)}
