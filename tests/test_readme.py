"""The pages. Every Python block of README.md and docs/*.md runs unchanged, in order, each section on its own. Links and
anchors exist. README_CN.md has README.md's sections and code."""
import re
import runpy
from pathlib import Path

import mindspore as ms
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # the Chinese README's blocks are the English one's
ALL_PAGES = [*sorted(ROOT.glob("*.md")), *PAGES[1:], *sorted((ROOT / "docs" / "zh").glob("*.md"))]


def sections():
    """Return (page, section, code) of all sections. Code keeps its place, so that tracebacks show the page's lines."""
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
RECIPES = [(title, code) for path, title, code in BLOCKS if path.name == "recipes.md"]  # test_recipes.py runs these
BLOCKS = [block for block in BLOCKS if block[0].name != "recipes.md"]


def test_there_are_blocks():
    assert {path.name for path, _, _ in BLOCKS} >= {"README.md", "usage.md", "mindspore.md", "from_pytorch.md",
                                                    "model_zoo.md", "performance.md"}


def with_shapes_asserted(code):
    """Turn comments that give shapes into assertions on the values of their lines."""
    made, shape = r"^(\w+)((?:, \w+)* = .*\S)", r"(\([\d, ]+\))"
    return re.sub(f"{made} +# {shape}(?:[:;].*)?$", r"\1\2; assert \1.shape == \3, \1.shape", code, flags=re.MULTILINE)


@pytest.mark.parametrize("path, title, code", BLOCKS, ids=[f"{path.name}: {title}" for path, title, _ in BLOCKS])
def test_block(path, title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "import onnxruntime" in code:
        pytest.importorskip("onnxruntime")
    code = with_shapes_asserted(code)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")  # a file, because ms.jit reads the source of a function
    try:
        runpy.run_path("block.py")
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_what_the_page_says_of_float16_in_a_comment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, = (code for path, title, code in BLOCKS if path.name == "mindspore.md" and title == "Model.train")
    call = re.search(r"# in float16: (Model\(.*\))", code).group(1)
    code = code.replace("Model(network, optimizer=optimizer).train", f"{call}.train")
    assert f"{call}.train" in code
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    runpy.run_path("block.py")


def prose(path):
    """Return a page's lines outside of code."""
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield line


def anchors(path):
    """Return GitHub's anchors of a page's titles: no punctuation, hyphens for spaces, numbers for equal titles."""
    seen = []
    for line in prose(path):
        if re.match("#+ ", line):
            slug = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
            again = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", other) is not None for other in seen)
            seen.append(f"{slug}-{again}" if again else slug)
    return seen


def links(path):
    """Return the relative links of a page, including pictures, as (target, file, anchor or None)."""
    text = "\n".join(prose(path))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not re.match(r"https?:|mailto:", target):
            file, _, anchor = target.partition("#")
            yield target, (path.parent / file if file else path), anchor or None


@pytest.mark.parametrize("path", ALL_PAGES, ids=[str(path.relative_to(ROOT)) for path in ALL_PAGES])
def test_links(path):
    for target, file, anchor in links(path):
        assert file.exists(), f"{path.name} links to {target}, which does not exist"
        assert ROOT in file.resolve().parents, f"{path.name} links to {target}, outside of the checkout"
        assert anchor is None or anchor in anchors(file), f"{path.name} links to {target}, and there is no such title"


def test_every_page_can_be_found_from_the_readme():
    linked, linked_cn = ({file.resolve() for _, file, _ in links(ROOT / name)}
                         for name in ("README.md", "README_CN.md"))
    chinese = {path for path in ALL_PAGES if path.parent.name == "zh"}
    assert set(ALL_PAGES) - {ROOT / "README.md"} - chinese <= linked
    assert chinese <= linked_cn


def outline(path):
    """Return the sections and code blocks of a page: the level of every title, and every block with its title."""
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
