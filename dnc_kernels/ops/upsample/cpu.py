"""Launchers of the C++ upsample kernels (csrc/cpu/upsample.cpp, upsample_loss.cpp)."""

from __future__ import annotations

from torch import Tensor

from .._cpu import run
from .calls import ArgmaxCall, ArgmaxOut, UpsampleCall, UpsampleOut


def upsample_cross_entropy(call: UpsampleCall, out: UpsampleOut) -> None:
    """Results and the gradient, those given. A bad label fills nothing and raises."""
    run("upsample_cross_entropy", call, out)


def upsample_argmax(call: ArgmaxCall, out: Tensor) -> None:
    """Class of the highest upsampled score."""
    run("upsample_argmax", call, ArgmaxOut(out))
