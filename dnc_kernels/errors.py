"""Messages that name op, argument, expected, got and, where it helps, the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def describe(value: Any) -> str:
    """Short text of what the caller passed: shape and dtype of a tensor, repr of anything else."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return repr(value)


def message(op: str, argument: str, expected: str, got: Any, fix: str = "") -> str:
    """Text of an error: ``op: argument must be expected; got got (fix)``."""
    text = got if isinstance(got, str) else describe(got)
    return f"{op}: {argument} must be {expected}; got {text}" + (f" ({fix})" if fix else "")


def check_value(ok: bool, op: str, argument: str, expected: str | Callable[[], str], got: Any, fix: str = "") -> None:
    """Raise ValueError unless `ok`.

    A function as `expected` is called on failure alone: text made of sizes would pin them under torch.compile.
    """
    if not ok:
        raise ValueError(message(op, argument, expected if isinstance(expected, str) else expected(), got, fix))


def check_dtype(ok: bool, op: str, argument: str, expected: str, got: Any, fix: str = "") -> None:
    """Raise TypeError unless `ok`."""
    if not ok:
        raise TypeError(message(op, argument, expected, got, fix))


def check_float(op: str, argument: str, tensor: Any) -> None:
    """Raise TypeError unless `tensor` is a float32, float64, float16 or bfloat16 tensor."""
    check_dtype(
        isinstance(tensor, Tensor) and tensor.dtype in FLOATS,
        op, argument, "a float32, float64, float16 or bfloat16 tensor", tensor,
    )  # fmt: skip


def check_integer(op: str, argument: str, tensor: Any) -> None:
    """Raise TypeError unless `tensor` is an integer tensor (bool does not count)."""
    ok = isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    check_dtype(ok, op, argument, "an integer tensor", tensor, "labels and clusters are indices")


def check_device(op: str, argument: str, tensor: Tensor, like: Tensor, like_name: str = "x") -> None:
    """Raise ValueError unless `tensor` is on the device of `like`."""
    check_value(
        tensor.device == like.device,
        op, argument, f"on {like.device} like {like_name}", str(tensor.device), f"move it with .to({like_name}.device)",
    )  # fmt: skip
