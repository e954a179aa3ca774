"""Fixtures shared by all tests."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

# Triton reads this once, at its import: without a GPU its kernels run under its interpreter, on CPU tensors
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cuda_on_cpu import DEVICE, ORDERS, configure, host_kernels
from gpu_check import BACKENDS
from interpreter import quicken

from dnc_kernels import backends

if not torch.cuda.is_available():
    with suppress(ImportError):  # without Triton its tests are skipped
        quicken()

try:
    from hypothesis import settings
except ImportError:  # a GPU machine without network: files with property tests are left out
    collect_ignore = [
        path.name for path in Path(__file__).parent.glob("test_*.py") if "\nfrom hypothesis import" in path.read_text()
    ]
else:
    settings.register_profile("default", deadline=None, max_examples=25, derandomize=True, print_blob=True)
    settings.load_profile("default")


def pytest_collection_modifyitems(config, items):
    """Files with slow tests go first, or one worker would still run them when the others have nothing left.

    Tests marked large would starve others of memory: they run where they are asked for.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if "large" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    large = [item for item in items if item.get_closest_marker("large")]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in large]


@pytest.fixture(params=backends.usable_isas())
def isa(request):
    """Every instruction set that this processor can run, forced in turn."""
    with backends.use_isa(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread():
    """For files whose tensors are so small that a second thread gains nothing, and loses much where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def settings_of_kernels():
    """Environment variables that kernels or their build read; libraries set some others for themselves."""
    return {k: v for k, v in os.environ.items() if k.startswith(("DNC_", "OMP_", "CUDA_", "TRITON_INTERPRET"))}


@pytest.fixture(autouse=True)
def _nothing_remembered():
    """Choices of a test that has planted tables of its own."""
    backends._remembered.cache_clear()


@pytest.fixture(autouse=True)
def _settings_put_back():
    """What a test leaves behind would fail tests of other files, in some orders of files alone."""
    before = settings_of_kernels()
    yield
    assert settings_of_kernels() == before, "put the environment variables back, as monkeypatch.setenv does"


@pytest.fixture
def cuda():
    """The device that backend "cuda" runs on, for tests marked ``cuda``: without a GPU its kernels run on CPU tensors."""
    if DEVICE == "cuda":
        yield DEVICE
    else:
        with host_kernels():
            yield DEVICE


def set_order(cuda, order):
    """Let the host run a kernel's threads in this order; a GPU has but its own."""
    if cuda == "cpu":
        configure(order)
    elif order != "forward":
        pytest.skip("a GPU chooses its own order")


@pytest.fixture(params=ORDERS)
def order(request, cuda):
    """The order in which the host runs a kernel's threads."""
    set_order(cuda, request.param)
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Triton and CUDA C++ in turn, each test marked by its own; see gpu_check.py for other parameters."""
    name, _, order = request.param.partition(" ")
    if name == "triton":
        pytest.importorskip("triton")
    else:
        cuda = request.getfixturevalue("cuda")
        if order:
            set_order(cuda, order)
    return name
