"""``python -m tests.fuzz``: thousands of random calls of the public API."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does


def main() -> int:
    """Exit status: 0 where nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another gives other calls (%(default)s)")
    parser.add_argument("--op", help="one op or layer alone")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so many (%(default)s)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read once, at the import of Triton
    from . import runner

    if options.child:
        runner.child(json.loads((options.child / "options").read_text()))
        return 0
    if options.op and options.op not in runner.targets():
        parser.error(f"--op must be one of {', '.join(runner.targets())}")
    with tempfile.TemporaryDirectory() as folder:
        report = runner.supervise(options.calls, options.seed, options.op, options.seconds, Path(folder))
    print(report)
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
