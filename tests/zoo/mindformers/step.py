"""Compiles one training step of a GPTModel of mindformers in semi-auto parallel, in MindSpore's dry run on Ascend.

    python step.py '{"dp": 2, ...}'      as rank RANK_ID of RANK_SIZE; dry.py sets the environment
"""
import json
import logging
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, nn

CASE = {**dict(dp=1, tp=1, cp=1, pp=1, sp=False, shard_optimizer=False, packed=False, ours=True, n=4096, rows=2,
               window=1024, heads=8, kv_heads=4, width=64), **json.loads(sys.argv[1])}
VOCABULARY = 1024


def begin():
    logging.disable(logging.CRITICAL)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    communication.GlobalComm.CHECK_ENVS = False
    communication.init()
    from mindformers.core.context.build_context import build_context
    build_context({"use_legacy": False, "use_parallel": False, "context": {"mode": 0, "device_target": "Ascend"},
                   "parallel": {}})
    more = {}
    if CASE["shard_optimizer"]:
        more["parallel_optimizer_config"] = {"gradient_accumulation_shard": False, "parallel_optimizer_threshold": 0}
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel", gradients_mean=False, full_batch=True, pipeline_stages=CASE["pp"],
        device_num=communication.get_group_size(), enable_parallel_optimizer=CASE["shard_optimizer"], **more)


def model():
    from mindformers.parallel_core.training_graph.base_models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from mindformers.parallel_core.training_graph.base_models.gpt.gpt_model import GPTModel
    from mindformers.parallel_core.transformer_config import TransformerConfig

    from local_attention.zoo import mindformers as windows
    dim, n = CASE["heads"] * CASE["width"], CASE["n"]
    config = TransformerConfig(
        num_layers=max(1, CASE["pp"]), hidden_size=dim, num_attention_heads=CASE["heads"],
        num_query_groups=CASE["kv_heads"], ffn_hidden_size=2 * dim, seq_length=n, vocab_size=VOCABULARY,
        max_position_embeddings=n, position_embedding_type="rope", use_flash_attention=True, attention_dropout=0.,
        hidden_dropout=0., compute_dtype="bfloat16", params_dtype="float32", layernorm_compute_dtype="float32",
        softmax_compute_dtype="float32", rotary_dtype="float32", add_bias_linear=False, normalization="RMSNorm",
        gated_linear_unit=True, hidden_act="silu", data_parallel_size=CASE["dp"],
        tensor_model_parallel_size=CASE["tp"], context_parallel_size=CASE["cp"],
        pipeline_model_parallel_size=CASE["pp"], sequence_parallel=CASE["sp"], micro_batch_num=CASE["pp"],
        window_size=(CASE["window"] - 1, 0), use_eod_attn_mask_compression=CASE["packed"],
        use_attn_mask_compression=not CASE["packed"])
    spec = get_gpt_decoder_block_spec(config)
    if CASE["ours"]:
        spec = windows.with_windows(spec, [CASE["window"]] * config.num_layers)
    return GPTModel(config=config, transformer_layer_spec=spec, vocab_size=VOCABULARY, max_sequence_length=n)


class Loss(nn.Cell):
    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, x, y, ends=None):
        return self.model(x, labels=y, actual_seq_len=ends)[0].sum()


def main():
    begin()
    made = model()
    made.set_train()
    loss, optimizer = Loss(made), nn.SGD(made.trainable_params(), 1e-3)
    if CASE["pp"] > 1:
        from mindspore.nn.wrap.cell_wrapper import _TrainGradAccuStepCell
        step = _TrainGradAccuStepCell(nn.PipelineCell(loss, CASE["pp"]), optimizer)
    else:
        step = nn.TrainOneStepCell(loss, optimizer)
    step.set_train()
    n, rows = CASE["n"], CASE["rows"]
    given = [Tensor(np.ones((rows, n)), ms.int32), Tensor(np.ones((rows, n)), ms.int32)]
    if CASE["packed"]:
        given.append(Tensor([[row * n + n // 2, row * n + n] for row in range(rows)], ms.int32))
    step(*given)
    print("compiled", flush=True)


main()
