"""The start of every test: quiet, synchronous, seeded, and with nothing written into the checkout."""
import os
import tempfile

os.environ.setdefault("GLOG_v", "3")
# If a graph fails to compile, as in tests of messages, its dump goes here instead of the working directory.
os.environ.setdefault("MS_OM_PATH", tempfile.mkdtemp(prefix="mindspore-"))

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--device", choices=("CPU", "GPU", "Ascend"), default="CPU", help="where the tests run")


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
