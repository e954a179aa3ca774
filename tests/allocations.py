"""Counting the memory that a call asks a GPU's allocator for, without one: torch's own tensors, and those of Triton's launchers.

Tensors lie on torch's meta device, which has shapes and no numbers, so that a call of any size takes no memory here. Triton's
kernels ask for no memory of their own, and are not run.
"""

import weakref
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnc_kernels import backends
from dnc_kernels.ops import _op, _triton

#: CUDA's caching allocator gives memory in units of so many bytes.
UNIT = 512


class Allocations(TorchDispatchMode):
    """Inside: bytes of the storages that are alive and were made inside (`live`), and their most at a time (`peak`).

    at_peak: (bytes, op, shape) of each of them, largest first.
    shares: what an index of booleans keeps of the rows, which a tensor without numbers cannot say, is one in so many.
    """

    def __init__(self, shares=1):
        super().__init__()
        self.shares, self.live, self.peak, self.at_peak = shares, 0, 0, []
        self._known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = self._answer(func, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self._see(t, func._opname)
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, sorted(self._known.values(), reverse=True)
        return result

    def _answer(self, func, args):
        """What depends on numbers: any condition holds, and each class has as many pixels as the others."""
        name = func._opname
        if name == "_local_scalar_dense":
            return True
        masks = (
            [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool] if len(args) > 1 else ()
        )
        if masks and name == "index":
            return args[0].new_empty((max(1, len(args[0]) // self.shares), *args[0].shape[1:]))
        return args[0] if masks and name in ("index_put", "index_put_") else None

    def _see(self, t, name):
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // UNIT) * UNIT
        self._known[key] = size, name, tuple(t.shape)
        self.live += size
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.live -= self._known.pop(key)[0]

    def given(self, *tensors):
        """Tensors that were there before."""
        for t in tensors:
            self._known[t.untyped_storage()._cdata] = 0, "given", tuple(t.shape)


@contextmanager
def pretended(kind="sm_90", shared=227 << 10):
    """Inside, ops choose Triton's kernels for tensors of the meta device as on a GPU of this kind, and launch nothing."""
    resolve = backends.resolve

    def of_gpu(op, device, *arguments, **options):
        return resolve(op, "cuda" if device == "meta" else device, *arguments, **options)

    replaced = [
        (backends, "resolve", of_gpu), (_op, "plain", lambda call: True), (_triton, "_recorder", lambda *arguments: None),
        (_triton, "_kind", kind), (_triton, "_kind_shared", shared),
    ]  # fmt: skip
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(backends.use_backend("triton"))
        yield
