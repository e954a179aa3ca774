"""Launchers of the CUDA C++ Sinkhorn kernels (csrc/cuda/sinkhorn.cu, sinkhorn_backward.cu), with the functions of cpu.py."""

from __future__ import annotations

from .._cuda import launch
from .calls import SinkhornBackwardCall, SinkhornBackwardOut, SinkhornCall, SinkhornOut


def sinkhorn(call: SinkhornCall, out: SinkhornOut) -> None:
    """Assignment, plan, history and steps, those given.

    Memory: 36 G K + 16 G + 10 N bytes. One cooperative launch, and one to clear a part of that memory.
    """
    launch("sinkhorn", call, out, op="sinkhorn_plan" if out.assignment is None else "sinkhorn_assign")


def sinkhorn_backward(call: SinkhornBackwardCall, out: SinkhornBackwardOut) -> None:
    """Gradient of the similarity, float32, from `history` and `steps` as `sinkhorn` wrote them.

    Memory: 32 G K + 20 G + 10 N bytes. One cooperative launch, and one to clear a part of that memory.
    """
    launch("sinkhorn_backward", call, out, op="sinkhorn_plan")
