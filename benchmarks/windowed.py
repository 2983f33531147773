"""The sides of the workload `models`: `windowed_attention` with the options of today's models, and its peers."""
import numpy as np


def document_lengths(n):
    """Return lengths of documents, 64 to 1,024 tokens, that fill a row of n."""
    lengths, rng = [], np.random.default_rng(3)
    while sum(lengths) < n:
        lengths.append(min(int(rng.integers(64, 1025)), n - sum(lengths)))
    return lengths


def inputs_of(spec):
    """Return q, k, v and the output's gradient."""
    batch, heads, n, head_dim = spec["shape"]
    rng = np.random.default_rng(0)
    queries, keys = spec.get("queries", n), (batch, spec["key_heads"], n, head_dim)
    width = spec.get("width", head_dim)  # of the values
    shapes = ((batch, heads, queries, head_dim), keys, (*keys[:3], width), (batch, heads, queries, width))
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def bias_of_queries(spec):
    """Return a bias with a row for each query, `(1, heads, n, window)`."""
    _, heads, n, _ = spec["shape"]
    return np.random.default_rng(1).standard_normal((1, heads, n, spec["window"]), dtype=np.float32)


def here(spec):
    """Return our call with the named options."""
    import mindspore as ms
    from mindspore import Tensor, ops

    from local_attention import WindowSpec, windowed_attention
    *inputs, dout = map(Tensor, inputs_of(spec))
    options, named = spec["options"], {}
    batch, heads, n, _ = spec["shape"]
    if "documents" in options:
        lengths = document_lengths(n)
        named["segment_ids"] = Tensor(np.tile(np.repeat(np.arange(len(lengths)), lengths), (batch, 1)).astype(np.int32))
    if "ends" in options:  # the same documents
        ends = np.cumsum(document_lengths(n))
        named["cu_seqlens"] = Tensor(np.concatenate([[0], *(row * n + ends for row in range(batch))]).astype(np.int32))
    if "softcap" in options:
        named["softcap"] = 50.
    if "order" in options:  # that of the positions: the same as causal
        named["order"] = Tensor(np.tile(np.arange(n, dtype=np.int32), (batch, 1)))
    if "bias of queries" in options:
        named["attn_bias"] = Tensor(bias_of_queries(spec))
    sinks = Tensor(np.linspace(-1, 1, heads, dtype=np.float32)) if "sinks" in options else None
    causal, backward = "order" not in options, spec["window"] - 1
    window = WindowSpec(1, backward, 0 if causal else backward, causal, prefix=4 if "prefix" in options else 0)
    return_lse, backend = "lse" in options, spec["backend"]

    def forward(q, k, v):
        return windowed_attention(q, k, v, window, sinks=sinks, return_lse=return_lse, backend=backend, **named)

    gradient = ops.GradOperation(get_all=True, sens_param=True)(forward)
    sens = (dout, ops.ones(dout.shape[:3], ms.float32)) if return_lse else dout

    def both(*inputs):
        return gradient(*inputs, sens)
    function = both if spec["backward"] else forward
    function = ms.jit(function) if spec["mode"] == "graph" else function

    def call():
        answers = function(*inputs)
        answers = answers[:3] if spec["backward"] else [answers[0] if return_lse else answers]
        answers[-1].asnumpy()  # calls return before they are done
        return answers
    return call


def peer(spec):
    """Return PyTorch's SDPA under a mask of the window, or compiled FlexAttention with window and documents."""
    import torch
    n, window = spec["shape"][2], spec["window"]
    q, k, v, dout = (torch.from_numpy(x).requires_grad_(spec["backward"]) for x in inputs_of(spec))
    i = torch.arange(n)
    if spec["name"] == "sdpa":
        mask = (i[:, None] >= i) & (i[:, None] - i < window)
        if "bias of queries" in spec["options"]:  # the same numbers, written as n² of them
            column = (i - i[:, None] + window - 1).clamp(0, window - 1).expand(*q.shape[:3], n)
            mask = torch.from_numpy(bias_of_queries(spec)).gather(-1, column).masked_fill(~mask, float("-inf"))

        def attn(q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    else:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        lengths = torch.tensor(document_lengths(n))
        ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)

        def seen(batch, head, i, j):
            return (j <= i) & (i - j < window) & (ids[i] == ids[j])
        blocks = create_block_mask(seen, None, None, n, n, device="cpu")
        compiled = torch.compile(flex_attention)

        def attn(q, k, v):
            return compiled(q, k, v, block_mask=blocks)

    def call():
        with torch.set_grad_enabled(spec["backward"]):
            out = attn(q, k, v)
            return torch.autograd.grad(out, (q, k, v), dout) if spec["backward"] else [out]
    return call
