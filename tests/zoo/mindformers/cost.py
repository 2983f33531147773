"""A training step of a tiny GPT of mindformers on CPU, 1024 tokens, a window of 64, two layers, float32: its time and
its attention's memory, with CoreAttention and with mindformers' own attention, emulated densely.

    python cost.py

It exits with 1 if the step is less than 1.5 times as fast, or the attention takes more than a third of the memory.
"""
import statistics
import subprocess
import sys
import time

N, WINDOW, STEPS = 1024, 64, 9


def peak():
    """Return the most memory that this process has had, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def seconds(models, attentions):
    """Return the median time of a step with each attention, one after the other."""
    x, y = models.tokens(N, 1)
    config = dict(seq_length=N, max_position_embeddings=N, window_size=(WINDOW - 1, 0))
    steps = [models.step_of(models.gpt(models.config_of(**config), attention)) for attention in attentions]
    taken = [[] for _ in steps]
    for number in range(STEPS + 2):
        for step, times in zip(steps, taken):
            begun = time.perf_counter()
            step(x, y)[0].asnumpy()
            times += [time.perf_counter() - begun] if number > 1 else []
    return [statistics.median(times) for times in taken]


def memory(models, attention):
    """Return by how much a compiled gradient of one layer's attention raises the peak of this process."""
    import mindspore as ms
    import numpy as np
    config = models.config_of(seq_length=N, max_position_embeddings=N, window_size=(WINDOW - 1, 0))
    cell, small = attention(config=config, layer_number=2), np.random.default_rng(0)

    def loss(q, k, v):
        return (cell(q, k, v, None) ** 2).sum()

    step = ms.jit(ms.grad(loss, (0, 1, 2)))
    q, k, v = (ms.Tensor(small.standard_normal((N, 8, 4, 16)).astype(np.float32)) for _ in range(3))
    before = peak()
    for x in step(q, k, v):
        x.asnumpy()
    return peak() - before


def main(arguments):
    import models
    from local_attention.zoo.mindformers import CoreAttention
    models.start()
    attentions = {"theirs": models.THEIRS, "ours": CoreAttention}
    if arguments:
        print("bytes", memory(models, attentions[arguments[0]]), flush=True)
        return 0
    theirs, ours = seconds(models, attentions.values())
    taken = []
    for name in attentions:  # in processes of their own, for their peaks
        output = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True).stdout
        taken.append(int(output.split("bytes ")[1].split()[0]))
    print(f"a step {theirs * 1e3:.0f} ms, ours {ours * 1e3:.0f} ms: {theirs / ours:.2f} times as fast")
    print(f"attention raises the peak by {taken[0] / 1e6:.0f} MB, ours by {taken[1] / 1e6:.0f} MB", flush=True)
    return int(theirs < 1.5 * ours or taken[1] * 3 > taken[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
