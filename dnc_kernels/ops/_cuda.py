"""How the launchers of the CUDA C++ kernels call them: workspace, stream and device of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import native


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


def aligned(call: Any) -> Any:
    """The call with `x` at a multiple of 16 bytes, where a view into the middle of a tensor may not begin."""
    return call if call.x.data_ptr() % 16 == 0 else call._replace(x=call.x.clone())


def launch(name: str, *records: Any, op: str = "") -> None:
    """Call a function of `module` with the fields of records, by name, on the current stream of the first tensor's device.

    The workspace lives until the call returns: the allocator hands it on only behind the stream's work. Errors name `op`, as a
    rule the function's own name.
    """
    device, kept = records[0][0].device, []

    def allocate(size: int) -> int:
        kept.append(torch.empty(size, dtype=torch.uint8, device=device))
        return kept[-1].data_ptr()

    stream, index = where(records[0][0])
    getattr(module(), name)(op or name, allocate, stream, index, *records)
