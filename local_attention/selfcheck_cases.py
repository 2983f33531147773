"""What `local_attention.selfcheck` checks: calls, and their results by a definition in float64.

The tests have a definition of their own, which works on one query at a time, but tests are not installed.
"""
from dataclasses import dataclass, field

import numpy as np

from local_attention import WindowSpec

BATCH, HEADS, N, D = 2, 4, 37, 16


@dataclass
class Case:
    """A call of `windowed_attention`: arrays, with values that bfloat16 nearly holds, and numbers."""
    name: str
    spec: WindowSpec
    kv_heads: int = HEADS
    n_q: int = N
    width: int = D  # of the values
    mask: bool = False
    documents: bool = False
    ends: bool = False  # documents by their ends
    order: bool = False
    bias: bool = False
    sinks: bool = False
    of_queries: bool = False  # whether bias and sinks have a row for each query
    lse: bool = False
    more: dict = field(default_factory=dict)

    def __post_init__(self):
        rng = np.random.default_rng(len(self.name))

        def draw(*shape):
            return np.round(rng.standard_normal(shape) * 32).astype(np.float32) / 32
        key_shape, period = (BATCH, self.kv_heads, N, D), self.spec.bucket
        self.floats = dict(q=draw(BATCH, HEADS, self.n_q, D), k=draw(*key_shape), v=draw(*key_shape[:3], self.width))
        if self.bias:
            rows = (1, HEADS, self.n_q) if self.of_queries else (HEADS, period)
            self.floats["attn_bias"] = draw(*rows, self.spec.backward + period + self.spec.forward)
        if self.sinks:
            self.floats["sinks"] = draw(*((BATCH, HEADS, self.n_q) if self.of_queries else (HEADS,)))
        self.dout, self.dlse = draw(BATCH, HEADS, self.n_q, self.width), draw(BATCH, HEADS, self.n_q) * self.lse
        self.given = {}
        if self.mask:
            self.given["mask"] = rng.random((BATCH, N)) > .3
        if self.documents:
            self.given["segment_ids"] = np.sort(rng.integers(-1, 3, (BATCH, N)), 1).astype(np.int32)
        if self.ends:
            self.given["cu_seqlens"] = np.array([0, 11, 30, N, N + 20, 2 * N, 2 * N], np.int32)
        if self.order:
            self.given["order"] = rng.integers(0, 9, (BATCH, N)).astype(np.int32)

    def ids(self, row):
        """Return the number of each token's document."""
        if self.ends:
            return np.searchsorted(self.given["cu_seqlens"], row * N + np.arange(N), side="right")
        return self.given["segment_ids"][row] if self.documents else np.zeros(N, int)


CASES = (  # first what a device may do otherwise than it is described
    Case("a window that moves", WindowSpec(1, 7, 0, True)),
    Case("new queries of a cache", WindowSpec(1, 7, 0, True), n_q=3, kv_heads=1, sinks=True),
    Case("new queries, a band", WindowSpec(1, 5, 0, True), n_q=9),
    Case("packed documents", WindowSpec(1, 7, 0, True), kv_heads=2, ends=True),
    Case("values of other widths", WindowSpec(1, 7, 2, False), width=24),
    Case("windows, one back", WindowSpec(8, 8, 0, True), kv_heads=2),
    Case("both sides, a key mask", WindowSpec(1, 5, 3, False), mask=True, lse=True),
    Case("documents", WindowSpec(8, 8, 8, False), documents=True),
    Case("a bias", WindowSpec(8, 8, 0, True), bias=True),
    Case("sinks, capped scores", WindowSpec(1, 11, 0, True), sinks=True, more=dict(softcap=2., scale=.5)),
    Case("a prefix, sinks, sums", WindowSpec(1, 7, 0, True, 3), kv_heads=2, mask=True, sinks=True, lse=True),
    Case("an order", WindowSpec(1, 7, 5, False), documents=True, order=True),
    Case("rows of each query", WindowSpec(8, 8, 0, True), kv_heads=2, bias=True, sinks=True, of_queries=True),
)
DROPOUT = Case("dropout", WindowSpec(8, 8, 0, True), more=dict(dropout_rate=.3, seed=5))


def reference(case):
    """Compute output, log-sum-exp and gradients in float64, from `WindowSpec.visible` and the order of `Scoring`."""
    q, k, v = (case.floats[name].astype(np.float64) for name in "qkv")
    share, offset, spec = HEADS // case.kv_heads, N - case.n_q, case.spec
    k, v = k.repeat(share, 1), v.repeat(share, 1)
    seen, entry = np.zeros((BATCH, N, N), bool), np.zeros((BATCH, N, N), int)
    for row in range(BATCH):
        ids = case.ids(row)
        edges = [0, *np.flatnonzero(np.diff(ids)) + 1, N]
        for start, end in zip(edges[:-1], edges[1:]):  # in each document, positions count from its start
            place, document = np.arange(end - start), np.s_[row, start:end, start:end]
            seen[document] = spec.visible(place, place) & (ids[start] >= 0)
            start_of_bucket = place // spec.bucket * spec.bucket
            columns = spec.backward + spec.bucket + spec.forward
            column = np.clip(place - (start_of_bucket - spec.backward)[:, None], 0, columns - 1)
            rows = place + start - offset if case.of_queries else place % spec.bucket
            entry[document] = rows[:, None] * columns + column
    if case.order:
        seen &= case.given["order"][:, None] <= case.given["order"][:, :, None]
    seen &= case.given.get("mask", np.ones((BATCH, N), bool))[:, None]
    seen, entry = seen[:, None, offset:], entry[:, offset:]
    scale, softcap = case.more.get("scale", D ** -0.5), case.more.get("softcap")
    scores, slope = scale * q @ k.swapaxes(2, 3), 1.
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
        slope = 1 - (scores / softcap) ** 2
    if case.bias:
        flat = case.floats["attn_bias"].astype(np.float64).reshape(HEADS, -1)
        scores = scores + flat[:, entry].swapaxes(0, 1)
    weights = np.exp(scores) * seen  # without a maximum, because scores are small here
    of_sink = np.exp(case.floats["sinks"].astype(np.float64)) if case.sinks else np.zeros(HEADS)
    of_sink = of_sink if case.of_queries else of_sink[:, None]
    total = weights.sum(-1) + of_sink
    with np.errstate(divide="ignore"):
        lse, total = np.log(total), np.where(total == 0, 1, total)
    weights, of_sink = weights / total[..., None], of_sink / total
    dweights = case.dout @ v.swapaxes(2, 3)
    along = (weights * dweights).sum(-1)
    dscores = weights * (dweights + (case.dlse - along)[..., None])
    dproducts = dscores * slope * scale
    grads = dict(q=dproducts @ k, k=dproducts.swapaxes(2, 3) @ q, v=weights.swapaxes(2, 3) @ case.dout)
    for name in "kv":
        grads[name] = grads[name].reshape(BATCH, -1, share, N, case.floats[name].shape[-1]).sum(2)
    if case.bias:
        grads["attn_bias"] = np.zeros(case.floats["attn_bias"].shape)
        for head in range(HEADS):
            np.add.at(grads["attn_bias"].reshape(HEADS, -1)[head], entry, dscores[:, head])
    if case.sinks:
        of_sink = of_sink * (case.dlse - along)
        grads["sinks"] = of_sink if case.of_queries else of_sink.sum((0, 2))
    return [weights @ v, *[lse] * case.lse, *grads.values()]
