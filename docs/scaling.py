"""The cost of a long sequence over many ranks: `measure` it on this machine, `predict` it from measurements.

    msrun --worker_num=2 --local_worker_num=2 --join=True --log_dir=logs docs/scaling.py measure
    python docs/scaling.py predict

`measure` times a training step of one layer, forward and backward, for a short and for a long slice on every rank. On
Linux, it also reads how many bytes the loopback device received, and how much memory the process kept for a token. With
two ranks it times the sum of a buffer of 4 bytes and of 4 MiB, too.
`predict` is arithmetic. docs/scaling.md says where its numbers come from.
"""
import argparse
import json
import os
import resource
import time
from pathlib import Path

LAYER = {"dim": 512, "heads": 8, "dim_head": 64, "local_attn_window_size": 512}


def halo_bytes(item=4):
    """Return the bytes that go from one rank to a neighbour for one layer: keys and values of a window forward, their
    gradients backward. They depend neither on the length of the sequence nor on the number of ranks."""
    return 2 * 2 * LAYER["heads"] * LAYER["dim_head"] * LAYER["local_attn_window_size"] * item


def layer_weights():
    """Return the number of weights of the projections, and of a feed-forward of four times the width."""
    dim, inner = LAYER["dim"], int(LAYER["dim"] * 8 / 3)
    return 4 * dim * LAYER["heads"] * LAYER["dim_head"] + 3 * dim * inner


def step_parts(own, ranks, settings):
    """Return the seconds of a rank's step: its own tokens, exchanges with neighbours, averaging all gradients."""
    work = settings.layers * own * settings.token_seconds
    exchange = settings.layers * (halo_bytes() / settings.bandwidth + 2 * settings.latency)
    gradients = 2 * (ranks - 1) / ranks * settings.layers * layer_weights() * 4 / settings.bandwidth
    return work, exchange, gradients + 2 * (ranks - 1) * settings.latency  # in a ring, messages go one after another


def predict(settings):
    print("| tokens | ranks | tokens of a rank | a step | exchanging | averaging | activations of a rank |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for tokens in settings.tokens:
        for ranks in settings.ranks:
            own = tokens * 2**20 // ranks
            work, exchange, gradients = step_parts(own, ranks, settings)
            memory = own * settings.layers * settings.token_bytes / 2**30
            print(f"| {tokens}M | {ranks} | {own:,} | {work + exchange + gradients:,.2f} s | {exchange:.2f} s "
                  f"| {gradients:.2f} s | {memory:,.2f} GiB |")


def wire_bytes():
    """Return the bytes that the loopback device has received so far, 0 if unknown."""
    path = Path("/proc/net/dev")
    lines = [line for line in path.read_text().splitlines() if line.strip().startswith("lo:")] if path.exists() else []
    return int(lines[0].split(":")[1].split()[0]) if lines else 0


def measure(lengths, repeats):
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, communication, ops

    from local_attention import LocalTransformer
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    rank, size, together = 0, 1, "MS_ROLE" in os.environ
    if together:
        communication.init()
        rank, size = communication.get_rank(), communication.get_group_size()
    model = LocalTransformer(num_tokens=None, max_seq_len=max(lengths) * size, depth=1, sequence_parallel=together,
                             **LAYER)

    def loss(x):
        return model(x).sum()

    gradients = ms.value_and_grad(loss, 0, model.trainable_params())

    @ms.jit
    def step(x):
        value, (dx, weights) = gradients(x)
        return value, dx, *weights

    def wait():
        if size > 1:
            ops.AllReduce()(Tensor([1.], ms.float32)).asnumpy()

    for numbers in (1, 2**20) if size > 1 else ():
        buffer, seconds = Tensor(np.zeros(numbers, np.float32)), []
        for _ in range(5 * repeats):
            wait()
            start = time.perf_counter()
            ops.AllReduce()(buffer).asnumpy()
            seconds.append(time.perf_counter() - start)
        if rank == 0:
            print(json.dumps({"ranks": size, "bytes of a buffer": 4 * numbers, "seconds of its sum, median":
                              round(sorted(seconds)[len(seconds) // 2], 5)}), flush=True)
    peak = 0
    for n in lengths:
        x = Tensor(np.random.default_rng(rank).standard_normal((1, n, LAYER["dim"])).astype(np.float32))
        step(x)[0].asnumpy()
        seconds, wire = [], []
        for _ in range(repeats):
            wait()
            start, before = time.perf_counter(), wire_bytes()
            step(x)[0].asnumpy()
            seconds.append(time.perf_counter() - start)
            wait()
            wire.append(wire_bytes() - before)
        before, peak = peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if rank == 0:
            print(json.dumps({
                "ranks": size, "tokens of a rank": n, "seconds, median": round(sorted(seconds)[repeats // 2], 4),
                "seconds, all": [round(second, 3) for second in seconds], "peak of memory": peak, "more than before":
                peak - before, "wire bytes of a step, median": sorted(wire)[repeats // 2],
                "halo bytes by arithmetic, both ways": 2 * halo_bytes() * (size - 1)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure")
    command.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192], help="tokens of a rank")
    command.add_argument("--repeats", type=int, default=7)
    command = commands.add_parser("predict")
    command.add_argument("--tokens", type=int, nargs="+", default=[1, 64],
                         help="tokens of the sequence, in units of 2**20")
    command.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    command.add_argument("--layers", type=int, default=12)
    command.add_argument("--token-seconds", type=float, default=1.3e-4,
                         help="seconds per token of one layer, forward and backward")
    command.add_argument("--token-bytes", type=float, default=52e3,
                         help="bytes per token that one layer keeps for the backward pass")
    command.add_argument("--bandwidth", type=float, default=4e8, help="bytes per second from rank to rank")
    command.add_argument("--latency", type=float, default=2e-4, help="seconds of an empty exchange")
    settings = parser.parse_args()
    if settings.command == "measure":
        measure(settings.lengths, settings.repeats)
    else:
        predict(settings)


if __name__ == "__main__":
    main()
