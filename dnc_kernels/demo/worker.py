"""A training run in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from .training import HeadName, Report, Run, Settings, read_scenes, train


class TrainingFailedError(RuntimeError):
    """A training process raised or ended early."""


def train_in_process(head: HeadName, seed: int, folder: Path, settings: Settings, report: Report) -> Run:
    """`train` in a fresh process, on the scenes that `write_scenes` wrote to `folder`.

    Raises:
        TrainingFailedError: with the traceback, or with the exit status of a process that was killed.
    """
    # spawn: a forked process would begin with this one's memory, and CUDA does not survive a fork
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, head, seed, folder, settings), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            kind, content = receiver.recv()
            if kind == "step":
                report(*content)
            elif kind == "run":
                return content
            else:
                raise TrainingFailedError(f"training the {head} head failed\n{content}")
    except EOFError:
        process.join()
        raise TrainingFailedError(
            f"the process that trained the {head} head ended with status {process.exitcode}"
            + (": killed, most likely for memory; lower --batch or --size" if process.exitcode == -signal.SIGKILL else "")
        ) from None
    finally:
        receiver.close()
        if process.is_alive():
            process.join(timeout=5)  # after its last message it has nothing to do but end
        if process.is_alive():
            process.terminate()
            process.join()


def _work(sender: Connection, head: HeadName, seed: int, folder: Path, settings: Settings) -> None:
    """Train, sending ("step", arguments of a Report), then ("run", Run), or ("error", traceback)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches both processes; the parent's one line is enough
    report: Callable[..., None] = lambda *step: sender.send(("step", step))  # noqa: E731
    try:
        sender.send(("run", train(head, seed, read_scenes(folder), settings, report)))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone; nobody is left to tell
    except Exception:
        sender.send(("error", traceback.format_exc()))
