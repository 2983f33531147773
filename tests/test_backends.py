"""What it takes to add a backend, and a tensor: a record, and a name."""
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from local_attention import WindowSpec, use_backend, windowed_attention
from local_attention.attend import BACKENDS, WHOLE, attend, beside, prepared, problem_of, refusals, run
from local_attention.backends import Backend
from local_attention.explanation import explain
from local_attention.spec import Scoring

SPEC = WindowSpec(1, 2, 0, True)


def values(*shape):
    return Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def twice_the_values(factor, q, k, v, tensors):
    return v * factor, None


@pytest.fixture
def toy(monkeypatch):
    """A backend that returns the values, for calls with no more than a mask."""
    record = Backend("toy", frozenset(("mask",)), why_not=lambda problem: None, scores=lambda problem: (0, 0),
                     prepare=lambda problem: 2., run=twice_the_values)
    monkeypatch.setitem(BACKENDS, "toy", record)
    return record


@pytest.mark.parametrize("backend", ["toy", None])
def test_a_backend_is_one_record(toy, backend):
    x, mask = values(1, 2, 5, 4), ops.ones((1, 5), ms.bool_)

    def call(x):
        return windowed_attention(x, x, x, SPEC, mask=mask, backend=backend)

    def total(x):
        return call(x).sum()
    with use_backend("toy"):
        np.testing.assert_array_equal(call(x).asnumpy(), 2 * x.asnumpy())
        np.testing.assert_array_equal(ms.jit(ms.grad(total))(x).asnumpy(), np.full(x.shape, 2.))


@pytest.mark.parametrize("name, option", [
    ("softcap", dict(softcap=2.)), ("dropout", dict(dropout_rate=.5)), ("lse", dict(return_lse=True)),
    ("sinks", dict(sinks=np.ones(2))), ("bias", dict(attn_bias=np.ones((2, 1, 3)))),
    ("documents", dict(segment_ids=np.zeros((1, 5), np.int32)))])
def test_what_a_record_does_not_name_is_refused(toy, name, option):
    x = values(1, 2, 5, 4)
    option = {key: Tensor(value.astype(np.int32 if key == "segment_ids" else np.float32))
              if isinstance(value, np.ndarray) else value for key, value in option.items()}
    with pytest.raises(ValueError, match=f"the backend 'toy' cannot run this call: it takes no '{name}'"):
        windowed_attention(x, x, x, SPEC, backend="toy", **option)


def problem(**shapes):
    return problem_of(SPEC, Scoring(1.), WHOLE, (2, 5, 4), (2, 5, 4), (2, 5, 4), ms.float32, tuple(shapes.items()))


def test_a_tensor_that_a_backend_does_not_name_is_refused_by_name():
    reasons = refusals(problem(toy=(2, 5)))
    assert set(reasons) == set(BACKENDS)
    for record in BACKENDS.values():
        able = replace(record, why_not=lambda problem: None)
        assert able.refusal(problem(toy=(2, 5))) == "takes no 'toy'"
        assert able.refusal(problem()) is None
    x = values(2, 5, 4)
    with pytest.raises(ValueError, match="no backend can run this call: .*'dense' takes no 'toy'"):
        attend(x, x, x, SPEC, Scoring(1.), beside(toy=x))


def test_a_call_stops_at_the_first_backend_that_can(toy, monkeypatch):
    asked = []
    for name, record in list(BACKENDS.items()):
        monkeypatch.setitem(BACKENDS, name, replace(
            record, why_not=lambda problem, record=record: asked.append(record.name) or record.why_not(problem)))
    first = explain(problem()).split(":")[0]
    assert asked[-len(BACKENDS):] == list(BACKENDS)  # `explain` asks all
    asked.clear()
    x = values(2, 5, 4)
    attend(x, x, x, SPEC, Scoring(1.))
    assert asked == list(BACKENDS)[:list(BACKENDS).index(first) + 1]


def test_what_is_prepared_outside_of_a_graph_runs_in_it():
    x = values(2, 5, 4)
    ready = prepared(problem())
    wanted = attend(x, x, x, SPEC, Scoring(1.)).asnumpy()

    @ms.jit
    def call(x):
        return run(ready, x, x, x, beside())
    np.testing.assert_array_equal(call(x).asnumpy(), wanted)
