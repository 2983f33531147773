"""The library that the kernel is built as: whether it is there, and operators that call it."""
import ctypes
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import CustomRegOp, DataType

from ... import settings

FLOATS, BOOLS = DataType.F32_Default, DataType.BOOL_Default
INT32, INT64 = DataType.I32_Default, DataType.I64_Default
HALVES = DataType.F16_Default, DataType.BF16_Default
# What a call of attention takes and returns, in the kernel's order, and its numbers, which are sent in that order.
INPUTS = {"q": FLOATS, "k": FLOATS, "v": FLOATS, "mask": BOOLS, "documents": INT32, "order": INT32, "bias": FLOATS,
          "sinks": FLOATS, "rel_pos_emb": FLOATS, "rel_pos_query": FLOATS, "seed": INT32, "numbers": INT64}
EXPORTERS = {"mindspore.train.serialization": "MINDIR", "mindspore.onnx.onnx_export": "ONNX"}
OF_Q = "q", "k", "v", "out", "dout", "dq", "dk", "dv"  # these may be of two bytes, all alike; other floats are float32
RESULTS, RECEIVED = ("out", "statistics", "lse"), ("out", "statistics", "dout", "dlse")
GRADIENTS = ("dq", "dk", "dv", "dbias", "dsinks", "drel_pos_emb", "drel_pos_query")
NUMBERS = {
    "groups": lambda problem: problem.groups,
    "kv_groups": lambda problem: problem.groups // problem.per_key_head,
    "n_q": lambda problem: problem.n_q,
    "n_k": lambda problem: problem.n_k,
    "head_dim": lambda problem: problem.d,
    "value_dim": lambda problem: problem.d_v,
    "bucket": lambda problem: problem.spec.bucket,
    "spec_backward": lambda problem: problem.spec.backward,
    "spec_forward": lambda problem: problem.spec.forward,
    "causal": lambda problem: problem.spec.causal,
    "prefix": lambda problem: problem.spec.prefix,
    "offset": lambda problem: problem.offset,
    "batch": lambda problem: problem.rows("mask"),
    "doc_batch": lambda problem: problem.rows("documents"),
    "order_batch": lambda problem: problem.rows("order"),
    "bias_batch": lambda problem: problem.rows("bias") if problem.bias_rows else 1,
    "heads": lambda problem: problem.heads,
    "bias_rows": lambda problem: problem.bias_rows,
    "period": lambda problem: problem.bias_period,
    "columns": lambda problem: (problem.shape("bias") or (0,))[-1],
    "bias_backward": lambda problem: problem.spec.backward,
    "offsets": lambda problem: problem.rows("rel_pos_emb"),
    "own_query": lambda problem: problem.has("rel_pos_query"),
    "sink_heads": lambda problem: 0 if "sink_rows" in problem.uses else problem.rows("sinks"),
    "sink_rows": lambda problem: "sink_rows" in problem.uses,
    "hide_self": lambda problem: problem.scoring.hide_self,
    "threads": lambda problem: settings.threads(),
    "level": lambda problem: settings.level,
    "first_group": lambda problem: problem.frame.origin[0],
    "first_position": lambda problem: problem.frame.origin[1],
    "beside": lambda problem: problem.heads_in_row,
    "scale": lambda problem: float(problem.scoring.scale),
    "softcap": lambda problem: float(problem.scoring.softcap or 0),
    "dropout": lambda problem: float(problem.scoring.dropout),
}
OLDER = "_native*.so"  # in the folder above: what earlier versions built


@cache
def load():
    """Return (path of the built kernel, None), or (None, why it cannot be used)."""
    path = Path(__file__).with_name("_native.so")
    if not path.is_file():
        older = sorted(path.parent.parent.glob(OLDER))
        also = f"; {older[0]} is of an earlier version, and may be removed" if older else ""
        return None, f"was not built: that takes a C++ compiler where the package is installed{also}"
    try:
        fits = _fits(names(str(path)))
    except OSError as error:
        return None, f"could not be loaded ({error})"
    if not fits:
        return None, f"was built from other sources: {path} is to be removed, and the package installed again"
    return str(path), None


def names(path):
    """Return the names that a kernel has for what goes into a call and comes out of it, by kind."""
    tell = getattr(ctypes.CDLL(path), "attention_names", None)
    if tell is None:
        return {}
    tell.restype = ctypes.c_char_p
    return {kind: tuple(found) for kind, *found in map(str.split, tell().decode().splitlines())}


def _fits(found):
    """Whether what this file sends and expects has these names."""
    here = {"inputs": tuple(INPUTS), "results": RESULTS, "received": RECEIVED, "gradients": GRADIENTS}
    return set(found.get("numbers", ())) == set(NUMBERS) and {**found, **here} == found


def numbers(problem):
    """Return the numbers that the kernel gets for a problem."""
    return integers(*(NUMBERS[name](problem) for name in names(load()[0])["numbers"]))


def machine_level():
    """Return the widest vectors that the kernel can use on this machine, as an index of LEVELS."""
    return ctypes.CDLL(load()[0]).attention_level()


def exporting():
    """Return the format that the caller is being exported to, for machines without this library, None if it is not. A
    graph does not show it, but MindSpore's `export` is then among the callers."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") not in EXPORTERS:
        frame = frame.f_back
    if frame is None:
        return None
    return "ONNX" if frame.f_code.co_name == "_save_onnx" else EXPORTERS[frame.f_globals["__name__"]]


def unavailable(device):
    """Return why the library cannot run on a device now, None if it can."""
    if device != "CPU":
        return "runs on CPU alone"
    if exporting():
        return "is a library of this machine, which an exported graph would look for where it runs"
    return load()[1]


def integers(*numbers):
    """Return a Tensor of int64, with floats as their bits: a Cell that stays in float32 would cast any other dtype."""
    return Tensor(np.array([np.float64(x).view(np.int64) if isinstance(x, float) else x for x in numbers], np.int64))


def custom(name, inputs, outputs, *others):
    """Return an operator of the library with inputs and outputs of these types; it infers shapes itself. `others` are
    further lists of types, of inputs and outputs together: MindSpore keeps one registration for each name."""
    info = CustomRegOp(name)
    for number in range(len(inputs)):
        info = info.input(number, f"x{number}")
    for number in range(len(outputs)):
        info = info.output(number, f"y{number}")
    for types in ((*inputs, *outputs), *others):
        info = info.dtype_format(*types)
    info = info.target("CPU").get_op_info()
    return _Operator(f"{load()[0]}:{name}", out_shape=None, out_dtype=None, func_type="aot", reg_info=info)


def attention(name, *kinds):
    """Return an operator of attention: `kinds` are the names of further inputs, if any, and of its outputs."""
    def types(floats):
        return [[floats if tensor in OF_Q else INPUTS.get(tensor, FLOATS) for tensor in kind]
                for kind in ((*INPUTS, *sum(kinds[:-1], ())), kinds[-1])]
    return custom(name, *types(FLOATS), *(sum(types(halves), []) for halves in HALVES))


_one_call = threading.RLock()


class _Operator(ops.Custom):
    """A custom operator that threads call one after the other. Outside graphs, MindSpore shares what it hands to such
    operators between threads, so one may get the tensors of another's call. In a graph, this is not called."""

    def __call__(self, *args):
        with _one_call:
            return super().__call__(*args)
