"""What is asked for in the whole process. What was prepared for other settings is not used: they are part of the key of
every cache."""
import os
from functools import cache

from mindspore._c_expression import MSContext, PyNativeExecutor_, ms_ctx_param

LEVELS = ("baseline", "AVX2", "AVX-512")
backend = None  # what `use_backend` asked for; layers beside attention follow it
MOST_THREADS = 1024
FEW_CORES = 2  # where a thread that waits without sleeping takes a core that the work needs
level = len(LEVELS) - 1  # the widest vectors allowed; the machine may have narrower ones


def device():
    """Return MindSpore's device target. `mindspore.get_context` takes ten times as long, a tenth of a short call."""
    return MSContext.get_instance().get_param(ms_ctx_param.device_target)


def cores():
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@cache
def keep_cores():
    """On a CPU of few cores, make the calling thread compute what it would wait for; called by the first Cell.

    MindSpore hands compiled functions to a thread of its own, and whoever waits for that turns in an empty loop. It has
    two ways to end this. The variable MS_DEV_HOST_BLOCKING_RUN is not for a library to set: it also ends the queues
    behind, without which threads that call operators at the same time crash. So this is the other one, which MindSpore
    has for hooks (2.9 has it, 2.7 does not). A variable that is set, to whatever value, is the user's own decision.
    """
    executor = PyNativeExecutor_.get_instance()
    if (device() == "CPU" and cores() <= FEW_CORES and "MS_DEV_HOST_BLOCKING_RUN" not in os.environ
            and hasattr(executor, "disable_frontend_and_bprop_pipeline")):
        executor.disable_frontend_and_bprop_pipeline()


def threads():
    """Return how many threads may work: OMP_NUM_THREADS, else the fewer of MindSpore's threads and our cores."""
    try:
        asked = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0])
    except ValueError:
        asked = 0
    if asked > 0:
        return min(asked, MOST_THREADS)
    return max(1, min(cores(), MSContext.get_instance().get_param(ms_ctx_param.runtime_num_threads)))


def of_kernel():
    """Return what the native kernel's Cells were made for."""
    return threads(), level
