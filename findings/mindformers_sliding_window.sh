#!/usr/bin/env bash
# mindformers 1.9.0 (mindspore 2.9.0): a Qwen3 whose config has Hugging Face's sliding_window=8, use_sliding_window=True
# trains with full attention: a line of the log calls the field useless. The field that is read is window_size, and
# window_size=(7, 0) are the same 8 keys. Prints what the layers got; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mindspore==2.9.0 mindformers==1.9.0 numpy==1.26.4
cat > "$folder/seen.py" <<'PY'
import logging

from mindformers.core.context.build_context import build_context
from mindformers.models.qwen3.configuration_qwen3 import Qwen3Config
from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM

logging.disable(logging.CRITICAL)
build_context({"use_legacy": False, "use_parallel": False, "context": {"mode": 0, "device_target": "CPU"},
               "parallel": {}})


def layers(**window):
    config = Qwen3Config(
        vocab_size=10, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=16, seq_length=16, use_flash_attention=True,
        compute_dtype="float32", attention_dropout=0., hidden_dropout=0., **window)
    model = TrainingQwen3ForCausalLM(config)
    cells = [layer.self_attention.core_attention for layer in model.model.decoder.layers]
    return [(cell.is_sliding_layer, cell.flash_attention.pre_tokens) for cell in cells]


hugging_face = dict(sliding_window=8, use_sliding_window=True, max_window_layers=0)
found = [layers(**hugging_face), layers(window_size=(7, 0))]
for window, seen in zip((hugging_face, dict(window_size=(7, 0))), found):
    print(f"mindformers 1.9.0, Qwen3 with {window}: (slides, keys before the query's own) by layer {seen}")
assert found == [[(False, 2147483647)] * 2, [(True, 7)] * 2], found
PY
cd "$folder"
GLOG_v=3 venv/bin/python seen.py 2> errors || { cat errors; exit 1; }
