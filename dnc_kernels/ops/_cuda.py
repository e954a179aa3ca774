"""What the launchers of the CUDA C++ kernels share: workspace, stream and device of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ._common import view


def module() -> Any:
    """The functions of csrc/bindings_cuda.cpp.

    Raises:
        RuntimeError: the extension was built without CUDA.
    """
    found = getattr(native(), "cuda", None)
    if found is None:
        raise RuntimeError("the extension dnc_kernels._C was built without CUDA; rebuild it where nvcc is on PATH")
    return found


def where(x: Tensor) -> tuple[int, int]:
    """The current stream of the device of `x`, and its index."""
    return torch.cuda.current_stream(x.device).cuda_stream, x.device.index


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it where it does not begin at a multiple of 16 bytes, as a view into the middle of a tensor may not."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def launch(name: str, x: Tensor, *arguments: Any) -> None:
    """Call a launcher of `module` on the current stream of the device of `x`; tensors and None become views.

    The workspace lives until the call returns: the allocator hands it on only behind the stream's work.
    """
    kept = []

    def allocate(size: int) -> int:
        kept.append(torch.empty(size, dtype=torch.uint8, device=x.device))
        return kept[-1].data_ptr()

    stream, device = where(x)
    made = (view(a) if a is None or isinstance(a, Tensor) else a for a in arguments)
    getattr(module(), name)(*made, allocate, stream, device)
