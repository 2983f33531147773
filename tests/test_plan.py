"""The block plan covers every query once, and computes few scores that nobody sees."""
import itertools

import numpy as np
import pytest

from local_attention.plan import make_plan
from local_attention.spec import NO_LIMIT, WindowSpec

SPECS = [WindowSpec(1, 7, 0, True), WindowSpec(7, 7, 0, True), WindowSpec(7, 14, 7, False),
         WindowSpec(1, 200, 100, False), WindowSpec(300, 300, 0, True), WindowSpec(257, 0, 257, False),
         WindowSpec(1, 3, -1, False), WindowSpec(1, NO_LIMIT, 0, True), WindowSpec(1, NO_LIMIT, NO_LIMIT, False),
         WindowSpec(1, 0, -1, False)]


@pytest.mark.parametrize("spec, n, offset, period", [
    *itertools.product(SPECS, (1, 6, 7, 8, 127, 128, 129, 1000), (0,), (1,)),
    *itertools.product(SPECS, (1, 300), (5, 640), (1,)), *itertools.product(SPECS[:4], (23, 600), (0, 13), (7,))])
def test_runs_are_the_mask_of_the_spec(spec, n, offset, period):
    n_k = n + offset
    seen = np.zeros((n, n_k), int)
    rows = np.zeros(n, int)
    for run in make_plan(spec, n, n_k, offset, period):
        assert run.keys.min() >= 0 and run.keys.max() < n_k
        for queries, keys in zip(run.queries, run.keys):
            rows[queries] += 1
            seen[np.ix_(queries, keys)] += run.visible
            assert (queries[0] + offset) % period == (run.queries[0][0] + offset) % period
    assert (rows == 1).all()
    np.testing.assert_array_equal(seen, spec.visible(np.arange(n) + offset, np.arange(n_k)))


@pytest.mark.parametrize("spec, wasted", [(WindowSpec(1, 512, 0, True), 1.3), (WindowSpec(512, 512, 0, True), 1.2),
                                          (WindowSpec(512, 512, 512, False), 1.), (WindowSpec(1, 4096, 0, True), 1.3),
                                          (WindowSpec(4, 4, 0, True), 6), (WindowSpec(509, 509, 0, True), 1.5)])
def test_few_scores_are_computed_in_vain_and_few_patterns_are_kept(spec, wasted):
    n = 2**13
    runs = make_plan(spec, n, n)
    computed = sum(run.scores for run in runs)
    assert computed <= wasted * spec.visible(np.arange(n), np.arange(n)).sum()
    longer = make_plan(spec, 2**15, 2**15)
    assert len(longer) <= len(runs) + 1 <= 20
    assert sum(run.visible.size for run in longer) <= 1.3 * sum(run.visible.size for run in runs)
