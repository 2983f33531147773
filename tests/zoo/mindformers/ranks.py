"""Two processes on CPU, each with a slice of a sequence: CoreAttention with the halo inside of its operator, against
one process with the whole sequence; forward and backward, BSH and TND.

    msrun --worker_num=2 --local_worker_num=2 --join=True ranks.py
"""
import os

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication
from mindspore.parallel import Layout

from local_attention import parallel
from local_attention.parallel.sharded import Operator
from local_attention.zoo import mindformers as windows

N, B, H, H_KV, D, W = 128, 2, 4, 2, 16, 24
ENDS = [5, 50, 70, 128]


class Config:
    num_layers, num_attention_heads, num_query_groups, kv_channels, seq_length = 2, H, H_KV, D, N
    use_flash_attention, attention_dropout, window_size, window_attn_skip_freq = True, 0., (W - 1, 0), None

    def __init__(self, input_layout):
        self.input_layout = input_layout


def operator_of(call, axes, inputs):
    """Return an Operator. On CPU there is no semi-auto parallel: the inputs are slices already."""
    layout = Layout((1,), ("all",))(*["None"] * axes)
    return Operator(call, (layout,) * inputs, (layout,))


def step_of(call):
    def loss(q, k, v, cotangent, *more):
        out = call(q, k, v, *more)
        return (out * cotangent).sum(), out
    gradients = ms.value_and_grad(loss, (0, 1, 2), has_aux=True)

    @ms.jit
    def step(*given):
        (_, out), found = gradients(*given)
        return out, found[0], found[1], found[2]
    return step


def check(name, shapes, more):
    random = np.random.default_rng(0)
    whole = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    rank, size, n = communication.get_rank(), communication.get_group_size(), shapes[0][0]
    part = slice(rank * n // size, (rank + 1) * n // size)
    alone, split = (windows.CoreAttention(Config(name), 1) for _ in range(2))
    split.group = parallel.sequence_group("CoreAttention", True)
    call = "_documents" if name == "TND" else "_rows"
    wanted = step_of(getattr(alone, call))(*map(Tensor, whole), *more)
    inside = operator_of(getattr(split, call), len(shapes[0]), 3 + len(more))
    found = step_of(inside)(*(Tensor(x[part]) for x in whole), *more)
    largest = 0.
    for a, b in zip(wanted, found):
        a, b = a.asnumpy()[part], b.asnumpy()
        if not np.abs(a).max() > .1:
            raise ValueError("a gradient is zero")
        largest = max(largest, np.abs(a - b).max() / np.abs(a).max())
    print(f"{name}, rank {rank} of {size}: {largest:.1e}", flush=True)
    return largest <= 1e-6


def main():
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    communication.init()
    rows = [(N, B, heads * D) for heads in (H, H_KV, H_KV, H)]
    tokens = [(N, heads, D) for heads in (H, H_KV, H_KV, H)]
    if not (check("BSH", rows, ()) and check("TND", tokens, (Tensor(np.array(ENDS, np.int32)),))):
        os._exit(1)


main()
