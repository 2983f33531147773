"""Train on one sequence that is split over several processes: each has a slice.

    msrun --worker_num=2 --local_worker_num=2 --join=True --log_dir=logs docs/long_sequence.py
"""
import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, nn

from local_attention import LocalTransformer
from local_attention.parallel import AverageGradients

SLICE = 256  # tokens of each process, a multiple of the window
WINDOW = 64


def main():
    ms.set_seed(0)  # the same weights in every process
    communication.init()
    rank, ranks = communication.get_rank(), communication.get_group_size()
    model = LocalTransformer(num_tokens=256, dim=64, depth=2, heads=2, dim_head=32, local_attn_window_size=WINDOW,
                             max_seq_len=ranks * SLICE, sequence_parallel=True)
    optimizer = nn.Adam(model.trainable_params(), learning_rate=3e-3)
    average = AverageGradients()

    def loss_of(x):
        return model(x, return_loss=True)

    gradients = ms.value_and_grad(loss_of, None, optimizer.parameters)

    @ms.jit
    def step(x):
        loss, grads = gradients(x)
        optimizer(average(grads))
        return loss

    text = np.frombuffer(("round and round it goes, " * ranks * SLICE).encode(), np.uint8)[:ranks * SLICE]
    mine = Tensor(text[rank * SLICE:(rank + 1) * SLICE].astype(np.int32)[None])
    model.set_train()
    for number in range(1, 21):
        loss = float(step(mine))
        if rank == 0 and number % 5 == 0:
            print(f"step {number}: loss of {ranks * SLICE} tokens {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
