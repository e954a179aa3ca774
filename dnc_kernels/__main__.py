"""``python -m dnc_kernels doctor|demo|explain``."""

from __future__ import annotations

import sys

USAGE = """usage: python -m dnc_kernels COMMAND [options]

  doctor   what works here, what does not and why, and what to do; exit status 1 if something is wrong
  demo     train a network with a DNC head on scenes of handwritten digits (needs the extra: pip install "dnc_kernels[demo]")
  explain  make the sub-centroids of a trained run real training samples, and show by which of them it decides
           (needs the extra: pip install "dnc_kernels[explain]")

`python -m dnc_kernels COMMAND --help` lists a command's options."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "doctor":
        from .doctor import main as doctor

        return doctor(rest)
    if command in ("demo", "explain"):
        try:
            if command == "demo":
                from .demo import main as run
            else:
                from .explain.cli import main as run
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.startswith("dnc_kernels"):
                raise
            what = "the demo" if command == "demo" else "explain"
            print(f'{what} needs {error.name}: run `pip install "dnc_kernels[{command}]"`', file=sys.stderr)
            return 1
        return run(rest) or 0
    asked_for_help = command in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked_for_help else sys.stderr)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main())
