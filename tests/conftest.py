"""The start of every test: quiet, synchronous, seeded, and with nothing written into the checkout."""
import os
import tempfile

os.environ.setdefault("GLOG_v", "3")
# If a graph fails to compile, as in tests of messages, its dump goes here instead of the working directory.
os.environ.setdefault("MS_OM_PATH", tempfile.mkdtemp(prefix="mindspore-"))

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


# How many cases of a test the quick suite runs, spread evenly over all of them; `pytest -m thorough` runs the others.
# These are the tests that compile a model or a backward pass for each case, which takes most of the suite's time.
OF_MANY = {
    "test_attend.py::test_dropout_is_a_function_of_the_seed": 3, "test_attend.py::test_graph_sweep": 4,
    "test_attend.py::test_half_precision": 7, "test_cache.py::test_chunks_equal_one_call": 30,
    "test_cache.py::test_greedy_tokens_are_the_same_with_and_without_a_cache": 4,
    "test_generation.py::test_each_row_is_continued_as_if_it_were_alone": 5,
    "test_generation.py::test_half_precision_with_a_cache_is_as_without": 6,
    "test_grouped.py::test_chunks_equal_one_call": 10, "test_grouped.py::test_documents_of_a_model_are_as_if_alone": 9,
    "test_grouped.py::test_greedy_tokens_are_the_same_with_and_without_a_cache": 5,
    "test_jit_within_gradients.py::test_backends": 8,
    "test_layers.py::test_heads_by_the_kernel_are_those_that_are_gathered": 6,
    "test_reference.py::test_greedy": 5, "test_reference.py::test_streams_and_global_layers": 4,
    "test_reference.py::test_transformer": 10, "test_transformer.py::test_a_step_of_training_lowers_the_loss": 6,
    "test_wide.py::test_words": 24, "test_windowed.py::test_all_at_once_with_gradients_that_are_not_zero": 8,
    "test_windowed.py::test_dropout_is_one_function_of_the_seed_everywhere": 2, "test_windowed.py::test_graph_sweep": 4,
    "test_windowed.py::test_half_precision": 7,
}


def pytest_addoption(parser):
    parser.addoption("--device", choices=("CPU", "GPU", "Ascend"), default="CPU", help="where the tests run")


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items):
    cases = {}
    for item in items:
        cases.setdefault(f"{item.path.name}::{getattr(item, 'originalname', item.name)}", []).append(item)
    for name, count in OF_MANY.items():
        found = cases.get(name, [])
        for index, item in enumerate(found):
            if index * count // len(found) == (index - 1) * count // len(found):
                item.add_marker("thorough")


def pytest_configure(config):
    ms.set_device(config.getoption("--device"))
    ms.set_context(pynative_synchronize=True)  # so that an error surfaces in the test that caused it


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def seed():
    ms.set_seed(0)
    np.random.seed(0)
