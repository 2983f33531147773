"""A named peer in a process and environment of its own: for each line it is sent, one call and its milliseconds.

Run by `python -m benchmarks`, never by hand; needs torch, and for `lucidrains` the package local-attention.
"""
import json
import sys
import time

import numpy as np
import torch


def attention(name, before, after):
    """Causal, where nothing `after` the query is seen."""
    if name == "lucidrains":
        from local_attention import LocalAttention
        return LocalAttention(before, causal=True, exact_windowsize=True)
    if name == "sdpa":
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=after == 0)
    if name == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(batch, head, i, j):
            return (j <= i + after) & (i - j <= before)
        compiled, masks = torch.compile(flex_attention), {}

        def call(q, k, v):
            n = q.shape[-2]
            if n not in masks:
                masks[n] = create_block_mask(seen, None, None, n, n, device="cpu")
            return compiled(q, k, v, block_mask=masks[n])
        return call
    raise ValueError(f"the peer must be lucidrains, flex or sdpa, but got {name}")


def main():
    name, before, after, backward, inputs, outputs = json.loads(sys.argv[1])
    q, k, v, dout = (torch.from_numpy(x).requires_grad_(backward) for x in np.load(inputs))
    call = attention(name, before, after)

    def run():
        with torch.set_grad_enabled(backward):
            out = call(q, k, v)
            if not backward:
                return [out]
            return [out, *torch.autograd.grad(out, (q, k, v), dout)]
    np.save(outputs, np.stack([x.detach().numpy() for x in run()]))
    print("ready", torch.__version__, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print((time.perf_counter() - start) * 1e3, flush=True)


if __name__ == "__main__":
    main()
