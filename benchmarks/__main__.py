"""Attention against named peers, call by call in turn: `python -m benchmarks --peer-python OTHER_ENV/bin/python`.

Every answer is compared before anything is timed. Milliseconds are medians with the middle half's range behind them; a
ratio is the median of the ratios of neighbouring calls.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import mindspore as ms
import numpy as np
from mindspore import Tensor

from local_attention import LocalAttention, sliding_window_attention

PEERS = ("lucidrains", "flex", "sdpa")


class Peer:
    """A peer's process, and the answers it gave."""

    def __init__(self, python, name, span, backward, inputs, folder):
        outputs = str(pathlib.Path(folder) / f"{name}.npy")
        script = pathlib.Path(__file__).with_name("peer.py")
        elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # not our namesake
        self.process = subprocess.Popen(
            [python, str(script), json.dumps([name, *span, backward, inputs, outputs])], cwd=folder, env=elsewhere,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if not self.process.stdout.readline().startswith("ready"):
            raise RuntimeError(f"the peer {name} did not start in {python}")
        self.answers = np.load(outputs)

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def ours(span, sliding, backward, mode, backend, arrays):
    """A call of ours and its answers, for queries that see so many keys before and after themselves."""
    before, after = span
    causal = None if sliding else LocalAttention(before, causal=True, exact_windowsize=True, backend=backend)

    def attn(q, k, v):
        if causal is not None:
            return causal(q, k, v)
        return sliding_window_attention(q, k, v, window_size_left=before, window_size_right=after + 1, backend=backend)
    q, k, v, dout = map(Tensor, arrays)

    def forward(q, k, v):
        return attn(q, k, v)

    def weighted(q, k, v):
        return (attn(q, k, v) * dout).sum()
    function = ms.grad(weighted, (0, 1, 2)) if backward else forward
    function = ms.jit(function) if mode == "graph" else function

    def call():
        start = time.perf_counter()
        result = function(q, k, v)
        answers = [x.asnumpy() for x in (result if backward else (result,))]
        return (time.perf_counter() - start) * 1e3, answers
    return call


def spread(times):
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.1f} ms ({low:.1f} … {high:.1f})"


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--peer-python", required=True, help="the interpreter of an environment with torch and peers")
    parser.add_argument("--peers", default="lucidrains", help=f"comma-separated, of {', '.join(PEERS)}")
    parser.add_argument("--shape", type=int, nargs=4, default=(2, 8, 2048, 64), metavar=("B", "H", "N", "D"))
    parser.add_argument("--window", type=int, default=512, help="of LocalAttention, causal and exact")
    parser.add_argument("--sliding", type=int, nargs=2, metavar=("LEFT", "RIGHT"),
                        help="sliding_window_attention in its place, with these window sizes")
    parser.add_argument("--modes", default="graph", help="comma-separated, of graph, pynative")
    parser.add_argument("--backend", help="by name; the fastest if left out")
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    arrays = np.random.default_rng(0).standard_normal((4, *args.shape)).astype(np.float32)
    span = (args.sliding[0], args.sliding[1] - 1) if args.sliding else (args.window, 0)
    print(f"MindSpore {ms.__version__}, B H N D = {tuple(args.shape)}, float32, "
          f"{span[0]} keys before each query, itself, and {span[1]} after it")
    with tempfile.TemporaryDirectory() as folder:
        inputs = str(pathlib.Path(folder) / "inputs.npy")
        np.save(inputs, arrays)
        for backward in (False, True):
            for mode in args.modes.split(","):
                for name in args.peers.split(","):
                    call = ours(span, args.sliding is not None, backward, mode, args.backend, arrays)
                    try:
                        peer = Peer(args.peer_python, name, span, backward, inputs, folder)
                    except RuntimeError as error:
                        print(error)
                        continue
                    answers = call()[1]
                    wanted = peer.answers[1:] if backward else peer.answers
                    error = max(np.abs(a - b).max() for a, b in zip(answers, wanted))
                    what = f"{'forward+backward' if backward else 'forward'}, {mode}, against {name}"
                    if error > 1e-3 and name != "sdpa":  # sdpa sees the whole past: a cost to compare, not an answer
                        sys.exit(f"{what}: answers differ by {error:.1e}, nothing timed")
                    call(), peer()
                    pairs = [(call()[0], peer()) for _ in range(args.repeat)]
                    peer.close()
                    mine, theirs = zip(*pairs)
                    print(f"{what}: {spread(mine)}, {name} {spread(theirs)}: "
                          f"{statistics.median(b / a for a, b in pairs):.2f} times as fast", flush=True)


if __name__ == "__main__":
    main()
