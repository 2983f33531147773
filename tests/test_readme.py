"""Every Python block of the README runs as it stands, in order, each section on its own."""
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def sections():
    """(file, section, its code): the code keeps its place in the file, so that a traceback names the README's lines."""
    for path in sorted(ROOT.glob("README*.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        title, code, language = path.name, [""] * len(lines), None
        for number, line in enumerate(lines):
            fence = re.match(r"```(\w*)", line)
            if fence:
                language = fence.group(1) if language is None else None
            elif language == "python":
                code[number] = line
            elif language is None and line.startswith("## "):
                yield path, title, code
                title, code = line[3:], [""] * len(lines)
        yield path, title, code


BLOCKS = [(path, title, "\n".join(code)) for path, title, code in sections() if any(code)]


def test_there_are_blocks():
    assert len(BLOCKS) > 1


@pytest.mark.parametrize("path, title, code", BLOCKS, ids=[f"{path.name}: {title}" for path, title, _ in BLOCKS])
def test_block(path, title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")  # a file, because ms.jit reads the source of a function
    runpy.run_path("block.py")


def test_links_to_files():
    for path in ROOT.glob("README*.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{path.name} links to {target}"
