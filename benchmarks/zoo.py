"""One layer of a zoo's Mistral, with the zoo's eager attention and with this package's: time, and growth of memory.

    python benchmarks/zoo.py mindone|mindnlp FILE.json [longest]     in that zoo's environment, see tests/zoo/run.sh
    python benchmarks/zoo.py plot PICTURE FILE.json ...

Hidden size 512, 8 query heads on 2 key heads of 64, window 512, batch 1, float32. Every figure is of a process of its
own: the best of three calls, and by how much the process grows over what it was before the first.
"""
import json
import re
import subprocess
import sys
import time
from pathlib import Path

LENGTHS = (1024, 2048, 4096, 8192, 16384)
SETTINGS = dict(vocab_size=64, hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8,
                num_key_value_heads=2, head_dim=64, max_position_embeddings=32768, sliding_window=512)
SECONDS = 300  # which a figure may take


def layer(which, attention):
    """Forward, and forward with backward, of a model's one layer, as functions of a number of tokens."""
    import numpy as np
    if which == "mindone":
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "zoo"))
        import mindspore as ms
        import mint_on_cpu  # noqa: F401
        from mindone.transformers import MistralModel
        from transformers import MistralConfig
    else:
        import mindnlp  # noqa: F401
        import torch
        from mindtorch import autograd
        from transformers import MistralConfig, MistralModel
    from local_attention import zoo
    zoo.register(zoos=which)
    model = MistralModel(MistralConfig(**SETTINGS, attn_implementation=attention))
    model.config._attn_implementation = attention

    def tokens(n):
        ids = np.random.RandomState(0).randint(0, 64, (1, n))
        return ms.Tensor(ids) if which == "mindone" else torch.tensor(ids)

    def loss(ids):
        return (model(ids, use_cache=False, return_dict=True).last_hidden_state ** 2).mean()

    if which == "mindone":
        weights = model.trainable_params()
        gradients = ms.value_and_grad(loss, None, weights)
        return tokens, lambda ids: loss(ids).asnumpy(), lambda ids: [each.asnumpy() for each in gradients(ids)[1]]
    weights = list(model.parameters())

    def forward(ids):
        with torch.no_grad():
            return loss(ids).numpy()

    def backward(ids):
        autograd.value_and_grad(lambda: loss(ids), weights)()
        return [each.grad.numpy() for each in weights if each.grad is not None]
    return tokens, forward, backward


def status(name):
    """In bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def measure(which, attention, kind, n):
    tokens, forward, backward = layer(which, attention)
    call = forward if kind == "forward" else backward
    call(tokens(64))
    ids = tokens(n)
    before = status("VmRSS")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call(ids)
        times.append(time.perf_counter() - start)
        if sum(times) > SECONDS / 3:
            break
    return dict(seconds=min(times), bytes=status("VmHWM") - before)


def run(which, file, longest):
    found = []
    for kind in ("forward", "forward and backward"):
        for n in (n for n in LENGTHS if n <= longest):
            row = {}
            for attention in ("eager", "local_attention"):
                command = [sys.executable, __file__, "one", which, attention, kind, str(n)]
                try:
                    output = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS).stdout
                    row[attention] = json.loads(output.strip().splitlines()[-1])
                except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError):
                    row[attention] = None  # too long, or out of memory
            found.append(dict(zoo=which, kind=kind, n=n, **row))
            cells = [f"{name} {each['seconds']:.2f} s, {each['bytes'] / 2**20:.0f} MiB" if each else f"{name} none"
                     for name, each in row.items()]
            if all(row.values()):
                eager, ours = row.values()
                cells.append(f"eager takes {eager['seconds'] / ours['seconds']:.1f} times as long "
                             f"and {eager['bytes'] / ours['bytes']:.1f} times the memory")
            print(f"{which}, {kind}, {n}: " + "; ".join(cells), flush=True)
            Path(file).write_text(json.dumps(found, indent=1))


def plot(picture, files):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [row for file in files for row in json.loads(Path(file).read_text()) if row["kind"] != "forward"]
    figure, grid = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, what, label, unit in zip(grid, ("seconds", "bytes"), ("seconds", "MiB more than before"), (1, 2**20)):
        for zoo, colour in (("mindone", "#1f77b4"), ("mindnlp", "#d2691e")):
            for attention, line in (("eager", "--"), ("local_attention", "-")):
                points = [(row["n"], row[attention][what] / unit) for row in rows
                          if row["zoo"] == zoo and row[attention]]
                if points:
                    axes.plot(*zip(*points), line, marker="o", markersize=4, color=colour, label=f"{zoo}, {attention}")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, xticks=LENGTHS)
        axes.set_xticklabels([f"{n // 1024}k" for n in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=.3)
    grid[0].legend(fontsize="small")
    figure.suptitle("One Mistral layer on CPU, forward and backward, window 512", fontsize="medium")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    if task == "one":
        which, attention, kind, n = rest
        print(json.dumps(measure(which, attention, kind, int(n))))
    elif task == "plot":
        plot(rest[0], rest[1:])
    else:
        run(task, rest[0], int(rest[1]) if len(rest) > 1 else LENGTHS[-1])
