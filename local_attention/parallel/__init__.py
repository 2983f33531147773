"""Sequence parallelism: every rank of a group holds one slice of the sequences, in the order of the ranks.

A slice needs from its neighbours only the halo: the keys, values, mask and ids of documents that its outermost queries
see. So the amount exchanged depends neither on the length of the sequence nor on the number of ranks. (Once in a call
of a model, each rank also sends three numbers per row, which say where documents began.) All ranks must execute
collectives in one order, and a compiler may reorder operations that do not depend on each other. So each collective
here works on data, and depends on the one before it.
"""
from .agreement import agreed
from .documents import places
from .gradients import AverageGradients
from .groups import Group, group_of, sequence_group
from .halo import with_halo
from .loss import MeanOfRanks, next_tokens, without_last
from .sharded import sharded

__all__ = ["AverageGradients", "Group", "MeanOfRanks", "agreed", "group_of", "next_tokens", "places", "sequence_group",
           "sharded", "with_halo", "without_last"]
