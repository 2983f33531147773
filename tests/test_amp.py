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
    work = tmp_path / "work"  # MindSpore writes the rewritten classes here
    work.mkdir()
    done = subprocess.run([sys.executable, "-B", ROOT / "tests" / "amp_worker.py", mode], cwd=work, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(path)}, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("is right") == 11
