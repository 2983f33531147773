#!/usr/bin/env bash
# ONNX's Attention (opset 25) in onnxruntime 1.32.0, with left_window_size=1 alone: the window is open on the right, so
# that a query sees all later keys. A window that is given as one number is causal in most libraries. Exits with 0 as
# long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

n = 5
inputs = {"q": np.zeros((1, 1, n, n), np.float32), "k": np.zeros((1, 1, n, n), np.float32),
          "v": np.eye(n, dtype=np.float32)[None, None]}         # one-hot values: the output has the weights


def seen(**attributes):
    graph = helper.make_graph(
        [helper.make_node("Attention", list(inputs), ["out"], **attributes)], "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return (session.run(None, inputs)[0][0, 0] > 0).astype(int)


alone, causal = seen(left_window_size=1), seen(left_window_size=1, is_causal=1)
print("onnxruntime", onnxruntime.__version__, "Attention, opset 25. 1: the query of the row sees the key of the column")
print("left_window_size=1:", alone, sep="\n")
print("left_window_size=1, is_causal=1:", causal, sep="\n")
places = np.arange(n)
near = places[:, None] - places <= 1
assert (alone == near).all(), "the right side is no longer open"
assert (causal == near & (places[:, None] >= places)).all(), "the causal window has changed"
END
