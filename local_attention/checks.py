"""Argument rules and their messages, one place for all of them.

Every rule raises before anything is computed, in one form: whose argument it is, its name, the rule, what arrived.
"""
import inspect
import numbers

import mindspore as ms
from mindspore import Tensor

FLOATS = ("Float32", "Float16", "BFloat16")
INTEGERS = ("Int32", "Int64")


def value_error(owner, name, rule, got):
    return ValueError(f"For '{owner}', '{name}' must be {rule}, but got {got}.")


def type_error(owner, name, rule, got):
    return TypeError(f"For '{owner}', '{name}' must be {rule}, but got {got!r} of type {type(got).__name__}.")


def integer(owner, name, value, minimum):
    """An int of at least `minimum`, 0 and 1 being spoken of as non-negative and positive."""
    rule = {0: "a non-negative int", 1: "a positive int"}.get(minimum, f"an int of at least {minimum}")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise type_error(owner, name, rule, value)
    if value < minimum:
        raise value_error(owner, name, rule, value)
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
    """A dropout rate: what would drop everything is not one."""
    if not 0 <= number(owner, name, value) < 1:
        raise value_error(owner, name, "a rate in [0, 1)", value)
    return float(value)


def settings(cell):
    """For a Cell's `extend_repr`: the arguments of its constructor that it keeps under their names, less those that are
    as by default."""
    arguments = inspect.signature(type(cell).__init__).parameters.values()
    kept = [(one, getattr(cell, one.name)) for one in arguments if hasattr(cell, one.name)]
    return ", ".join(f"{one.name}={value!r}" for one, value in kept if one.default is one.empty or value != one.default)


def dtype_name(dtype):
    """MindSpore's name of a dtype; once mindtorch is imported, str says `mindspore.float32` of it."""
    name = str(dtype)
    return {"mindspore.float32": "Float32", "mindspore.float16": "Float16", "mindspore.bfloat16": "BFloat16",
            "mindspore.int32": "Int32", "mindspore.int64": "Int64", "mindspore.bool": "Bool"}.get(name, name)


def described(x):
    """What can be checked of a tensor without its values, a constant in a graph: (shape, dtype); None as it is."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    return x


def tensor(owner, name, got, dtypes, shape=None, rule=None):
    """A tensor, as `described`, of one of some dtypes and, where given, of a shape; returns the shape."""
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
    """Queries, keys and values, as `described`, of one dtype and shape, but for fewer heads, a divisor of q's, in the
    axis before the last two of k and v; returns q's shape and how many of its heads share one of theirs."""
    shape = tensor(owner, "q", q, FLOATS)
    if len(shape) < 2 or 0 in shape[-2:]:
        raise value_error(owner, "q", "of shape (..., n, d) with n and d of at least 1", shape)
    got = tensor(owner, "k", k, (dtype_name(q[1]),))
    share = shared(shape, got)
    if share is None:
        of_heads = len(got) == len(shape) > 2 and got[:-3] + got[-2:] == shape[:-3] + shape[-2:]
        fewer = f", or of a divisor of its {shape[-3]} heads" if of_heads else ""
        raise value_error(owner, "k", f"of q's shape {shape}{fewer}", got)
    tensor(owner, "v", v, (dtype_name(q[1]),), got, f"of k's shape {got}")
    return shape, share


def shared(q_shape, k_shape):
    """How many heads of q share one of k, if shapes differ in the number of heads alone; None where they do not."""
    if k_shape == q_shape:
        return 1
    if len(q_shape) < 3 or len(k_shape) != len(q_shape) or None in (q_shape[-3], k_shape[-3]):
        return None
    fewer, heads = k_shape[-3], q_shape[-3]
    if (*q_shape[:-3], fewer, *q_shape[-2:]) != tuple(k_shape) or fewer == 0 or heads % fewer:
        return None
    return heads // fewer


def segment_ids(owner, got, batch, n):
    """Ids of documents, as `described`, `(batch, n)`."""
    shape = tensor(owner, "segment_ids", got, ("Int32", "Int64"))
    if len(shape) != 2 or shape[1] != n or (batch is not None and shape[0] != batch):
        raise value_error(owner, "segment_ids", f"of shape ({'batch' if batch is None else batch}, {n})", shape)
    return shape


def sinks(owner, got, heads):
    """Sinks of heads, as `described`."""
    return tensor(owner, "sinks", got, FLOATS, (heads,), f"of shape ({heads},), one for each head")


def softcap(owner, value):
    return None if value is None else positive_number(owner, "softcap", value)


def together(owner, one, other):
    """Two options, `(name, whether it is given)`, of which no more than one may be."""
    if one[1] and other[1]:
        raise ValueError(f"For '{owner}', '{one[0]}' and '{other[0]}' cannot go together, but got both.")


def fraction(owner, name, value):
    """A share of a whole, nothing and all of it included."""
    if not 0 <= number(owner, name, value) <= 1:
        raise value_error(owner, name, "a number in [0, 1]", value)
    return float(value)


def key_mask(owner, got, shape):
    """A mask, as `described`, of a batch of sequences; returns the shape of these."""
    if got is not None:
        tensor(owner, "mask", got, ("Bool",), shape)
    return shape


def tokens(owner, name, got, mask):
    """Token sequences and their mask, as `described`; returns the batch and length."""
    shape = tensor(owner, name, got, INTEGERS)
    if len(shape) != 2 or 0 in shape:
        raise value_error(owner, name, "of shape (batch, n), not empty", shape)
    return key_mask(owner, mask, shape)
