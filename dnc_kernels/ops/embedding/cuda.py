"""Launchers of the CUDA C++ embedding kernels (csrc/cuda/embedding*.cu); the functions are those of cpu.py."""

from __future__ import annotations

from .._cuda import launch
from .calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut


def normalize_embedding(call: NormalizeCall, out: NormalizeOut) -> None:
    """Embedding and statistics. One launch."""
    launch("normalize_embedding", call, out)


def normalize_embedding_backward(call: NormalizeBackwardCall, out: NormalizeBackwardOut) -> None:
    """Gradients, those given. One launch, or two."""
    launch("normalize_embedding_backward", call, out, op="normalize_embedding")
