"""The settings of a run of train.py: from its command line, and from the settings of the run that it resumes."""
import argparse
import json
import math
import os
import sys
from pathlib import Path

from .folder import refuse_a_second_run

FREE_ON_RESUME = ("data", "out", "resume", "steps", "validate_every", "sample_every", "save_every", "sample_len",
                  "temperature", "device", "mode", "text_checksum")
INSTEAD = ("generate", "tokens", "export", "compare")  # what is done with runs that are there, in place of training
FREE_TO_GENERATE = (*INSTEAD, "out", "resume", "temperature", "seed", "device", "ranks")


def positive(number):
    """Return an argparse type: a finite int or float (`number`) above zero."""
    def parse(text):
        value = number(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value
    parse.__name__ = f"positive {number.__name__}"
    return parse


def window(text):
    """Parse the window of a layer: an int, or None for a layer that sees the whole sequence."""
    return None if text == "none" else positive(int)(text)


def make_parser():
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False,
                                     description="Train a byte-level LocalTransformer on real text and sample from it.")
    count, real = positive(int), positive(float)

    def add(name, kind, default, text, *names, **more):
        text += "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, *names, type=kind, default=default, help=text, **more)

    add("--data", str, None, "a file or a folder to train on, plain or .gz (default: the Python standard library)")
    parser.add_argument("--packed", action="store_true", help="each file is a document: documents are packed into "
                        "rows of --seq-len, longer ones in pieces, and none sees another (default: all files are one "
                        "text, which is cut anywhere)")
    add("--out", str, None, "the folder of the run (default: runs/1, runs/2, …)")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in --out (default: the newest in runs/)")
    add("--steps", count, 3000, "optimizer steps")
    add("--batch-size", count, 4, "sequences in a batch, for each process")
    add("--grad-accum", count, 1, "batches in a step, which is that of one batch of all their rows")
    add("--seq-len", count, 128, "bytes in a sequence")
    add("--windows", window, [64], "window of the local attention: one for all layers, or one for each; with 'none', a "
        "layer sees the whole sequence", "--window-size", nargs="+")
    add("--dim", count, 128, "width of the model")
    add("--depth", count, 2, "layers")
    add("--heads", count, 2, "attention heads")
    add("--kv-heads", count, None, "heads of keys and values, a divisor of --heads (default: as many as --heads)")
    add("--dim-head", count, 64, "width of a head")
    add("--num-residual-streams", count, 1, "residual streams; more than 1 are joined by hyper-connections")
    add("--global-layers", count, None, "numbers, from 1, of the layers that full attention is put before", nargs="+")
    add("--learning-rate", real, 2e-3, "highest learning rate, reached after the warm-up")
    add("--warmup", count, 100, "steps of the warm-up; then the learning rate falls to zero along a cosine")
    add("--clip", real, 1.0, "largest global norm of the gradients; they are scaled down to it")
    add("--seed", int, 0, "seed of the weights and of the order of the data")
    add("--validate-every", count, 1000, "steps between validations")
    add("--validate-batches", count, 64, "batches in a validation")
    add("--sample-every", count, 2000, "steps between samples")
    add("--sample-len", count, 200, "bytes in a sample")
    add("--temperature", real, 0.7, "temperature of sampling")
    add("--save-every", count, 1000, "steps between checkpoints")
    add("--device", str, "CPU", "the device to train on", choices=("CPU", "GPU", "Ascend"))
    add("--mode", str, "graph", "graph compiles the steps, pynative runs them eagerly", choices=("graph", "pynative"))
    instead = parser.add_argument_group("instead of training, with runs that are there")
    instead.add_argument("--generate", metavar="TEXT", help="print a continuation of a text (\"\": a text from its "
                         "beginning) by the model of the run in --out (default: the newest in runs/); takes "
                         "--temperature, --seed and --device, too")
    instead.add_argument("--tokens", type=count, help="bytes that --generate adds (default: --sample-len of the run)")
    instead.add_argument("--export", metavar="FILE", help="write the model of the run in --out as an .onnx file, which "
                         "computes one byte after the other, and a .json file with its vocabulary beside it")
    instead.add_argument("--compare", nargs="+", metavar="RUN", help="draw the curves of these runs into one picture, "
                         "--out (default: compare.png)")
    parser.set_defaults(ranks=int(os.environ["MS_WORKER_NUM"]) if "MS_ROLE" in os.environ else 1, text_checksum=None)
    return parser


def read_settings(arguments):
    """Return the settings of a run and its folder. A resumed run keeps its settings, except those in FREE_ON_RESUME,
    and so does a run that generates or is exported, except those in FREE_TO_GENERATE."""
    parser = make_parser()
    settings = parser.parse_args(arguments)
    generating, exporting = settings.generate is not None, settings.export is not None
    if settings.tokens is not None and not generating:
        parser.error("--tokens says how many bytes --generate adds, and needs it.")
    if exporting and not settings.export.endswith(".onnx"):
        parser.error("--export wants a file whose name ends in .onnx.")
    if sum((generating, exporting, settings.compare is not None, settings.resume)) > 1:
        parser.error("--generate, --export, --compare and --resume exclude each other.")
    if settings.compare is not None:
        return settings, Path(settings.out or "compare.png")
    uses_a_run = settings.resume or generating or exporting
    folder = run_folder(settings.out, uses_a_run)
    if not uses_a_run:
        refuse_a_second_run(folder)
        return settings, folder
    return _settings_of_a_run(parser, arguments, settings, folder), folder


def _settings_of_a_run(parser, arguments, settings, folder):
    generating, checkpoint = settings.generate is not None, folder / "checkpoint.ckpt"
    does, free = ("continues", FREE_ON_RESUME) if settings.resume else ("uses", FREE_TO_GENERATE)
    option = "--resume" if settings.resume else "--generate" if generating else "--export"
    if not checkpoint.exists():
        sys.exit(f"train.py: there is nothing to {option[2:]}{' with' * generating}, {checkpoint} does not exist.")
    saved = {**vars(parser.parse_args([])), "ranks": 1, **json.loads((folder / "settings.json").read_text())}
    strange = [name for name in saved if name not in vars(settings)]
    if strange:
        sys.exit(f"train.py: another version of train.py wrote {folder / 'settings.json'}, with the settings "
                 f"{', '.join(strange)}, which this version does not have.")
    if settings.ranks != saved["ranks"] and settings.resume:
        sys.exit(f"train.py: {saved['ranks']} processes trained the run that --resume continues, and {settings.ranks} "
                 "cannot continue it: they would see other batches.")
    kept = {name: value for name, value in saved.items() if name not in ("out", "resume", *INSTEAD)}
    parser.set_defaults(**kept)
    settings = parser.parse_args(arguments)
    for name, value in vars(settings).items():
        if name not in free and value != saved[name]:
            sys.exit(f"train.py: --{name.replace('_', '-')} is {saved[name]} in the run that {option} {does}, "
                     f"and cannot become {value}.")
    return settings


def kept(settings):
    """Return the settings that belong to a run, by name."""
    return {name: value for name, value in vars(settings).items() if name not in INSTEAD}


def run_folder(out, resume):
    """Return the folder of a run; for a new one without `out`, the first number after those in runs/."""
    if out:
        return Path(out)
    newest = max((int(path.name) for path in Path("runs").glob("*") if path.name.isdecimal()), default=0)
    return Path("runs", str(newest if resume else newest + 1))
