"""Tiny models of mindformers on CPU, with its own attention or another; their losses and gradients."""
import logging

import mindspore as ms
import numpy as np
import on_cpu
from mindspore import Tensor, nn

import mindformers  # noqa: F401
from mindformers.core.context.build_context import build_context
from mindformers.models.qwen3.configuration_qwen3 import Qwen3Config
from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM
from mindformers.parallel_core.training_graph.base_models.gpt import gpt_layer_specs
from mindformers.parallel_core.training_graph.base_models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from mindformers.parallel_core.training_graph.base_models.gpt.gpt_model import GPTModel
from mindformers.parallel_core.transformer_config import TransformerConfig

N, B, VOCABULARY = 64, 2, 100
THEIRS = gpt_layer_specs.FlashAttention
FLOATS = dict.fromkeys(("compute_dtype", "params_dtype", "layernorm_compute_dtype", "softmax_compute_dtype",
                        "rotary_dtype"), "float32")


def start():
    logging.disable(logging.CRITICAL)  # hundreds of lines for each model
    build_context({"use_legacy": False, "use_parallel": False, "context": {"mode": 0, "device_target": "CPU"},
                   "parallel": {}})


def config_of(**more):
    settings = dict(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=4, ffn_hidden_size=96, seq_length=N,
        vocab_size=VOCABULARY, max_position_embeddings=N, position_embedding_type="rope", use_flash_attention=True,
        attention_dropout=0., hidden_dropout=0., fused_norm=False, add_bias_linear=False, normalization="RMSNorm",
        gated_linear_unit=True, hidden_act="silu", **FLOATS)
    return TransformerConfig(**{**settings, **more})


def filled(model, scale=.3):
    random = np.random.RandomState(0)
    for name, parameter in model.parameters_and_names():
        if parameter.requires_grad and "norm" not in name:
            values = random.standard_normal(parameter.shape).astype(np.float32) * scale
            parameter.set_data(Tensor(values).astype(parameter.dtype))
    return on_cpu.keep_float32(model)


def gpt(config, attention=None, spec=None, tied=False):
    """Return a GPTModel in float32 with a Cell of attention, mindformers' own if it is None, or by a block's specs."""
    if spec is None:
        spec = get_gpt_decoder_block_spec(config)
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = attention or THEIRS
    return filled(GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=config.seq_length,
                           share_embeddings_and_output_weights=tied))


def qwen3(attention=None, **more):
    """Return mindformers' Qwen3, made by its own specs."""
    gpt_layer_specs.FlashAttention = attention or THEIRS
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=N, seq_length=N, use_flash_attention=True,
        attention_dropout=0., hidden_dropout=0., window_size=(15, 0), **FLOATS)
    return filled(TrainingQwen3ForCausalLM(Qwen3Config(**{**settings, **more})), .05)


def tokens(n=N, b=B):
    x = np.random.RandomState(1).randint(1, VOCABULARY, (b, n + 1)).astype(np.int32)
    return Tensor(x[:, :-1].copy()), Tensor(x[:, 1:].copy())


class _Loss(nn.Cell):
    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, x, y, position_ids=None, actual_seq_len=None):
        return self.model(x, labels=y, position_ids=position_ids, actual_seq_len=actual_seq_len)[0]


def step_of(model):
    """Return a compiled function from tokens and labels to the loss and the gradients of all Parameters."""
    model.set_train(True)
    gradients = ms.value_and_grad(_Loss(model), None, model.trainable_params())

    @ms.jit
    def step(*given):
        return gradients(*given)
    return step


def loss_and_gradients(model, *given):
    loss, gradients = step_of(model)(*given)
    names = [parameter.name for parameter in model.trainable_params()]
    return float(loss.asnumpy()), {name: one.asnumpy() for name, one in zip(names, gradients)}


def difference(wanted, found):
    """Return the largest difference of a gradient, relative to its largest entry, and that of the loss."""
    largest = 0.
    for name, gradient in wanted[1].items():
        if not np.abs(gradient).max() > 0:
            raise ValueError(f"The gradient of {name} is zero.")
        largest = max(largest, np.abs(gradient - found[1][name]).max() / np.abs(gradient).max())
    return max(largest, abs(wanted[0] - found[0]) / abs(wanted[0]))
