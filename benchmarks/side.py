"""One side of a comparison in its own process: for each number on its input, it makes so many calls and prints the
median of their milliseconds.

`python -m benchmarks` runs it; it is not run by hand. The side `here` needs MindSpore and this package; `lucidrains`
needs torch and the PyTorch package local-attention, which has our import name and so needs its own environment; `flex`
and `sdpa` need torch.
"""
import json
import pathlib
import re
import statistics
import sys
import time

import numpy as np

MODEL = dict(num_tokens=256, dim=512, depth=6, heads=8, max_seq_len=1024, causal=True, local_attn_window_size=256,
             num_residual_streams=1)  # 20M weights


def here(spec):
    """Return our call: LocalAttention with a window, sliding_window_attention with a span."""
    import mindspore as ms
    from mindspore import Tensor, ops

    from local_attention import LocalAttention, sliding_window_attention
    options = spec["options"]
    dtype = getattr(ms, spec.get("dtype", "float32"))
    *inputs, dout = (Tensor(each).astype(dtype) for each in np.load(spec["inputs"]))
    batch, heads, n, _ = inputs[0].shape
    window = spec["window"]
    mask, bias = None, None
    if "mask" in options:
        mask = Tensor(np.arange(n) < np.linspace(n * 3 // 4, n, batch).astype(int)[:, None])
    if "bias" in options:
        bias = Tensor(np.random.default_rng(1).standard_normal((heads, window, 2 * window)).astype(np.float32))
        inputs.append(bias)
    if spec["sliding"]:
        left, right = spec["sliding"]

        def attn(q, k, v, *_):
            return sliding_window_attention(q, k, v, window_size_left=left, window_size_right=right,
                                            backend=spec["backend"])
    else:
        cell = LocalAttention(window, causal=True, exact_windowsize="aligned" not in options, backend=spec["backend"],
                              dropout=0.1 if "dropout" in options else 0.)
        cell.set_train("dropout" in options)

        def attn(q, k, v, *bias):
            return cell(q, k, v, mask=mask, attn_bias=bias[0] if bias else None)

    def forward(*inputs):
        return attn(*inputs)

    gradient = ops.GradOperation(get_all=True, sens_param=True)(forward)

    def both(*inputs):
        return gradient(*inputs, dout)
    function = both if spec["backward"] else forward
    function = ms.jit(function) if spec["mode"] == "graph" else function

    def call():
        result = function(*inputs)
        answers = result[:3] if spec["backward"] else [result]
        answers[-1].asnumpy()  # calls return before they are done
        return answers
    return call


def torch_attention(spec):
    """Return a peer's call on (q, k, v), causal if it gets a window."""
    import torch
    if spec["name"] == "lucidrains":
        from local_attention import LocalAttention
        return LocalAttention(spec["window"], causal=True, exact_windowsize=True)
    before, after = (spec["sliding"][0], spec["sliding"][1] - 1) if spec["sliding"] else (spec["window"], 0)
    if spec["name"] == "sdpa":
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=after == 0)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch, head, i, j):
        return (j <= i + after) & (i - j <= before)
    n = spec["shape"][2]
    compiled, mask = torch.compile(flex_attention), create_block_mask(seen, None, None, n, n, device="cpu")
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def peer(spec):
    import torch
    q, k, v, dout = (torch.from_numpy(x).requires_grad_(spec["backward"]) for x in np.load(spec["inputs"]))
    attn = torch_attention(spec)

    def call():
        with torch.set_grad_enabled(spec["backward"]):
            out = attn(q, k, v)
            answers = torch.autograd.grad(out, (q, k, v), dout) if spec["backward"] else [out]
        return answers
    return call


def tokens(shape):
    return np.random.default_rng(0).integers(0, MODEL["num_tokens"], shape)


def here_model(spec):
    """Return a training step, or decoding of tokens after a prompt, compiled."""
    import mindspore as ms
    from mindspore import Tensor, nn

    from local_attention import LocalTransformer, load_torch_weights
    ms.set_context(mode=ms.GRAPH_MODE)
    model = LocalTransformer(**MODEL)
    load_torch_weights(model, spec["weights"])
    if spec["kind"] == "decode":
        prime = Tensor(tokens((spec["rows"], spec["prompt"])).astype(np.int32))
        few = [model.generate(prime, 8, temperature=0., use_kv_cache=cached).asnumpy() for cached in (True, False)]
        if (few[0] != few[1]).any():
            raise RuntimeError("tokens differ with and without a cache")
        return lambda: [model.generate(prime, spec["new"], temperature=0.)]
    x, optimizer = Tensor(tokens(spec["batch"]).astype(np.int32)), nn.Adam(model.trainable_params(), 1e-4)

    def loss(x):
        return model(x, return_loss=True)
    gradient = ms.value_and_grad(loss, None, model.trainable_params())

    def step(x):
        loss, grads = gradient(x)
        optimizer(grads)
        return loss
    step = ms.jit(step)
    model.set_train()
    return lambda: [Tensor(step(x).asnumpy())]


def peer_model(spec):
    import torch
    from local_attention import LocalTransformer
    torch.manual_seed(0)
    model = LocalTransformer(**MODEL)
    np.savez(spec["weights"], **{name: x.numpy() for name, x in model.state_dict().items()})
    if spec["kind"] == "decode":
        prime = torch.from_numpy(tokens((spec["rows"], spec["prompt"])))
        model.eval()
        return lambda: [model.generate(prime, spec["new"], temperature=0., use_kv_cache=True)]
    x, optimizer = torch.from_numpy(tokens(spec["batch"])), torch.optim.Adam(model.parameters(), 1e-4)

    def step():
        loss = model(x, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss]
    return step


def main():
    spec = json.loads(sys.argv[1])
    ours = spec["name"].startswith("here")
    if spec["kind"] == "windowed":
        import windowed
        make = windowed.here if ours else windowed.peer
    else:
        make = {("attention", True): here, ("attention", False): peer}.get(
            (spec["kind"], ours), here_model if ours else peer_model)
    call = make(spec)
    np.savez(spec["outputs"], *(np.asarray(x.asnumpy() if hasattr(x, "asnumpy") else x.detach()) for x in call()))
    call()
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        print(statistics.median(times), flush=True)
    status = pathlib.Path("/proc/self/status").read_text()  # getrusage's peak includes the starting process's
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024, flush=True)


if __name__ == "__main__":
    main()
