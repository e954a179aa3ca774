"""Results as JSON lines that survive whatever ends the process: one system call a line, at the end of the file.

And the commit that they name. Nothing here imports torch or the package, which a fault on a GPU could break.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import ROOT

Line = dict[str, Any]
#: What a run on a GPU writes beside the source: it makes no other source.
_EVIDENCE = ("dnc_kernels/proofs.json", "dnc_kernels/dispatch", "dnc_kernels/ops/*/configs/*", "benchmarks/results")


def append(path: Path, line: Line) -> bool:
    """Add a line; False where it could not be written: it is printed then, since a full disk must neither lose nor end a run.

    Several processes may append to one file. A line starts anew where another process was cut off within its own.
    """
    text = json.dumps(line)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            data = ("\n" * torn + text + "\n").encode()
            if os.write(file, data) != len(data):
                raise OSError("the line was cut off")
        finally:
            os.close(file)
    except OSError as error:
        with suppress(OSError):
            print(f"could not be written ({error}): {text}", file=sys.stderr, flush=True)
        return False
    return True


def read(path: Path) -> Iterator[Line]:
    """The whole lines of a file, in order; a line that was cut off is passed over. No file: no lines."""
    if not path.exists():
        return
    for text in path.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict):
                yield line


def commit() -> str:
    """What DNC_COMMIT says, for a copy whose history is another; else of the checkout, -dirty where its source has changed."""
    if named := os.environ.get("DNC_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if (ROOT / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):
            changed = git("status", "--porcelain", "-uno", "--", ".", *(f":!{path}" for path in _EVIDENCE))
            return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    return "unknown"
