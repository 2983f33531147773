"""`python -m local_attention.selfcheck`: its definition against the tests' own, what it prints, and its exit status."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import oracle
from local_attention import selfcheck

ROOT = Path(__file__).resolve().parent.parent
BROKEN = """
import sys
from local_attention import selfcheck
from dataclasses import replace
from local_attention.attend import BACKENDS
whole = BACKENDS["blocked"].run
BACKENDS["blocked"] = replace(BACKENDS["blocked"], run=lambda constants, q, k, v, tensors: (
    1.01 * whole(constants, q, k, v, tensors)[0], None))
sys.exit(selfcheck.main(["--quick"]))
"""

REFUSES = """
import sys
from local_attention import selfcheck
from dataclasses import replace
from local_attention.attend import BACKENDS
BACKENDS["dense"] = replace(BACKENDS["dense"],
                            why_not=lambda problem: "takes no softcap" if problem.scoring.softcap else None)
selfcheck.CASES = [case for case in selfcheck.CASES if "softcap" in case.more]
report = selfcheck.Report()
selfcheck.check_cases(report, "GPU", False)
assert any(row["note"] == "takes no softcap." for row in report.rows)
sys.exit(not report.right)
"""


def run(*arguments):
    return subprocess.run([sys.executable, "-B", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("case", selfcheck.CASES, ids=lambda case: case.name)
def test_its_definition_is_that_of_the_oracle(case):
    q, k, v, *_ = (x.reshape(-1, *x.shape[2:]) if x.ndim == 4 else x for x in case.floats.values())
    options = dict(scale=case.more.get("scale", selfcheck.D ** -0.5), softcap=case.more.get("softcap"),
                   bias=case.floats.get("attn_bias"), sinks=case.floats.get("sinks"), key_mask=case.given.get("mask"),
                   order=case.given.get("order"), dout=case.dout.reshape(*q.shape[:2], -1),
                   dlse=case.dlse.reshape(q.shape[:2]))
    if case.of_queries:
        options.update(bias=case.floats["attn_bias"], sinks=case.floats["sinks"])
    if case.documents or case.ends:
        ids = np.stack([case.ids(row) for row in range(selfcheck.BATCH)])
        wanted = oracle.in_documents(q, k, v, case.spec, segment_ids=ids, **options)
    else:
        wanted = oracle.everything(q, k, v, case.spec, offset=selfcheck.N - case.n_q, **options)
    names = ["out", *["lse"] * case.lse, "q", "k", "v", *["bias"] * case.bias, *["sinks"] * case.sinks]
    got = selfcheck.reference(case)
    assert len(got) == len(names)
    for name, x in zip(names, got):
        np.testing.assert_allclose(x.reshape(wanted[name].shape), wanted[name], atol=1e-12)
        assert np.abs(x).max() > 1e-3


@pytest.mark.parametrize("case", selfcheck.CASES, ids=lambda case: case.name)
def test_values_with_gradients_in_one_graph(case):
    """Such a graph may lose a function that both the forward pass and the gradient call."""
    assert selfcheck.distance(selfcheck.computed(case, "blocked", "float32", True), selfcheck.reference(case)) < 1e-5


def test_it_ends_well_and_writes_what_it_prints(tmp_path):
    done = run("-m", "local_attention.selfcheck", "--quick", "--device", "CPU", "--json", str(tmp_path / "it.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "it.json").read_text())
    assert written["right"] and written["machine"]["device"] == "CPU" and "mindspore" in written["machine"]
    rows = {(row["what"], row["backend"]): row for row in written["rows"]}
    for backend in ("dense", "blocked"):
        assert rows["a window that moves", backend]["right"] and rows["a window that moves", backend]["error"] < 1e-5
    assert rows["everything", "ascend"]["right"] is None and "the device is CPU" in rows["everything", "ascend"]["note"]
    assert done.stdout.splitlines()[-1].endswith("all that could run was right")


def test_a_backend_that_is_wrong_is_named(tmp_path):
    done = run("-c", BROKEN)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert "WRONG: a window that moves (blocked, float32)" in last and "native" not in last and "dense" not in last


def test_a_refusal_does_not_make_the_next_row_wrong():
    """An error in a gradient or a graph leaves MindSpore in a bad state: the next compiled case then failed."""
    done = run("-c", REFUSES)
    assert done.returncode == 0, done.stdout + done.stderr
