"""The demo: a network learns to segment handwritten digits, once with a DNC head and once with a softmax head."""

from __future__ import annotations

from importlib.util import find_spec

for _name in ("sklearn", "matplotlib", "rich", "scipy", "safetensors", "PIL", "jinja2"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(f'the demo needs {_name}: run `pip install "dnc_kernels[demo]"`', name=_name)


def main(argv: list[str] | None = None) -> int:
    """Run the demo with command-line options; return the exit status."""
    from .cli import main as run  # rich and matplotlib stay out of the training processes, which import this package too

    return run(argv)


__all__ = ["main"]
