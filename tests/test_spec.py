"""Which keys a query sees: the formula, its picture, and other libraries' terms for it."""
import doctest

import numpy as np
import pytest

from local_attention import WindowSpec
from local_attention import spec as spec_module
from local_attention.spec import NO_LIMIT


@pytest.mark.parametrize("spec, query, span", [
    (WindowSpec(7, 7, 0, True), 0, (-7, 0)),
    (WindowSpec(7, 7, 0, True), 13, (0, 13)),
    (WindowSpec(7, 7, 0, True), 14, (7, 14)),
    (WindowSpec(7, 14, 7, False), 15, (0, 27)),
    (WindowSpec(1, 7, 0, True), 15, (8, 15)),
    (WindowSpec(1, 7, 3, False), 15, (8, 18)),
    (WindowSpec(1, 3, 5, True), 15, (12, 15)),
    (WindowSpec(1, 3, -1, False), 15, (12, 14)),
])
def test_span_is_inclusive_on_both_ends(spec, query, span):
    assert tuple(spec.span(query)) == span


def test_visible_is_span_for_every_pair():
    spec = WindowSpec(5, 10, 5, False)
    queries, keys = np.arange(3, 17), np.arange(23)
    for row, query in zip(spec.visible(queries, keys), queries):
        first, last = spec.span(int(query))
        assert keys[row].tolist() == [key for key in keys if first <= key <= last]


def test_show_draws_a_row_for_each_query():
    assert WindowSpec(2, 2, 0, True).show(5) == "\n".join([
        "■ · · · ·",
        "■ ■ · · ·",
        "■ ■ ■ · ·",
        "■ ■ ■ ■ ·",
        "· · ■ ■ ■"])


def test_a_prefix_is_seen_from_everywhere():
    assert WindowSpec(1, 1, 0, True, prefix=2).show(6) == "\n".join([
        "■ · · · · ·",
        "■ ■ · · · ·",
        "■ ■ ■ · · ·",
        "■ ■ ■ ■ · ·",
        "■ ■ · ■ ■ ·",
        "■ ■ · · ■ ■"])
    assert WindowSpec(1, 0, -1, False, prefix=2).show(3) == "\n".join(["■ ■ ·"] * 3)


def test_chunks_see_themselves_alone():
    assert WindowSpec.from_chunks(2) == WindowSpec(2, 0, 0, True)
    assert WindowSpec.from_chunks(2).show(4) == "\n".join(["■ · · ·", "■ ■ · ·", "· · ■ ·", "· · ■ ■"])


def test_hugging_face_counts_the_query_among_its_keys():
    first, last = WindowSpec.from_sliding_window(4096).span(10_000)
    assert last == 10_000 and last - first + 1 == 4096


@pytest.mark.parametrize("window_size, causal, span", [
    ((4, 2), False, (96, 102)),
    ((4, 2), True, (96, 100)),
    ((-1, 0), False, (100 - NO_LIMIT, 100)),
    ((0, -1), False, (100, 100 + NO_LIMIT)),
    ((-1, -1), True, (100 - NO_LIMIT, 100)),
    (4, False, (96, 104)),
    (4, True, (96, 100)),
    (0, False, (100, 100)),
    (-1, False, (100 - NO_LIMIT, 100 + NO_LIMIT)),
    (np.int64(4), True, (96, 100)),
])
def test_flash_attention_counts_keys_beside_the_query(window_size, causal, span):
    assert tuple(WindowSpec.from_flash(window_size, causal=causal).span(100)) == span


@pytest.mark.parametrize("width, extra, span", [
    (1, "left", (100, 100)), (1, "right", (100, 100)), (2, "left", (99, 100)), (2, "right", (100, 101)),
    (7, "left", (97, 103)), (7, "right", (97, 103)), (8, "left", (96, 103)), (8, "right", (97, 104))])
def test_a_centered_window_has_its_width(width, extra, span):
    assert WindowSpec.from_centered(width, extra).span(100) == span
    assert not WindowSpec.from_centered(width, extra=extra).causal


def test_a_streaming_chunk_sees_all_of_itself():
    assert WindowSpec.from_streaming(5, 3, 2) == WindowSpec(5, 3, 2, False)
    assert WindowSpec.from_streaming(chunk=1, left=3, right=0).span(9) == (6, 9)


def test_kept_keys_are_counted_in_the_window():
    assert WindowSpec.from_sinks(7, 2) == WindowSpec(1, 4, 0, True, prefix=2)
    assert WindowSpec.from_sinks(window=7, keep=0) == WindowSpec.from_sliding_window(7)
    positions = np.arange(23)
    for window, keep in ((7, 2), (7, 6), (1, 0)):
        seen = WindowSpec.from_sinks(window, keep).visible(positions, positions)
        assert seen.sum(1).tolist() == [min(i + 1, window) for i in positions]


def test_pictures_of_docstrings():
    assert doctest.testmod(spec_module).failed == 0


def test_equal_specs_are_one_key():
    assert len({WindowSpec(7, 7, 0, True), WindowSpec(7, 7, 0, True), WindowSpec(1, 7, 0, True)}) == 2
