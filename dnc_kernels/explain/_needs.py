"""Says which extra is missing, before another module's import fails without a hint."""

from __future__ import annotations

from importlib.util import find_spec

for _name in ("scipy", "safetensors", "matplotlib", "PIL", "jinja2"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(f'dnc_kernels.explain needs {_name}: run `pip install "dnc_kernels[explain]"`', name=_name)
