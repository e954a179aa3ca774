"""Faults that a run on a GPU must survive and name: not collected by a plain `pytest`, but by `make gpu-run DRY=1 PLANT=1`."""

import ctypes
import time

import pytest

from benchmarks import pytest_record


def test_right() -> None:
    """Nothing is wrong."""


def test_wrong() -> None:
    """A result beyond its bound."""
    assert 0.5 == 0.25, "similarity: element (3, 1) is off by 7 times the bound"


@pytest.mark.skip(reason="needs two GPUs")
def test_skipped() -> None:
    """What this machine cannot run."""
    raise AssertionError


def test_hanging() -> None:
    """A kernel that waits for ever."""
    time.sleep(3600)


def test_crashing() -> None:
    """An access that ends the process."""
    ctypes.string_at(0)


def test_spoiling_its_process() -> None:
    """As an illegal access does: from here on every call of CUDA fails."""

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA ...")

    pytest_record.synchronize = fail


@pytest.mark.parametrize("n", range(3))
def test_after_the_faults(n: int) -> None:
    """What must run all the same."""


def test_out_of_a_broken_fixture(absent: None) -> None:
    """A test that cannot start."""
