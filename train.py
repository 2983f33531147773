"""Train a byte-level `LocalTransformer` on real text and sample from it: `python train.py`.

Without `--data` the text is the source of the Python standard library on this machine. A run writes into a folder of
its own: settings, a checkpoint (`--resume` continues from it exactly), metrics as JSON lines, the loss curve and a
picture of what its heads look at.
"""
import argparse
import gzip
import json
import math
import os
import signal
import sys
import sysconfig
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # errors only; MindSpore reads it as it is imported

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor, nn, ops  # noqa: E402

from local_attention import LocalMHA, LocalTransformer  # noqa: E402
from local_attention.plot import attention_weights, plot_weights  # noqa: E402

try:
    import matplotlib
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f'train.py: {missing.name} is not installed; pip install -e ".[train]" brings what training needs.')

BITS = 1 / math.log(2)  # in a nat
VALIDATION_SHARE = 0.1  # of the text, its end
FREE_ON_RESUME = ("data", "out", "resume", "steps", "validate_every", "sample_every", "save_every", "sample_len",
                  "temperature", "device", "mode")


# ---- settings

def positive(number):
    """An argparse type: `number`, an int or a float, above zero."""
    def parse(text):
        value = number(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value
    parse.__name__ = f"positive {number.__name__}"
    return parse


def make_parser():
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False,
                                     description="Train a byte-level LocalTransformer on real text and sample from it.")
    count, real = positive(int), positive(float)

    def add(name, kind, default, text, **more):
        text += "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, type=kind, default=default, help=text, **more)

    add("--data", str, None, "a file or a folder, plain or .gz; the Python standard library where not given")
    add("--out", str, None, "the folder of the run; runs/1, runs/2, … where not given")
    parser.add_argument("--resume", action="store_true", help="continue the run of --out, or the newest in runs/")
    add("--steps", count, 800, "optimizer steps")
    add("--batch-size", count, 4, "sequences in a batch")
    add("--grad-accum", count, 1, "batches whose gradients are averaged for a step")
    add("--seq-len", count, 256, "bytes in a sequence")
    add("--window-size", count, 64, "window of the local attention")
    add("--dim", count, 128, "width of the model")
    add("--depth", count, 2, "layers")
    add("--heads", count, 2, "attention heads")
    add("--dim-head", count, 64, "width of a head")
    add("--num-residual-streams", count, 1, "residual streams; above 1, with hyper-connections")
    add("--global-layers", count, None, "layers, by number from 1, with full attention before them", nargs="+")
    add("--learning-rate", real, 4e-3, "at its highest, after the warm-up")
    add("--warmup", count, 30, "steps until then; afterwards it falls along a cosine to a tenth")
    add("--clip", real, 1.0, "largest global norm of a gradient")
    add("--seed", int, 0, "of the weights and of the order of the data")
    add("--validate-every", count, 200, "steps between validations")
    add("--validate-batches", count, 16, "batches in a validation")
    add("--sample-every", count, 400, "steps between samples")
    add("--sample-len", count, 200, "bytes in a sample")
    add("--temperature", real, 0.7, "of sampling")
    add("--save-every", count, 200, "steps between checkpoints")
    add("--device", str, "CPU", "where to train", choices=("CPU", "GPU", "Ascend"))
    add("--mode", str, "graph", "compiled steps, or eager ones", choices=("graph", "pynative"))
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
    saved = {**vars(parser.parse_args([])), **json.loads((folder / "settings.json").read_text())}
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


# ---- data

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


def read_text(data, seq_len):
    """The training and the validation text as arrays of bytes. Files of a folder that are not text are left out."""
    files = files_of(data)
    contents = [read_bytes(path) for path in files]
    text = b"".join(content for content in contents if len(files) == 1 or b"\0" not in content[:1024])
    held_back = int(len(text) * VALIDATION_SHARE)
    if held_back <= seq_len:
        sys.exit(f"train.py: {data or 'the standard library'} holds {len(text)} bytes of text, but --seq-len {seq_len} "
                 f"needs more than {math.ceil((seq_len + 1) / VALIDATION_SHARE)}.")
    array = np.frombuffer(text, np.uint8)
    return array[:-held_back], array[-held_back:]


def order_0_entropy(text):
    """Bits per byte of the best code that knows how often each byte occurs and nothing else."""
    share = np.bincount(text, minlength=256) / len(text)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def sequences(text, starts, length):
    return Tensor(text[np.asarray(starts)[:, None] + np.arange(length)].astype(np.int32))


def training_batches(text, settings, step):
    """The batches of one step, a function of seed and step alone: a resumed run sees what it would have seen."""
    starts = np.random.default_rng((settings.seed, step)).integers(
        0, len(text) - settings.seq_len, (settings.grad_accum, settings.batch_size))
    return [sequences(text, row, settings.seq_len + 1) for row in starts]


def validation_batches(text, settings):
    """Sequences evenly spread over the validation text, the same at every validation."""
    shape = settings.validate_batches, settings.batch_size
    starts = np.linspace(0, len(text) - settings.seq_len - 1, math.prod(shape)).astype(int).reshape(shape)
    return [sequences(text, row, settings.seq_len + 1) for row in starts]


# ---- training

def learning_rate(settings, step):
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(progress, 1)))


class Trainer:
    """A model, its optimizer, and the compiled functions that train it."""

    def __init__(self, settings):
        self.settings = settings
        self.step = 0
        ms.set_seed(settings.seed)
        heads = dict(dim=settings.dim, heads=settings.heads, dim_head=settings.dim_head, causal=True)
        full = None
        if settings.global_layers:  # one window, as long as the sequence
            full = LocalMHA(
                window_size=settings.seq_len, look_backward=0, exact_windowsize=False, prenorm=True, **heads)
        self.model = LocalTransformer(
            **heads, num_tokens=256, max_seq_len=settings.seq_len, depth=settings.depth,
            local_attn_window_size=settings.window_size, num_residual_streams=settings.num_residual_streams,
            global_attn_layer=full, layers_insert_global_attn=settings.global_layers)
        self.optimizer = nn.Adam(self.model.trainable_params(), learning_rate=settings.learning_rate, beta2=0.99)
        self._each = ops.HyperMap()
        compiled = ms.jit if settings.mode == "graph" else lambda function: function
        self.loss = compiled(self._loss)
        self.gradients = compiled(ms.value_and_grad(self._share, None, self.model.trainable_params(), has_aux=True))
        self.add = compiled(self._add)
        self.update = compiled(self._update)

    def _loss(self, tokens):
        return self.model(tokens, return_loss=True)

    def _share(self, tokens):
        """What a batch adds to the loss of its step, and its own loss beside it."""
        loss = self._loss(tokens)
        return loss / self.settings.grad_accum, loss

    def _add(self, total, gradients):
        return self._each(ops.add, total, gradients)

    def _update(self, gradients):
        return self.optimizer(ops.clip_by_global_norm(gradients, self.settings.clip))

    def train_step(self, batches):
        """One step of the optimizer; returns the loss over its batches, in bits per byte."""
        self.model.set_train(True)
        ops.assign(self.optimizer.learning_rate, Tensor(learning_rate(self.settings, self.step), ms.float32))
        losses, total = [], None
        for tokens in batches:
            (_, loss), gradients = self.gradients(tokens)
            losses.append(loss)
            gradients = ms.mutable(gradients)  # a tuple that is not mutable is a constant, and compiled anew each time
            total = gradients if total is None else ms.mutable(self.add(total, gradients))
        self.update(total)
        self.step += 1
        return self._bits(losses)

    def validate(self, batches):
        self.model.set_train(False)
        return self._bits([self.loss(tokens) for tokens in batches])

    def _bits(self, losses):
        return float(np.mean([float(loss.asnumpy()) for loss in losses])) * BITS

    def sample(self, prime):
        tokens = self.model.generate(Tensor(prime[None].astype(np.int32)), self.settings.sample_len,
                                     temperature=self.settings.temperature)
        return bytes(tokens.asnumpy()[0].astype(np.uint8).tolist())

    def save(self, path):
        """Weights, optimizer state and step; the file under its own name is always a whole one."""
        temporary = path.with_name("checkpoint.tmp.ckpt")
        ms.save_checkpoint(self.optimizer, str(temporary), append_dict={"step": self.step})
        os.replace(temporary, path)

    def load(self, path):
        values = ms.load_checkpoint(str(path))
        self.step = int(values.pop("step").asnumpy())
        missing, left_over = ms.load_param_into_net(self.optimizer, values, strict_load=True)
        if missing or left_over:
            sys.exit(f"train.py: {path} does not belong to this model: {', '.join([*missing, *left_over])}.")


# ---- what a run leaves behind

def read_metrics(path, step):
    """The records of a run up to `step`: what an interrupted run logged after its checkpoint is done again."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["step"] <= step]


def draw_curve(path, records, entropy):
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, label, style in (("loss", "training", {"linewidth": 0.8}), ("validation", "validation", {"marker": "o"})):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points), label=label, **style)
    axes.axhline(entropy, color="grey", linestyle=":", label="order-0 entropy")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_heads(path, model, text):
    """What each head of each layer looks at, over a text."""
    figure = plot_weights(attention_weights(model, Tensor(text[None].astype(np.int32))))
    figure.suptitle("query by key; a column for each head, a row for each layer")
    figure.savefig(path, dpi=120)


class Interrupt:
    """Remembers Ctrl-C or a request to terminate, so that the step at hand is finished and saved first."""

    def __enter__(self):
        self.seen = False
        self.before = {number: signal.signal(number, self._see) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _see(self, number, frame):
        self.seen = True


def printable(text):
    """Bytes as text for a terminal: what is not UTF-8, or would control the terminal, is replaced."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in decoded)


def run(settings, folder):
    train_text, validation_text = read_text(settings.data, settings.seq_len)
    entropy = order_0_entropy(validation_text)
    try:
        trainer = Trainer(settings)
    except ValueError as error:  # what the model says of a size or a seed that cannot be
        sys.exit(f"train.py: {error}")
    checkpoint = folder / "checkpoint.ckpt"
    if settings.resume:
        trainer.load(checkpoint)
    if trainer.step > settings.steps:
        sys.exit(f"train.py: the run is at step {trainer.step} already, after --steps {settings.steps}.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(vars(settings), indent=2) + "\n")

    weights = sum(parameter.size for parameter in trainer.model.trainable_params())
    print(f"Training on {len(train_text):,} bytes of {settings.data or 'the Python standard library'}, "
          f"validating on {len(validation_text):,}, whose order-0 entropy is {entropy:.3f} bits per byte.\n"
          f"{weights:,} weights, {settings.device}, {settings.mode} mode; results go to {folder}.")

    validation = validation_batches(validation_text, settings)
    prime = validation_text[:min(128, settings.seq_len)]
    records = read_metrics(folder / "metrics.jsonl", trainer.step)
    step_tokens = settings.grad_accum * settings.batch_size * settings.seq_len
    with open(folder / "metrics.jsonl", "w", buffering=1) as log, Interrupt() as interrupt, \
            tqdm(total=settings.steps * step_tokens, initial=trainer.step * step_tokens, unit="token",
                 unit_scale=True) as bar:
        for record in records:
            print(json.dumps(record), file=log)
        while trainer.step < settings.steps and not interrupt.seen:
            record = {"loss": trainer.train_step(training_batches(train_text, settings, trainer.step))}
            bar.update(step_tokens)
            step, last = trainer.step, trainer.step == settings.steps
            record = {"step": step, **record}
            if step % settings.validate_every == 0 or last:
                record["validation"] = trainer.validate(validation)
            bar.set_postfix({name: f"{value:.3f}" for name, value in record.items() if name != "step"})
            if step % settings.sample_every == 0 or last:
                record["sample"] = printable(trainer.sample(prime))
                bar.write(f"--- step {step}, after the validation text's …{printable(prime[-40:].tobytes())!r}:\n"
                          f"{record['sample']}\n---")
            records.append(record)
            print(json.dumps(record), file=log)
            if step % settings.save_every == 0 or last or interrupt.seen:
                trainer.save(checkpoint)
    draw_curve(folder / "curve.png", records, entropy)
    draw_heads(folder / "heads.png", trainer.model, validation_text[:min(256, settings.seq_len)])
    return trainer.step, records, entropy


def main(arguments=None):
    settings, folder = read_settings(arguments)
    try:
        ms.set_device(settings.device)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"train.py: --device {settings.device} is not available: {str(error).splitlines()[0]}")
    if settings.device == "CPU":
        ms.runtime.launch_blocking()  # on few cores, the queue of asynchronous launches costs more than it saves
    step, records, entropy = run(settings, folder)
    if step < settings.steps:
        print(f"Stopped after step {step}; --resume --out {folder} continues.")
        return
    print(f"Validation: {records[-1]['validation']:.3f} bits per byte; order-0 entropy: {entropy:.3f}. See {folder}.")


if __name__ == "__main__":
    main()
