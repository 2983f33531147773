"""Train a byte-level `LocalTransformer` on real text and sample from it: `python train.py`.

Without `--data`, the text is the source of the Python standard library on this machine. Each run has its own folder:
settings, a checkpoint (`--resume` continues from it exactly), metrics as JSON lines, the loss curve, and a picture of
each head's attention weights. `--generate TEXT` prints how the model of a run continues a text, and `--compare RUN RUN`
draws the curves of several runs.

`msrun --worker_num=N --local_worker_num=N --join=True train.py …` trains with N processes, each on its own batches.
"""
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from training.interrupt import Interrupt, name_if_dead

if __name__ == "__main__" and os.environ.get("MS_ROLE") == "MS_WORKER":
    name_if_dead()  # before MindSpore starts threads, which a child would not have

os.environ.setdefault("GLOG_v", "3")  # errors only; MindSpore reads it when it is imported

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402

from training.data import (  # noqa: E402
    bytes_of, checksum, order_0_entropy, read_documents, rows_of, training_batches, validation_batches)
from training.folder import read_metrics, taken, write_text  # noqa: E402
from training.ranks import Ranks  # noqa: E402
from training.settings import kept, read_settings  # noqa: E402

try:
    from tqdm import tqdm

    from training.pictures import draw_comparison, draw_curve, draw_heads
    from training.trainer import Trainer
except ModuleNotFoundError as missing:
    sys.exit(f'train.py: {missing.name} is not installed; pip install -e ".[train]" installs what training needs.')


def printable(text):
    """Return bytes as text for a terminal. Bytes that are not UTF-8 or would control the terminal are replaced."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in decoded)


def documents_of(settings, folder):
    """Return the documents to train and to validate on, and keep their checksum in the settings."""
    documents = read_documents(settings.data, settings.seq_len, folder)
    text_checksum = checksum(documents)
    if settings.text_checksum not in (None, text_checksum):
        sys.exit(f"train.py: the text of {settings.data or 'the Python standard library'} is not that of the run that "
                 "--resume continues; name the same text by --data, or start a new run.")
    settings.text_checksum = text_checksum
    return documents


def trainer_of(settings):
    try:
        return Trainer(settings)
    except ValueError as error:  # the model's message about a wrong size or seed
        sys.exit(f"train.py: {error}")


def begin(settings, folder, ranks, trainer, records):
    """End every process if they differ; then write the files that a run begins with."""
    ranks.agree({**{f"--{name.replace('_', '-')}": value for name, value in kept(settings).items()
                    if name != "text_checksum"},
                 "the run's folder": str(folder) if settings.resume else None,  # a new one is the first process's alone
                 "the step of the checkpoint": trainer.step,
                 "the checksum of the text": settings.text_checksum,
                 "the checksum of the weights": trainer.checksum()})
    if ranks.rank == 0:
        write_text(folder / "settings.json", json.dumps(kept(settings), indent=2) + "\n")
        write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def run(settings, folder, ranks):
    documents = documents_of(settings, folder)
    texts = train_text, validation_text = [np.concatenate(each) for each in documents]
    train_rows, validation_rows = (rows_of(*each, settings) for each in zip(texts, documents))
    entropy = order_0_entropy(validation_text)
    trainer = trainer_of(settings)
    checkpoint = folder / "checkpoint.ckpt"
    if settings.resume:
        trainer.load(checkpoint)
    if trainer.step > settings.steps:
        sys.exit(f"train.py: the run is at step {trainer.step} already, after --steps {settings.steps}.")
    first, records = ranks.rank == 0, read_metrics(folder / "metrics.jsonl", trainer.step)
    begin(settings, folder, ranks, trainer, records)
    if first:
        weights = sum(parameter.size for parameter in trainer.model.trainable_params())
        together = f", {ranks.count} processes" if ranks.count > 1 else ""
        print(f"Training on {len(train_text):,} bytes of {settings.data or 'the Python standard library'}. "
              f"Validating on {len(validation_text):,} bytes; their order-0 entropy is {entropy:.3f} bits per byte.\n"
              f"{weights:,} weights, {settings.device}, {settings.mode} mode{together}. Results go to {folder}.")

    validation = validation_batches(validation_rows, settings, ranks.rank)
    prime = validation_text[:min(128, settings.seq_len)]
    with open(folder / "metrics.jsonl" if first else os.devnull, "a", buffering=1) as log, Interrupt() as interrupt, \
            tqdm(total=settings.steps, initial=trainer.step, unit="step", disable=not first,
                 desc="compiling" if settings.mode == "graph" else None) as bar:
        stopped, bits = False, {}
        while trainer.step < settings.steps and not stopped:
            loss = trainer.train_step(training_batches(train_rows, settings, trainer.step, ranks.rank))
            loss, stopped = ranks.mean(loss, interrupt.seen)  # if one is asked to stop, all stop
            bar.set_description(refresh=False)  # the first step has been compiled
            bar.update()
            step, last = trainer.step, trainer.step == settings.steps
            record = {"step": step, "loss": loss}
            if step % settings.validate_every == 0 or last:
                record["validation"], = ranks.mean(trainer.validate(validation))
            bits.update({"bits" if name == "loss" else f"{name} bits": f"{value:.3f}" for name, value in record.items()
                         if name != "step"})
            bar.set_postfix(bits)
            if step % settings.sample_every == 0 or last:  # by every rank: on CPU, none may wait ten seconds
                record["sample"] = printable(trainer.sample(prime, first))
                if first:
                    bar.write(f"--- step {step}, a sample that continues …{printable(prime[-40:].tobytes())!r}:\n"
                              f"{record['sample']}\n---")
            records.append(record)
            print(json.dumps(record), file=log)
            if first and (step % settings.save_every == 0 or last or stopped):
                trainer.save(checkpoint)
    if first:
        draw_curve(folder / "curve.png", records, entropy)
        draw_heads(folder / "heads.png", trainer.model, validation_text[:min(256, settings.seq_len)])
    return trainer.step, records, entropy


def generate(settings, folder):
    """Print a text and how the model of a run continues it; of no text, it continues the end of a line."""
    settings.ranks, settings.sample_len = 1, settings.tokens or settings.sample_len
    prime, trainer = bytes_of(settings.generate), trainer_of(settings)
    trainer.load(folder / "checkpoint.ckpt")
    written = trainer.sample(prime if len(prime) else bytes_of("\n"), sys.stderr.isatty())
    print(printable(prime.tobytes() + written))


def export(settings, folder):
    """Write the model of a run as an ONNX file of one step of decoding, and its vocabulary beside it."""
    settings.ranks, path = 1, Path(settings.export)
    trainer = trainer_of(settings)
    trainer.load(folder / "checkpoint.ckpt")
    step, zero = trainer.model.exportable_step(), ms.Tensor([0], ms.int32)
    ms.export(step, zero, zero, *step.rings(), file_name=str(path.with_suffix("")), file_format="ONNX")
    vocabulary = {"vocabulary": "bytes", "num_tokens": trainer.model.num_tokens, "positions": trainer.model.max_seq_len,
                  "rings": [list(ring.shape) for ring in step.rings()]}
    write_text(path.with_suffix(".json"), json.dumps(vocabulary) + "\n")
    print(f"The model is in {path}, its vocabulary in {path.with_suffix('.json')}.")


def set_device(name):
    try:
        ms.set_device(name)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"train.py: --device {name} is not available: {str(error).splitlines()[0]}")
    if name == "CPU":
        # on few cores, asynchronous launches and threads that wait by spinning cost more than they save
        ms.runtime.launch_blocking()
        os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")


def main(arguments=None):
    settings, folder = read_settings(arguments)
    if settings.compare is not None:
        draw_comparison(folder, settings.compare)
        print(f"The curves of {', '.join(settings.compare)} are in {folder}.")
        return
    set_device(settings.device)
    if settings.generate is not None:
        generate(settings, folder)
        return
    if settings.export is not None:
        export(settings, folder)
        return
    ranks = Ranks(settings.ranks)
    with taken(folder, settings) if ranks.rank == 0 else nullcontext(folder) as folder:
        step, records, entropy = run(settings, folder, ranks)
    if ranks.rank > 0:
        return
    if step < settings.steps:
        print(f"Stopped after step {step}; continue with --resume --out {folder}.")
        return
    print(f"Validation: {records[-1]['validation']:.3f} bits per byte; order-0 entropy: {entropy:.3f}. "
          f"Results are in {folder}.")


if __name__ == "__main__":
    main()
