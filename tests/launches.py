"""Counting what a call launches on a GPU, without one: torch's own kernels, Triton's, and CUDA C++'s."""

import sys
from contextlib import contextmanager

from cuda_on_cpu import load
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dnc_kernels.ops import _cuda, _op, _triton

#: What launches nothing: views, and tensors without values.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "flatten", "lift_fresh", "narrow",
    "new_empty", "new_empty_strided", "permute", "promote_types", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
#: What only a CPU does: a look at the labels, and at a factor.
CPU_ONLY = {"aminmax", "_local_scalar_dense"}


class _Launches(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if func.namespace == _op.NAMESPACE and name in _op.OPS:
            with self:
                return _op.OPS[name]._kernel(*args)
        if name not in FREE | CPU_ONLY:
            self.found.append(f"torch {name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def counted():
    """Inside: the names of what is launched, in order."""
    found = []
    triton, cuda, modules = _triton.launch, _cuda.launch, list(sys.modules.items())

    def of_triton(kernel, grid, *arguments, **options):
        if 0 not in grid:
            found.append(f"triton {kernel.fn.__name__}")
        with _disable_current_modes():
            triton(kernel, grid, *arguments, **options)

    def of_cuda(name, *records, **options):
        before = load().launches()
        with _disable_current_modes():
            cuda(name, *records, **options)
        found.extend([f"cuda {name}"] * (load().launches() - before))

    def put(old, new):
        for name, module in modules:
            if name.startswith("dnc_kernels") and getattr(module, "launch", None) is old:
                module.launch = new

    put(triton, of_triton), put(cuda, of_cuda)
    try:
        with _Launches(found):
            yield found
    finally:
        put(of_triton, triton), put(of_cuda, cuda)
