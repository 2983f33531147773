"""Time this package in turn with named peers: `python -m benchmarks attention --peer-python OTHER_ENV/bin/python`.

Each side runs in its own process. Results are compared before anything is timed. Then the sides take turns of five
calls, of which the median counts; a call that takes over 100 ms is a turn by itself. Times are medians in milliseconds,
followed by the interquartile range. A ratio is the median of the ratios of neighbouring turns. Memory is the peak of a
side's whole process. A peer that does not start is reported.

The workloads:

  attention  batch 2, 8 heads, 2,048 tokens, window 512, forward and forward with backward
  long       the same with batch 1 and 16,384 tokens
  options    this package alone: a mask, a bias, window-aligned spans, dropout, each against the call without it
  sliding    128 keys on each side
  scaling    2k to 128k tokens
  train      a training step of a model of 20M weights
  decode     128 tokens after a prompt of 512, for one row and for 8
  first      one token after prompts of 128, 512 and 1,024
  models     grouped heads, documents, softcap, sinks, a prefix, the log-sum-exp, an order, narrow values and a bias for
             each query, each against our call without it; grouped heads and that bias also against SDPA, documents also
             against compiled FlexAttention
"""
import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
STANDARD = dict(kind="attention", shape=(2, 8, 2048, 64), window=512, sliding=None, backward=False, mode="graph",
                backend=None, options=())


WINDOWED = dict(kind="windowed", shape=(2, 8, 2048, 64), key_heads=8, window=512, backward=False, mode="graph",
                backend=None, options=())


class Side:
    """A process that makes calls when told to, and says how long they took."""

    plain = False  # whether the variable is left as it is

    def __init__(self, python, folder, **spec):
        self.name, self.output = spec["name"], pathlib.Path(folder) / f"{spec['name']}-{len(os.listdir(folder))}.npz"
        spec = {**spec, "outputs": str(self.output)}
        # see docs/performance.md, "What to set": threads that wait by spinning take cores from others
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOG_v": "3"}
        if not self.plain:
            environment["MS_DEV_HOST_BLOCKING_RUN"] = "1"
        if python != sys.executable:
            del environment["PYTHONPATH"]  # the peer's package has our import name
        errors = self.output.with_suffix(".err")
        with errors.open("w") as file:
            self.process = subprocess.Popen(
                [python, str(ROOT / "benchmarks" / "side.py"), json.dumps(spec)], cwd=folder, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True)
        if self.process.stdout.readline() != "ready\n":
            self.process.wait()
            reason = (errors.read_text().strip() or "no reason given").splitlines()[-1]
            raise RuntimeError(f"{self.name} cannot run this workload in {python}: {reason}")
        self.answers = list(np.load(self.output).values())

    def __call__(self, calls=1):
        """Return the median time of so many calls in a row, in ms."""
        time.sleep(.005)  # PyTorch's threads spin for a few milliseconds after a call
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        """End the process; return its peak memory in bytes."""
        self.process.stdin.close()
        memory = int(self.process.stdout.readline())
        self.process.wait(timeout=60)
        return memory


def verify(ours, theirs, tolerance):
    error = max(np.abs(a.astype(np.float64) - b).max() for a, b in zip(ours.answers, theirs.answers))
    if not error <= tolerance:
        raise RuntimeError(f"the answers of {theirs.name} differ by {error:.1e}, so nothing was timed")


def spread(times):
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.1f} ms ({low:.1f} … {high:.1f})"


def compare(what, ours, theirs, repeat, tolerance):
    """Make one comparison, print it and return its record. Both sides are ended."""
    try:
        if tolerance is not None:
            verify(ours, theirs, tolerance)
        calls, peer_calls = (1 if side() > 100 else 5 for side in (ours, theirs))  # a process that wakes up is slow
        pairs = [(ours(calls), theirs(peer_calls)) for _ in range(repeat)]
    finally:
        memory = [side.close() / 2**30 for side in (ours, theirs)]
    mine, others = zip(*pairs)
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{what}: here {spread(mine)}, {memory[0]:.2f} GiB; {theirs.name} {spread(others)}, {memory[1]:.2f} GiB; "
          f"here {ratio:.2f} times as fast", flush=True)
    return {"what": what, "ms": statistics.median(mine), "GiB": memory[0], "peer": theirs.name,
            "peer ms": statistics.median(others), "peer GiB": memory[1], "ratio": ratio}


class Runner:
    """The comparisons of one run, with inputs in one folder."""

    def __init__(self, args, folder):
        self.args, self.folder, self.records = args, folder, []

    def side(self, name, python, **spec):
        return Side(python, self.folder, name=name, **spec)

    def attention(self, what, peers, repeat=None, **spec):
        """Compare our attention with each peer; a peer of None is our own attention on the standard workload."""
        spec = {**STANDARD, "backend": self.args.backend, "mode": self.args.mode, **spec}
        inputs = pathlib.Path(self.folder) / f"inputs-{'-'.join(map(str, spec['shape']))}.npy"
        if not inputs.exists():
            np.save(inputs, np.random.default_rng(0).standard_normal((4, *spec["shape"])).astype(np.float32))
        spec["inputs"] = str(inputs)
        for name in peers:
            try:
                ours = self.side("here", sys.executable, **spec)
                try:
                    plain = {**spec, "options": (), "name": "here"}
                    theirs = (self.side(name, self.args.peer_python, **spec) if name else
                              Side(sys.executable, self.folder, **plain))
                except RuntimeError:
                    ours.close()
                    raise
                # sdpa sees the whole past, and our plain call other keys: only the costs are comparable
                tolerance = None if name in (None, "sdpa") else 1e-3
                self.records.append(compare(f"{what}, {'forward+backward' if spec['backward'] else 'forward'}", ours,
                                            theirs, repeat or self.args.repeat, tolerance))
            except RuntimeError as error:
                print(f"{what}: {error}", flush=True)

    def windowed(self, what, peer, repeat=None, tolerance=None, **spec):
        """Compare our `windowed_attention` with a PyTorch peer or, if `peer` is a dict, with itself so set."""
        spec = {**WINDOWED, "backend": self.args.backend, "mode": self.args.mode, **spec}
        try:
            ours = self.side("here", sys.executable, **spec)
            try:
                theirs = (self.side("here, without", sys.executable, **{**spec, **peer}) if isinstance(peer, dict) else
                          self.side(peer, self.args.peer_python, **spec))
            except RuntimeError:
                ours.close()
                raise
            what = f"{what}, {'forward+backward' if spec['backward'] else 'forward'}"
            self.records.append(compare(what, ours, theirs, repeat or self.args.repeat, tolerance))
            print(f"  time here relative to the other: {1 / self.records[-1]['ratio']:.2f}", flush=True)
        except RuntimeError as error:
            print(f"{what}: {error}", flush=True)

    def model(self, what, tolerance, repeat, **spec):
        spec["weights"] = str(pathlib.Path(self.folder) / f"weights-{spec['kind']}.npz")
        theirs = self.side("lucidrains", self.args.peer_python, **spec)
        ours = self.side("here", sys.executable, **spec)
        self.records.append(compare(what, ours, theirs, repeat, tolerance))


def matmul_rate():
    """Return the multiply-adds per second of MindSpore's matmul of two large matrices."""
    import mindspore as ms
    from mindspore import Tensor, ops
    ms.runtime.launch_blocking()
    a = Tensor(np.ones((2048, 2048), np.float32))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        ops.matmul(a, a).asnumpy()
        times.append(time.perf_counter() - start)
    return 2048**3 / min(times)


def of_matmul_rate(record, shape, window, backward):
    """Return the share of the matmul rate that the products of the window reach: two forward, seven with backward."""
    groups, n, head_dim = shape[0] * shape[1], *shape[2:]
    seen = sum(min(i, window) + 1 for i in range(n))
    return groups * seen * head_dim * (7 if backward else 2) / (record["ms"] / 1e3) / matmul_rate()


def processor():
    """Return the name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE) if info.exists() else []
    return re.sub(r"\((R|TM)\)| CPU| @.*", "", names[0]) if names else platform.machine()


def plot(records, file):
    """Plot time and memory against the sequence length."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    lines = (("", "ms", "GiB", "local_attention for MindSpore, float32"),
             ("half ", "half ms", "half GiB", "the same, float16"),
             ("peer ", "peer ms", "peer GiB", "local-attention for PyTorch, float32"))
    records = [record for record in records if "n" in record]
    last = max((record["n"] for record in records if "peer ms" in record), default=None)
    labels = "ms, forward + backward", "GiB, peak of the process"
    for axes, column, label in zip(figure.subplots(1, 2), (1, 2), labels):
        for line, colour in zip(lines, ("C0", "C2", "C1")):
            points = [(record["n"], record[line[column]]) for record in records if line[column] in record]
            if points:
                axes.plot(*zip(*points), "o-", color=colour, label=line[3])
                if line[0] == "peer " and column == 2:
                    axes.annotate(f"not run past {last // 1024}k:\nmemory", points[-1], xytext=(8, -4), fontsize=8,
                                  textcoords="offset points", va="top")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks([2**k for k in range(11, 18, 2)], [f"{2**k // 1024}k" for k in range(11, 18, 2)], minor=False)
        low, high = axes.get_ylim()
        ticks = [step * 10**power for power in range(-3, 6) for step in (1, 2, 5) if low <= step * 10**power <= high]
        axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=.3)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Batch 1, 8 heads of 64, causal, exact windows of {STANDARD['window']}, "
                    f"{len(os.sched_getaffinity(0))} threads of {processor()}", fontsize=10)
    figure.savefig(file, dpi=120)


def scaling(runner):
    """Time us alone where the peer would need more memory than such a machine has, and in float16."""
    for k in range(11, 18):
        shape = (1, 8, 2**k, 64)
        if k <= 14:
            runner.attention(f"{2**k} tokens", ["lucidrains"], repeat=5, shape=shape, backward=True)
        else:
            alone(runner, shape, "", {"what": f"{2**k} tokens"})
        if runner.records and runner.records[-1]["what"].startswith(str(2**k)):
            runner.records[-1]["n"] = 2**k
            alone(runner, shape, "half ", runner.records.pop(), dtype="float16")


def alone(runner, shape, name, record, **spec):
    """Time us alone; add the time and the memory to a record, which is added to those of the run."""
    inputs = pathlib.Path(runner.folder) / "inputs.npy"
    np.save(inputs, np.random.default_rng(0).standard_normal((4, *shape), dtype=np.float32))
    spec = {**STANDARD, "shape": shape, "backward": True, "mode": runner.args.mode, "inputs": str(inputs), **spec}
    side = runner.side("here", sys.executable, **spec)
    times = [side() for _ in range(5)]
    record.update({f"{name}ms": statistics.median(times), f"{name}GiB": side.close() / 2**30})
    runner.records.append(record)
    print(f"{record['what']}, forward+backward{', float16' * bool(name)}: {spread(times)}, "
          f"{record[f'{name}GiB']:.2f} GiB", flush=True)


def models(runner, backward):
    """Compare each option of today's models with our call without it, and with a peer that has it."""
    runner.windowed("8 heads on 2", dict(key_heads=8), key_heads=2, backward=backward)
    for option in ("softcap", "sinks", "prefix", "lse"):
        runner.windowed(f"with {option}", dict(options=()), options=[option], backward=backward)
    runner.windowed("an order", dict(options=()), options=["order"], backward=backward)
    wide = dict(shape=(2, 8, 2048, 128), backward=backward)
    runner.windowed("values of 64, keys of 128", dict(width=128), width=64, **wide)
    rows = dict(shape=(1, 8, 4096, 64), window=256, options=["bias of queries"], backward=backward)
    runner.windowed("a bias for each query", dict(options=()), **rows)
    row = dict(shape=(1, 8, 8192, 64), options=["documents"], backward=backward)
    runner.windowed("documents in a row of 8,192", dict(options=()), **row)
    runner.windowed("documents by their ends", dict(options=["documents"]), **{**row, "options": ["ends"]})
    if backward:
        runner.windowed("16 heads on 1, 16,384 tokens", dict(key_heads=16), repeat=3, shape=(1, 16, 16384, 64),
                        key_heads=1, backward=True)
    else:
        runner.windowed("a token after 512, 8 heads on 2", dict(key_heads=8), shape=(1, 8, 512, 64), queries=1,
                        key_heads=2, repeat=200)
    if runner.args.peer_python:
        runner.windowed("8 heads on 2", "sdpa", tolerance=1e-3, key_heads=2, backward=backward)
        runner.windowed("a bias for each query", "sdpa", tolerance=1e-3, **rows)
        if not backward:
            runner.windowed("documents in a row of 8,192", "flex", tolerance=1e-3, **row)


def where_it_runs():
    """Return a line of the processor, its instruction set, the versions, and the variable that the sides get."""
    from importlib.metadata import version

    from local_attention import settings
    from local_attention.backends import native
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    level = "no kernel" if native.unavailable("CPU") else settings.LEVELS[native.machine_level()]
    variable = os.environ.get("MS_DEV_HOST_BLOCKING_RUN", "not set") if Side.plain else "1"
    return (f"{names[0] if names else platform.machine()}, {level}, {len(os.sched_getaffinity(0))} cores, float32; "
            f"MindSpore {version('mindspore')}, Python {platform.python_version()}; "
            f"MS_DEV_HOST_BLOCKING_RUN {variable}")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+",
                        choices=("attention", "long", "options", "sliding", "scaling", "train", "decode", "first",
                                 "models"))
    parser.add_argument("--peer-python", help="the Python of an environment with torch and the peers")
    parser.add_argument("--peers", default="lucidrains,flex,sdpa",
                        help="the peers of `attention`, separated by commas (default: %(default)s)")
    parser.add_argument("--mode", choices=("graph", "pynative"), default="graph",
                        help="the mode of this package (default: %(default)s)")
    parser.add_argument("--backend", help="the backend of this package (default: its own choice)")
    parser.add_argument("--plain", action="store_true", help="do not set MS_DEV_HOST_BLOCKING_RUN, as a plain program")
    parser.add_argument("--repeat", type=int, default=15,
                        help="calls of each side, where a workload has no number of its own (default: %(default)s)")
    parser.add_argument("--plot", help="with `scaling`: a .png file for time and memory against the sequence length")
    parser.add_argument("--json", help="a file for all records")
    args = parser.parse_args()
    if args.peer_python is None and not set(args.workloads) <= {"options", "models"}:
        parser.error("--peer-python is needed for every workload but `options` and `models`")
    Side.plain = args.plain
    print(where_it_runs())
    peers = args.peers.split(",")
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(args, folder)
        for workload in args.workloads:
            for backward in (False, True):
                if workload == "attention":
                    before = len(runner.records)
                    runner.attention("standard", peers, backward=backward)
                    if len(runner.records) > before:
                        share = of_matmul_rate(runner.records[before], STANDARD["shape"], STANDARD["window"], backward)
                        print(f"  matrix products of the window, here: {share:.0%} of MindSpore's matmul rate")
                elif workload == "long":
                    runner.attention("16,384 tokens", peers[:1], repeat=5, shape=(1, 8, 16384, 64), backward=backward)
                elif workload == "options":
                    for option in ("mask", "bias", "aligned", "dropout"):
                        runner.attention(f"with {option}", [None], options=[option], backward=backward)
                elif workload == "models":
                    models(runner, backward)
                elif workload == "sliding":
                    runner.attention("sliding 128 + 128", ["flex"], sliding=(128, 128), backward=backward)
            if workload == "scaling":
                scaling(runner)
            elif workload == "train":
                runner.model("training step", 1e-2, args.repeat, kind="train", batch=(2, 1025))
            elif workload == "first":
                for prompt in (128, 512, 1024):
                    runner.model(f"one token after {prompt}", None, 7, kind="decode", rows=1, prompt=prompt, new=1)
            elif workload == "decode":
                for rows, name in ((1, "128 tokens after 512"), (8, "the same for 8 rows at once")):
                    runner.model(name, None, 7,  # checked by our uncached tokens: the peer's cache errs
                                 kind="decode", rows=rows, prompt=512, new=128)
        if args.plot:
            plot(runner.records, args.plot)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(runner.records, indent=1))


if __name__ == "__main__":
    main()
