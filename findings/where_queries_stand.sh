#!/usr/bin/env bash
# Causal attention of 1 query and 4 keys, as in a step of decoding. In JAX and in ONNX's Attention (without past keys) the
# query stands at the first position and sees one key. In mlx-lm, which is told the offset, it stands at the last and sees
# all. The first two raise no error. Exits with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 onnxruntime==1.32.0 onnx==1.23.2 \
    "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from mlx_lm.models.base import create_causal_mask
from onnx import TensorProto, helper

# The value of each key is its place, one-hot, so that the output has the weights.
q, k, v = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 1, 4, 4), np.float32), np.eye(4, dtype=np.float32)[None, None]

tokens_first = [jnp.asarray(x.swapaxes(1, 2)) for x in (q, k, v)]
in_jax = np.asarray(jax.nn.dot_product_attention(*tokens_first, is_causal=True)).ravel()

shapes = {"q": q.shape, "k": k.shape, "v": v.shape}
graph = helper.make_graph(
    [helper.make_node("Attention", list(shapes), ["out"], is_causal=1)], "one",
    [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
    [helper.make_tensor_value_info("out", TensorProto.FLOAT, q.shape)])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
in_onnx = session.run(None, {"q": q, "k": k, "v": v})[0].ravel()

in_mlx = np.array(create_causal_mask(1, offset=3)).ravel()

print("weights in jax", version("jax"), "with is_causal=True:", in_jax)
print("weights in onnxruntime", version("onnxruntime"), "Attention with is_causal=1:", in_onnx)
print("mask in mlx-lm", version("mlx-lm"), "with offset=3:", in_mlx)
assert in_jax.tolist() == in_onnx.tolist() == [1, 0, 0, 0], "the query no longer stands at the first position"
assert in_mlx.all(), "the query no longer stands at the last position"
END
