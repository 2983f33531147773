"""Merging of attention over some keys with attention over others, as a function."""
import mindspore as ms
from mindspore import ops
from mindspore.ops import constexpr

from . import checks
from .backends.spans import merged


@constexpr
def _check_pieces(outs, lses):
    owner = "merge_attentions"
    for name, pieces in (("outs", outs), ("lses", lses)):
        if not isinstance(pieces, (tuple, list)) or not pieces:
            raise checks.type_error(owner, name, "a tuple of Tensors, one for each piece", pieces)
    if len(lses) != len(outs):
        raise checks.value_error(owner, "lses", f"of as many pieces as outs, {len(outs)}", len(lses))
    shape = checks.tensor(owner, "outs", outs[0], checks.FLOATS)
    if len(shape) < 2:
        raise checks.value_error(owner, "outs", "of shape (..., n, d)", shape)
    for out, lse in zip(outs, lses):
        checks.tensor(owner, "outs", out, (checks.dtype_name(outs[0][1]),), shape, f"of one shape, {shape}")
        checks.tensor(owner, "lses", lse, checks.FLOATS, shape[:-1], f"of the shape of outs without d, {shape[:-1]}")


def merge_attentions(outs, lses):
    r"""
    Merge pieces of attention, each over some of the keys, into attention over all of these keys.

    With `lse = log(sum_i exp(lse_i))`, the output is `sum_i exp(lse_i - lse) * out_i`. All pieces have the
    same queries. No key may be in two pieces, and a sink only in one.

    Args:
        outs (tuple[Tensor]): The output of each piece, `(..., n, d)`.
        lses (tuple[Tensor]): The log-sum-exp of each piece, `(..., n)`. `windowed_attention` returns both.

    Returns:
        Tuple of the output, of the dtype of `outs`, and the log-sum-exp, float32.

    Raises:
        TypeError: If `outs` or `lses` is not a tuple of Tensors.
        ValueError: If their lengths or shapes do not agree.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> from mindspore import ops
        >>> from local_attention import WindowSpec, merge_attentions, windowed_attention
        >>> x = ops.randn((1, 2, 10, 8))
        >>> spec = WindowSpec.from_flash((-1, -1))
        >>> halves = [windowed_attention(x[:, :, :5], x[:, :, i:i + 5], x[:, :, i:i + 5], spec, return_lse=True)
        ...           for i in (0, 5)]
        >>> out, lse = merge_attentions(*zip(*halves))
        >>> print(out.shape, lse.shape)
        (1, 2, 5, 8) (1, 2, 5)
    """
    def got(pieces):  # a function within, so that MindSpore's O1 leaves this one as it is (see `cells`)
        return _all_described(pieces)
    _check_pieces(got(outs), got(lses))
    pieces = []
    for lse in lses:
        pieces.append(ops.cast(lse, ms.float32))
    return merged(outs, pieces)


def _all_described(pieces):
    if not isinstance(pieces, (tuple, list)):
        return pieces
    described = []
    for piece in pieces:
        described.append(checks.described(piece))
    return tuple(described)
