#!/usr/bin/env bash
# MindSpore 2.10.0 (2.7.0 alike): a Cell with a `bprop` of its own that reads `out`, called twice in a compiled function
# that is differentiated from outside of graphs. The value is right; the `bprop` of the first call gets the `out` of the
# last, so the gradient is wrong without a word. It is right if all of it runs outside graphs, if the gradient is
# compiled with the function, or with two Cells. Prints the four gradients; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mindspore==2.10.0 numpy==1.26.4
cat > "$folder/seen.py" <<'PY'
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


class Exp(nn.Cell):
    def construct(self, x):
        return ops.exp(x)

    def bprop(self, x, out, dout):
        return (out * dout,)


first, second = Exp(), Exp()
x = Tensor(np.array([.1, .2, .3], np.float32))


def one_cell(x):
    return first(first(x) * .5).sum()


def two_cells(x):
    return first(second(x) * .5).sum()


def close(a, b):
    return np.allclose(a.asnumpy(), b, rtol=1e-3)


right = .5 * np.exp(.5 * np.exp(x.asnumpy())) * np.exp(x.asnumpy())
seen = {"outside graphs": ms.grad(one_cell)(x), "the gradient compiled": ms.jit(ms.grad(one_cell))(x),
        "two Cells, compiled, differentiated from outside": ms.grad(ms.jit(two_cells))(x),
        "one Cell, compiled, differentiated from outside": ms.grad(ms.jit(one_cell))(x)}
for name, gradient in seen.items():
    print(f"mindspore {ms.__version__}, {name}: {gradient.asnumpy().tolist()}, right is {right.tolist()}")
assert [close(gradient, right) for gradient in seen.values()] == [True, True, True, False]
PY
cd "$folder"
GLOG_v=3 "$folder/venv/bin/python" seen.py
