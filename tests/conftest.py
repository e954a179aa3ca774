"""Fixtures shared by all tests."""

import pytest
import torch
from hypothesis import settings

from dnc_kernels import backends

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture(params=backends.usable_isas())
def isa(request):
    """Every instruction set that this processor can run, forced in turn."""
    with backends.use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
