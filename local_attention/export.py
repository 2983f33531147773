"""One decoded token as a Cell of flat tensors, for machines that have neither this package nor MindSpore."""
from mindspore import nn, ops
from mindspore.ops import constexpr

from . import checks
from .cache import capacity
from .mha import LocalMHA


def _check(model, batch):
    """Check a request for a step."""
    owner = f"{model.cls_name}.exportable_step"
    checks.positive_int(owner, "batch", batch)
    for wrong, rule in ((model.num_tokens is None, "one with tokens, but its 'num_tokens' is None"),
                        (not model.causal, "causal, but its 'causal' is False"),
                        (model.group is not None, "one without 'sequence_parallel', which its weights load into"),
                        (not (model.global_takes_cache and model.global_cache_is_ours),
                         "one whose 'global_attn_layer' is a causal LocalMHA, but it is another Cell")):
        if wrong:
            raise ValueError(f"For '{owner}', the model must be {rule}.")


@constexpr
def _check_call(owner, batch, wanted, token, position, rings):
    for name, got, shape in (("token", token, (batch,)), ("position", position, (1,))):
        if checks.tensor(owner, name, got, checks.INTEGERS) != shape:
            raise checks.value_error(owner, name, f"of shape {shape}", got[0])
    shapes = tuple(shape for shape, _ in rings)
    if shapes != wanted:
        raise checks.value_error(owner, "rings", f"those of 'rings' or of the step before, {wanted}", shapes)


class ExportableStep(nn.Cell):
    r"""
    One decoded token: its logits, and the keys and values that the next step needs, as flat tensors of fixed shapes.

    Whatever runs an exported graph generates with it: it feeds the tokens of a prompt one at a time, and then each
    token that it chooses. :func:`LocalTransformer.exportable_step` makes this Cell.

    Inputs:
        - **token** (Tensor) - int :math:`(batch)`, each in [0, `num_tokens`).
        - **position** (Tensor) - int32 :math:`(1)`: how many tokens each row was fed before this one. It is less than
          `max_seq_len`, which a graph does not check.
        - **rings** (Tensor) - Keys and values of each block, as `rings` returned them, or the step before.

    Outputs:
        Tuple of the logits :math:`(batch, num\_tokens)` and the rings for the next step, in the order of the inputs.

    Raises:
        TypeError: If an input is of another type or dtype.
        ValueError: If an input is of another shape.

    Supported Platforms:
        ``CPU``; written for ``Ascend`` and ``GPU``, where it has not been run.
    """

    def __init__(self, model, batch):
        super().__init__(auto_prefix=False)  # else this would give the model's Parameters other names
        _check(model, batch)
        self.model, self.batch, shapes = model, batch, []
        for layer in [layers[0] for layers in model.layers] + list(model.global_layers):
            if isinstance(layer, LocalMHA):  # no place holder of a layer without a global one
                shapes += [(batch * layer.kv_heads, capacity(layer.attn_fn.windows), layer.dim_head)] * 2
        self.shapes = tuple(shapes)

    def rings(self):
        """Return the rings that a sequence starts from, a tuple of zeros."""
        return tuple(ops.zeros(shape, self.model.token_emb.embedding_table.dtype) for shape in self.shapes)

    def construct(self, token, position, *rings):
        model, layers, described, flat = self.model, [], (), ()
        for ring in rings:
            described += (checks.described(ring),)
        _check_call(self.cls_name, self.batch, self.shapes, checks.described(token), checks.described(position),
                    described)
        for number in range(0, len(rings), 2):
            layers.append((rings[number], rings[number + 1], position))
        x = model.token_emb(token[:, None]) + model.pos_emb(position[:, None])
        x, layers = model._through_layers(x, None, model._biases(), layers, True)
        for layer in layers:
            flat += (layer[0], layer[1])
        return (model.to_logits(x)[:, 0], *flat)
