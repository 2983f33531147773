"""Peak memory of a process that generates more and more tokens: `python benchmarks/decode_memory.py 1000 10000`.

There is one model and one prompt; only the number of tokens grows.
"""
import resource
import sys
import time

import mindspore as ms
import numpy as np
from mindspore import Tensor

from local_attention import LocalTransformer

MIB = 2**20


def main():
    counts = sorted(map(int, sys.argv[1:])) or [1000, 10000]
    ms.runtime.launch_blocking()  # a script that owns its process may do so: see train.py
    model = LocalTransformer(num_tokens=256, max_seq_len=64 + counts[-1], dim=128, depth=2, heads=4, dim_head=32,
                             local_attn_window_size=64)
    prime = Tensor(np.arange(64, dtype=np.int32)[None])
    model.generate(prime, 100, temperature=0.)  # compiles
    for count in counts:
        start = time.perf_counter()
        model.generate(prime, count, temperature=0.)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
        each = (time.perf_counter() - start) / count * 1e3
        print(f"{count} tokens: peak {peak:.1f} MiB, {each:.2f} ms each", flush=True)


if __name__ == "__main__":
    main()
