"""What a build is made from: the files, their SHA-256 and the commit.

cmake/source.cmake finds the same for `_C.source` and `_C.commit`. Nothing here imports torch or the extension.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

#: The folder above the package: a checkout, or site-packages.
ROOT = Path(__file__).resolve().parents[1]
_WHERE = ("CMakeLists.txt", "cmake", "csrc", ":!csrc/tests")


def files(root: Path = ROOT) -> list[Path]:
    """What decides the binary: CMakeLists.txt, cmake/ and csrc/ without its tests, in order. None: no checkout."""
    patterns = ("CMakeLists.txt", "cmake/**/*.cmake", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.h")
    found = {path.relative_to(root).as_posix(): path for pattern in patterns for path in root.glob(pattern)}
    return [found[name] for name in sorted(found) if not name.startswith("csrc/tests/")] if "CMakeLists.txt" in found else []


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of files, one after another, whose lines end as on Linux."""
    return hashlib.sha256(b"".join(path.read_bytes().replace(b"\r\n", b"\n") for path in paths)).hexdigest()


def source(root: Path = ROOT) -> str | None:
    """What `_C.source` is after a build of this checkout; None where there is no checkout."""
    paths = files(root)
    return digest(paths) if paths else None


def commit(root: Path = ROOT) -> str:
    """The last commit that changed what `files` names, with + where the tree has changed since.

    Without a repository of its own: what DNC_COMMIT says, or unknown.
    """
    if not (root / ".git").exists():
        return os.environ.get("DNC_COMMIT") or "unknown"

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *_WHERE]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        found = git("log", "-1", "--format=%h", "--abbrev=12")
        return found + "+" * bool(found and git("status", "--porcelain")) or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
