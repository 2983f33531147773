#!/usr/bin/env bash
# MindSpore 2.10.0 (2.7.0 alike): a dict display that names a key twice, such as `{"scale": 1, **given}`, the usual way to
# fill in defaults. Python keeps the last value; a compiled function keeps the first, without a word. `update` gives the
# right value in both. Prints what each returns; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mindspore==2.10.0 numpy==1.26.4
cat > "$folder/seen.py" <<'PY'
import mindspore as ms
import numpy as np
from mindspore import Tensor


def display(x, scale):
    options = {"scale": x, "bias": x, **{"scale": scale}}
    return x * options["scale"]


def keywords(x, scale):
    def filled(**given):
        return {"scale": x, **given}
    return x * filled(scale=scale)["scale"]


def updated(x, scale):
    options = {"scale": x, "bias": x}
    options.update({"scale": scale})
    return x * options["scale"]


x, scale = Tensor(np.array([1., 2.], np.float32)), Tensor(np.array([3., 3.], np.float32))
results = []
for function in (display, keywords, updated):
    results.append((function(x, scale).asnumpy().tolist(), ms.jit(function)(x, scale).asnumpy().tolist()))
    print(f"mindspore {ms.__version__}, {function.__name__}: outside a graph {results[-1][0]}, compiled {results[-1][1]}")
assert results == [([3., 6.], [1., 4.]), ([3., 6.], [1., 4.]), ([3., 6.], [3., 6.])], results
PY
cd "$folder"
GLOG_v=3 "$folder/venv/bin/python" seen.py
