"""Train a byte-level `LocalTransformer` on real text and sample from it: `python train.py`.

Without `--data`, the text is the source of the Python standard library on this machine. Each run has its own folder:
settings, a checkpoint (`--resume` continues from it exactly), metrics as JSON lines, the loss curve, and a picture of
each head's attention weights.

`msrun --worker_num=N --local_worker_num=N --join=True train.py …` trains with N processes, each on its own batches.
"""
import json
import math
import os
import signal
import sys
import threading
import time
import zlib


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


if __name__ == "__main__" and os.environ.get("MS_ROLE") == "MS_WORKER":
    name_if_dead()  # before MindSpore starts threads, which a child would not have

os.environ.setdefault("GLOG_v", "3")  # errors only; MindSpore reads it when it is imported

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor, communication, nn, ops  # noqa: E402

from local_attention import LocalMHA, LocalTransformer  # noqa: E402
from local_attention.parallel import AverageGradients  # noqa: E402
from local_attention.plot import attention_weights, plot_weights  # noqa: E402
from training.data import order_0_entropy, read_documents, rows_of, training_batches, validation_batches  # noqa: E402
from training.settings import read_settings  # noqa: E402

try:
    import matplotlib
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f'train.py: {missing.name} is not installed; pip install -e ".[train]" installs what training needs.')

BITS = 1 / math.log(2)  # bits in a nat


# ---- processes

class Ranks:
    """The processes that train together, and the rank of this one. Without msrun there is one process."""

    def __init__(self, count):
        self.rank, self.count = 0, count
        if "MS_ROLE" in os.environ:
            communication.init()
            self.rank = communication.get_rank()

    def mean(self, *values):
        """Return the mean of each number over the processes."""
        if self.count == 1:
            return values
        return (ops.AllReduce()(Tensor(values, ms.float32)) / self.count).asnumpy().tolist()

    def agree(self, values):
        """End every process if their `values` differ. The keys are the names in the message."""
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
        # rotary embedding already gives positions, and small initial vectors need fewer steps than PyTorch's large ones
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
        """Return what a batch adds to the loss of its step, and the batch's own loss."""
        loss = self._loss(tokens, segment_ids)
        return loss / self.settings.grad_accum, loss

    def _add(self, total, gradients):
        return self._each(ops.add, total, gradients)

    def _update(self, gradients):
        if self.average is not None:
            gradients = self.average(gradients)
        return self.optimizer(ops.clip_by_global_norm(gradients, self.settings.clip))

    def _step_of_one(self, *batch):
        """Run a step of one batch. Its gradients stay in the compiled function: this saves a fifth of a small step."""
        (_, loss), gradients = self._gradients(*batch)
        return ops.depend(loss, self._update(gradients))

    def train_step(self, batches):
        """Run one step of the optimizer; return the mean loss of its batches, in bits per byte."""
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
            gradients = ms.mutable(gradients)  # any other tuple is a constant, for which each call would compile
            total = gradients if total is None else ms.mutable(self.add(total, gradients))
        self.update(total)
        return losses

    def validate(self, batches):
        self.model.set_train(False)
        return self._bits([self.loss(*batch) for batch in batches])

    def _bits(self, losses):
        return float(np.mean([float(loss.asnumpy()) for loss in losses])) * BITS

    def sample(self, prime, shown):
        """Return the text that the model writes after `prime`, with a progress bar if `shown`."""
        length = self.settings.sample_len
        with tqdm(total=length, desc="sampling", unit="token", leave=False, disable=not shown) as bar:
            tokens = self.model.generate(Tensor(prime[None].astype(np.int32)), length,
                                         temperature=self.settings.temperature, callback=lambda _: bar.update())
        return bytes(tokens.asnumpy()[0].astype(np.uint8).tolist())

    def save(self, path):
        """Save weights, optimizer state and step. The file at `path` is complete at every moment."""
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
        """Return a checksum of the weights and the optimizer's state."""
        total = 0
        for parameter in self.optimizer.get_parameters():
            total = zlib.crc32(parameter.asnumpy().tobytes(), total)
        return total


# ---- the files of a run

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
    """Draw the attention weights of each head of each layer over a text."""
    names = []
    for number, place in enumerate(model.global_places, 1):
        names += [f"layer {number}, global"] * (place > 0) + [f"layer {number}"]
    plot_weights(attention_weights(model, Tensor(text[None].astype(np.int32))), names).savefig(path, dpi=120)


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


def printable(text):
    """Return bytes as text for a terminal. Bytes that are not UTF-8 or would control the terminal are replaced."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in decoded)


def run(settings, folder, ranks):
    documents = read_documents(settings.data, settings.seq_len)
    texts = train_text, validation_text = [np.concatenate(each) for each in documents]
    train_rows, validation_rows = (rows_of(*each, settings) for each in zip(texts, documents))
    entropy = order_0_entropy(validation_text)
    try:
        trainer = Trainer(settings)
    except ValueError as error:  # the model's message about a wrong size or seed
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
        print(f"Training on {len(train_text):,} bytes of {settings.data or 'the Python standard library'}. "
              f"Validating on {len(validation_text):,} bytes; their order-0 entropy is {entropy:.3f} bits per byte.\n"
              f"{weights:,} weights, {settings.device}, {settings.mode} mode{together}. Results go to {folder}.")

    validation = validation_batches(validation_rows, settings, ranks.rank)
    prime = validation_text[:min(128, settings.seq_len)]
    step_tokens = settings.grad_accum * settings.ranks * settings.batch_size * settings.seq_len
    with open(folder / "metrics.jsonl" if first else os.devnull, "a", buffering=1) as log, Interrupt() as interrupt, \
            tqdm(total=settings.steps * step_tokens, initial=trainer.step * step_tokens, unit="token",
                 unit_scale=True, disable=not first) as bar:
        stopped = False
        while trainer.step < settings.steps and not stopped:
            loss = trainer.train_step(training_batches(train_rows, settings, trainer.step, ranks.rank))
            loss, stopped = ranks.mean(loss, interrupt.seen)  # if one is asked to stop, all stop
            bar.update(step_tokens)
            step, last = trainer.step, trainer.step == settings.steps
            record = {"step": step, "loss": loss}
            if step % settings.validate_every == 0 or last:
                record["validation"], = ranks.mean(trainer.validate(validation))
            bar.set_postfix({name: f"{value:.3f}" for name, value in record.items() if name != "step"})
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


def main(arguments=None):
    settings, folder = read_settings(arguments)
    try:
        ms.set_device(settings.device)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"train.py: --device {settings.device} is not available: {str(error).splitlines()[0]}")
    if settings.device == "CPU":
        # on few cores, asynchronous launches and threads that wait by spinning cost more than they save
        ms.runtime.launch_blocking()
        os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")
    ranks = Ranks(settings.ranks)
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
