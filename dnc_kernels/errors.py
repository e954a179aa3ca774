"""Messages that name op, argument, expected, got and, where it helps, the fix."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Result = TypeVar("Result", bound=tuple[Any, ...])

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def describe(value: Any) -> str:
    """Short text of what the caller passed: shape and dtype of a tensor, repr of anything else."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    if getattr(value, "ndim", 0) and hasattr(value, "dtype"):  # as of numpy
        return f"a {type(value).__module__.partition('.')[0]} array {list(value.shape)} {value.dtype}, no tensor"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


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
    fix = "labels are ids; convert them with .long()" if isinstance(tensor, Tensor) else "labels are ids"
    check_dtype(ok, op, argument, "an integer tensor", tensor, fix)


def label_fix(labels: Tensor) -> str:
    """What to do about labels of another shape, where that is clear."""
    return "drop the channel axis with labels[:, 0]" if labels.ndim == 4 and labels.shape[1] == 1 else ""


def check_device(op: str, argument: str, tensor: Tensor, like: Tensor, like_name: str = "x") -> None:
    """Raise ValueError unless `tensor` is on the device of `like`."""
    check_value(
        tensor.device == like.device,
        op, argument, f"on {like.device} like {like_name}", str(tensor.device), f"move it with .to({like_name}.device)",
    )  # fmt: skip


def whole_number(op: str, argument: str, value: Any, least: int | None = 1, expected: str = "") -> int:
    """`value` as an int of at least `least` (None: any).

    A numpy integer becomes an int. A torch.SymInt stays as it is: it may vary. Under torch.jit.trace, where sizes are 0-d
    tensors, the number of the example is taken.

    Raises:
        TypeError: not a whole number (a bool is none either).
        ValueError: below `least`.
    """
    if not expected:
        names = {None: "an integer", 0: "a non-negative integer", 1: "a positive integer"}
        expected = names.get(least, f"an integer of at least {least}")
    number = value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        whole = torch.jit.is_tracing() if isinstance(value, Tensor) else not isinstance(value, bool)
        try:
            number = operator.index(value) if whole else None
        except TypeError:
            number = None
        check_dtype(number is not None, op, argument, expected, value)
    check_value(least is None or bool(number >= least), op, argument, expected, value)
    return number


def check_no_tensor(op: str, argument: str, value: Any) -> None:
    """Raise TypeError for a tensor where a number is taken: it would get no gradient, without a word."""
    fix = "it gets no gradient here; pass .item() of it"
    check_dtype(not isinstance(value, Tensor), op, argument, "a number", value, fix)


def map_size(op: str, size: int | Sequence[int], argument: str = "size") -> tuple[int, int]:
    """(H, W) of one whole number for both or of a pair of them, each as `whole_number` takes it.

    Raises:
        TypeError: neither; ValueError: not two, or one below 1.
    """
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    check_value(len(pair) == 2, op, argument, "a positive integer or a pair (H, W) of them", size)
    height, width = (whole_number(op, argument, n, 1, "a positive integer or a pair (H, W) of them") for n in pair)
    return height, width


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function whose keywords have new names, ``@renamed(old="new")``: an old one still works, and warns.

    Raises:
        TypeError: both names are given.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        op = function.__qualname__

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if kwargs:
                for old, new in names.items():
                    if old in kwargs:
                        if new in kwargs:
                            raise TypeError(f"{op}: {old} is the old name of {new}; both were given")
                        if not torch.compiler.is_compiling():  # a graph cannot warn
                            warnings.warn(f"{op}: {old} is now called {new}; {old} will go in 0.2", FutureWarning, stacklevel=2)
                        kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def holds_a_loss(result: type[Result]) -> type[Result]:
    """Decorator of a named tuple with a field `loss`: used as if it were that tensor, it says what to write instead."""
    name, fields = result.__name__, ", ".join(result._fields)  # type: ignore[attr-defined]

    def missing(self: Result, attribute: str) -> Any:
        if not attribute.startswith("_") and hasattr(Tensor, attribute):
            call = "()" if callable(getattr(Tensor, attribute)) else ""
            raise AttributeError(f"{name} is a tuple ({fields}) and has no {attribute!r}: use .loss.{attribute}{call}")
        raise AttributeError(f"{name} has no attribute {attribute!r}")

    def no_arithmetic(sign: str) -> Callable[[Result, Any], Any]:
        def calculate(self: Result, other: Any = None) -> Any:
            raise TypeError(f"{name} is a tuple ({fields}), not a tensor: use .loss with {sign!r}")

        return calculate

    def no_number(self: Result) -> float:
        raise TypeError(f"{name} is a tuple ({fields}), not a number: use .loss.item()")

    result.__getattr__ = missing  # type: ignore[attr-defined]
    result.__float__ = no_number  # type: ignore[attr-defined]
    for method, sign in (("mul", "*"), ("add", "+"), ("sub", "-"), ("truediv", "/")):
        setattr(result, f"__{method}__", no_arithmetic(sign))
        setattr(result, f"__r{method}__", no_arithmetic(sign))
    return result
