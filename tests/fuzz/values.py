"""Tensors of every dtype, layout and kind of value; each knows the code that makes it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = tuple(getattr(torch, name) for name in ("int64", "int32", "uint8", "int16", "int8", "uint16", "uint32", "uint64"))

#: The first are the simplest: hypothesis shrinks to them.
ROWS = ("contiguous", "slice", "transposed", "one pixel", "one channel", "spread")
MAPS = ("contiguous", "channels_last", "crop", "one pixel", "one sample", "transposed")
KINDS = (
    "normal", "integers", "unit", "constant", "zeros", "duplicates", "offset", "large", "tiny", "denormal", "huge", "some NaN", "some Inf",
)  # fmt: skip
#: Kinds whose numbers are all finite and of a usual size.
TAME = KINDS[:7]
SIZES = (1, 2, 3, 5, 4, 7, 8, 13, 16, 17, 31, 33, 65)


class Spec(NamedTuple):
    """What a tensor is made of."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    seed: int
    #: of integers: values that may occur
    ids: tuple[int, ...] = ()

    def make(self) -> torch.Tensor:
        """The tensor: the same each time."""
        generator = torch.Generator().manual_seed(self.seed)
        plain = self._ids(generator) if self.ids else self._floats(generator)
        return laid_out(plain, self.layout)

    def _ids(self, generator: torch.Generator) -> torch.Tensor:
        known = [i for i in self.ids if _least(self.dtype) <= i <= torch.iinfo(self.dtype).max]
        drawn = torch.randint(len(known), self.shape, generator=generator).numpy()
        kind = str(self.dtype).removeprefix("torch.")
        return torch.from_numpy(numpy.array(known, dtype=kind)[drawn].reshape(self.shape))

    def _floats(self, generator: torch.Generator) -> torch.Tensor:
        kind, shape, info = self.kind, self.shape, torch.finfo(self.dtype)
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind == "integers":
            t = (2 * t).round().clamp(-3, 3)
        elif kind == "unit":  # over the channels: the second axis of pixels, the last of centroids [C,K,D]
            t = F.normalize(t, dim=1 if len(shape) in (2, 4) else -1)
        elif kind in ("constant", "zeros"):
            t = torch.full(shape, 0.5 if kind == "constant" else 0.0, dtype=torch.float64)
        elif kind == "duplicates" and t.numel():
            t = t[torch.arange(shape[0]) // 2]
        elif kind == "offset":
            t = t.round() + (1e5 if info.bits > 16 else 1e2)
        elif kind == "large":
            t = t * (1e5 if info.max > 1e5 else 1e2)
        elif kind == "tiny":
            t = t * math.sqrt(info.tiny)
        elif kind == "denormal":
            t = t * info.tiny / 8
        elif kind == "huge":
            t = t.sign() * info.max * torch.rand(shape, generator=generator, dtype=torch.float64).round()
        elif kind.startswith("some"):
            bad = math.nan if kind == "some NaN" else math.inf
            t = torch.where(torch.rand(shape, generator=generator) < 2 / max(t.numel(), 4), bad, t)
        return t.to(self.dtype)

    def code(self) -> str:
        """An expression that makes it: its numbers, or where they are many a call of `made`."""
        t = self.make()
        if not 0 < t.untyped_storage().nbytes() // t.itemsize <= 64:
            return f"made({', '.join(map(repr, self))})"
        flat = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
        numbers = flat.tolist() if self.ids else flat.double().tolist()
        text = _named(f"torch.tensor({numbers}, dtype={t.dtype})")
        if t.is_contiguous() and len(flat) == t.numel():
            return f"{text}.view({tuple(t.shape)})"
        return f"{text}.as_strided({tuple(t.shape)}, {t.stride()}, {t.storage_offset()})"


def made(*spec: Any) -> torch.Tensor:
    """The tensor of a `Spec` with these fields."""
    return Spec(*spec).make()


def _named(text: str) -> str:
    return text.replace("nan", "torch.nan").replace("inf", "torch.inf")


def _least(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).min


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The shape of `t` with other strides; ``one ...`` repeats the values of one along others with stride 0."""
    if layout == "contiguous" or t.ndim not in (1, 2, 3, 4) or t.numel() == 0:
        return t
    last = t.ndim - 1
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(0, last).contiguous().transpose(0, last)
    if layout == "one pixel":
        return (t[:1] if t.ndim < 4 else t[:1, :, :1, :1]).expand(t.shape)
    if layout == "one channel":
        return t[:, :1].expand(t.shape)
    if layout == "one sample":
        return t[:1].expand(t.shape)
    if layout == "spread":  # every other channel
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout not in ("slice", "crop"):
        raise ValueError(layout)
    wide = t.new_zeros([n + 3 for n in t.shape])
    inside = tuple(slice(1, n + 1) for n in t.shape)
    wide[inside] = t
    return wide[inside]


def layouts(ndim: int) -> st.SearchStrategy[str]:
    """Layouts of a tensor of so many axes."""
    choices = MAPS if ndim == 4 else ROWS if ndim == 2 else ("contiguous", "slice", "transposed", "one sample")
    return st.sampled_from(choices)


SEEDS = st.integers(0, 2**16)


def code_of(value: Any) -> str:
    """Code of an argument."""
    if isinstance(value, Spec):
        return value.code()
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            return f"torch.empty({tuple(value.shape)}, dtype={value.dtype}, device='meta')"
        if value.is_sparse:
            return f"{code_of(value.to_dense())}.to_sparse()"
        return _named(f"torch.tensor({value.tolist()}, dtype={value.dtype}).view({tuple(value.shape)})")
    if isinstance(value, numpy.ndarray):
        return f"{code_of(torch.from_numpy(value))}.numpy()"
    if isinstance(value, numpy.generic):
        return f"numpy.{type(value).__name__}({value.item()!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
