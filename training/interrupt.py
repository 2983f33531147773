"""The end of a run from outside: Ctrl-C, and the death of a rank. MindSpore need not be imported yet."""
import os
import signal
import sys
import threading
import time


def name_if_dead():
    """Continue in a child process, and print its rank if it dies: msrun ends the other processes and names no rank."""
    rank, parent = os.environ.get("RANK_ID", "of this process"), os.getpid()
    child = os.fork()
    if child == 0:
        def watch():
            while os.getppid() == parent:
                time.sleep(1)
            print(f"train.py: the parent of rank {rank} was killed, so the rank ends too.", file=sys.stderr, flush=True)
            os._exit(1)
        threading.Thread(target=watch, daemon=True).start()
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, number))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        print(f"train.py: rank {rank} {how}, which ends the run; --resume continues from its last checkpoint.",
              file=sys.stderr, flush=True)
    os._exit(status if status >= 0 else 128 - status)


class Interrupt:
    """Remembers Ctrl-C or SIGTERM, so that the present step is finished and saved first."""

    def __enter__(self):
        self.seen = False
        self.before = {number: signal.signal(number, self._see) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _see(self, number, frame):
        self.seen = True
