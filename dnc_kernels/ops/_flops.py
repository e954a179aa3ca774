"""Floating-point operations of ops, for torch.utils.flop_counter.

That module imports Triton, half a second, so it is not imported here: it learns of the ops when somebody else imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple[Any, Callable[..., int]]] = []


def count_flops(packet: Any, formula: Callable[..., int]) -> None:
    """Let FlopCounterMode count an op; formula: of the op's arguments, flat, and of its results as `out_val`."""
    if COUNTER in sys.modules:
        sys.modules[COUNTER].register_flop_formula(packet, get_raw=True)(formula)
    else:
        _formulas.append((packet, formula))


class _Finder:
    """Finds the module that counts, and registers the formulas once it has been imported."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(_Finder)
            while _formulas:
                packet, formula = _formulas.pop()
                module.register_flop_formula(packet, get_raw=True)(formula)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder)
