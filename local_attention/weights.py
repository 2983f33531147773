"""Weights from and to the PyTorch package: one table of names, used in both directions.

`load_torch_weights` and `export_torch_weights` work on a model; the command works on files, without a model::

    python -m local_attention.weights model.safetensors model.ckpt
    python -m local_attention.weights model.ckpt model.safetensors --reverse

PyTorch's side is a .safetensors, .npz, .pt or .pth file, MindSpore's a .ckpt. Only .pt and .pth files need PyTorch.
"""
import argparse
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from . import checks
from .layers import LayerNorm
from .rotary import SinusoidalEmbeddings
from .transformer import DynamicPositionBias, LocalMHA, LocalTransformer
from .weight_files import MINDSPORE, TORCH

INV_FREQ = "attn_fn.rel_pos.inv_freq"
NUMBERS = "fiub"  # NumPy's kinds of numeric dtypes

# Modules have the same paths on both sides. For the modules at a path: MindSpore's name of each parameter, and
# PyTorch's.
_LAYER, _GLOBAL = r"layers\.\d+\.", r"global_layers\.\d+"
_TREE = "hyper_connections."  # on MindSpore's side only, where the connections are a tree of their own
_BLOCK, _CONNECTION = rf"({_LAYER}0\.|{_GLOBAL}\.)?", rf"{_TREE}({_LAYER}[01]|{_GLOBAL})"
_TABLE = {
    r"(token|pos)_emb": {"embedding_table": "weight"},
    rf"{_BLOCK}norm|{_LAYER}1\.0|to_logits\.0": {"gamma": "weight", "beta": "bias"},
    rf"{_BLOCK}(to_qkv|to_out)|{_LAYER}1\.[14]|to_logits\.1": {"weight": "weight"},
    rf"{_BLOCK}to_v_gate\.0|(dynamic_pos_bias\.)?mlp\.[024]": {"weight": "weight", "bias": "bias"},
    rf"({_LAYER}0|{_GLOBAL})?": {"q_scale": "q_scale", "k_scale": "k_scale", "sinks": "sinks"},
    rf"{_BLOCK}attn_fn\.rel_pos": {"inv_freq": "inv_freq"},
    _CONNECTION: {name: name for name in ("static_alpha", "dynamic_alpha_fn", "dynamic_alpha_scale", "static_beta",
                                          "dynamic_beta_fn", "dynamic_beta_scale")},
    rf"{_CONNECTION}\.norm": {"gamma": "gamma"},
}
_SCALAR = rf"({_TREE})?({_LAYER}[01]|{_GLOBAL})\.dynamic_(alpha|beta)_scale"  # names of both sides; here, of shape (1,)
# In PyTorch's releases with hyper-connections, these are the paths of connections; what they connect is one level down.
_CONNECTED, _BRANCH = rf"^({_LAYER}[01]|{_GLOBAL})\.", rf"^({_LAYER}[01]|{_GLOBAL})\.branch\."
# A global layer is any Cell. Parameters of MindSpore's own Cells, and of LayerNorm here, have these names there; others
# keep theirs.
_OF_CELLS = {"gamma": "weight", "beta": "bias", "embedding_table": "weight", "moving_mean": "running_mean",
             "moving_variance": "running_var"}


def torch_name(name):
    """Return PyTorch's name for MindSpore's name of a weight, None if the table does not have it."""
    renamed = _renamed(name, _TABLE.items())
    return renamed and _reconnected(renamed)


def mindspore_name(name):
    """Return MindSpore's name for PyTorch's name of a weight, of any release; None if the table does not have it."""
    if name.startswith(_TREE):
        return None
    backwards = [(path, {theirs: ours for ours, theirs in names.items()}) for path, names in _TABLE.items()]
    return _renamed(re.sub(_BRANCH, r"\1.", name), backwards) or _renamed(_TREE + name, backwards)


def _reconnected(name):
    if name.startswith(_TREE):
        return name[len(_TREE):]
    return re.sub(_CONNECTED, r"\1.branch.", name)


def _renamed(name, table):
    path, dot, last = name.rpartition(".")
    return next((path + dot + names[last] for pattern, names in table
                 if last in names and re.fullmatch(pattern, path)), None)


def load_torch_weights(cell, source, strict=True):
    """
    Give a model the weights of the PyTorch package's model with the same settings. Parameters keep their dtypes.

    Load before the model is first compiled. If the rotary frequencies (`inv_freq`) of the source differ from the
    model's by more than a rounding to half precision, they are loaded too, and a graph holds them as constants.

    Args:
        cell (Cell): `LocalMHA`, `LocalTransformer` or `DynamicPositionBias`.
        source (Union[Mapping, str, Path]): A mapping of names to arrays or tensors, of NumPy, MindSpore or PyTorch, or
            a path to a .safetensors, .npz, .pt or .pth file of one. It may be under a key ``state_dict`` or ``model`` .
            A prefix of all names, such as ``module.`` , ``_orig_mod.`` or the path to `cell` in a larger model, is
            removed. A Parameter of the model in two places, as in tied embeddings, loads from either name, or from
            both if their values are equal.
        strict (bool): Whether everything must fit. Default: ``True`` .

    Returns:
        list of PyTorch's names that were left out: entries of the source that the model has no place for, as the source
        names them, and weights of the model that the source lacks. `inv_freq` may be missing. Empty when strict.

    Raises:
        TypeError: If `cell`, `source` or `strict` is of another type.
        ValueError: If the source cannot be read, or if strict and an entry is missing, left over or misshapen, or two
            entries of one Parameter differ. The model is then unchanged.
        ImportError: If a .pt or .pth file is given and PyTorch is not installed.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from local_attention import LocalMHA, export_torch_weights, load_torch_weights
        >>> there, here = LocalMHA(dim=8, window_size=4), LocalMHA(dim=8, window_size=4)
        >>> print(load_torch_weights(here, export_torch_weights(there)))
        []
    """
    owner = "load_torch_weights"
    places = _places(owner, cell)
    theirs = _torch_names(cell, places)
    by_theirs = {name: ours for ours, name in theirs.items()}
    checks.boolean(owner, "strict", strict)
    entries = _read(owner, source, TORCH)
    renamed = _without_prefix(entries, lambda name: by_theirs.get(name) or mindspore_name(name), places)
    values, misfits, names = {}, {}, {}
    for name, value in entries.items():
        ours = renamed[name]
        if ours not in places:
            misfits[name] = "is left over"
        elif ours in values:
            misfits[name] = "is given twice"
        else:
            names[ours] = name
            values[ours], misfit = _fitted(value, places[ours], _torch_shape(ours, places[ours]))
            misfits.update({name: misfit} if misfit else {})
    given = {}  # of each Parameter, the first name whose value fits: it may have several names, as in tied embeddings
    for ours, value in values.items():
        place = id(places[ours])
        if values.get(given.get(place)) is None:
            given[place] = ours
        first = given[place]
        if first != ours and value is not None and not _equal(value, values[first]):
            misfits[names[ours]] = f"differs from '{names[first]}', which is the same Parameter here"
            values[ours] = None
    misfits.update((theirs[ours], "is missing") for ours, place in places.items()
                   if id(place) not in given and isinstance(place, Parameter))
    if strict and misfits:
        raise checks.value_error(owner, "source", f"the weights of this {type(cell).__name__}, each and no other",
                                 _listed(misfits) + _of_streams(entries, misfits))
    for ours, value in values.items():
        if value is not None:
            _set(places[ours], value)
    return list(misfits)


def export_torch_weights(cell):
    """
    Return the weights of a model as the PyTorch package's `state_dict` holds them, including `inv_freq`.

    The names are those of release 1.11.2, which loads them into a model of the same `num_residual_streams`. A global
    layer keeps its names, except that parameters of MindSpore's own Cells, and of LayerNorm, get PyTorch's names. A
    Parameter in two places, as in tied embeddings, has both names.

    Args:
        cell (Cell): `LocalMHA`, `LocalTransformer` or `DynamicPositionBias`.

    Returns:
        dict of name -> NumPy array, copies; bfloat16 as float32.

    Raises:
        TypeError: If `cell` is of another type.
        ValueError: If it has weights that the PyTorch package's model has not, as of adapters put in place of its
            projections.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from local_attention import LocalMHA, export_torch_weights
        >>> print(list(export_torch_weights(LocalMHA(dim=8, window_size=4))))
        ['to_qkv.weight', 'to_out.weight', 'attn_fn.rel_pos.inv_freq']
    """
    places = _places("export_torch_weights", cell)
    theirs = _torch_names(cell, places)
    unknown = [ours for ours in places if torch_name(ours) is None and not ours.startswith("global_layers.")]
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise checks.value_error("export_torch_weights", "cell", "a model of weights that the PyTorch package's has, "
                                 "without Cells put in place of its own", f"one with {', '.join(unknown[:8])}{more}")
    return {theirs[ours]: _array(place).reshape(_torch_shape(ours, place)) if isinstance(place, Parameter)
            else place.inv_freq.astype(np.float32) for ours, place in places.items()}


def _places(owner, cell):
    """Return the places of a model's weights by MindSpore's names: parameters, and Cells with rotary frequencies."""
    if not isinstance(cell, (LocalMHA, LocalTransformer, DynamicPositionBias)):
        raise checks.type_error(owner, "cell", "a LocalMHA, LocalTransformer or DynamicPositionBias", cell)
    parts = dict(_parts(cell))
    return {**{f"{path}.{name}" if path else name: parameter for path, part in parts.items()
               for name, parameter in part.parameters_and_names(expand=False)},
            **{f"{path}.inv_freq": part for path, part in parts.items() if isinstance(part, SinusoidalEmbeddings)}}


def _parts(cell, path=""):
    """Return (path, Cell) of a Cell and of all its parts. One that is in two places has two paths, which MindSpore's
    own iterators leave out."""
    yield path, cell
    for name, part in cell._cells.items():
        if part is not None:
            yield from _parts(part, f"{path}.{name}" if path else name)


def _equal(value, other):
    return np.array_equal(_array(value), _array(other), equal_nan=True)


def _torch_names(cell, places):
    """Return PyTorch's name of every place by MindSpore's: from the table, except in global layers. What the table does
    not have, as in Cells put in place of others, keeps its name."""
    cells = dict(_parts(cell))

    def theirs(ours):
        if not ours.startswith("global_layers."):
            return torch_name(ours) or ours
        path, _, last = ours.rpartition(".")
        of_mindspore = isinstance(cells[path], LayerNorm) or type(cells[path]).__module__.startswith("mindspore.")
        return _reconnected(f"{path}.{_OF_CELLS.get(last, last) if of_mindspore else last}")
    return {ours: theirs(ours) for ours in places}


def _torch_shape(ours, place):
    if re.fullmatch(_SCALAR, ours):
        return ()
    return tuple(place.shape if isinstance(place, Parameter) else place.inv_freq.shape)


def _fitted(value, place, shape):
    """Return (an entry as its place takes it, None) or (None, why it does not fit); PyTorch's has this `shape`."""
    array = _array(value)
    if array.dtype.kind not in NUMBERS:
        return None, f"is of type {type(value).__name__}"
    if array.shape != shape:
        return None, f"is of shape {array.shape} and not {shape}"
    return array if isinstance(place, SinusoidalEmbeddings) else Tensor(array.reshape(place.shape), place.dtype), None


def _set(place, value):
    if isinstance(place, Parameter):
        place.set_data(value)
    elif not _rounded(value, place.inv_freq):
        place.inv_freq = value


def _rounded(value, exact):
    """Whether values are the exact ones up to rounding to bfloat16, the coarsest dtype, which has 8 bits."""
    return np.allclose(value, exact, rtol=2**-8, atol=0)


def _array(value):
    """Convert a tensor of any framework to a NumPy array. NumPy has no bfloat16, which becomes float32."""
    if isinstance(value, Tensor):
        return np.array((value.astype(ms.float32) if value.dtype == ms.bfloat16 else value).asnumpy())
    if hasattr(value, "detach"):  # a PyTorch tensor
        value = value.detach().cpu()
        return (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    return np.asarray(value)


def _without_prefix(names, rename, known=None):
    """Return the new name of every name. A prefix that all names share, because their model was wrapped, compiled or
    part of another, is removed: as much of it as makes most new names `known`, or lets most be renamed at all."""
    shared = os.path.commonprefix([str(name) for name in names])
    starts = (0, *(dot.end() for dot in re.finditer(r"\.", shared)))
    renamed = [{name: rename(str(name)[start:]) for name in names} for start in starts]
    return max(renamed, key=lambda new: sum(ours is not None if known is None else ours in known
                                            for ours in new.values()))


def _listed(misfits, most=8):
    listed = "; ".join(f"'{name}' {misfit}" for name, misfit in list(misfits.items())[:most])
    return f"one where {listed}" + (f"; and {len(misfits) - most} more" if len(misfits) > most else "")


def _of_streams(entries, misfits):
    """Return the setting that a model lacks if what does not fit are weights that join residual streams."""
    joins = [name for name in misfits if name.endswith("static_beta")]
    if not joins:
        return ""
    streams = len(entries[joins[0]]) if joins[0] in entries else 1
    return f" (they join residual streams: build the model with num_residual_streams={streams})"


def _read(owner, source, formats):
    """Read a mapping of names from a mapping or a file, also from under the keys that training scripts use."""
    entries = source
    if isinstance(source, (str, os.PathLike)):
        reader, path = _format(owner, "source", source, formats).read, Path(source)
        if not path.is_file():
            raise checks.value_error(owner, "source", "an existing file", f"'{path}'")
        try:
            entries = reader(path)
        except ImportError:
            raise
        except Exception as error:  # zipfile, json, pickle and NumPy raise different errors for a damaged file
            raise checks.value_error(owner, "source", f"a well-formed {path.suffix} file",
                                     f"'{path}': {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(entries, Mapping) and isinstance(entries.get(key), Mapping):
            entries = entries[key]
    if not isinstance(entries, Mapping):
        raise checks.type_error(owner, "source", "a mapping of names to arrays, or a path to one", entries)
    return entries


def _format(owner, name, path, formats):
    suffix = Path(path).suffix
    if suffix not in formats:
        raise checks.value_error(owner, name, f"the path of a {' or '.join(formats)} file", f"'{path}'")
    return formats[suffix]


# The command


def convert(source, target, reverse=False, dim_head=64, partial=False):
    """
    Write a file of the PyTorch package's weights as MindSpore's .ckpt, or with `reverse` the other way round.

    A .ckpt has no `inv_freq` buffers, because models here compute them. PyTorch's side has them, so `reverse` adds
    them: for heads of `dim_head`, or of the size of a `q_scale` if there is one; none for models with dynamic position
    bias or if `dim_head` is 0. Anything that is not a weight of these models is an error, or with `partial` left out.
    A global layer can be any Cell; its weights are known by name if it is a LocalMHA. Return a report.
    """
    owner, here, there = "convert", MINDSPORE, TORCH
    for name, path in (("source", source), ("target", target)):
        if not isinstance(path, (str, os.PathLike)):
            raise checks.type_error(owner, name, "a path", path)
    checks.boolean(owner, "reverse", reverse)
    checks.non_negative_int(owner, "dim_head", dim_head)
    checks.boolean(owner, "partial", partial)
    formats, target_formats, rename = (here, there, torch_name) if reverse else (there, here, mindspore_name)
    write = _format(owner, "target", target, target_formats).write
    arrays, misfits = _renamed_entries(_read(owner, source, formats), rename, () if reverse else (1,))
    buffers = _frequencies(owner, arrays, dim_head) if reverse else _take_frequencies(arrays, misfits)
    if misfits and not partial:
        raise checks.value_error(owner, "source", "weights of these models and nothing else, unless 'partial'",
                                 _listed(misfits))
    arrays.update(buffers if reverse else {})
    write(Path(target), arrays)
    report = (f"{source} -> {target}: {len(arrays)} arrays, {sum(array.size for array in arrays.values()):,} numbers; "
              f"{len(buffers)} inv_freq {'among them' if reverse else 'left for the model to compute'}")
    return report + (f"; left out: {', '.join(misfits)}" if misfits else "")


def _renamed_entries(entries, rename, scalar):
    """Return arrays by their new names, scalars with the shape `scalar`, and why each other entry was left out."""
    arrays, misfits = {}, {}
    renamed = _without_prefix(entries, rename)
    for name, value in entries.items():
        new, array = renamed[name], _array(value)
        if new is None or array.dtype.kind not in NUMBERS:
            misfits[name] = "is no weight of these models"
        elif new in arrays:
            misfits[name] = "is given twice"
        else:
            arrays[new] = array.reshape(scalar) if re.fullmatch(_SCALAR, new) and array.size == 1 else array
    return arrays, misfits


def _take_frequencies(arrays, misfits):
    """Remove the buffers that models compute from the arrays. Other values of them have no place in a .ckpt."""
    buffers = [name for name in arrays if name.endswith(INV_FREQ)]
    for name in buffers:
        value = arrays.pop(name)
        if value.ndim != 1 or not _rounded(value, SinusoidalEmbeddings(2 * len(value)).inv_freq):
            misfits[torch_name(name)] = "is not what a model computes, and has no place in a .ckpt"
    return buffers


def _frequencies(owner, arrays, dim_head):
    """Return the buffers that PyTorch's models have in addition to these arrays."""
    if dim_head == 0 or any(name.startswith("dynamic_pos_bias.") for name in arrays):
        return {}
    buffers = {}
    for name, qkv in arrays.items():
        if name.endswith("to_qkv.weight"):
            block = name[:-len("to_qkv.weight")]
            dim = len(arrays.get(block + "q_scale", range(dim_head)))
            out = arrays.get(block + "to_out.weight")  # there may be fewer heads of keys and values
            inner = len(qkv) // 3 if out is None else out.shape[-1]
            if inner % dim:
                raise checks.value_error(owner, "dim_head", f"a divisor of {inner}, heads times dim_head", dim)
            buffers[block + INV_FREQ] = SinusoidalEmbeddings(dim).inv_freq.astype(np.float32)
    return buffers


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m local_attention.weights",
        description="Convert weights of the PyTorch package local-attention to MindSpore, or back.")
    parser.add_argument("source", metavar="IN", help=f"{', '.join(TORCH)}; .ckpt with --reverse")
    parser.add_argument("target", metavar="OUT", help=f".ckpt; {', '.join(TORCH)} with --reverse")
    parser.add_argument("--reverse", action="store_true", help="from MindSpore to PyTorch")
    parser.add_argument("--dim-head", type=int, default=64,
                        help="with --reverse: the model's dim_head, of which PyTorch keeps buffers; 0 for a model "
                        "without rotary embedding (default: 64)")
    parser.add_argument("--partial", action="store_true",
                        help="leave out what is no weight of these models, such as an optimizer's state, instead of "
                        "stopping at it")
    try:
        print(convert(**vars(parser.parse_args(arguments))))
    except (ValueError, TypeError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
