"""Check that this machine computes right results: `python -m local_attention.selfcheck [--device CPU|GPU|Ascend]`.

Every backend that can run here is compared, forward and backward, with a definition in float64 and with `dense` on this
machine; then follow training steps, decoding and times. It exits with 0 only if everything that could run was right.
Send what it prints, or the file of `--json FILE`, with a report.
"""
import argparse
import json
import platform
import sys
import time

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

import local_attention
from local_attention import LocalAttention, LocalTransformer, WindowSpec, settings, use_backend, windowed_attention
from local_attention.attend import BACKENDS
from local_attention.backends.native import library
from local_attention.selfcheck_cases import BATCH, CASES, D, DROPOUT, HEADS, N, reference

PRECISIONS = {"CPU": ("float32", "float16", "bfloat16"), "GPU": ("float32", "float16"),
              "Ascend": ("float32", "float16", "bfloat16")}  # on GPU, MindSpore has no cast to bfloat16
LIMITS = {"float32": 2e-4, "float16": 5e-3, "bfloat16": 4e-2}  # of errors, relative to the largest value or 1
REFUSED = "cannot run this call: it "


def computed(case, backend, precision, compiled):
    """Return the output, the log-sum-exp and the gradients of a case, computed by a backend."""
    inputs = [Tensor(x) if name == "sinks" else Tensor(x).astype(getattr(ms, precision))
              for name, x in case.floats.items()]
    mask, ids, ends, order = (Tensor(case.given[name]) if name in case.given else None
                              for name in ("mask", "segment_ids", "cu_seqlens", "order"))
    dout, dlse, spec, with_lse = Tensor(case.dout), Tensor(case.dlse), case.spec, case.lse
    with_bias, with_sinks = case.bias, case.sinks
    scale, softcap, rate, seed = (case.more.get(name) for name in ("scale", "softcap", "dropout_rate", "seed"))

    def loss(q, k, v, *more):
        out = windowed_attention(
            q, k, v, spec, mask=mask, segment_ids=ids, cu_seqlens=ends, order=order,
            attn_bias=more[0] if with_bias else None, sinks=more[-1] if with_sinks else None, scale=scale,
            softcap=softcap, dropout_rate=rate or 0., seed=seed, return_lse=with_lse, backend=backend)
        outs = out if with_lse else (out,)
        total = (ops.cast(outs[0], ms.float32) * dout).sum()
        if with_lse:
            total = total + (ops.masked_fill(outs[1], outs[1] < -1e30, 0.) * dlse).sum()
        return total, outs
    loss(*inputs)  # a refusal is raised here: in a gradient or a graph, it would leave MindSpore in a bad state
    step = ms.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True)
    (_, outs), grads = (ms.jit(step) if compiled else step)(*inputs)
    return [x.astype(ms.float32).asnumpy() for x in (*outs, *grads)]


def distance(got, wanted):
    """Return the largest difference, relative to the largest value or 1; infinite for NaN, other shapes or
    infinities."""
    worst = 0.
    for a, b in zip(got, wanted):
        if a.shape != b.shape or np.isnan(a).any() or (np.isfinite(a) != np.isfinite(b)).any():
            return float("inf")
        there = np.isfinite(b)
        worst = max(worst, float(np.abs(a[there] - b[there]).max(initial=0) / max(1, np.abs(b[there]).max(initial=0))))
    return worst


# ---- every check is a function that returns an error, which is right if it is below a limit


class Report:
    """The rows of what ran; prints each as it is added."""

    def __init__(self):
        self.rows = []
        print(f"{'what':26}{'backend':12}{'how':20}{'error':>10}{'from dense':>12}{'seconds':>9}")

    def check(self, what, backend, how, limit, function):
        """Add one row. `function` returns the error and the distance from dense. A reasoned refusal is no failure."""
        start, error, apart, note = time.perf_counter(), None, None, ""
        try:
            error, apart = function()
            right = error <= limit and (apart is None or apart <= 2 * limit)
        except Exception as exception:  # whatever it is, the other checks must run
            text = str(exception).strip() or repr(exception)
            _, refused, note = text.partition(REFUSED)
            right = None if refused else False
            note = note if refused else f"{type(exception).__name__}: {text}"
            note = note.splitlines()[0][:160]
        self.add(what, backend, how, right, error, apart, time.perf_counter() - start, note)

    def add(self, what, backend, how, right, error=None, apart=None, seconds=None, note=""):
        self.rows.append(dict(what=what, backend=backend, how=how, right=right, error=error, from_dense=apart,
                              seconds=seconds, note=note))
        verdict = {True: "", False: "  WRONG", None: "  not run"}[right]
        numbers = "".join(f"{'' if x is None else f'{x:.1e}':>{width}}" for x, width in ((error, 10), (apart, 12)))
        print(f"{what:26}{backend:12}{how:20}{numbers}{'' if seconds is None else f'{seconds:.2f}':>9}{verdict}"
              f"{': ' + note if note else ''}", flush=True)

    @property
    def right(self):
        return all(row["right"] is not False for row in self.rows)


def check_cases(report, device, quick):
    backends = ["dense", *(name for name in BACKENDS if name not in ("dense", "any_length"))]
    for name in list(backends):
        reason = _never(name)
        if reason:
            backends.remove(name)
            report.add("everything", name, "", None, note=reason)
    for case in CASES[:2] if quick else (*CASES, DROPOUT):
        for precision in PRECISIONS[device][:1 if quick else None]:
            for compiled in (False, True)[:1 if precision != "float32" or quick else None]:
                dense, wanted = [], reference(case) if case is not DROPOUT else None

                def against(backend, case=case, precision=precision, compiled=compiled, dense=dense, wanted=wanted):
                    got = computed(case, backend, precision, compiled)
                    if backend == "dense":
                        dense.extend(got)
                    truth = wanted or dense
                    return distance(got, truth), distance(got, dense) if dense else None
                for backend in backends:
                    report.check(case.name, backend, f"{precision}{', compiled' if compiled else ''}",
                                 LIMITS[precision], lambda backend=backend: against(backend))


def _never(backend):
    """Return why a backend runs nothing on this machine, None if it may run something."""
    try:
        x = ops.zeros((1, 1, 8, 16), ms.float16)
        windowed_attention(x, x, x, WindowSpec(1, 3, 0, True), backend=backend)
    except ValueError as exception:
        return str(exception).partition(REFUSED)[2] or str(exception)
    except Exception:  # it runs, and fails: the cases will show it
        return None
    return None


def check_any_length():
    """Compare a graph that is compiled once for any length with one that is not."""
    rng = np.random.default_rng(0)
    x = [Tensor(rng.standard_normal((BATCH, HEADS, N, D)).astype(np.float32)) for _ in range(3)]
    attn = LocalAttention(8, causal=True, autopad=True, dim=D)
    wanted = LocalAttention(8, causal=True, autopad=True, dim=D, backend="dense")(*x)
    attn.set_inputs(*[Tensor(shape=(BATCH, HEADS, None, D), dtype=ms.float32)] * 3)
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        got = attn(*x).asnumpy()
    finally:
        ms.set_context(mode=mode)
    return distance([got], [wanted.asnumpy()]), None


def a_model():
    ms.set_seed(0)
    np.random.seed(0)
    return LocalTransformer(num_tokens=61, max_seq_len=64, dim=32, depth=2, heads=2, dim_head=D, causal=True,
                            local_attn_window_size=8)


def steps(backend, compiled):
    """Return the losses of four steps of Adam, and the last gradients."""
    tokens = Tensor(np.random.default_rng(0).integers(0, 61, (BATCH, 33)).astype(np.int32))
    with use_backend(backend):
        model = a_model()
        model.set_train()
        optimizer = nn.Adam(model.trainable_params(), 1e-2)

        def loss_of(x):
            return model(x, return_loss=True)
        step = ms.value_and_grad(loss_of, None, optimizer.parameters)
        step = ms.jit(step) if compiled else step
        losses = []
        for _ in range(4):
            loss, grads = step(tokens)
            optimizer(grads)
            losses.append(loss.asnumpy())
        return [np.array(losses), *(grad.asnumpy() for grad in grads)]


def check_training(compiled):
    """Compare training by the fastest backends with dense, from the same weights; the loss must fall."""
    got, wanted = steps(None, compiled), steps("dense", False)
    fell = got[0][-1] < got[0][0]
    return distance(got, wanted) if fell else float("inf"), None


def check_decoding(precision):
    """Compare greedy decoding with a cache to decoding without; return the share of tokens that differ."""
    model = a_model()
    if precision != "float32":
        model.to_float(getattr(ms, precision))
    prime = Tensor(np.random.default_rng(1).integers(0, 61, (BATCH, 5)).astype(np.int32))
    with_cache, without = (model.generate(prime, 20, temperature=0., use_kv_cache=cached).asnumpy()
                           for cached in (True, False))
    valid = with_cache.min() >= 0 and with_cache.max() < 61 and len(np.unique(with_cache)) > 1
    return float((with_cache != without).mean()) if valid else float("inf"), None


def times(report, device):
    """Time compiled attention of (1, 8, 2048, 64) with a window of 512."""
    spec, rng = WindowSpec.from_sliding_window(512), np.random.default_rng(0)
    precision = "float16" if device == "Ascend" else "float32"
    x = [Tensor(rng.standard_normal((1, 8, 2048, 64)).astype(np.float32)).astype(getattr(ms, precision))
         for _ in range(3)]
    for backend in (name for name in BACKENDS if name != "any_length" and not _never(name)):
        for what, function in zip(("time, forward", "time, with gradients"), _to_time(spec, backend)):
            def timed(function=function):
                compiled, took = ms.jit(function), []
                for _ in range(6):
                    start = time.perf_counter()
                    out = compiled(*x)
                    (out if isinstance(out, Tensor) else out[0]).asnumpy()
                    took.append(time.perf_counter() - start)
                return float(np.median(took[1:]))
            try:
                report.add(what, backend, f"{precision}, compiled", True, seconds=timed())
            except Exception as exception:
                report.add(what, backend, f"{precision}, compiled", False, note=str(exception).strip().splitlines()[0])


def _to_time(spec, backend):
    def forward(q, k, v):
        return windowed_attention(q, k, v, spec, backend=backend)

    def total(q, k, v):
        return ops.cast(forward(q, k, v), ms.float32).sum()
    return forward, ms.grad(total, (0, 1, 2))


def machine(device):
    """Return the versions and the machine, the head of a report."""
    there = dict(local_attention=local_attention.__version__, mindspore=ms.__version__, numpy=np.__version__,
                 python=platform.python_version(), system=platform.platform(), device=device)
    if device == "CPU" and library.load()[0]:
        there["native"] = f"{settings.LEVELS[library.machine_level()]}, {settings.threads()} threads"
    elif device != "CPU":
        try:
            there["device"] = f"{device}, {ms.hal.get_device_name(0)}"
        except Exception:  # a missing name is not worth a failure
            pass
    return there


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m local_attention.selfcheck", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(PRECISIONS), help="where to run; MindSpore's own choice if not given")
    parser.add_argument("--json", metavar="FILE", help="where to write the same as JSON")
    parser.add_argument("--quick", action="store_true", help="a few cases alone, in seconds")
    options = parser.parse_args(arguments)
    if options.device:
        ms.set_device(options.device)
    device = ms.get_context("device_target")
    ms.set_context(pynative_synchronize=True)  # so that an error surfaces where it was caused
    there = machine(device)
    print("\n".join(f"{name}: {value}" for name, value in there.items()))
    report, start = Report(), time.perf_counter()
    check_cases(report, device, options.quick)
    if not options.quick:
        report.check("a length not known", "any_length", "float32, compiled", LIMITS["float32"], check_any_length)
        for compiled in (False, True):
            report.check("training steps", "the fastest", f"float32{', compiled' if compiled else ''}", 5e-3,
                         lambda compiled=compiled: check_training(compiled))
        for precision in PRECISIONS[device][:2]:
            report.check("decoding with a cache", "the fastest", precision, 0,
                         lambda precision=precision: check_decoding(precision))
        times(report, device)
    wrong = [f"{row['what']} ({row['backend']}, {row['how']})" for row in report.rows if row["right"] is False]
    print(f"{len(report.rows)} rows in {time.perf_counter() - start:.0f} s: "
          + (f"{len(wrong)} WRONG: " + "; ".join(wrong) if wrong else "all that could run was right"))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(dict(machine=there, right=report.right, rows=report.rows), file, indent=1)
    return 0 if report.right else 1


if __name__ == "__main__":
    sys.exit(main())
