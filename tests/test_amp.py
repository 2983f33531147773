"""Blocks at O1 of `amp`, which rewrites classes from their sources."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mode", ["pynative", "jit"])
@pytest.mark.parametrize("place", ["checkout", "site-packages"])
def test_blocks_at_o1(place, mode, tmp_path):
    """In a folder `site-packages` that is not in the working directory, MindSpore rewrites only Cells."""
    path = ROOT
    if place == "site-packages":
        path = tmp_path / "site-packages"
        shutil.copytree(ROOT / "local_attention", path / "local_attention")
    assert at_o1(tmp_path, path, mode).count("is right") == 12


def test_blocks_at_o1_after_an_editable_install(tmp_path):
    """`pip install -e .` lets an import hook find the package, and leaves its folder out of `sys.path`."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import sys
from importlib.util import spec_from_file_location

class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "local_attention":
            return spec_from_file_location(name, {str(ROOT / "local_attention" / "__init__.py")!r})

sys.meta_path.append(Finder)
""")
    names = ["LocalTransformer", "a Cell with LocalAttention", "a Cell with functions"]
    assert at_o1(tmp_path, tmp_path, "pynative", *names).count("is right") == 3


def at_o1(folder, path, *args):
    """Run the worker in a folder of its own, with `path` before the others; return what it prints."""
    work = folder / "work"  # MindSpore writes the rewritten classes here
    work.mkdir()
    done = subprocess.run([sys.executable, "-B", ROOT / "tests" / "amp_worker.py", *args], cwd=work, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(path)}, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout
