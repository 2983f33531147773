"""What a rank of test_parallel.py's jobs computes: the same cases as one process, each rank on its slice.

`msrun … parallel_worker.py FOLDER SECTION…` runs the sections' cases in both modes and writes FOLDER/RANK.npz. The test
calls the same functions without ranks, at the one place of a single process. Every result is an array and how to
combine those of the ranks into that of one process: concatenated along an axis, their mean, their sum, or the same on
each.
"""
import functools
import importlib
import re
import runpy
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, ops

import train
from local_attention import LocalAttention, LocalMHA, LocalTransformer
from local_attention.parallel import AverageGradients, exchange, halo

B, H, D, W, DIM, TOKENS = 2, 3, 10, 5, 11, 23
MODES = ("pynative", "graph")


@dataclass(frozen=True)
class Place:
    """The place of a process in the sequence and in the batch."""
    rank: int = 0
    size: int = 1
    sequence_parallel: Union[bool, str] = False
    part: int = 0  # of the batch
    parts: int = 1

    def slice(self, x, axis):
        return np.split(x, self.size, axis)[self.rank]

    def batch(self, x):
        return np.split(x, self.parts)[self.part]


def rng(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def run(function, arguments, mode):
    return [x.astype(ms.float32).asnumpy() for x in (ms.jit(function) if mode == "graph" else function)(*arguments)]


def ids_of(place, n, ranks, dtype):
    """Return ids of documents, or None: one document crosses every border, one ends at the first border, one is beside
    another whose id equals its own in float32, and there is padding in between."""
    if dtype is None:
        return None
    length, large = ranks * n, 2 ** 24
    rows = [[7] * (W - 2) + [large] * (length - W - 1) + [large + 1] * 3,
            [9] * 3 + [large] * (n - 3) + [large + 1, -1, -1] + [large + 1] * (length - n - 3)]
    return Tensor(place.batch(place.slice(np.array(rows), 1))).astype(dtype)


def attention(name, place, mode, ranks, n=2 * W, masked=False, biased=False, dtype=ms.float32, heads=H, kv_heads=None,
              sinks=False, documents=None, **settings):
    """Return output and gradients of LocalAttention, for n tokens on each rank."""
    ms.set_seed(3)  # the seed of dropout
    random, attn = rng(name), LocalAttention(W, sequence_parallel=place.sequence_parallel, **settings)
    q, k, v, cotangent = (place.slice(random.standard_normal((B, count, ranks * n, D)).astype(np.float32), 2)
                          for count in (heads, kv_heads or heads, kv_heads or heads, heads))
    ids, sink = ids_of(place, n, ranks, documents), random.standard_normal(heads).astype(np.float32)
    bias = random.standard_normal((H, W, attn.windows.span)).astype(np.float32)
    mask = place.slice(random.random((B, ranks * n)) < .6, 1)
    mask, cotangent = Tensor(mask) if masked else None, Tensor(cotangent)
    attn.set_train()

    def loss(q, k, v, bias, sink):
        out = attn(q, k, v, mask=mask, attn_bias=bias if biased else None, segment_ids=ids,
                   sinks=sink if sinks else None)
        return (ops.cast(out, ms.float32) * cotangent).sum(), out

    step = ms.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)

    def results(q, k, v, bias, sink):
        (_, out), grads = step(q, k, v, bias, sink)
        return out, *grads

    found = run(results, [*(Tensor(x).astype(dtype) for x in (q, k, v)), Tensor(bias), Tensor(sink)], mode)
    results = {key: (2, x) for key, x in zip(("out", "dq", "dk", "dv"), found)}
    more = {"dbias": ("sum", found[4])} if biased else {}
    return {**results, **more, **({"dsinks": ("sum", found[5])} if sinks else {})}


def filled(cell, random):
    """Return the cell with weights that are the same in every process, large enough for gradients to show."""
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(random.standard_normal(parameter.shape).astype(np.float32) * .3))
    return cell


def block(name, place, mode, ranks, n=2 * W, documents=None, **settings):
    """Return output and gradients of LocalMHA."""
    random = rng(name)
    x, cotangent = (Tensor(place.slice(random.standard_normal((B, ranks * n, DIM)).astype(np.float32), 1))
                    for _ in range(2))
    cell = filled(LocalMHA(dim=DIM, window_size=W, heads=H, dim_head=D, sequence_parallel=place.sequence_parallel,
                           **settings), random)

    ids = ids_of(place, n, ranks, documents)

    def loss(x):
        out = cell(x, segment_ids=ids)
        return (out * cotangent).sum(), out

    step = ms.value_and_grad(loss, 0, cell.trainable_params(), has_aux=True)

    def results(x):
        (_, out), (dx, grads) = step(x)
        return out, dx, *grads

    out, dx, *grads = run(results, [x], mode)
    names = [parameter.name for parameter in cell.trainable_params()]
    return {"out": (1, out), "dx": (1, dx), **{key: ("sum", grad) for key, grad in zip(names, grads)}}


def model(name, place, mode, ranks, n=2 * W, masked=False, ignored=0., longest=0, documents=None, padded=False,
          **settings):
    """Return loss and gradients of a LocalTransformer, averaged over the ranks as in a training script."""
    random = rng(name)
    settings = {"num_tokens": TOKENS, "max_seq_len": ranks * n + longest, "dim": DIM, "depth": 2, "heads": H,
                "dim_head": D, "local_attn_window_size": W, "ignore_index": 3, **settings}
    x = random.integers(0, TOKENS, (B, ranks * n))
    x = np.where(random.random(x.shape) < ignored, 3, x).astype(np.int32)
    mask = random.random(x.shape) < .7
    if padded == "right":  # but for a row of nothing else
        mask[:-1, 0], mask[-1] = True, False
    elif padded:  # on the left, in one row all slices but the last
        mask &= np.arange(ranks * n) >= np.linspace(3, (ranks - 1) * n + 1, B, dtype=int)[:, None]
    x, mask = (place.batch(place.slice(array, 1)) for array in (x, mask))
    mask, ids = Tensor(mask) if masked else None, ids_of(place, n, ranks, documents)
    cell = filled(LocalTransformer(sequence_parallel=place.sequence_parallel, **settings), random)
    parameters = cell.trainable_params()
    reduce = None
    if place.sequence_parallel is not False:
        reduce = AverageGradients("three" if place.sequence_parallel == "three" else None)

    def loss(x):
        return cell(x, mask=mask, return_loss=True, segment_ids=ids)

    step = ms.value_and_grad(loss, None, parameters)

    def results(x):
        value, grads = step(x)
        return value, *(grads if reduce is None else reduce(grads))

    def logits(x):
        return (cell(x, mask=mask, segment_ids=ids),)

    value, *grads = run(results, [Tensor(x)], mode)
    found = {"loss": ("same", value), **{p.name: ("same", grad) for p, grad in zip(parameters, grads)}}
    if longest == 0 and mode == "pynative":
        found["logits"] = 1, run(logits, [Tensor(x)], mode)[0]
    return found


# Every case runs outside of graphs on any number of ranks. In a graph, the cases of COMPILED run on two ranks, the
# others on more.
ATTENTION = {
    "causal": dict(causal=True, dim=D),
    "exact causal": dict(causal=True, exact_windowsize=True, dim=D, masked=True, n=W),
    "both sides": dict(dim=D, masked=True, biased=True),
    "exact both sides": dict(exact_windowsize=True, shared_qk=True, n=W),
    "two back, one forward": dict(look_backward=2, look_forward=1, shared_qk=True, masked=True, dropout=.3),
    "forward alone": dict(look_backward=0, look_forward=2, exact_windowsize=True, biased=True),
    "nothing beside": dict(look_backward=0, causal=True, masked=True),
    "xpos": dict(causal=True, dim=D, use_xpos=True, biased=True, dropout=.3),
    "xpos both sides": dict(dim=D, use_xpos=True, xpos_scale_base=3, masked=True, shared_qk=True, n=W),
    "float16": dict(causal=True, dtype=ms.float16, biased=True),
    "bfloat16": dict(look_forward=1, dtype=ms.bfloat16, masked=True),
    "fewer heads": dict(causal=True, dim=D, heads=6, kv_heads=2, sinks=True, softcap=2., masked=True),
    "documents": dict(causal=True, exact_windowsize=True, dim=D, heads=4, kv_heads=2, sinks=True, documents=ms.int32),
    "documents both sides": dict(exact_windowsize=True, dim=D, kv_heads=1, softcap=1.5, dropout=.3, masked=True,
                                 documents=ms.int64),
    "documents, float16": dict(causal=True, exact_windowsize=True, look_backward=2, dtype=ms.float16,
                               documents=ms.int32),
}
MODELS = {
    "causal": dict(ignored=.2, qk_rmsnorm=True, longest=-1),
    "both sides": dict(causal=False, depth=1, masked=True, ignored=.2, use_dynamic_pos_bias=True, n=W),
    "documents": dict(kv_heads=1, learned_sinks=True, softcap=3., ignored=.2, documents=ms.int32),
    "documents both sides": dict(causal=False, depth=1, masked=True, documents=ms.int64),
    "padded": dict(depth=1, masked=True, padded=True),
    "padded on the right": dict(depth=1, masked=True, padded="right", exact_windowsize=False),
    "padded documents": dict(depth=1, masked=True, padded=True, documents=ms.int32),
    "both sides, no mask": dict(causal=False, depth=1, exact_windowsize=False, use_xpos=True, num_residual_streams=2),
}
BLOCKS = {
    "block": dict(causal=True, qk_rmsnorm=True, gate_values_per_head=True, prenorm=True, dropout=.3),
    "fewer heads": dict(causal=True, exact_windowsize=False, kv_heads=1, learned_sinks=True, softcap=2.),
}
CASES = {**{f"attention, {name}": (attention, case) for name, case in ATTENTION.items()},
         **{f"block, {name}": (block, case) for name, case in BLOCKS.items()},
         **{f"model, {name}": (model, case) for name, case in MODELS.items()}}
COMPILED = ["attention, exact causal", "attention, both sides", "attention, two back, one forward", "attention, xpos",
            "block, block", "model, causal", "attention, fewer heads", "attention, documents", "model, documents",
            "model, padded documents"]
GRID = "model, both sides, no mask"  # equally many labels in each half of the batch: the mean of both losses is right
EMULATED = ["attention, exact causal", "attention, documents", "attention, two back, one forward",
            "attention, forward alone"]
NOT_COMPILED = ["attention, bfloat16", GRID]  # graphs have no bfloat16 on CPU; the grid compiles the other one


def runs(ranks):
    """Return which cases run in which mode."""
    compiled = [name for name in CASES if (name in COMPILED) == (ranks == 2) and name not in NOT_COMPILED]
    return [(name, "pynative") for name in CASES] + [(name, "graph") for name in compiled]


def compute(name, place, mode, ranks):
    """Return a case's results: name -> (how to combine the ranks' results, this rank's result)."""
    function, case = CASES[name]
    return {f"{name}/{mode}/{key}": value for key, value in function(name, place, mode, ranks, **case).items()}


@functools.lru_cache
def group_place():
    """Return the place in a group of all ranks, or of the first three if there are more; None for the other ranks."""
    rank, size = communication.get_rank(), communication.get_group_size()
    if size < 4:
        return Place(rank, size, True)
    if rank < 3:
        communication.create_group("three", [0, 1, 2])
    return Place(rank, 3, "three") if rank < 3 else None


def cases():
    place, results = group_place(), {}
    for name, mode in runs(place.size) if place else ():
        results.update(compute(name, place, mode, place.size))
    return results


def grid():
    """Run on four ranks: two halves of the batch, each with its sequences on two ranks."""
    rank, results = communication.get_rank(), {}
    for first in (0, 2):
        if rank in (first, first + 1):
            communication.create_group(f"sequence {first}", [first, first + 1])
    place = Place(rank % 2, 2, f"sequence {rank // 2 * 2}", rank // 2, 2)
    for mode in MODES:
        results.update({f"grid, {key}": value for key, value in compute(GRID, place, mode, 2).items()})
    return results


class EmulatedAllToAll:
    """Emulates ops.AlltoAllV by sums of zeros and a rank's part. Parts of a flat tensor, by counts, go to the ranks."""

    def __init__(self, group):
        self.rank, self.size = communication.get_rank(group), communication.get_group_size(group)
        self.sum = ops.AllReduce(group=group)

    def gather(self, x):
        every = np.zeros((self.size, *x.shape), np.float32)
        every[self.rank] = x
        return self.sum(Tensor(every)).asnumpy()

    def __call__(self, x, sent, received):
        assert x.shape == (sum(sent),) or sum(sent) == 0
        counts = self.gather(np.array(sent)).astype(int)
        assert tuple(counts[:, self.rank]) == received
        every, starts = self.gather(np.resize(x.asnumpy(), counts.sum(1).max())), np.cumsum(counts, 1) - counts
        parts = [part[start:start + count] for part, start, count in
                 zip(every, starts[:, self.rank], counts[:, self.rank])]
        return Tensor(np.concatenate(parts)) if sum(received) else ops.zeros((), x.dtype)


def emulated():
    """Run cases again with Ascend's exchange, and its operator emulated."""
    results, place = {}, group_place()
    before, all_to_all = halo.exchange, ops.AlltoAllV
    halo.exchange, ops.AlltoAllV = exchange.AllToAll, EmulatedAllToAll
    for name in EMULATED if place else ():
        function, case = CASES[name]
        found = function(name, place, "pynative", place.size, **{**case, "n": 3 * W})
        results.update({f"{name}/emulated/{key}": value for key, value in found.items()})
    halo.exchange, ops.AlltoAllV = before, all_to_all
    return results


def counted_bytes():
    """Count the bytes that a rank puts into collectives, forward and backward, for a short and for a long slice."""
    results, counted, reduce = {}, [], ops.AllReduce

    class Counted:
        def __init__(self, **kwargs):
            self.reduce = reduce(**kwargs)

        def __call__(self, x):
            counted.append(x.nbytes)
            return self.reduce(x)

    ops.AllReduce = Counted
    for n in (4 * W, 40 * W):
        counted.clear()
        place = Place(communication.get_rank(), communication.get_group_size(), True)
        attention("bytes", place, "pynative", place.size, n=n, causal=True, dim=D, masked=True)
        results[f"bytes/{n}"] = None, np.array([len(counted), sum(counted)])
    for kv_heads in (8, 2):
        counted.clear()
        attention("bytes", place, "pynative", place.size, causal=True, dim=D, heads=8, kv_heads=kv_heads)
        results[f"bytes/8 on {kv_heads}"] = None, np.array(sum(counted))
    ops.AllReduce = reduce
    return results


def refusals():
    """Check messages raised before anything is exchanged: unknown groups, and options that exclude each other."""
    q, ids = ops.ones((B, H, 2 * W, D)), ops.zeros((B, 2 * W), ms.int32)
    parallel_attention = functools.partial(LocalAttention, W, sequence_parallel=True)
    model = functools.partial(LocalTransformer, num_tokens=TOKENS, max_seq_len=9 * W, dim=DIM, depth=2, heads=H,
                              dim_head=D, sequence_parallel=True)
    for call, message in (
            (lambda: LocalAttention(W, sequence_parallel="nobody"), "'sequence_parallel' needs a communication group"),
            (lambda: AverageGradients("nobody"), "For 'AverageGradients', 'group' needs a communication group"),
            (lambda: parallel_attention(prefix=1), "'prefix' and 'sequence_parallel' cannot go together"),
            (lambda: parallel_attention()(q, q, q, segment_ids=ids),
             "'segment_ids' and 'sequence_parallel' without 'exact_windowsize' cannot go together"),
            (lambda: parallel_attention(exact_windowsize=True)(
                q, q, q, segment_ids=ids, attn_bias=ops.ones((H, W, 3 * W))),
             "'segment_ids' and 'attn_bias' with 'sequence_parallel' cannot go together"),
            (lambda: model(local_attn_window_size=W, exact_windowsize=False)(ids, segment_ids=ids),
             "For 'LocalTransformer', 'segment_ids' and 'sequence_parallel' without 'exact_windowsize' cannot"),
            (lambda: model(local_attn_window_size=W, use_dynamic_pos_bias=True)(ids, segment_ids=ids),
             "'segment_ids' and 'use_dynamic_pos_bias' with 'sequence_parallel' cannot go together"),
            (lambda: model(local_attn_window_size=(W, None)),
             "'local_attn_window_size' must be without None with 'sequence_parallel'")):
        try:
            call()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    return {}


def disagreements():
    """Check the message that every rank gets where calls differ, also of a function that each rank has compiled for
    either call. (After the error, MindSpore cannot run the compiled function again.)"""
    n, rank, ones = 2 * W, communication.get_rank(), ops.ones
    attn = LocalAttention(W, causal=True, exact_windowsize=True, sequence_parallel=True)
    net = LocalTransformer(num_tokens=TOKENS, max_seq_len=4 * W, dim=DIM, depth=1, heads=H, dim_head=D,
                           local_attn_window_size=W, sequence_parallel=True)
    gradients = ms.value_and_grad(lambda x, mask=None: net(x, mask=mask, return_loss=True), None,
                                  net.trainable_params())
    x, q, mask = ops.zeros((B, n), ms.int32), ones((B, H, n, D)), ones((B, n)).bool()
    long, short = f"{n} tokens", f"{W} tokens"

    def attention(q, mask=None, segment_ids=None):
        return attn(q, q, q, mask=mask, segment_ids=segment_ids)

    def biased(q, attn_bias=None):
        return attn(q, q, q, attn_bias=attn_bias)

    def logits(x):
        return net(x)

    def renewed(function):
        def call(*arguments):
            return function(*arguments)
        return call

    for function, first, second, got in (
            (logits, (x,), (x[:, :W],), (f"{long} alone", f"{short} alone")),
            (gradients, (x, mask), (x,), (f"{long} with 'mask', 'return_loss'", f"{long} with 'return_loss'")),
            (attention, (q,), (q[:, :, :W],), (f"{long} alone", f"{short} alone")),
            (attention, (q,), (q, None, x), (f"{long} alone", f"{long} with 'segment_ids'")),
            (attention, (q, mask), (q, None, x), (f"{long} with 'mask'", f"{long} with 'segment_ids'")),
            (biased, (q, ones((H, 1, W + 1))), (q,), (f"{long} with 'attn_bias'", f"{long} alone")),
            (attention, (q,), (q.half(),), (f"{long} alone", f"{long} alone of other shapes or dtypes"))):
        for mode in MODES if function in (logits, attention) else MODES[:1]:
            call = function
            if mode == "graph":
                call = ms.jit(renewed(function))
                call(*first), call(*second)
            try:
                found = call(*(second if rank else first))
                (found[0] if isinstance(found, tuple) else found).asnumpy()
            except ValueError as error:
                assert f"must be the same on every rank, but got {got[0]} on rank 0 and {got[1]} on rank 1" in str(
                    error), error
            else:
                raise AssertionError(got)
    return {}


def left_padding():
    """Check that padding on the left of windows that count from there is refused on every rank."""
    net = LocalTransformer(num_tokens=TOKENS, max_seq_len=4 * W, dim=DIM, depth=1, heads=H, dim_head=D,
                           local_attn_window_size=W, exact_windowsize=False, sequence_parallel=True)
    mask = Tensor(np.arange(2 * W)[None] >= (1 if communication.get_rank() else 2 * W))

    def logits(x):
        return net(x, mask=mask)
    for call in (logits, ms.jit(logits)):
        try:
            call(ops.zeros((1, 2 * W), ms.int32)).asnumpy()
        except ValueError as error:
            assert "'mask' must be without padding on the left with 'sequence_parallel'" in str(error), error
            assert f"but got {2 * W + 1} tokens of it." in str(error), error
        else:
            raise AssertionError("left padding")
    return {}


TINY = ("--dim 16 --depth 1 --heads 2 --dim-head 8 --seq-len 24 --windows 8 --grad-accum 2 --warmup 2 --steps 20 "
        "--validate-every 10 --validate-batches 2 --sample-every 20 --sample-len 1 --save-every 3").split()


def training():
    """Run train.py unchanged: it dies and is resumed, then gets settings that disagree. `data` is in this folder."""
    ms.set_device = lambda name: None  # communication.init() has set it already
    settings = [*TINY, "--data", "data", "--batch-size", "3"]
    train.main([*settings, "--out", "graph"])

    take_step = train.Trainer.train_step

    def disturbed(trainer, batches):
        if trainer.step == 5:  # after the checkpoint of step 3
            raise MemoryError
        return take_step(trainer, batches)

    train.Trainer.train_step = disturbed
    try:
        train.main([*settings, "--out", "pynative", "--mode", "pynative"])
    except MemoryError:
        pass
    train.Trainer.train_step = take_step
    train.main(["--out", "pynative", "--resume"])
    try:
        train.main([*settings, "--out", "none", "--seed", str(communication.get_rank())])
    except SystemExit as error:
        assert "--seed is 0 for rank 0 and 1 for rank 1, but must be the same for all" in str(error), error
    else:
        raise AssertionError("two seeds")
    assert communication.get_rank() > 0 or not Path("none").exists()  # the first rank made it, and removed it
    return {}


def example():
    """Run the example of docs/long_sequence.py."""
    sys.path.append(str(Path(train.__file__).parent / "docs"))
    importlib.import_module("long_sequence").main()
    return {}


def model_train():
    """Run the block of docs/parallel.md that trains by `Model.train`; the ranks have other data and equal weights."""
    page = (Path(train.__file__).parent / "docs" / "parallel.md").read_text(encoding="utf-8")
    script, = re.findall(r"```text\n(import mindspore.*?)```", page, re.DOTALL)
    Path(f"script_{communication.get_rank()}.py").write_text(script.replace("\ninit()\n", "\n"))  # main has called it
    try:
        used = runpy.run_path(f"script_{communication.get_rank()}.py")
    finally:
        ms.reset_auto_parallel_context()
    first, = next(used["data"].create_tuple_iterator(num_epochs=1, output_numpy=True))
    return {"model_train/data": (0, first),
            **{f"model_train/{x.name}": ("same", x.asnumpy()) for x in used["network"].trainable_params()}}


SECTIONS = {"example": example, "cases": cases, "grid": grid, "emulated": emulated, "bytes": counted_bytes,
            "refusals": refusals, "disagreements": disagreements, "left padding": left_padding,
            "training": training, "model_train": model_train}


def main(folder, *sections):
    ms.set_device("CPU")
    communication.init()
    results = {}
    for section in sections:
        start = time.process_time()
        results.update(SECTIONS[section]())
        print(f"{section}: {time.process_time() - start:.1f} s of CPU", flush=True)
    np.savez(Path(folder) / f"{communication.get_rank()}.npz", **{name: value for name, (_, value) in results.items()})
    while len(list(Path(folder).glob("*.npz"))) < communication.get_group_size():
        time.sleep(.1)  # no rank leaves before the last one is done: in a collective, ranks wait at most ten seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
