"""Launchers of the C++ embedding kernels (csrc/cpu/embedding.cpp)."""

from __future__ import annotations

from .._cpu import run
from .calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut


def normalize_embedding(call: NormalizeCall, out: NormalizeOut) -> None:
    """Embedding and statistics."""
    run("normalize_embedding", call, out)


def normalize_embedding_backward(call: NormalizeBackwardCall, out: NormalizeBackwardOut) -> None:
    """Gradients, those given."""
    run("normalize_embedding_backward", call, out, op="normalize_embedding")
