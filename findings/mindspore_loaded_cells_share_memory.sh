#!/usr/bin/env bash
# MindSpore 2.10.0, CPU: two Cells get their weights from one loaded checkpoint by `load_param_into_net`, as a student
# and its teacher do. Training one changes the other, without a word: both have the memory of the checkpoint. So it is
# with `set_data`; `ops.assign` copies. Prints how far training one moves the other; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mindspore==2.10.0 numpy==1.26.4
cat > "$folder/seen.py" <<'PY'
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

x = Tensor(np.ones((1, 3), np.float32))
ms.save_checkpoint(nn.Dense(3, 1), "weights.ckpt")


def by_load(cell, weights):
    ms.load_param_into_net(cell, weights)


def by_set_data(cell, weights):
    cell.weight.set_data(weights["weight"])


def by_assign(cell, weights):
    ops.assign(cell.weight, weights["weight"])


seen = []
for load in (by_load, by_set_data, by_assign):
    weights, student, teacher = ms.load_checkpoint("weights.ckpt"), nn.Dense(3, 1), nn.Dense(3, 1)
    load(student, weights)
    load(teacher, weights)
    before = teacher.weight.asnumpy().copy()
    optimizer = nn.SGD(student.trainable_params(), .1)
    _, gradients = ms.value_and_grad(lambda x: student(x).sum(), None, student.trainable_params())(x)
    optimizer(gradients)
    seen.append(round(float(np.abs(teacher.weight.asnumpy() - before).max()), 3))
    print(f"mindspore {ms.__version__}, {load.__name__}: a step of the student moves the teacher by {seen[-1]}")
assert seen == [.1, .1, 0.], seen
PY
cd "$folder"
GLOG_v=3 "$folder/venv/bin/python" seen.py
