"""Imports of optional packages, and of torchvision where torch cannot load its C++ library."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

import torch

# Ops that torchvision registers Python code for while it is imported, whether or not its C++ library defined them.
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # an op lives as long as its Library


def require(name: str, why: str) -> Any:
    """Import the optional package or module `name`.

    Raises:
        ModuleNotFoundError: its package is not installed; the message names `why` and the extra that installs it.
    """
    package = name.partition(".")[0]
    if package not in sys.modules and find_spec(package) is None:
        raise ModuleNotFoundError(f'{why} needs {package}: run `pip install "dnc_kernels[networks]"`', name=package)
    declare_missing_torchvision_ops()  # timm and transformers import torchvision too
    return importlib.import_module(name)


def declare_missing_torchvision_ops() -> bool:
    """Make `import torchvision` work where its C++ library cannot be loaded; return whether that was necessary.

    The wheel on the package index is built for a CUDA torch, so its library does not load on a CPU-only torch of the same
    version. torchvision then fails at its first fake kernel with "operator torchvision::nms does not exist", and so does the
    import of timm and of transformers' models. This function declares the op, without a kernel. Everything that uses no C++ op
    of torchvision then works: all classification and segmentation networks do. A call of such an op (nms, roi_align,
    deform_conv2d) still raises.

    It does nothing if torchvision is absent or its import works, so a complete torchvision is never touched.
    """
    if "torchvision" in sys.modules or find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, op):
            library.define(op + schema)
    _declared.append(library)
    importlib.import_module("torchvision")
    return True


def class_layer(owner: str, layer: Any, where: str) -> int:
    """Input channels of a network's class layer, which must be a 1x1 convolution.

    Raises:
        TypeError: `layer` is something else.
    """
    if not isinstance(layer, torch.nn.Conv2d) or layer.kernel_size != (1, 1):
        raise TypeError(f"{owner}: {where} must be a 1x1 convolution, the class layer to cut; got {layer!r}")
    return layer.in_channels
