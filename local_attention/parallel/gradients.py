"""Gradients averaged over processes."""
import mindspore as ms
from mindspore import nn, ops

from .. import checks
from .groups import group_of


class AverageGradients(nn.Cell):
    r"""
    Average gradients over the ranks of a group.

    All gradients travel in one buffer, and so in one collective, which runs after every exchange that they depend on.
    So, unlike `nn.DistributedGradReducer`, it may be compiled together with the gradients of a model with
    `sequence_parallel`. (A compiler may order independent collectives differently on each rank.)

    Args:
        group (str): The name of a communication group; ``None`` is all ranks. Default: ``None`` .

    Inputs:
        - **gradients** (tuple[Tensor]) - Of any shapes and dtypes, the same on every rank.

    Outputs:
        tuple[Tensor], of the same shapes and dtypes; the mean is computed in float32.

    Raises:
        TypeError: If `group` is not a str.
        ValueError: If there is no such group, or `mindspore.communication.init()` was not called.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.

    Examples:
        >>> # in a script that msrun starts
        >>> from mindspore import communication
        >>> from local_attention.parallel import AverageGradients
        >>> communication.init()
        >>> gradients = AverageGradients()(gradients)
    """

    def __init__(self, group=None):
        super().__init__()
        if group is not None and not isinstance(group, str):
            raise checks.type_error("AverageGradients", "group", "None or the name of a communication group", group)
        group = group_of("AverageGradients", "group", group)
        self.size, self.sum = group.size, ops.AllReduce(group=group.name) if group.size > 1 else None
        self.slice, self.join = ops.Slice(), ops.Concat(0)

    def construct(self, gradients):
        if self.size == 1:
            return gradients
        flat = []
        for gradient in gradients:
            flat.append(ops.cast(gradient, ms.float32).reshape(-1))
        total = self.sum(self.join(flat))
        means, start = [], 0
        for gradient in gradients:
            mean = self.slice(total, (start,), (gradient.size,)).reshape(gradient.shape) / self.size
            means.append(ops.cast(mean, gradient.dtype))
            start += gradient.size
        return tuple(means)
