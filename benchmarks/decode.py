"""Greedy decoding with a cache, in turn with the PyTorch package: `python benchmarks/decode.py OTHER_ENV/bin/python`.

A model of 20M weights continues 512 tokens by 128. Both have the same weights; ours are held to the tokens that ours
gives without a cache. The other environment is one with torch and the PyTorch package local-attention.
"""
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SETTINGS = dict(num_tokens=256, dim=512, depth=6, heads=8, max_seq_len=1024, causal=True, local_attn_window_size=256,
                num_residual_streams=1)
PROMPT, TOKENS, ROUNDS = 512, 128, 7


def prompt():
    return np.random.default_rng(0).integers(0, 256, (1, PROMPT))


def peer(folder):
    """Writes its weights, then times a call for each line it is sent."""
    import torch
    from local_attention import LocalTransformer
    torch.manual_seed(0)
    model = LocalTransformer(**SETTINGS).eval()
    np.savez(folder / "weights.npz", **{name: x.numpy() for name, x in model.state_dict().items()})
    prime = torch.from_numpy(prompt())
    model.generate(prime, 4, temperature=0.)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        model.generate(prime, TOKENS, temperature=0., use_kv_cache=True)
        print((time.perf_counter() - start) * 1e3 / TOKENS, flush=True)


def main():
    if len(sys.argv) == 3:
        peer(pathlib.Path(sys.argv[2]))
        return
    import mindspore as ms
    from mindspore import Tensor

    from local_attention import LocalTransformer, load_torch_weights
    ms.runtime.launch_blocking()  # as a script that owns its process may: see train.py
    with tempfile.TemporaryDirectory() as name:
        elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # not our namesake
        process = subprocess.Popen([sys.argv[1], os.path.abspath(__file__), "--peer", name], cwd=name, env=elsewhere,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if process.stdout.readline() != "ready\n":
            sys.exit("the peer did not start")
        model = LocalTransformer(**SETTINGS)
        load_torch_weights(model, str(pathlib.Path(name) / "weights.npz"))
        prime = Tensor(prompt().astype(np.int32))
        start = time.perf_counter()
        tokens = model.generate(prime, TOKENS, temperature=0.).asnumpy()
        print(f"first call, the compilation of the step included: {time.perf_counter() - start:.1f} s")
        if (tokens[:, :8] != model.generate(prime, 8, temperature=0., use_kv_cache=False).asnumpy()).any():
            sys.exit("tokens differ with and without a cache, nothing timed")
        pairs = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            model.generate(prime, TOKENS, temperature=0.)
            mine = (time.perf_counter() - start) * 1e3 / TOKENS
            process.stdin.write("\n")
            process.stdin.flush()
            pairs.append((mine, float(process.stdout.readline())))
        process.stdin.close()
        process.wait(timeout=60)
    mine, theirs = (statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"ms a token: {mine:.2f}, PyTorch {theirs:.2f}; median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
