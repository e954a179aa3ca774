"""Fused kernels for Deep Nearest Centroids: torch ops in `dnc_kernels.ops`, the head in `dnc_kernels.nn`."""

from . import nn, ops
from .backends import _native, use_backend, use_isa

__version__: str = _native.__version__ if _native is not None else "0+unbuilt"

__all__ = ["__version__", "nn", "ops", "use_backend", "use_isa"]
