"""The form of the scripts in findings/. They install packages, so they are not run here."""
import os
import re
import shlex
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def test_there_are_scripts_and_the_page_lists_each():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+\.sh)\]\(\1\) \|", page, re.MULTILINE)
    assert SCRIPTS and sorted(listed) == [path.name for path in SCRIPTS]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_form(path):
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
    assert "\nfolder=$(mktemp -d)\n" in text and """\ntrap 'rm -rf "$folder"' EXIT\n""" in text
    assert "\nassert " in text
    assert "local_attention" not in text and "local-attention" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_all_packages_are_pinned(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    installs = re.findall(r'^"\$folder/\w+/bin/pip" install -q (.+)$', text, re.MULTILINE)
    assert len(installs) == text.count("pip\" install")
    for requirement in (word for line in installs for word in shlex.split(line)):
        assert re.fullmatch(r"[\w-]+(\[\w+\])?==[\d.]+", requirement), requirement
