"""Messages that name op, argument, expected, got and, where it helps, the fix."""

from __future__ import annotations

import numbers
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

#: The largest number of iterations, classes or clusters: kernels count with 32 bits.
MOST = 2**31 - 1
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


def check_choice(op: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Check a string option."""
    check_value(value in choices, op, argument, "one of " + ", ".join(choices), repr(value))


def check_dtype(ok: bool, op: str, argument: str, expected: str, got: Any, fix: str = "") -> None:
    """Raise TypeError unless `ok`."""
    if not ok:
        raise TypeError(message(op, argument, expected, got, fix))


def check_float(op: str, argument: str, tensor: Any) -> None:
    """Raise TypeError unless `tensor` is a float32, float64, float16 or bfloat16 tensor."""
    check_dtype(
        isinstance(tensor, Tensor) and tensor.dtype in FLOATS,
        op, argument, "a float32, float64, float16 or bfloat16 tensor", tensor, _float_fix(tensor),
    )  # fmt: skip
    check_strided(op, argument, tensor)


def _float_fix(value: Any) -> str:
    if not isinstance(value, Tensor):
        return tensor_fix(value)
    return "" if value.is_complex() else "convert it with .float()"


def tensor_fix(value: Any) -> str:
    """How a tensor is made of what is none."""
    if hasattr(value, "__array__"):
        return "convert it with torch.as_tensor(...)"
    return "convert it with torch.tensor(...)" if isinstance(value, (list, tuple, int, float)) else ""


def check_integer(op: str, argument: str, tensor: Any) -> None:
    """Raise TypeError unless `tensor` is an integer tensor (bool does not count)."""
    ok = isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not ok:
        check_dtype(False, op, argument, "an integer tensor", tensor, _integer_fix(tensor))
    check_strided(op, argument, tensor)


def check_strided(op: str, argument: str, tensor: Tensor) -> None:
    """Raise TypeError for a sparse tensor, and for one of another layout."""
    if tensor.layout is not torch.strided:
        check_dtype(False, op, argument, "a dense tensor", f"one of layout {tensor.layout}", "convert it with .to_dense()")


def _integer_fix(value: Any) -> str:
    if not isinstance(value, Tensor):
        return tensor_fix(value)
    if value.is_complex():
        return ""
    if value.is_floating_point() and _seen(value) and not bool((value == value.round()).all()):
        # .long() would make them 0 without a word
        return "ids have no fractions: ToTensor divides a mask by 255, PILToTensor does not; of shares take .argmax(1)"
    return "convert it with .long()"


def label_fix(labels: Tensor, like: Tensor) -> str:
    """What to do about labels of another shape than `like` asks for, [N,...] or [B,...,h,w], where that is clear."""
    shape, ndim = list(labels.shape), 3 if like.ndim == 4 else 1
    if labels.ndim == ndim + 1:
        if shape[1] == 1:
            return "drop the channel axis with labels[:, 0]"
        if shape[-1] == 1:
            return "drop the channel axis with labels[..., 0]"
        for dim in (1, -1)[: labels.ndim - 1]:
            if _one_hot(labels, dim):
                return f"these are one-hot: labels.argmax({dim})"
        if ndim == 3 and {3, 4} & {shape[1], shape[-1]}:
            return "a mask in colour: replace each colour by the id of its class"
    if ndim == 3 and labels.ndim == 2 and like.shape[0] == 1:
        return "add the batch axis with labels[None]"
    return SWAPPED if ndim == 3 and labels.ndim == 3 and shape[0] == like.shape[0] and swapped(labels, like) else ""


#: What to do about labels that are `swapped`.
SWAPPED = "rows and columns are swapped: labels.transpose(1, 2)"


def swapped(labels: Tensor, like: Tensor) -> bool:
    """Whether labels [B,H,W] have the rows of the columns of `like` [B,...,h,w], and the other way round, at any scale.

    Sizes are not looked at under tracing, where they may vary.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    (rows, columns), (height, width) = labels.shape[1:], like.shape[2:]
    if height == width or height * width == 0 or rows % width:
        return False
    return bool(rows // width * height == columns)


def _seen(t: Tensor) -> bool:
    """Whether an error may look at what a tensor holds."""
    return type(t) is Tensor and not t.is_meta and not torch.compiler.is_compiling()


def _one_hot(labels: Tensor, dim: int) -> bool:
    return _seen(labels) and bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(dim) == 1).all())


def feature_fix(features: Tensor, ndim: int, channels: int) -> str:
    """What to do about features of another shape than [N,channels] (`ndim` 2) or [B,channels,h,w] (4), where that is clear."""
    shape = list(features.shape)
    if ndim == 4 and features.ndim == 4 and shape[3] == channels:
        return "channels come second: features.permute(0, 3, 1, 2)"
    if ndim == 4 and features.ndim == 3 and shape[0] == channels:
        return "add the batch axis with features[None]"
    if ndim == 4 and features.ndim == 3 and shape[2] == channels:
        return "of tokens make a map: features.transpose(1, 2).unflatten(2, (h, w))"
    if ndim == 2 and features.ndim == 4 and shape[1] == channels:
        return "pool them first: features.mean((2, 3))"
    if ndim == 2 and features.ndim == 3 and shape[2] == channels:
        return "of tokens take their mean, features.mean(1), or the class token, features[:, 0]"
    if ndim == 2 and features.ndim == 1 and shape[0] == channels:
        return "add the batch axis with features[None]"
    return f"make the head for {shape[1]} channels" if features.ndim == ndim and shape[1] else ""


def check_device(op: str, argument: str, tensor: Tensor, like: Tensor, like_name: str = "x") -> None:
    """Raise ValueError unless `tensor` is on the device of `like`."""
    check_value(
        tensor.device == like.device,
        op, argument, f"on {like.device} like {like_name}", str(tensor.device), f"move it with .to({like_name}.device)",
    )  # fmt: skip


def whole_number(
    op: str, argument: str, value: Any, least: int | None = 1, expected: str = "", *, most: int | None = None
) -> int:
    """`value` as an int of at least `least` (None: any), and at most `most`.

    A numpy integer becomes an int. A torch.SymInt stays as it is: it may vary. Under torch.jit.trace, where sizes are 0-d
    tensors, the number of the example is taken.

    Raises:
        TypeError: not a whole number (a bool is none either).
        ValueError: below `least`, or above `most`.
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
        check_dtype(number is not None, op, argument, expected, _shown(value))
    check_value(least is None or bool(number >= least), op, argument, expected, value)
    if most is not None and number > most:
        check_value(False, op, argument, f"{expected}, at most {most}", value)
    return number


def check_number(op: str, argument: str, value: Any, expected: str, ok: Callable[[Any], bool], fix: str = "") -> None:
    """Raise TypeError unless `value` is a real number, of Python or numpy, and ValueError unless it is `ok`.

    A tensor is none: it would get no gradient, without a word.
    """
    if not isinstance(value, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)) or isinstance(value, bool):
        fix = fix or ("it gets no gradient here; pass .item() of it" if isinstance(value, Tensor) else "")
        check_dtype(False, op, argument, f"a number, {expected}", _shown(value), fix)
    if isinstance(value, int) and abs(value) > 2**1000:  # more than a float holds
        check_value(False, op, argument, expected, "a number beyond floats")
    check_value(ok(value), op, argument, expected, value)


def check_flag(op: str, argument: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False: a word such as "no" would count as True."""
    flag = isinstance(value, (bool, torch.SymBool)) or (isinstance(value, int) and value in (0, 1))
    flag = flag or str(getattr(value, "dtype", "")) == "bool"  # of numpy
    check_dtype(flag, op, argument, "True or False", _shown(value))


def check_instance(op: str, argument: str, value: Any, kind: type, expected: str) -> None:
    """Raise TypeError unless `value` is of a class."""
    check_dtype(isinstance(value, kind), op, argument, expected, _shown(value))


def _shown(value: Any) -> Any:
    return repr(value) if isinstance(value, str) else value


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
