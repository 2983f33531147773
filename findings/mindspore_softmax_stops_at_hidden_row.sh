#!/usr/bin/env bash
# MindSpore 2.10.0, CPU: `softmax` over the last axis of float32 rows, of which one is -inf throughout, as a row of a
# mask that hides every key. NaN in that row alone would be the guess, as in NumPy's formula, PyTorch and MindSpore's
# own float16. Here that row is 0, and the rows after it are not computed: they keep what was in that memory, here
# that of a tensor of fourteens. Prints all rows; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mindspore==2.10.0 numpy==1.26.4
cat > "$folder/seen.py" <<'PY'
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

x = np.zeros((4, 8), np.float32)
x[1] = -np.inf
old = Tensor(np.full((4, 8), 7, np.float32)) * 2
old.asnumpy()
del old  # its memory is used again
single = ops.softmax(Tensor(x), -1).asnumpy()
half = ops.softmax(Tensor(x.astype(np.float16)), -1).asnumpy()
for name, rows in (("float32", single), ("float16", half)):
    print(f"mindspore {ms.__version__}, {name}: the sums of the rows are {rows.sum(-1).tolist()}; one row is -inf")
assert np.isnan(half[1]).all() and np.allclose(half[[0, 2, 3]], 1 / 8)
assert np.allclose(single[0], 1 / 8) and (single[1] == 0).all() and not np.allclose(single[2:], 1 / 8)
PY
cd "$folder"
GLOG_v=3 "$folder/venv/bin/python" seen.py
