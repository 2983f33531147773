"""Compiles a training step with sharded attention in semi-auto parallel, in MindSpore's dry run on Ascend:
`sharded_step.py CASE`, as rank RANK_ID of RANK_SIZE."""
import functools
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, nn, ops
from mindspore.parallel import Layout
from mindspore.parallel.auto_parallel import AutoParallel

from local_attention import LocalAttention, LocalTransformer, WindowSpec, windowed_attention
from local_attention.parallel import sharded

B, N, H, H_KV, D, W = 4, 512, 8, 4, 16, 64
CASES = {  # the sizes of (dp, tp, cp); the shapes of queries and keys on the second rank along positions; its halo
    "attention": ((1, 2, 2), (8, 4, 128, D), (8, 2, 192, D), 2 * B * 2 * W * D + B * W * 5),
    "function": ((2, 1, 2), (1, 16, 256, D), (1, 8, 319, D), 2 * 2 * 4 * 63 * D),
    "model": ((2, 1, 2), (1, 16, 256, D), (1, 8, 320, D), 2 * 2 * 4 * W * D)}


class Block(nn.Cell):
    """Projections, and the attention between them with a key mask and documents, or alone."""

    def __init__(self, attention, layout, masked):
        super().__init__()
        heads, row = layout("dp", "tp", "cp", "None"), layout("dp", "cp")
        names = {"q": heads, "k": heads, "v": heads, **({"mask": row, "segment_ids": row} if masked else {})}
        self.qkv, self.masked = nn.Dense(H * D, (H + 2 * H_KV) * D, has_bias=False), masked
        self.attention = sharded(attention, names, (heads,))

    def construct(self, x, mask, ids):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, H + 2 * H_KV, D).swapaxes(1, 2).astype(ms.float16)
        q, k, v = qkv[:, :H], qkv[:, H:H + H_KV], qkv[:, H + H_KV:]
        out = self.attention(q, k, v, mask, ids) if self.masked else self.attention(q, k, v)
        return out.astype(ms.float32).sum()


class Loss(nn.Cell):
    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, x):
        return self.model(x, return_loss=True)


def main(case):
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    communication.GlobalComm.CHECK_ENVS = False
    communication.init()
    layout = Layout(CASES[case][0], ("dp", "tp", "cp"))
    if case == "model":
        model = LocalTransformer(num_tokens=64, max_seq_len=N + 1, dim=H * D, depth=1, heads=H, kv_heads=H_KV,
                                 dim_head=D, local_attn_window_size=W).to_float(ms.float16)
        net = Loss(sharded(model, (layout("dp", "cp"),), (layout("dp", "cp", "tp"),)))
        given = Tensor(np.ones((B, N + 1), np.int32)),
    else:
        masked = case == "attention"
        attention = LocalAttention(W, causal=True, exact_windowsize=True, dim=D) if masked else functools.partial(
            windowed_attention, spec=WindowSpec.from_sliding_window(W))
        net = Block(attention, layout, masked)
        given = (Tensor(np.ones((B, N, H * D), np.float32)), ops.ones((B, N), ms.bool_), ops.zeros((B, N), ms.int32))
    step = AutoParallel(nn.TrainOneStepCell(net, nn.SGD(net.trainable_params(), .1)).set_train(), "semi_auto")
    step.dataset_strategy("full_batch")
    step(*given)
    print("compiled", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
