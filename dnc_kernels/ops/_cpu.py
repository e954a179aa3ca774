"""How the launchers of the C++ kernels call them."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends


def run(name: str, *records: Any, op: str = "") -> None:
    """Call a function of csrc/bindings.cpp with the fields of records, by name; errors name `op` (as a rule its own name)."""
    getattr(backends._native or backends.native(), name)(op or name, torch.get_num_threads(), *records)


def contiguous(call: Any, field: str = "centroids") -> Any:
    """The call with a tensor of it contiguous."""
    tensor = getattr(call, field)
    return call if tensor.is_contiguous() else call._replace(**{field: tensor.contiguous()})
