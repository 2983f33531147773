"""The pages in docs/zh say what those in docs say: the same sections, code, numbers in tables, and links."""
import re
from collections import Counter

import pytest
from test_readme import ROOT, anchors, links, prose

ENGLISH, CHINESE = ROOT / "docs", ROOT / "docs" / "zh"
PAIRS = {  # each page in both languages, and which of its sections the Chinese one has: None for all
    "ascend.md": None,
    "from_pytorch.md": None,
    "mindspore.md": None,
    "model_zoo.md": None,
    "parallel.md": None,
    "performance.md": ("What to set",),
    "usage.md": None,
}


def lines_of(path, sections=None):
    """Return the lines of a page: all, or its title and those of some sections alone."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if sections is None:
        return lines
    kept, inside, fenced = lines[:3], False, False  # the title, and below it the link to the other language
    for line in lines[3:]:
        fenced ^= line.startswith("```")
        if not fenced and line.startswith("## "):
            inside = line[3:] in sections
        kept += [line] * inside
    return kept


def parted(lines):
    """Return titles, blocks of code, and tables; a table is a list of its rows' numbers, sorted."""
    titles, blocks, tables, fence = [], [], [[]], None
    for line in lines:
        if line.startswith("```"):
            blocks += [] if fence is None else ["\n".join([*fence, line])]
            fence = [line] if fence is None else None
        elif fence is not None:
            fence.append(line)
        elif re.match("#+ ", line):
            titles.append(line)
        if fence is None and line.startswith("|"):
            tables[-1].append(sorted(re.findall(r"\d[\d.,]*\d|\d", line)))
        elif tables[-1]:
            tables.append([])
    return titles, blocks, [table for table in tables if table]


@pytest.fixture(params=PAIRS)
def pair(request):
    name = request.param
    return lines_of(ENGLISH / name, PAIRS[name]), lines_of(CHINESE / name), name


def test_the_pairs_are_those_of_the_folder():
    assert sorted(PAIRS) == sorted(path.name for path in CHINESE.glob("*.md"))


def test_sections_are_the_same_in_order(pair):
    english, chinese = (parted(lines)[0] for lines in pair[:2])
    levels = [[title.split()[0] for title in titles] for titles in (english, chinese)]
    assert levels[0] == levels[1], list(zip(english, chinese))


def outline(lines):
    """Return what a page consists of, in order: titles, items of lists, tables, code and paragraphs."""
    kinds, fenced, before = [], False, ""
    for line in lines:
        fence = line.startswith("```")
        if fence and not fenced:
            kinds.append("code")
        elif not fence and not fenced and line:
            kind = ("title" if line.startswith("#") else "item" if line.startswith("- ") else
                    "table" if line.startswith("|") else "text")
            if kind in ("title", "item") or not before or (kind == "table" and not before.startswith("|")):
                kinds.append(kind)
        fenced ^= fence
        before = "" if fence else line
    return kinds


def test_paragraphs_and_lists_are_the_same_in_order(pair):
    english, chinese, _ = pair
    assert outline(chinese) == outline(english)


def test_code_is_the_same_letter_by_letter(pair):
    english, chinese = (parted(lines)[1] for lines in pair[:2])
    for ours, theirs in zip(chinese, english):
        assert ours == theirs
    assert len(chinese) == len(english)


def test_tables_have_the_same_numbers(pair):
    english, chinese = (parted(lines)[2] for lines in pair[:2])
    assert [len(table) for table in chinese] == [len(table) for table in english]
    for ours, theirs in zip(chinese, english):
        for row, (mine, wanted) in enumerate(zip(ours, theirs)):
            assert mine == wanted, f"row {row} of a table with {theirs[:2]}"


def english_title(file, anchor):
    """Return a page's name and the number of a title in the English page."""
    if anchor is None or file.suffix != ".md":
        return file.name, None
    number = anchors(file).index(anchor)
    if file.parent == CHINESE and PAIRS[file.name] is not None:
        number = titles_of(ENGLISH / file.name).index(titles_of(ENGLISH / file.name, PAIRS[file.name])[number])
    return file.name, number


def titles_of(path, sections=None):
    return parted(lines_of(path, sections))[0]


def test_each_page_begins_with_a_link_to_the_other_language(pair):
    english, chinese, name = pair
    assert (english[2], chinese[2]) == (f"[中文](zh/{name})", f"[English](../{name})")


def test_links_are_the_same(pair, tmp_path):
    """Links lead to the same section of the same page, and to the Chinese page where it has that section."""
    _, _, name = pair
    part = tmp_path / name
    part.write_text("\n".join(pair[0]), encoding="utf-8")
    found = {}
    for page, folder, path in (("english", ENGLISH, part), ("chinese", CHINESE, CHINESE / name)):
        found[page] = Counter()
        for target, file, anchor in links(path):
            file = (folder / name if file == path else folder / target.partition("#")[0]).resolve()
            found[page][english_title(file, anchor)] += 1
            if page == "chinese" and file.parent == ENGLISH and file.name in PAIRS and target != f"../{name}":
                has = titles_of(file, PAIRS[file.name])
                there = has[0] if anchor is None else titles_of(file)[anchors(file).index(anchor)]
                assert there not in has or (anchor is None and PAIRS[file.name]), target
    assert found["chinese"] == found["english"]
    outside = [sorted(re.findall(r"\]\((https?:[^)]*)\)", "\n".join(prose(path)))) for path in (part, CHINESE / name)]
    assert outside[0] == outside[1]
