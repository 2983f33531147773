"""Every Python block of the README, in both languages, and of docs/model_zoo.md runs as it stands, in order, each
section on its own."""
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "model_zoo.md"]  # the Chinese README's blocks are the English one's


def sections():
    """(file, section, its code): the code keeps its place in the file, so that a traceback names the README's lines."""
    for path in PAGES:
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


def with_shapes_asserted(code):
    """The shapes that comments give of what a line makes, as assertions on that line."""
    made, shape = r"^(\w+)((?:, \w+)* = .*\S)", r"(\([\d, ]+\))"
    return re.sub(f"{made} +# {shape}(?:[:;].*)?$", r"\1\2; assert \1.shape == \3, \1.shape", code, flags=re.MULTILINE)


@pytest.mark.parametrize("path, title, code", BLOCKS, ids=[f"{path.name}: {title}" for path, title, _ in BLOCKS])
def test_block(path, title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = with_shapes_asserted(code)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")  # a file, because ms.jit reads the source of a function
    runpy.run_path("block.py")


def test_what_the_readme_says_of_float16_in_a_comment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, = (code for path, title, code in BLOCKS if path.name == "README.md" and title == "In MindSpore")
    call = re.search(r"# in float16: (Model\(.*\))", code).group(1)
    code = code[:code.index("ms.save_checkpoint")].replace("Model(network, optimizer=optimizer).train", f"{call}.train")
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    runpy.run_path("block.py")


def test_links_to_files():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def outline(path):
    """Sections and code blocks of a page: the level of every title, and every block with its title above it."""
    title, block, levels, blocks = "", None, [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if block is not None:
                blocks.append((title, "\n".join(block)))
            block = [line] if block is None else None
        elif block is not None:
            block.append(line)
        elif line.startswith("#"):
            title = line
            levels.append(line.split()[0])
    return levels, blocks


def test_both_languages_have_the_same_sections_and_code():
    (levels, blocks), (levels_cn, blocks_cn) = (outline(ROOT / name) for name in ("README.md", "README_CN.md"))
    english, chinese = [code for _, code in blocks], [code for _, code in blocks_cn]
    lacking = [f"{title}: {code.splitlines()[1]} …" for title, code in blocks if code not in chinese]
    surplus = [f"{title}: {code.splitlines()[1]} …" for title, code in blocks_cn if code not in english]
    assert not lacking, "README_CN.md lacks the blocks of README.md in " + "; ".join(lacking)
    assert not surplus, "README_CN.md has blocks that README.md lacks, in " + "; ".join(surplus)
    assert chinese == english, "the blocks of README_CN.md stand in another order than README.md's"
    assert levels_cn == levels, "the sections of README_CN.md are not those of README.md"
