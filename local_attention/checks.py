"""The rules of arguments and their messages, all in one place.

Every rule raises before anything is computed. All messages have one form: whose argument it is, its name, the rule, and
what was given.
"""
import difflib
import inspect
import numbers
import reprlib

import mindspore as ms
from mindspore import Tensor

FLOATS = ("Float32", "Float16", "BFloat16")
INTEGERS = ("Int32", "Int64")
LARGEST_FLOAT32 = (2 - 2.**-23) * 2.**127
LONGEST = 100  # characters of a value in a message
_DTYPES = {ms.float32: "Float32", ms.float16: "Float16", ms.bfloat16: "BFloat16", ms.float64: "Float64",
           ms.int32: "Int32", ms.int64: "Int64", ms.bool_: "Bool"}


def value_error(owner, name, rule, got):
    """Return the error. A str is a text that says what was given; of a str that was given itself, pass what is `shown`.
    """
    return ValueError(f"For '{owner}', '{name}' must be {rule}, but got {got if isinstance(got, str) else shown(got)}.")


def type_error(owner, name, rule, got):
    return TypeError(f"For '{owner}', '{name}' must be {rule}, but got {shown(got)} of type {type(got).__name__}.")


def shown(got):
    """Return what a message shows of a value: all of it if it is short; an array's shape and dtype."""
    shape = getattr(got, "shape", None)
    if isinstance(shape, tuple) and shape and hasattr(got, "dtype"):
        return f"one of shape {tuple(shape)} and {dtype_name(got.dtype).lower()}"
    text = repr(got)
    return text if len(text) <= LONGEST else " ".join(reprlib.repr(got).split())[:LONGEST]


def parameters(of):
    """Return the names of the arguments of a Cell's constructor, or of a function."""
    given = inspect.signature(of.__init__ if isinstance(of, type) else of).parameters.items()
    return [name for name, one in given if name != "self" and one.kind != one.VAR_KEYWORD]


def arguments(owner, given, known, instead):
    """Check the names of keyword arguments that are not a constructor's or a function's own: a dict with their values,
    or the names alone. `instead` has the right names for some wrong ones; for others the message has the nearest one.
    """
    def words(name):
        return "_".join(sorted(name.split("_")))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(words(name), map(words, known), 1)
            right = instead.get(name) or next((one for one in known if [words(one)] == near), None)
            nearest = "" if right is None else f"; the nearest is '{right}'"
            value = f" with {shown(given[name])}" if isinstance(given, dict) else ""
            raise TypeError(f"For '{owner}', '{name}' must be the name of one of its arguments{nearest}, but got it"
                            f"{value}.")


def integer(owner, name, value, minimum, end=2**63):
    """Check for an int of at least `minimum` and, unless it is None, below `end`. Messages say "non-negative" for 0 and
    "positive" for 1."""
    rule = {0: "a non-negative int", 1: "a positive int"}.get(minimum, f"an int of at least {minimum}")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise type_error(owner, name, rule, value)
    if value < minimum:
        raise value_error(owner, name, rule, value)
    if end is not None and value >= end:
        raise value_error(owner, name, f"{rule} below 2**63", value)
    return int(value)


def positive_int(owner, name, value):
    return integer(owner, name, value, 1)


def non_negative_int(owner, name, value):
    return integer(owner, name, value, 0)


def boolean(owner, name, value):
    if not isinstance(value, bool):
        raise type_error(owner, name, "a bool", value)
    return value


def number(owner, name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise type_error(owner, name, "a number", value)
    if value != value or value in (float("inf"), float("-inf")):
        raise value_error(owner, name, "finite", value)
    return float(value)


def positive_number(owner, name, value):
    if number(owner, name, value) <= 0:
        raise value_error(owner, name, "a positive number", value)
    return float(value)


def non_negative_number(owner, name, value):
    if number(owner, name, value) < 0:
        raise value_error(owner, name, "a non-negative number", value)
    return float(value)


def rate(owner, name, value):
    """Check that a value is a dropout rate in [0, 1). A rate of 1 would drop everything, and is refused."""
    if not 0 <= number(owner, name, value) < 1:
        raise value_error(owner, name, "a rate in [0, 1)", value)
    return float(value)


def float_dtype(owner, name, value):
    """Check for None or a dtype of q, k and v."""
    if value is not None and not (isinstance(value, ms.Type) and dtype_name(value) in FLOATS):
        raise type_error(owner, name, "None or MindSpore's float32, float16 or bfloat16", value)


def device(owner, value):
    """Check for None or the name of a device, which need not be there."""
    if value is not None and (not isinstance(value, str) or value not in ("CPU", "GPU", "Ascend")):
        raise value_error(owner, "device", "None, 'CPU', 'GPU' or 'Ascend'", shown(value))


def settings(cell):
    """Return the text of a Cell's `extend_repr`: the arguments of its constructor that are also its attributes, without
    those that have their default value, except windows."""
    arguments = inspect.signature(type(cell).__init__).parameters.values()
    kept = [(one, getattr(cell, one.name)) for one in arguments if hasattr(cell, one.name)]
    return ", ".join(f"{one.name}={value!r}" for one, value in kept
                     if one.default is one.empty or value != one.default or "window_size" in one.name)


def dtype_name(dtype):
    """Return MindSpore's name of a dtype. After mindtorch is imported, `str` returns another."""
    return _DTYPES.get(dtype) or str(dtype)


def described(x):
    """Return what can be checked of a tensor without its values, `(shape, dtype)`, which is a constant in a graph.
    Return anything else as it is."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    return x


def tensor(owner, name, got, dtypes, shape=None, rule=None):
    """Check the dtype of a tensor, as `described`, and its shape if one is given; return its shape."""
    if not (isinstance(got, tuple) and len(got) == 2 and isinstance(got[0], tuple)):
        raise type_error(owner, name, "a Tensor", got)
    dtype, where = dtype_name(got[1]), ""
    if dtype == "BFloat16" and ms.get_context("device_target") == "GPU":
        dtypes, where = [known for known in dtypes if known != dtype], " on GPU, where MindSpore has no bfloat16"
    if dtype not in dtypes:
        raise TypeError(f"For '{owner}', '{name}' must be a Tensor of {' or '.join(d.lower() for d in dtypes)}{where}, "
                        f"but got {dtype.lower()}.")
    if shape is not None and got[0] != shape:
        raise value_error(owner, name, rule or f"of shape {shape}", got[0])
    return got[0]


def alike(owner, q, k, v):
    """Check queries, keys and values, as `described`: one dtype and one shape, except that k and v may have fewer
    heads, a divisor of q's, in the third axis from the end. Return q's shape and how many query heads share a key
    head."""
    shape = tensor(owner, "q", q, FLOATS)
    if len(shape) < 2 or 0 in shape[-2:]:
        raise value_error(owner, "q", "of shape (..., n, d) with n and d of at least 1", shape)
    got = tensor(owner, "k", k, (dtype_name(q[1]),))
    share = shared(shape, got)
    if share is None:
        of_heads = len(got) == len(shape) > 2 and got[:-3] + got[-2:] == shape[:-3] + shape[-2:]
        fewer = f", or of a divisor of its {shape[-3]} heads" if of_heads else ""
        raise value_error(owner, "k", f"of q's shape {shape}{fewer}{exchanged(shape, got)}", got)
    values(owner, v, q[1], got)
    return shape, share


def known_width(owner, shape, name="q"):
    """Check that a graph knows the head dimension of q: products and scales are made for it."""
    if shape[-1] is None:
        raise value_error(owner, name, "of a known head dimension: name it in 'set_inputs' or 'enable_dynamic', and do "
                          "not compile with 'dynamic=1'", shape)


def shared(q_shape, k_shape):
    """Return how many query heads share a key head if the two shapes differ only in the number of heads; else None."""
    if k_shape == q_shape:
        return 1
    if len(q_shape) < 3 or len(k_shape) != len(q_shape) or None in (q_shape[-3], k_shape[-3]):
        return None
    fewer, heads = k_shape[-3], q_shape[-3]
    if (*q_shape[:-3], fewer, *q_shape[-2:]) != tuple(k_shape) or fewer == 0 or heads % fewer:
        return None
    return heads // fewer


def exchanged(q_shape, k_shape):
    """Return what a message about k adds if heads and tokens look exchanged beyond doubt: as `(..., h, n, d)` the heads
    of k do not divide those of q; as `(..., n, h, d)` they do, and k has no fewer tokens than q and more than heads."""
    if len(q_shape) < 4 or len(k_shape) != len(q_shape) or None in (*q_shape[-3:-1], *k_shape[-3:-1]) or 0 in k_shape:
        return ""
    (n_q, h), (n_k, h_kv) = q_shape[-3:-1], k_shape[-3:-1]
    if n_q % n_k == 0 or h % h_kv > 0 or n_k < max(n_q, h_kv + 1):
        return ""
    return " (heads stand before tokens; here they look exchanged, which swapaxes(-3, -2) of q, k and v undoes)"


def segment_ids(owner, got, batch, n):
    """Check the ids of documents, as `described`, of shape `(batch, n)`; return their shape."""
    shape = tensor(owner, "segment_ids", got, ("Int32", "Int64"))
    if len(shape) != 2 or shape[1] != n or (batch is not None and shape[0] != batch):
        raise value_error(owner, "segment_ids", f"of shape ({'batch' if batch is None else batch}, {n})", shape)
    return shape


def axes(got):
    """Return how many axes a tensor, as `described`, has; 0 for anything else, which is checked by its own rule."""
    return len(got[0]) if isinstance(got, tuple) and len(got) == 2 and isinstance(got[0], tuple) else 0


def sinks(owner, got, heads, queries):
    """Check the sinks, as `described`: one for each head, or one for each of its `queries`, `(b, heads, n)`."""
    shape = tensor(owner, "sinks", got, FLOATS)
    if shape not in ((heads,), tuple(queries)):
        raise value_error(owner, "sinks", f"of shape ({heads},), one for each head, or {tuple(queries)}, one for each "
                          "query", shape)


def order(owner, got, batch, n, spec):
    """Check the numbers of an order, as `described`, of shape `(batch, n)`; `batch` None is any."""
    shape = tensor(owner, "order", got, ("Int32", "Int64"))
    if len(shape) != 2 or shape[1] != n or (batch is not None and shape[0] != batch):
        raise value_error(owner, "order", f"of shape ({'batch' if batch is None else batch}, {n})", shape)
    together(owner, ("order", True), ("causal", spec.causal))
    return shape


def values(owner, got, dtype, k_shape):
    """Check values, as `described`: of the keys' shape, but of any width."""
    shape = tensor(owner, "v", got, (dtype_name(dtype),))
    if len(shape) != len(k_shape) or shape[:-1] != k_shape[:-1] or shape[-1] == 0:
        raise value_error(owner, "v", f"of k's shape {k_shape}, or of that with another width", shape)


def softcap(owner, value):
    """Check a cap of scores: None, or a number beside which float32 still holds the quotients and products that a score
    goes through."""
    if value is None:
        return None
    if isinstance(value, float) and value == 0:  # to which a graph rounds what float32 does not hold
        raise value_error(owner, "softcap", "a positive number from 1e-30 to 1e30", "0.0, as float32 has it")
    if not .999e-30 < positive_number(owner, "softcap", value) < 1.001e30:  # a graph rounds it to float32
        raise value_error(owner, "softcap", "from 1e-30 to 1e30", value)
    return float(value)


def scale(owner, name, value):
    """Check a factor of scores: a number that float32 holds."""
    if abs(number(owner, name, value)) > LARGEST_FLOAT32:
        raise value_error(owner, name, f"a number of at most {LARGEST_FLOAT32:.2g}, float32's largest", value)
    return float(value)


def together(owner, one, other):
    """Check that at most one of two options is given; each is `(name, whether it is given)`."""
    if one[1] and other[1]:
        raise ValueError(f"For '{owner}', '{one[0]}' and '{other[0]}' cannot go together, but got both.")


def fraction(owner, name, value):
    """Check that a value is in [0, 1], both ends included."""
    if not 0 <= number(owner, name, value) <= 1:
        raise value_error(owner, name, "a number in [0, 1]", value)
    return float(value)


def key_mask(owner, got, shape):
    """Check the mask, as `described`, of a batch of sequences of a shape; return that shape."""
    if got is not None:
        tensor(owner, "mask", got, ("Bool",), shape)
    return shape


def tokens(owner, name, got, mask):
    """Check token sequences and their mask, as `described`; return `(batch, length)`."""
    shape = tensor(owner, name, got, INTEGERS)
    if len(shape) != 2 or 0 in shape:
        raise value_error(owner, name, "of shape (batch, n), not empty", shape)
    return key_mask(owner, mask, shape)
