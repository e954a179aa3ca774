"""Launchers of the C++ Sinkhorn kernels (csrc/cpu/sinkhorn.cpp, sinkhorn_backward.cpp)."""

from __future__ import annotations

from .._cpu import run
from .calls import SinkhornBackwardCall, SinkhornBackwardOut, SinkhornCall, SinkhornOut


def sinkhorn(call: SinkhornCall, out: SinkhornOut) -> None:
    """Assignment, plan, history and steps, those given."""
    run("sinkhorn", call, out, op="sinkhorn_plan" if out.assignment is None else "sinkhorn_assign")


def sinkhorn_backward(call: SinkhornBackwardCall, out: SinkhornBackwardOut) -> None:
    """Gradient of the similarity."""
    run("sinkhorn_backward", call, out, op="sinkhorn_plan")
