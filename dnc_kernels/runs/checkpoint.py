"""Checkpoints that a crash cannot damage: written to another file, flushed, then renamed. The one before is kept."""

from __future__ import annotations

import os
import pickle
import random
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{8})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or belongs to another run."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well. A reader finds the old or the new file, always whole.

    A crash leaves a file ending in ``.partial``, which the next `save` removes.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)  # noqa: PTH105  the one call known to be atomic
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name, too, has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(folder: Path, step: int, content: dict[str, Any]) -> Path:
    """Write the checkpoint of a step into `folder`, then drop all but the last `KEPT`."""
    for left in folder.glob(".checkpoint-*.partial"):
        left.unlink()
    path = folder / f"checkpoint-{step:08d}.pt"
    with replacing(path) as file:
        torch.save(content, file)
    for old in found(folder)[:-KEPT]:
        old.unlink()
    return path


def found(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))


def load(path: Path) -> dict[str, Any]:
    """Content of a checkpoint. Loading reads tensors and runs no code from the file.

    Raises:
        CheckpointError: it is damaged; the message names the one before it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load would not see a changed bit: it skips the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if (
            not isinstance(content, dict)
            or not {"run", "about", "step", "model", "optimizer", "schedule", "random"} <= content.keys()
        ):
            raise zipfile.BadZipFile("it is another kind of file")
        return content
    except (OSError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        others = [other for other in found(path.parent) if other != path]
        fix = f"go on from the one before with --resume {others[-1]}" if others else "start again with another --out"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: expected a checkpoint of this script, whole; got {reason}; {fix}") from None


def random_state() -> dict[str, Any]:
    """State of every random generator that a network may draw from, in types that `weights_only` loads."""
    version, words, gauss = random.getstate()
    _, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned; CUDA's generators only where there are as many devices as then."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
