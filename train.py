"""Train a byte-level `LocalTransformer` on real text and sample from it: `python train.py`.

Without `--data` the text is the source of the Python standard library on this machine. A run writes into a folder of
its own: settings, a checkpoint (`--resume` continues from it exactly), metrics as JSON lines, the loss curve and a
picture of what its heads look at.

`msrun --worker_num=N --local_worker_num=N --join=True train.py …` trains with N processes, each on batches of its own.
"""
import argparse
import bisect
import gzip
import json
import math
import os
import signal
import sys
import sysconfig
import threading
import time
import zlib
from pathlib import Path


def name_if_dead():
    """Go on in a child, and say which rank it was if that dies: msrun knows processes alone, and ends the others."""
    rank, parent = os.environ.get("RANK_ID", "of this process"), os.getpid()
    child = os.fork()
    if child == 0:
        def watch():
            while os.getppid() == parent:
                time.sleep(1)
            print(f"train.py: the parent of rank {rank} was killed, and so it ends.", file=sys.stderr, flush=True)
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


if __name__ == "__main__" and os.environ.get("MS_ROLE") == "MS_WORKER":
    name_if_dead()  # before MindSpore starts threads, which a child would not have

os.environ.setdefault("GLOG_v", "3")  # errors only; MindSpore reads it as it is imported

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor, communication, nn, ops  # noqa: E402

from local_attention import LocalMHA, LocalTransformer  # noqa: E402
from local_attention.parallel import AverageGradients  # noqa: E402
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
    add("--steps", count, 4000, "optimizer steps")
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


# ---- processes

class Ranks:
    """The processes that train together, of which this one has a number. Under msrun alone is there more than one."""

    def __init__(self, count):
        self.rank, self.count = 0, count
        if "MS_ROLE" in os.environ:
            communication.init()
            self.rank = communication.get_rank()

    def mean(self, *values):
        """Of numbers, over the processes."""
        if self.count == 1:
            return values
        return (ops.AllReduce()(Tensor(values, ms.float32)) / self.count).asnumpy().tolist()

    def agree(self, values):
        """Ends every process if they were not given the same; `values` are by the names to call them by."""
        if self.count == 1:
            return
        text = np.frombuffer(json.dumps(values).encode(), np.uint8).astype(np.int32)
        lengths = ops.AllGather()(Tensor([len(text)], ms.int32)).asnumpy()
        texts = ops.AllGather()(Tensor(np.resize(text, lengths.max()))).asnumpy().reshape(self.count, -1)
        first, *others = (json.loads(text[:length].astype(np.uint8).tobytes()) for text, length in zip(texts, lengths))
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other.get(name) != value:
                    sys.exit(f"train.py: {name} is {value} for rank 0 and {other.get(name)} for rank {rank}, but must "
                             "be the same for all.")


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


# ---- training

def learning_rate(settings, step):
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1)))


class Trainer:
    """A model, its optimizer, and the compiled functions that train it."""

    def __init__(self, settings):
        self.settings = settings
        self.step = 0
        ms.set_seed(settings.seed)
        heads = dict(dim=settings.dim, heads=settings.heads, kv_heads=settings.kv_heads, dim_head=settings.dim_head,
                     causal=True)
        full = None
        if settings.global_layers:  # one window, as long as the sequence
            full = LocalMHA(
                window_size=settings.seq_len, look_backward=0, exact_windowsize=False, prenorm=True, **heads)
        windows = settings.windows * (settings.depth if len(settings.windows) == 1 else 1)
        self.model = LocalTransformer(
            **heads, num_tokens=256, max_seq_len=settings.seq_len, depth=settings.depth,
            local_attn_window_size=tuple(windows), num_residual_streams=settings.num_residual_streams,
            global_attn_layer=full, layers_insert_global_attn=settings.global_layers)
        # rotary embedding tells positions already, and small vectors are learned in fewer steps than those of PyTorch
        for embedding, scale in ((self.model.token_emb, 0.3), (self.model.pos_emb, 0.)):
            embedding.embedding_table.set_data(embedding.embedding_table * scale)
        self.optimizer = nn.Adam(self.model.trainable_params(), learning_rate=settings.learning_rate, beta2=0.99)
        self.average = AverageGradients() if settings.ranks > 1 else None
        self._each = ops.HyperMap()
        compiled = ms.jit if settings.mode == "graph" else lambda function: function
        self.loss = compiled(self._loss)
        self._gradients = ms.value_and_grad(self._share, None, self.model.trainable_params(), has_aux=True)
        self.gradients = compiled(self._gradients)
        self.add = compiled(self._add)
        self.update = compiled(self._update)
        self.step_of_one = compiled(self._step_of_one)

    def _loss(self, tokens, segment_ids=None):
        return self.model(tokens, return_loss=True, segment_ids=segment_ids)

    def _share(self, tokens, segment_ids=None):
        """What a batch adds to the loss of its step, and its own loss beside it."""
        loss = self._loss(tokens, segment_ids)
        return loss / self.settings.grad_accum, loss

    def _add(self, total, gradients):
        return self._each(ops.add, total, gradients)

    def _update(self, gradients):
        if self.average is not None:
            gradients = self.average(gradients)
        return self.optimizer(ops.clip_by_global_norm(gradients, self.settings.clip))

    def _step_of_one(self, *batch):
        """A step of a single batch, whose gradients need not leave the compiled function: a fifth of a small step."""
        (_, loss), gradients = self._gradients(*batch)
        return ops.depend(loss, self._update(gradients))

    def train_step(self, batches):
        """One step of the optimizer; returns the loss over its batches, in bits per byte."""
        self.model.set_train(True)
        ops.assign(self.optimizer.learning_rate, Tensor(learning_rate(self.settings, self.step), ms.float32))
        losses = [self.step_of_one(*batches[0])] if len(batches) == 1 else self._step_of_several(batches)
        self.step += 1
        return self._bits(losses)

    def _step_of_several(self, batches):
        losses, total = [], None
        for batch in batches:
            (_, loss), gradients = self.gradients(*batch)
            losses.append(loss)
            gradients = ms.mutable(gradients)  # a tuple that is not mutable is a constant, and compiled anew each time
            total = gradients if total is None else ms.mutable(self.add(total, gradients))
        self.update(total)
        return losses

    def validate(self, batches):
        self.model.set_train(False)
        return self._bits([self.loss(*batch) for batch in batches])

    def _bits(self, losses):
        return float(np.mean([float(loss.asnumpy()) for loss in losses])) * BITS

    def sample(self, prime, shown):
        """What the model writes after `prime`; whether its progress is `shown`."""
        length = self.settings.sample_len
        with tqdm(total=length, desc="sampling", unit="token", leave=False, disable=not shown) as bar:
            tokens = self.model.generate(Tensor(prime[None].astype(np.int32)), length,
                                         temperature=self.settings.temperature, callback=lambda _: bar.update())
        return bytes(tokens.asnumpy()[0].astype(np.uint8).tolist())

    def save(self, path):
        """Weights, optimizer state and step; the file under its own name is always a whole one."""
        temporary = path.with_name("checkpoint.tmp.ckpt")
        ms.save_checkpoint(self.optimizer, str(temporary), append_dict={"step": self.step})
        replace(temporary, path)

    def load(self, path):
        values = ms.load_checkpoint(str(path))
        self.step = int(values.pop("step").asnumpy())
        missing, left_over = ms.load_param_into_net(self.optimizer, values, strict_load=True)
        if missing or left_over:
            sys.exit(f"train.py: {path} does not belong to this model: {', '.join([*missing, *left_over])}.")


    def checksum(self):
        """Of the weights and the optimizer's state."""
        total = 0
        for parameter in self.optimizer.get_parameters():
            total = zlib.crc32(parameter.asnumpy().tobytes(), total)
        return total


# ---- what a run leaves behind

def replace(temporary, path):
    """A file that is written in another's place: it has that one's name once it is all there, and not before."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    replace(temporary, path)


def read_metrics(path, step):
    """The records of a run up to `step`: what an interrupted run logged after its checkpoint is done again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a line without its end is not all there
    return [record for record in records if record["step"] <= step]


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
    names = []
    for number, place in enumerate(model.global_places, 1):
        names += [f"layer {number}, global"] * (place > 0) + [f"layer {number}"]
    plot_weights(attention_weights(model, Tensor(text[None].astype(np.int32))), names).savefig(path, dpi=120)


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


def run(settings, folder, ranks):
    documents = read_documents(settings.data, settings.seq_len)
    texts = train_text, validation_text = [np.concatenate(each) for each in documents]
    train_rows, validation_rows = (rows_of(*each, settings) for each in zip(texts, documents))
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
    ranks.agree({**{f"--{name.replace('_', '-')}": value for name, value in vars(settings).items()},
                 "the run's folder": str(folder), "the step of the checkpoint": trainer.step,
                 "the checksum of the text": zlib.crc32(validation_text, zlib.crc32(train_text)),
                 "the checksum of the weights": trainer.checksum()})
    first = ranks.rank == 0
    records = read_metrics(folder / "metrics.jsonl", trainer.step)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "settings.json", json.dumps(vars(settings), indent=2) + "\n")
        write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        weights = sum(parameter.size for parameter in trainer.model.trainable_params())
        together = f", {ranks.count} processes" if ranks.count > 1 else ""
        print(f"Training on {len(train_text):,} bytes of {settings.data or 'the Python standard library'}, "
              f"validating on {len(validation_text):,}, whose order-0 entropy is {entropy:.3f} bits per byte.\n"
              f"{weights:,} weights, {settings.device}, {settings.mode} mode{together}; results go to {folder}.")

    validation = validation_batches(validation_rows, settings, ranks.rank)
    prime = validation_text[:min(128, settings.seq_len)]
    step_tokens = settings.grad_accum * settings.ranks * settings.batch_size * settings.seq_len
    with open(folder / "metrics.jsonl" if first else os.devnull, "a", buffering=1) as log, Interrupt() as interrupt, \
            tqdm(total=settings.steps * step_tokens, initial=trainer.step * step_tokens, unit="token",
                 unit_scale=True, disable=not first) as bar:
        stopped = False
        while trainer.step < settings.steps and not stopped:
            loss = trainer.train_step(training_batches(train_rows, settings, trainer.step, ranks.rank))
            loss, stopped = ranks.mean(loss, interrupt.seen)  # all of them stop where one is asked to
            bar.update(step_tokens)
            step, last = trainer.step, trainer.step == settings.steps
            record = {"step": step, "loss": loss}
            if step % settings.validate_every == 0 or last:
                record["validation"], = ranks.mean(trainer.validate(validation))
            bar.set_postfix({name: f"{value:.3f}" for name, value in record.items() if name != "step"})
            if step % settings.sample_every == 0 or last:  # by all: on CPU, none waits longer than ten seconds
                record["sample"] = printable(trainer.sample(prime, first))
                if first:
                    bar.write(f"--- step {step}, after the validation text's …{printable(prime[-40:].tobytes())!r}:\n"
                              f"{record['sample']}\n---")
            records.append(record)
            print(json.dumps(record), file=log)
            if first and (step % settings.save_every == 0 or last or stopped):
                trainer.save(checkpoint)
    if first:
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
        # on few cores, launching asynchronously costs more than it saves, and so do threads that wait by spinning
        ms.runtime.launch_blocking()
        os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")
    ranks = Ranks(settings.ranks)
    step, records, entropy = run(settings, folder, ranks)
    if ranks.rank > 0:
        return
    if step < settings.steps:
        print(f"Stopped after step {step}; --resume --out {folder} continues.")
        return
    print(f"Validation: {records[-1]['validation']:.3f} bits per byte; order-0 entropy: {entropy:.3f}. See {folder}.")


if __name__ == "__main__":
    main()
