"""What a window means in other libraries: masks recorded from them, and the `WindowSpec` with the same mask.

tests/reference/make_conventions.py runs the libraries.
"""
import json
import re
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from local_attention import WindowSpec, windowed_attention

ROOT = Path(__file__).parent.parent
FILE, PAGE = ROOT / "tests" / "reference" / "conventions.npz", ROOT / "docs" / "conventions.md"
RECORDED = dict(np.load(FILE))
SLIDE, FLASH, CENTERED = WindowSpec.from_sliding_window, WindowSpec.from_flash, WindowSpec.from_centered
WINDOWS = {  # 5 in most libraries; 6, so that the half of it tells, in models
    "jax/window": FLASH(5),
    "jax/window, causal": FLASH(5, causal=True),
    "jax/pair": FLASH((4, 2)),
    "onnxruntime/grouped": SLIDE(5),
    "onnxruntime-1.23/grouped": FLASH((5, 0), causal=True),
    "onnxruntime/pair": FLASH((4, 2)),
    "onnxruntime/left alone": FLASH((4, -1)),
    "torch/flex": FLASH((5, -1)),
    "torch/flex, causal": FLASH((5, 0), causal=True),
    "mlx/window": SLIDE(5),
    "mlx/rotating": WindowSpec.from_sinks(9, 4),
    "keras/window": FLASH(4),
    "keras/window, causal": SLIDE(5),
    "torchaudio/Emformer": WindowSpec.from_streaming(5, 10, 2),
    "transformers/Mistral": SLIDE(6),
    "transformers-4.57/Mistral": SLIDE(6),
    "transformers/Llama 4": WindowSpec.from_chunks(6),
    "transformers-4.57/Llama 4": WindowSpec.from_chunks(6),
    "transformers/T5Gemma": FLASH(6),
    "transformers-4.57/T5Gemma": FLASH(5),
    "transformers/T5Gemma 2": CENTERED(6, extra="right"),
    "transformers/UltraBERT": FLASH(6),
    "transformers/Gemma 3": CENTERED(7),
    "transformers/ModernBERT": CENTERED(7),
    "transformers/Longformer": CENTERED(7),
    "transformers/LongT5": FLASH(4),
}
FEWER = {  # fewer queries than keys: where they stand
    "jax/fewer": (FLASH(5, causal=True), "first"),
    "onnxruntime/fewer": (FLASH((4, 0), causal=True), "first"),
    "onnxruntime/grouped, past": (SLIDE(5), "last"),
    "onnxruntime/grouped, past, fewer": (SLIDE(5), "last"),
    "onnxruntime-1.23/grouped, past": (FLASH((5, 0), causal=True), "last"),
    "torch/flex, fewer": (FLASH((5, 0), causal=True), "first"),
    "torch/is_causal, fewer": (FLASH((-1, 0), causal=True), "first"),
    "torch/causal_lower_right, fewer": (FLASH((-1, 0), causal=True), "last"),
    "mlx/fewer": (SLIDE(5), "last"),
}
HIDDEN = {  # a query that sees none of 5 keys: its weights
    "jax/hidden": .2, "jax/hidden in a window": .2, "mlx/hidden": .2, "transformers/eager/hidden": .2,
    "transformers-4.57/eager/hidden": .2, "torch/lowest number/hidden": .2, "onnxruntime/hidden": 0,
    "torch/bool/hidden": 0, "torch/flex/hidden": 0, "torch/MultiheadAttention/hidden": np.nan,
}
LIBRARIES = {"onnxruntime-1.23": "onnxruntime", "transformers-4.57": "transformers", "mlx": "mlx-lm"}
VERSIONS = {name.split("/")[0]: json.loads(str(text)) for name, text in RECORDED.items() if name.endswith("/versions")}


def test_every_recorded_case_is_compared():
    versions = {f"{name}/versions" for name in VERSIONS}
    assert set(RECORDED) == {*WINDOWS, *FEWER, *HIDDEN, *versions}


@pytest.mark.parametrize("case", WINDOWS)
def test_window(case):
    seen = RECORDED[case]
    queries, keys = map(np.arange, seen.shape)
    assert 0 < seen.sum() < seen.size
    np.testing.assert_array_equal(WINDOWS[case].visible(queries, keys), seen)
    if len(queries) == len(keys):
        drawn = "\n".join(" ".join("·■"[int(one)] for one in row) for row in seen)
        assert WINDOWS[case].show(len(queries)) == drawn


@pytest.mark.parametrize("case", FEWER)
def test_where_fewer_queries_stand(case):
    seen, (spec, where) = RECORDED[case], FEWER[case]
    queries, keys = map(np.arange, seen.shape)
    queries = queries + (len(keys) - len(queries)) * (where == "last")
    np.testing.assert_array_equal(spec.visible(queries, keys), seen)


@pytest.mark.parametrize("case", HIDDEN)
def test_a_query_that_sees_no_key(case):
    np.testing.assert_allclose(RECORDED[case], np.full(5, HIDDEN[case]), rtol=1e-6)


def test_here_fewer_queries_are_the_last_and_no_key_gives_zeros():
    v = ops.eye(5, 5, ms.float32)[None, None]
    out = windowed_attention(ops.zeros((1, 1, 2, 5)), ops.zeros((1, 1, 5, 5)), v, SLIDE(2))
    np.testing.assert_array_equal(out.asnumpy()[0, 0] > 0, [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]])
    hidden = windowed_attention(ops.zeros((1, 1, 5, 5)), ops.zeros((1, 1, 5, 5)), v, SLIDE(2),
                                mask=ops.zeros((1, 5), ms.bool_))
    assert not hidden.asnumpy().any()


def test_every_constructor_is_compared_with_a_library():
    constructors = {name for name in dir(WindowSpec) if name.startswith("from_")}
    source = Path(__file__).read_text(encoding="utf-8").partition("def test_every")[0]
    assert constructors <= set(re.findall(r"WindowSpec\.(from_\w+)", source))


# ---- docs/conventions.md


def rows(columns):
    """Return the cells of the page's rows that have so many columns, without titles."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in cells if len(row) == columns and row[0] != "library" and not row[0].startswith("---")]


@pytest.mark.parametrize("environment", VERSIONS)
def test_the_page_names_the_version_that_was_recorded(environment):
    library = LIBRARIES.get(environment, environment)
    named = f"{library} {VERSIONS[environment][library]}"
    assert any(named in row[0] for row in rows(5) if row[-1].strip(" |") == "recorded")


def test_each_row_of_the_page_says_how_it_is_known_and_names_a_window():
    letters = dict(W=6, L=5, R=2, S=5, C=4, K=3, WindowSpec=WindowSpec, max=max, __builtins__={})
    letters |= {name: getattr(WindowSpec, name) for name in dir(WindowSpec) if name.startswith("from_")}
    assert len(rows(5)) > 40
    for row in rows(5):
        assert row[-1].strip(" |") in ("recorded", "run", "read", "run (arguments), read (kernel)"), row
        code = re.match("`([^`]+)`", row[3])
        assert code is None and row[3].startswith("none") or isinstance(eval(code.group(1), letters), WindowSpec), row
