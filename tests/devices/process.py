"""Chooses the cases, and is the process that runs them: `process.py PLATFORM NAME…`.

It prints a line before and after each case. MindSpore's logs of the case are between these lines.
"""
import re
import sys

import mindspore as ms
from mindspore import Tensor, communication, nn, ops

from devices.cases import CASES, RANKS
from local_attention.parallel import agreement, exchange, gradients, groups

DTYPES = {"GPU": ("float32", "float16"), "Ascend": ("float32", "float16", "bfloat16")}
MODES = ("pynative", "graph")
LONG = re.compile(r"generate\.(?!today)")  # not in the quick suite: seconds each, and others call the same operators
QUICK_HALVES = {  # also run in half precision by the quick suite
    "windowed_attention", "blocked.prefix", "ascend.span", "ascend.chunks", "ascend.bias", "LocalMHA",
    "training.dropout", "sequence_parallel.training"}
QUICK_GRAPHS = {  # compiled by the quick suite, some seconds each
    "windowed_attention/float16", "blocked.prefix/float32", "any_length.mask/float16", "training.dropout/float16",
    "generate/float32", "sequence_parallel.training/float32", "ascend.span/bfloat16", "of_cpu_alone/float32"}


def names(platform, mode, quick):
    """Return the cases of a platform in a mode, as `NAME/DTYPE/MODE`."""
    found = []
    for name, (_, dtypes) in CASES.items():
        for dtype in dtypes:
            there = dtype in DTYPES[platform] and (platform == "Ascend" or not name.startswith("ascend"))
            soon = (dtype == "float32" or name in QUICK_HALVES) and not LONG.match(name)
            if mode == "graph":
                soon = f"{name}/{dtype}" in QUICK_GRAPHS
            if there and (soon or not quick):
                found.append(f"{name}/{dtype}/{mode}")
    return found


class Alone(nn.Cell):
    """AllReduce of one process: on GPU, a process cannot join others that do not exist."""

    def __init__(self, group=None):
        super().__init__()

    def construct(self, x):
        return x + 0


def begin(platform):
    """Select the platform, with this process as the first of two ranks."""
    ms.set_device(platform)
    ms.set_context(pynative_synchronize=True)
    ms.set_seed(0)
    agreement._Agreement._compared = lambda self, every: every  # the other rank does not exist
    if platform == "Ascend":  # its dry run accepts ranks that do not exist
        communication.GlobalComm.CHECK_ENVS = False
        communication.init()
    else:
        groups.group_of = gradients.group_of = lambda *names: groups.Group("ranks", 0, RANKS)
        groups.pair = exchange.pair = lambda *names: "pair"
        ops.AllReduce = Alone


def values(result):
    """Wait for everything that a case returned."""
    if isinstance(result, (tuple, list)):
        for part in result:
            values(part)
    elif isinstance(result, Tensor):
        (result.astype(ms.float32) if result.dtype == ms.bfloat16 else result).asnumpy()


def main(platform, chosen):
    begin(platform)
    for name in chosen:
        print("\ncase", name, flush=True)
        what, dtype, mode = name.split("/")
        try:
            values(CASES[what][0](dtype, mode))
            print("\ndone", flush=True)
        except Exception as error:
            print("\nfailed", type(error).__name__, " ".join(str(error).split())[:1500], flush=True)
            return  # after an error in a gradient, the next compilation fails too


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
