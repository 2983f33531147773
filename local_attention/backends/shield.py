"""What a hidden key holds does not matter, not even NaN: backends that multiply it by a weight of 0 get finite numbers.

Whether a query sees such a key is known after the softmax: one more column of the values is 1 for the keys that hold
something else and 0 for the others, so that the output's last column is above 0.
"""
import mindspore as ms
from mindspore import ops

LARGEST = 3.4e38  # of finite numbers
LARGEST_KEY = 1e18  # with which a score is larger than any other, and still hidden by adding -1e30
LARGEST_VALUE = 1e36  # whose products with the gradient of an output add up to something finite


def wanted(problem):
    """Whether the span alone does not say what is hidden: elsewhere, a block has few keys that a query does not see."""
    return (problem.has("order") or problem.has("documents")
            or problem.has("bias") and not problem.frame.bias_is_constant)


def whole(k, v):
    """Return keys and values that are finite, the values with one more column that says which of them were not."""
    strange = ops.maximum(_strange(k, LARGEST), _strange(v, LARGEST_VALUE))
    k = ops.clamp(_within(k, LARGEST), -LARGEST_KEY, LARGEST_KEY)
    return k, ops.cat((_within(v, LARGEST_VALUE), strange), -1)


def marked(out, lse):
    """Return the output without that column, and the log-sum-exp, NaN for queries that see what is not finite."""
    strange = ops.greater(ops.stop_gradient(out[..., -1:]), 0.)
    out = ops.masked_fill(out[..., :-1], strange, float("nan"))
    return out, None if lse is None else ops.masked_fill(lse, strange.reshape(lse.shape), float("nan"))


def _strange(x, largest):
    """Return 1 for rows that hold a number beyond `largest` or none at all, else 0."""
    x = ops.stop_gradient(x)
    fine = ops.less_equal(ops.abs(x), largest)  # not NaN
    return ops.sub(1., ops.cast(ops.cast(fine, ms.float32).sum(-1, keepdims=True) == x.shape[-1], ms.float32))


def _within(x, largest):
    """Return zeros for the numbers beyond `largest`."""
    return ops.masked_fill(x, ops.logical_not(ops.less_equal(ops.abs(ops.stop_gradient(x)), largest)), 0.)
