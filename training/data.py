"""The data of train.py: bytes of files, documents packed into rows, and batches of rows."""
import bisect
import gzip
import math
import sys
import sysconfig
import zlib
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from .folder import runs_below

VALIDATION_SHARE = 0.1  # the share of the text, at its end, that is held back for validation


def standard_library():
    """Return the source files of the standard library, without its tests, IDLE and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    aside = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    return [path for path in sorted(root.rglob("*.py")) if not aside.intersection(path.relative_to(root).parts)]


def files_of(data, run=None):
    """Return the files of `--data` in a fixed order, without the hidden files of a folder and those of runs, of which
    `run` is the folder of this one."""
    if data is None:
        return standard_library()
    root = Path(data)
    if not root.exists():
        sys.exit(f"train.py: --data {data} does not exist.")
    if root.is_file():
        return [root]
    runs, inside = runs_below(root, run), root.resolve()
    files = [(path, path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
    return [path for path, relative in files if not any(part.startswith(".") for part in relative.parts)
            and runs.isdisjoint((inside / relative).parents)]


def read_bytes(path):
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError) as error:
        sys.exit(f"train.py: {path} cannot be read: {error}.")


def read_documents(data, seq_len, run=None):
    """Return the documents to train on and the documents to validate on, as arrays of bytes. The last files are for
    validation. Files of a folder that are not text, and those of runs, are left out."""
    files = files_of(data, run)
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


def bytes_of(text):
    """Return the bytes of a text from the command line, where bytes that are not UTF-8 have come as surrogates."""
    try:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
    except UnicodeEncodeError as error:
        sys.exit(f"train.py: {text[error.start:error.end]!r} of {text!r} is not in the vocabulary, which is the 256 "
                 "bytes: it is no character and has no bytes.")


def checksum(documents):
    """Return a checksum of the documents to train and to validate on, and of where they begin."""
    total = 0
    for document in (document for each in documents for document in each):
        total = zlib.crc32(document, zlib.crc32(len(document).to_bytes(8, "little"), total))
    return total


def order_0_entropy(text):
    """Return the bits per byte of the best code that knows only how often each byte occurs."""
    share = np.bincount(text, minlength=256) / len(text)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def rows_of(text, documents, settings):
    """Return the rows that batches are drawn from, each of seq_len + 1 bytes: every such piece of the text or, with
    `--packed`, packed documents and their segment ids."""
    length = settings.seq_len + 1
    return pack(documents, length) if settings.packed else (np.lib.stride_tricks.sliding_window_view(text, length),)


def pack(documents, length):
    """Pack documents into as few rows as best fit finds; return bytes and segment ids, both `(rows, length)`.

    A document longer than `length` is cut into pieces. The last byte of a piece is predicted but predicts nothing, so
    it is also the first byte of the next piece. The id -1 marks the empty rest of a row.
    """
    pieces = [document[start:start + length] for document in documents
              for start in range(0, len(document) - 1, length - 1)]
    if not pieces:
        sys.exit("train.py: --packed needs documents of two bytes or more, to train and to validate on.")
    rows, room = [], []  # the pieces of each row, and sorted pairs (room left, row)
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
    """Return the batches of one step, as `batches_of`. They depend on seed and step alone, so a resumed run sees the
    same batches.

    Several processes have the batches that one process would have, split among them.
    """
    chosen = np.random.default_rng((settings.seed, step)).integers(
        0, len(rows[0]), (settings.grad_accum, settings.ranks * settings.batch_size))
    return batches_of(rows, chosen, settings, rank)


def validation_batches(rows, settings, rank=0):
    """Return rows spread evenly over the validation text, the same rows in every validation."""
    shape = settings.validate_batches, settings.ranks * settings.batch_size
    return batches_of(rows, np.linspace(0, len(rows[0]) - 1, math.prod(shape)).astype(int).reshape(shape), settings,
                      rank)


def batches_of(rows, chosen, settings, rank):
    """Return a process's batches of the chosen rows, each a tuple: its weight, its bytes and, if packed, their ids.

    The weight is the number of the batch's labels, divided by that of all batches and by the mean over the processes.
    So losses times their weights, summed over the batches and averaged over the processes, are the mean over labels.
    """
    parts = np.stack(np.split(chosen, settings.ranks, 1))
    labels = np.array([[count_labels(rows, numbers) for numbers in part] for part in parts])
    weights = labels[rank] * settings.ranks / labels.sum()
    return [(Tensor(weight, ms.float32), *(Tensor(each[numbers].astype(np.int32)) for each in rows))
            for weight, numbers in zip(weights, parts[rank])]


def count_labels(rows, numbers):
    """Count the bytes that are predicted in some rows: all but the first of a row or, if packed, of a document."""
    tokens, *ids = (each[numbers] for each in rows)
    if not ids:
        return tokens[:, 1:].size
    before, after = ids[0][:, :-1], ids[0][:, 1:]
    return np.count_nonzero((after == before) & (after >= 0))
