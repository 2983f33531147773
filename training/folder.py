"""The folder of a run of train.py and its files: taken by one process at a time, and no text to train on."""
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where a folder that is new is still taken by making it
    fcntl = None


@contextmanager
def taken(folder, settings):
    """Take the folder of a run before its data are read, so that no other train.py takes it too. Without `--out`, the
    first number that is free is taken. A folder that was made here and holds no run in the end is removed again."""
    numbered = settings.out is None and not settings.resume
    new, new_parents = numbered or not folder.exists(), [each for each in folder.parents if not each.exists()]
    try:
        folder = _made(folder, numbered)
        descriptor = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    except OSError as error:
        sys.exit(f"train.py: the run's folder {folder} cannot be made: {error.strerror}.")
    try:
        if descriptor is not None:
            _lock(descriptor, folder)
        if not settings.resume:
            refuse_a_second_run(folder)
        yield folder
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if new:
            _remove_empty(folder, *new_parents)


def refuse_a_second_run(folder):
    if (folder / "checkpoint.ckpt").exists():
        sys.exit(f"train.py: {folder} already holds a run; continue it with --resume, or name another --out.")


def _made(folder, numbered):
    """Make a folder and return it. Of folders with numbers, it is the first that no other process has made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.mkdir(exist_ok=not numbered)
            return folder
        except FileExistsError:
            if not numbered:
                raise
            folder = folder.with_name(str(int(folder.name) + 1))


def _remove_empty(*folders):
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # it is not empty
            return


def _lock(descriptor, folder):
    """Lock a folder until its descriptor is closed, or the process ends in whatever way."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"train.py: another train.py writes to {folder}; wait for its end, or name another --out.")
    except OSError:  # a file system without locks
        pass


def runs_below(root, folder):
    """Return the folders below `root` that are runs: that of this run, `runs`, and all that look like one."""
    root = root.resolve()
    own = None if folder is None else folder.resolve()
    if own in (root, *root.parents):
        sys.exit(f"train.py: --data {root} lies in the run's folder {own}, whose files are no text.")
    found = {path.parent for path in root.rglob("settings.json") if (path.parent / "metrics.jsonl").exists()}
    return {each for each in (*found, own, Path("runs").resolve()) if each is not None and root in each.parents}


# ---- files


def replace(temporary, path):
    """Give a file the name `path` when all of it is on the disk, and not before."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    replace(temporary, path)


def read_metrics(path, step):
    """Return the records of a run up to `step`. Steps that were logged after the checkpoint are run again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a line without its end is incomplete
    return [record for record in records if record["step"] <= step]
