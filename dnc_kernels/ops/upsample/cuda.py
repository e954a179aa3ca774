"""Launchers of the CUDA C++ upsample kernels (csrc/cuda/upsample*.cu); the functions are those of cpu.py."""

from __future__ import annotations

from torch import Tensor

from .._cuda import launch
from .calls import ArgmaxCall, ArgmaxOut, UpsampleCall, UpsampleOut


def upsample_cross_entropy(call: UpsampleCall, out: UpsampleOut) -> None:
    """Results and the gradient, those given. A label outside [0,C) is ignored: a check would wait for the device."""
    launch("upsample_cross_entropy", call, out)


def upsample_argmax(call: ArgmaxCall, out: Tensor) -> None:
    """Class of the highest upsampled score."""
    launch("upsample_argmax", call, ArgmaxOut(out))
