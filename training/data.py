"""The bytes that train.py trains on: files, documents that are packed into rows, and batches of these."""
import bisect
import gzip
import math
import sys
import sysconfig
from pathlib import Path

import numpy as np
from mindspore import Tensor

VALIDATION_SHARE = 0.1  # of the text, its end


def standard_library():
    """The source files of the standard library, tests and installed packages aside."""
    root = Path(sysconfig.get_paths()["stdlib"])
    aside = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    return [path for path in sorted(root.rglob("*.py")) if not aside.intersection(path.relative_to(root).parts)]


def files_of(data):
    """The files behind `--data`, in a fixed order; hidden ones of a folder are left out."""
    if data is None:
        return standard_library()
    root = Path(data)
    if not root.exists():
        sys.exit(f"train.py: --data {data} does not exist.")
    if root.is_file():
        return [root]
    return [path for path in sorted(root.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)]


def read_bytes(path):
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError) as error:
        sys.exit(f"train.py: {path} cannot be read: {error}.")


def read_documents(data, seq_len):
    """What is trained and what is validated on, arrays of bytes: the files, the last of them for validation. Files of a
    folder that are not text are left out."""
    files = files_of(data)
    contents = [read_bytes(path) for path in files]
    documents = [np.frombuffer(content, np.uint8) for content in contents
                 if len(files) == 1 or b"\0" not in content[:1024]]
    size = sum(map(len, documents))
    held_back = int(size * VALIDATION_SHARE)
    if held_back <= seq_len:
        sys.exit(f"train.py: {data or 'the standard library'} holds {size} bytes of text, but --seq-len {seq_len} "
                 f"needs more than {math.ceil((seq_len + 1) / VALIDATION_SHARE)}.")
    starts = np.cumsum([0, *map(len, documents)])
    cuts = np.clip(size - held_back - starts, 0, None)  # one document is cut in two
    return ([document[:cut] for document, cut in zip(documents, cuts) if cut > 0],
            [document[cut:] for document, cut in zip(documents, cuts) if cut < len(document)])


def order_0_entropy(text):
    """Bits per byte of the best code that knows how often each byte occurs and nothing else."""
    share = np.bincount(text, minlength=256) / len(text)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def rows_of(text, documents, settings):
    """What batches are drawn from, arrays of rows of seq_len bytes and the one after: all that the text has, or those
    of its documents, packed, with the ids that tell these apart."""
    length = settings.seq_len + 1
    return pack(documents, length) if settings.packed else (np.lib.stride_tricks.sliding_window_view(text, length),)


def pack(documents, length):
    """Pieces of documents, no longer than `length`, in as few rows as best fit finds: `(rows, length)` of bytes and of
    the pieces' numbers, -1 where a row has room left. The last byte of a piece, which is predicted and predicts
    nothing, is the first of the next."""
    pieces = [document[start:start + length] for document in documents
              for start in range(0, len(document) - 1, length - 1)]
    if not pieces:
        sys.exit("train.py: --packed needs documents of two bytes or more, to train and to validate on.")
    rows, room = [], []  # what there is in each row, and `(how much room is left, row)`, in order
    for piece in sorted(pieces, key=len, reverse=True):
        fits = bisect.bisect_left(room, (len(piece), 0))
        if fits < len(room):
            left, row = room.pop(fits)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left > len(piece):
            bisect.insort(room, (left - len(piece), row))
    tokens, ids = np.zeros((len(rows), length), np.uint8), np.full((len(rows), length), -1, np.int32)
    for row, pieces in enumerate(rows):
        tokens[row, :sum(map(len, pieces))] = np.concatenate(pieces)
        ids[row, :sum(map(len, pieces))] = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    return tokens, ids


def training_batches(rows, settings, step, rank=0):
    """The batches of one step, a function of seed and step alone: a resumed run sees what it would have seen. Those of
    several processes, side by side, are the batches of one."""
    chosen = np.random.default_rng((settings.seed, step)).integers(
        0, len(rows[0]), (settings.grad_accum, settings.ranks * settings.batch_size))
    return batches_of(rows, chosen, settings, rank)


def validation_batches(rows, settings, rank=0):
    """Rows evenly spread over those of the validation text, the same at every validation."""
    shape = settings.validate_batches, settings.ranks * settings.batch_size
    return batches_of(rows, np.linspace(0, len(rows[0]) - 1, math.prod(shape)).astype(int).reshape(shape), settings,
                      rank)


def batches_of(rows, chosen, settings, rank):
    return [tuple(Tensor(each[numbers].astype(np.int32)) for each in rows)
            for numbers in np.split(chosen, settings.ranks, 1)[rank]]
