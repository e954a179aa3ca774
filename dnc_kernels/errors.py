"""Messages that name op, argument, expected, got and, where it helps, the fix."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

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


def whole_number(op: str, argument: str, value: Any, least: int | None = 1) -> int:
    """`value` as an int of at least `least` (None: any).

    Numpy integers and 0-d integer tensors count, bool does not; a torch.SymInt stays what it is.
    """
    expected = "an integer" if least is None else {0: "0 or more", 1: "a positive integer"}.get(least, f"an integer >= {least}")
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is None:
            check_dtype(False, op, argument, expected, value)
    if least is not None and number < least:
        check_value(False, op, argument, expected, value)
    return number


def map_size(op: str, size: int | Iterable[int]) -> tuple[int, int]:
    """(H, W) of one whole number for both, or of a pair of them."""
    one = isinstance(size, (int, torch.SymInt)) or getattr(size, "ndim", 1) == 0
    pair: tuple[Any, ...] = (size, size) if one else tuple(size) if isinstance(size, Iterable) else ()
    if len(pair) != 2:
        check_value(False, op, "size", "an integer or a pair (H, W) of integers", size)
    return whole_number(op, "size", pair[0]), whole_number(op, "size", pair[1])


def renamed(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: keyword arguments go by their old names too, for one version, with a FutureWarning.

    Args:
        names: old name -> new name.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{function.__name__}: {old} is the old name of {new}; give {new} alone")
                    warnings.warn(
                        f"{function.__name__}: the argument {old} is called {new} now; {old} will go in version 0.2",
                        FutureWarning, stacklevel=2,
                    )  # fmt: skip
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
