#!/usr/bin/env bash
# MindSpore 2.10.0, CPU: a step of `mint.optim.Adam` or `mint.optim.SGD`, the optimizers with PyTorch's names, outside
# of a graph. The weights stay as they were, without a word, at any learning rate; `nn.Adam` and `nn.SGD` move them.
# Prints how far each moves a weight; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mindspore==2.10.0 numpy==1.26.4
cat > "$folder/seen.py" <<'PY'
import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn

x = Tensor(np.ones((1, 3), np.float32))


def moved(make):
    layer = nn.Dense(3, 1)
    optimizer, before = make(layer.trainable_params()), layer.weight.asnumpy().copy()
    _, gradients = ms.value_and_grad(lambda x: layer(x).sum(), None, layer.trainable_params())(x)
    optimizer(gradients)
    return float(np.abs(layer.weight.asnumpy() - before).max())


seen = {"mint.optim.Adam": moved(lambda weights: mint.optim.Adam(weights, lr=.1)),
        "mint.optim.SGD": moved(lambda weights: mint.optim.SGD(weights, lr=.1)),
        "nn.Adam": moved(lambda weights: nn.Adam(weights, .1)), "nn.SGD": moved(lambda weights: nn.SGD(weights, .1))}
for name, distance in seen.items():
    print(f"mindspore {ms.__version__}, {name}: a step of 0.1 moves the weights by {distance:.3f}")
assert [round(distance, 3) for distance in seen.values()] == [0., 0., .1, .1]
PY
cd "$folder"
GLOG_v=3 "$folder/venv/bin/python" seen.py
