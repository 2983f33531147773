#!/usr/bin/env bash
# mindformers 1.9.0 (mindspore 2.9.0): of window_attn_skip_freq, layer 0 reads the entry of layer 1. Every second layer
# full would be the guess for 2, as in Megatron-Core; the layers that slide are those printed. A tuple in place of a list
# lets no layer slide. Prints which layers of a training model slide; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mindspore==2.9.0 mindformers==1.9.0 numpy==1.26.4
cat > "$folder/seen.py" <<'PY'
import logging

from mindformers.core.context.build_context import build_context
from mindformers.parallel_core.training_graph.base_models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from mindformers.parallel_core.training_graph.base_models.gpt.gpt_model import GPTModel
from mindformers.parallel_core.transformer_config import TransformerConfig

logging.disable(logging.CRITICAL)
build_context({"use_legacy": False, "use_parallel": False, "context": {"mode": 0, "device_target": "CPU"},
               "parallel": {}})


def slides(pattern, layers=4):
    config = TransformerConfig(
        num_layers=layers, hidden_size=32, num_attention_heads=2, num_query_groups=2, ffn_hidden_size=32, seq_length=16,
        vocab_size=10, max_position_embeddings=16, use_flash_attention=True, add_bias_linear=False, fused_norm=False,
        normalization="RMSNorm", gated_linear_unit=True, hidden_act="silu", position_embedding_type="rope",
        compute_dtype="float32", attention_dropout=0., hidden_dropout=0., window_size=(7, 0),
        window_attn_skip_freq=pattern)
    model = GPTModel(config, get_gpt_decoder_block_spec(config), vocab_size=10, max_sequence_length=16)
    return [int(layer.self_attention.core_attention.is_sliding_layer) for layer in model.decoder.layers]


patterns = (2, [1, 0, 1, 0], [1, 0, 0, 0], (1, 1, 1, 1))
found = [slides(pattern) for pattern in patterns]
for pattern, seen in zip(patterns, found):
    print(f"mindformers 1.9.0, four layers, window_attn_skip_freq={pattern}: {seen} (1 = the layer has a window)")
assert found == [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], found
PY
cd "$folder"
GLOG_v=3 venv/bin/python seen.py 2> errors || { cat errors; exit 1; }
