"""How a layout of MindSpore's semi-auto parallel slices the axes of a tensor, and the ranks along an axis."""
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from mindspore import communication

from .. import checks
from .groups import sequence_group


@dataclass(frozen=True)
class Slices:
    """A layout in words: the devices, by name and number in each direction, and the directions that slice each axis of
    a tensor. A direction of one device slices nothing."""
    directions: tuple  # (name, number of devices)
    ranks: tuple
    axes: tuple  # for each axis of the tensor, the names of directions

    def count(self, axis):
        """Return into how many parts an axis is sliced."""
        return int(np.prod([dict(self.directions)[name] for name in self.axes[axis]], dtype=int))


def slices_of(owner, argument, layout):
    """Return the Slices of a `mindspore.parallel.Layout` that was called with the axes of a tensor."""
    known = getattr(layout, "to_dict", dict)() if getattr(layout, "_tensor_map", None) is not None else {}
    if "tensor_map" not in known:
        raise checks.type_error(owner, argument, "of a mindspore.parallel.Layout that was called with a name for each "
                                "axis of its tensor", layout)
    names, sizes = tuple(known["alias_name"]), known["device_matrix"]
    many = [name for name, size in zip(names, sizes) if size > 1]
    axes = []
    for entry in known["tensor_map"]:
        entries = entry if isinstance(entry, tuple) else (entry,)
        axes.append(tuple(name for name in (names[len(names) - 1 - one] for one in entries if one >= 0)
                          if name in many))
    return Slices(tuple(zip(names, sizes)), tuple(known["rank_list"]), tuple(axes))


def members(slices, axis, rank):
    """Return the ranks that hold the parts of an axis beside this rank's, in the order of these parts."""
    names, sizes = [name for name, _ in slices.directions], [size for _, size in slices.directions]
    count = len(slices.ranks)
    stage = rank // count * count  # of a pipeline
    own = np.unravel_index(slices.ranks.index(rank - stage), sizes)
    along = [names.index(name) for name in slices.axes[axis]]
    found = []
    for part in np.ndindex(*(sizes[one] for one in along)):
        place = list(own)
        for one, index in zip(along, part):
            place[one] = index
        found.append(stage + slices.ranks[int(np.ravel_multi_index(place, sizes))])
    return tuple(found)


def group_along(owner, slices, axis):
    """Return the Group of the ranks along a sliced axis, None if it is not sliced."""
    if not slices.axes[axis]:
        return None
    if not communication.GlobalComm.INITED:
        raise ValueError(f"For '{owner}', 'in_layouts' must not slice a sequence before "
                         f"mindspore.communication.init(), but got one in {slices.count(axis)} parts.")
    return sequence_group(owner, _made(members(slices, axis, communication.get_rank())))


@cache
def _made(ranks):
    """Make the group of these ranks, once."""
    name = f"local_attention.{len(ranks)}.{ranks[0]}.{zlib.crc32(repr(ranks).encode()):x}"
    communication.create_group(name, list(ranks))
    return name
