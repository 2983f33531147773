"""What is asked for in the whole process. What was prepared for other settings is not used: they are part of the key of
every cache."""
import os

from mindspore._c_expression import MSContext, ms_ctx_param

LEVELS = ("baseline", "AVX2", "AVX-512")
backend = None  # what `use_backend` asked for; layers beside attention follow it
MOST_THREADS = 1024
level = len(LEVELS) - 1  # the widest vectors allowed; the machine may have narrower ones


def device():
    """Return MindSpore's device target. `mindspore.get_context` takes ten times as long, a tenth of a short call."""
    return MSContext.get_instance().get_param(ms_ctx_param.device_target)


def threads():
    """Return how many threads may work: OMP_NUM_THREADS, else the fewer of MindSpore's threads and our cores."""
    try:
        asked = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0])
    except ValueError:
        asked = 0
    if asked > 0:
        return min(asked, MOST_THREADS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores, MSContext.get_instance().get_param(ms_ctx_param.runtime_num_threads)))


def of_kernel():
    """Return what the native kernel's Cells were made for."""
    return threads(), level
