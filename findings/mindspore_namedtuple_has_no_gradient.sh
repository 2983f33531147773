#!/usr/bin/env bash
# MindSpore 2.10.0: a compiled function puts tensors into a NamedTuple, or a dataclass, and takes them out again. The
# value is right; the gradient through it is zero, without a word. Outside graphs, and with a plain tuple, it is
# right. Prints the gradients of all of them; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mindspore==2.10.0 numpy==1.26.4
cat > "$folder/seen.py" <<'PY'
from dataclasses import dataclass
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Record:
    a: Tensor
    b: Tensor


def named(x):
    pair = Pair(x * 2, x * 3)
    return (pair.a * pair.b).sum()


def record(x):
    pair = Record(x * 2, x * 3)
    return (pair.a * pair.b).sum()


def plain(x):
    a, b = x * 2, x * 3
    pair = (a, b)
    return (pair[0] * pair[1]).sum()


x = Tensor(np.array([1., 2.], np.float32))
right, seen = [12., 24.], {}
for function in (named, record, plain):
    compiled = ms.jit(function)
    assert float(compiled(x)) == 30.
    seen[function.__name__] = ms.grad(function)(x).asnumpy().tolist(), ms.grad(compiled)(x).asnumpy().tolist()
    print(f"mindspore {ms.__version__}, {function.__name__}: outside a graph {seen[function.__name__][0]}, compiled "
          f"{seen[function.__name__][1]}, right is {right}")
assert seen == {"named": (right, [0., 0.]), "record": (right, [0., 0.]), "plain": (right, right)}, seen
PY
cd "$folder"
GLOG_v=3 "$folder/venv/bin/python" seen.py
