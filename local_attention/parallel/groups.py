"""The ranks that share a sequence, and this process among them."""
from dataclasses import dataclass
from functools import cache

import mindspore as ms
from mindspore import communication

from .. import checks


@dataclass(frozen=True)
class Group:
    """The ranks that share a sequence, and this process's place among them."""
    name: str
    rank: int
    size: int

    def before(self, rows):
        """Return how many rows of the previous rank come before this rank's own: 0 if there is no previous rank."""
        return rows if self.rank > 0 else 0

    def after(self, rows):
        return rows if self.rank < self.size - 1 else 0


def group_of(owner, argument, name):
    """Return the group of a name, or of all ranks for True or None."""
    known = name if isinstance(name, str) else communication.GlobalComm.WORLD_COMM_GROUP
    if communication.GlobalComm.INITED:  # before that, MindSpore tells every process that it is the first of one
        try:
            return Group(known, communication.get_rank(known), communication.get_group_size(known))
        except (RuntimeError, ValueError):
            pass
    raise ValueError(f"For '{owner}', '{argument}' needs a communication group with this rank in it, made by "
                     f"'mindspore.communication.init()' or 'create_group()', but got {checks.shown(name)}.")


def sequence_group(owner, sequence_parallel):
    """Return the group that `sequence_parallel` means: of all ranks, or the one of that name; None for no group."""
    if not isinstance(sequence_parallel, (bool, str)):
        raise checks.type_error(owner, "sequence_parallel", "a bool or the name of a communication group",
                                sequence_parallel)
    if sequence_parallel is False:
        return None
    group = group_of(owner, "sequence_parallel", sequence_parallel)
    if only_sums():  # by all ranks in one order, here rather than during a first call
        for first in sorted((group.rank - 1, group.rank), key=lambda first: first % 2):
            if 0 <= first < group.size - 1:
                pair(group.name, first)
    return group


@cache
def pair(name, first):
    """Make the group of two neighbours, once."""
    neighbours = f"{name}.neighbours.{first}"
    communication.create_group(neighbours, communication.get_process_group_ranks(name)[first:first + 2])
    return neighbours


def only_sums():
    """Return whether reductions are the only collectives of a group: a rank cannot send to some of the others alone."""
    return ms.get_context("device_target") != "Ascend"
