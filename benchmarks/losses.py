"""Train both packages with the same weights, batches and optimizer: `python benchmarks/losses.py OTHER_ENV/bin/python`.

Prints the two curves of training losses of a LocalTransformer, step by step, and their largest difference. The other
environment has torch and the PyTorch package local-attention.
"""
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

STEPS, BATCH, LENGTH, RATE = 30, 4, 129, 1e-3
SETTINGS = dict(num_tokens=256, dim=64, depth=3, heads=4, dim_head=16, max_seq_len=128, causal=True,
                local_attn_window_size=32, num_residual_streams=1)


def batches():
    """Return bytes of the files in this folder: real text, from which a model can learn."""
    text = b"".join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob("*.py")))
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH, (STEPS, BATCH))
    return np.array([[np.frombuffer(text, np.uint8, LENGTH, start) for start in row] for row in starts], np.int64)


def peer(folder):
    """Write the initial weights, then the losses."""
    import torch
    from local_attention import LocalTransformer
    torch.manual_seed(0)
    model = LocalTransformer(**SETTINGS)
    np.savez(folder / "weights.npz", **{name: x.numpy() for name, x in model.state_dict().items()})
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    losses = []
    for batch in batches():
        loss = model(torch.from_numpy(batch), return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.save(folder / "losses.npy", losses)


def ours(folder):
    import mindspore as ms
    from mindspore import Tensor, nn

    from local_attention import LocalTransformer, load_torch_weights
    model = LocalTransformer(**SETTINGS)
    load_torch_weights(model, str(folder / "weights.npz"))
    model.set_train()
    optimizer = nn.Adam(model.trainable_params(), learning_rate=RATE, eps=1e-8)

    def loss(batch):
        return model(batch, return_loss=True)
    step = ms.jit(ms.value_and_grad(loss, None, optimizer.parameters))
    losses = []
    for batch in batches():
        value, grads = step(Tensor(batch.astype(np.int32)))
        optimizer(grads)
        losses.append(float(value))
    return losses


def main():
    if len(sys.argv) == 3:
        peer(pathlib.Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # the peer's package has our import name
        elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([sys.argv[1], os.path.abspath(__file__), "--peer", name], cwd=name, env=elsewhere, check=True)
        theirs, mine = np.load(folder / "losses.npy"), np.array(ours(folder))
    print("step   PyTorch   MindSpore")
    for step, pair in enumerate(zip(theirs, mine)):
        print(f"{step:4d}   {pair[0]:.5f}   {pair[1]:.5f}")
    print(f"largest difference: {np.abs(theirs - mine).max():.1e}")


if __name__ == "__main__":
    main()
