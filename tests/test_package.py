"""The package as it is installed and imported."""
import importlib
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

import local_attention

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["LocalAttention", "LocalMHA", "LocalTransformer", "DynamicPositionBias", "WindowSpec", "load_torch_weights",
         "export_torch_weights"]
SUBMODULES = {
    "local_attention.local_attention": ["LocalAttention", "look_around", "pad_to_multiple"],
    "local_attention.rotary": ["SinusoidalEmbeddings", "apply_rotary_pos_emb", "rotate_half"],
    "local_attention.transformer": ["LocalMHA", "LocalTransformer", "DynamicPositionBias", "FeedForward", "GEGLU",
                                    "top_k"],
}


def python(code, folder):
    """Runs code in a new process and an empty folder, with MindSpore's logging as a user has it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GLOG_v", "MS_OM_PATH")}
    return subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)


def test_import_prints_nothing_and_writes_nothing(tmp_path):
    done = python("import local_attention", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_numpy_2_is_refused_in_one_sentence(tmp_path):
    done = python("import numpy; numpy.__version__ = '2.1.0'; import local_attention", tmp_path)
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert message.startswith("ImportError: ") and "2.1.0" in message and "numpy>=1.25,<2" in message
    assert "SystemError" not in done.stderr


def test_public_names():
    assert set(NAMES) <= set(local_attention.__all__)
    for name in local_attention.__all__:
        assert callable(getattr(local_attention, name))


@pytest.mark.parametrize("module", SUBMODULES)
def test_submodules_keep_their_names(module):
    for name in SUBMODULES[module]:
        assert callable(getattr(importlib.import_module(module), name))


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py hands to setuptools, which need not be installed."""
    given = {}
    fake = types.SimpleNamespace(setup=lambda **arguments: given.update(arguments),
                                 find_packages=lambda include: include, Extension=lambda name, **options: name)
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_version(setup_arguments):
    assert setup_arguments["version"] == local_attention.__version__


def test_the_kernel_is_an_extension(setup_arguments):
    assert setup_arguments["ext_modules"] == ["local_attention.backends._native"]


def test_requirements(setup_arguments):
    assert setup_arguments["install_requires"] == (ROOT / "requirements.txt").read_text().split()
    assert "numpy>=1.25,<2" in setup_arguments["install_requires"]
    assert setup_arguments["python_requires"] == ">=3.9,<3.13"
    assert {"train", "test", "dev"} == set(setup_arguments["extras_require"])
    assert set(setup_arguments["extras_require"]["train"]) <= set(setup_arguments["extras_require"]["test"])
