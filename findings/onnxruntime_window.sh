#!/usr/bin/env bash
# onnxruntime's GroupQueryAttention with local_window_size=2: three keys in 1.23.2 (two before the query, and its own),
# two keys in 1.24.1. The same model file, the same attribute. Exits with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/run.py" <<'END'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

wanted = int(sys.argv[1])
n, width = 6, 16
zeros, empty = np.zeros((1, n, width), np.float32), np.zeros((1, 1, 0, width), np.float32)
# The value of each key is its place, one-hot, so that a row of the output has the weights of a query.
inputs = {"q": zeros, "k": zeros, "v": np.eye(n, width, dtype=np.float32)[None], "past_k": empty, "past_v": empty,
          "last": np.array([n - 1], np.int32), "total": np.array([n], np.int32)}
kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
node = helper.make_node("GroupQueryAttention", list(inputs), ["out", "keys", "values"], domain="com.microsoft",
                        num_heads=1, kv_num_heads=1, local_window_size=2)
graph = helper.make_graph(
    [node], "one", [helper.make_tensor_value_info(name, kinds[str(x.dtype)], x.shape) for name, x in inputs.items()],
    [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("out", "keys", "values")])
model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17),
                                                              helper.make_opsetid("com.microsoft", 1)])
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
weights = session.run(["out"], inputs)[0][0, :, :n]

print("onnxruntime", onnxruntime.__version__, "GroupQueryAttention, local_window_size=2. Weights, a row for each query:")
print(weights.round(2))
keys = np.flatnonzero(weights[4]).tolist()
print("query 4 sees the keys", keys)
assert keys == list(range(5 - wanted, 5)), f"query 4 no longer sees {wanted} keys"
END
cd "$folder"
python3 -m venv "$folder/before"
"$folder/before/bin/pip" install -q onnxruntime==1.23.2 onnx==1.19.1 numpy==2.4.6
"$folder/before/bin/python" run.py 3
python3 -m venv "$folder/after"
"$folder/after/bin/pip" install -q onnxruntime==1.24.1 onnx==1.19.1 numpy==2.4.6
"$folder/after/bin/python" run.py 2
