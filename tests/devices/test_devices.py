"""MindSpore's GPU and Ascend plugins have a kernel for each operator that the package calls: see platforms.py."""
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import local_attention
from devices import cases, platforms, process

HERE = Path(__file__).parent
# Arithmetic of lengths, in a graph for unknown lengths. It runs on the host on every platform.
ON_THE_HOST = re.compile(r"Shape|ShapeCalc|TensorShape|Real(TupleGetItem|MakeTuple)|Scalar\w+|TensorTo(Scalar|Tuple)|"
                         "TupleToTensor")
BACKED_OFF = re.compile(r"Backoff and rebuild kernel on CPU \w+ for node: \S*?(\w+)-op\d+")
# Errors after the choice of kernels. The first is from the dry run of a graph whose shapes depend on values. The second
# is from the kernel of Cast, outside graphs, in the gradient of MindSpore's Dense with a bias under to_float(float16).
CHOSEN = ("The dry run mode can not support dynamic shape graph", "addresses must be both null or both not null")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function from the name of a platform to the environment variables of its stubs."""
    return cache(lambda name: platforms.make(name, tmp_path_factory.mktemp(name)))


def outcomes(name, environment, chosen):
    """Return why the platform cannot run each case, None if it can. A process ends at the first case that fails; the
    next process goes on after it."""
    found = {}
    while len(found) < len(chosen):
        output = _run(name, environment, [case for case in chosen if case not in found])
        begun = output.split("\ncase ")[1:]
        if not begun:
            raise RuntimeError(f"no case was begun:\n{output[-4000:]}")
        for block in begun:
            case, _, block = block.partition("\n")
            found[case] = _refusal(block)
    return found


def _run(name, environment, chosen):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "GLOG_", "RANK_"))}
    path = os.pathsep.join([str(Path(environment.get("CUDA_HOME", HERE)) / "bin"), inherited["PATH"]])
    packages = os.pathsep.join(str(folder) for folder in (HERE.parent.parent, HERE.parent))
    environment = {**inherited, **environment, "PATH": path, "PYTHONPATH": packages, "RANK_SIZE": str(cases.RANKS),
                   "RANK_ID": "0", "DEVICE_ID": "0"}
    return subprocess.run([sys.executable, HERE / "process.py", name, *chosen], cwd=environment["MS_OM_PATH"],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace").stdout


def _refusal(block):
    given_away = {name for name in BACKED_OFF.findall(block) if not ON_THE_HOST.fullmatch(name)}
    if given_away:
        return f"no kernel, so run on CPU in a graph: {', '.join(sorted(given_away))}"
    failed = re.search(r"^failed (.*)", block, re.MULTILINE)
    if failed:
        return None if any(text in failed.group(1) for text in CHOSEN) else failed.group(1)
    return None if re.search(r"^done$", block, re.MULTILINE) else f"ended the process:\n{block[-2000:]}"


@pytest.fixture(scope="module")
def found(made):
    """Return a function from a platform and a mode to the outcomes of its cases."""
    @cache
    def run(name, mode, quick):
        return outcomes(name, made(name), process.names(name, mode, quick))
    return run


def skip_without(name):
    reason = platforms.missing(name)
    if reason:
        pytest.skip(reason)


def parametrized(quick):
    return pytest.mark.parametrize("name, mode, case", [
        (name, mode, case) for name in process.DTYPES for mode in process.MODES
        for case in process.names(name, mode, quick) if not case.startswith(cases.STAND_IN)])


@parametrized(True)
def test_has_all_that_is_asked_for(name, mode, case, found):
    skip_without(name)
    assert found(name, mode, True)[case] is None


@pytest.mark.devices
@parametrized(False)
def test_has_all_that_is_asked_for_in_every_dtype(name, mode, case, found):
    skip_without(name)
    assert found(name, mode, False)[case] is None


@pytest.mark.parametrize("mode", process.MODES)
@pytest.mark.parametrize("name", process.DTYPES)
def test_says_so_of_an_operator_that_it_lacks(name, mode, found):
    skip_without(name)
    refusal = found(name, mode, True)[f"{cases.STAND_IN}/float32/{mode}"]
    assert "Fmax" in refusal


def test_every_public_name_has_a_case():
    source = (HERE / "cases.py").read_text()
    assert not [name for name in local_attention.__all__ if not re.search(rf"\b{name}\(", source)]
