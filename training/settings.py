"""The settings of a run of train.py, by its command line and by what a run before it has saved."""
import argparse
import json
import math
import os
import sys
from pathlib import Path

FREE_ON_RESUME = ("data", "out", "resume", "steps", "validate_every", "sample_every", "save_every", "sample_len",
                  "temperature", "device", "mode")


def positive(number):
    """An argparse type: `number`, an int or a float, above zero."""
    def parse(text):
        value = number(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value
    parse.__name__ = f"positive {number.__name__}"
    return parse


def window(text):
    """An argparse type: the window of a layer, None for one that sees all."""
    return None if text == "none" else positive(int)(text)


def make_parser():
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False,
                                     description="Train a byte-level LocalTransformer on real text and sample from it.")
    count, real = positive(int), positive(float)

    def add(name, kind, default, text, *names, **more):
        text += "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, *names, type=kind, default=default, help=text, **more)

    add("--data", str, None, "a file or a folder, plain or .gz; the Python standard library where not given")
    parser.add_argument("--packed", action="store_true", help="files are documents, packed into rows of --seq-len with "
                        "none seen from another, and not one text to be cut anywhere; longer ones are cut into pieces")
    add("--out", str, None, "the folder of the run; runs/1, runs/2, … where not given")
    parser.add_argument("--resume", action="store_true", help="continue the run of --out, or the newest in runs/")
    add("--steps", count, 3000, "optimizer steps")
    add("--batch-size", count, 4, "sequences in a batch, of each process")
    add("--grad-accum", count, 1, "batches whose gradients are averaged for a step")
    add("--seq-len", count, 128, "bytes in a sequence")
    add("--windows", window, [64], "window of the local attention; several are one for each layer, 'none' for a layer "
        "that sees the whole sequence", "--window-size", nargs="+")
    add("--dim", count, 128, "width of the model")
    add("--depth", count, 2, "layers")
    add("--heads", count, 2, "attention heads")
    add("--kv-heads", count, None, "heads of keys and values, which divide --heads; as many where not given")
    add("--dim-head", count, 64, "width of a head")
    add("--num-residual-streams", count, 1, "residual streams; above 1, with hyper-connections")
    add("--global-layers", count, None, "layers, by number from 1, with full attention before them", nargs="+")
    add("--learning-rate", real, 2e-3, "at its highest, after the warm-up")
    add("--warmup", count, 100, "steps until then; afterwards it falls along a cosine to zero")
    add("--clip", real, 1.0, "largest global norm of a gradient")
    add("--seed", int, 0, "of the weights and of the order of the data")
    add("--validate-every", count, 1000, "steps between validations")
    add("--validate-batches", count, 64, "batches in a validation")
    add("--sample-every", count, 2000, "steps between samples")
    add("--sample-len", count, 200, "bytes in a sample")
    add("--temperature", real, 0.7, "of sampling")
    add("--save-every", count, 1000, "steps between checkpoints")
    add("--device", str, "CPU", "where to train", choices=("CPU", "GPU", "Ascend"))
    add("--mode", str, "graph", "compiled steps, or eager ones", choices=("graph", "pynative"))
    parser.set_defaults(ranks=int(os.environ["MS_WORKER_NUM"]) if "MS_ROLE" in os.environ else 1)
    return parser


def read_settings(arguments):
    """The settings of a run and its folder. A resumed run keeps its own, save for those free to change."""
    parser = make_parser()
    settings = parser.parse_args(arguments)
    folder = run_folder(settings.out, settings.resume)
    checkpoint = folder / "checkpoint.ckpt"
    if not settings.resume:
        if checkpoint.exists():
            sys.exit(f"train.py: {folder} already holds a run; continue it with --resume, or name another --out.")
        return settings, folder
    if not checkpoint.exists():
        sys.exit(f"train.py: there is nothing to resume, {checkpoint} does not exist.")
    saved = {**vars(parser.parse_args([])), "ranks": 1, **json.loads((folder / "settings.json").read_text())}
    strange = [name for name in saved if name not in vars(settings)]
    if strange:
        sys.exit(f"train.py: another version of it wrote {folder / 'settings.json'}, with {', '.join(strange)}.")
    if settings.ranks != saved["ranks"]:
        sys.exit(f"train.py: {saved['ranks']} processes trained the run that --resume continues, and {settings.ranks} "
                 "cannot: they would see other batches.")
    parser.set_defaults(**{name: value for name, value in saved.items() if name not in ("out", "resume")})
    settings = parser.parse_args(arguments)
    for name, value in vars(settings).items():
        if name not in FREE_ON_RESUME and value != saved[name]:
            sys.exit(f"train.py: --{name.replace('_', '-')} is {saved[name]} in the run that --resume continues, "
                     f"and cannot become {value}.")
    return settings, folder


def run_folder(out, resume):
    if out:
        return Path(out)
    newest = max((int(path.name) for path in Path("runs").glob("*") if path.name.isdecimal()), default=0)
    return Path("runs", str(newest if resume else newest + 1))
