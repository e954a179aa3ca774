"""The training loop: steps, the log, evaluations, checkpoints, and a stop at any step that loses nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .._json import dumps
from ..demo.training import class_iou
from .checkpoint import CheckpointError, found, load, random_state, replacing, save, set_random_state
from .data import DataError, network_input
from .schedules import Learning

Report = Callable[[int, float, float, "float | None"], None]


class StepBatches(Protocol):
    """Batches that follow from the number of their step."""

    def steps(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B,3,H,W] uint8 and labels of steps first..last, counted from 1."""
        ...


def rank() -> int:
    """Of this process in data parallel training; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did and they have not met yet; gives this one's device: of several GPUs
    each takes its own.
    """
    if dist.is_initialized() or "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def of_all_ranks(value: Any) -> list[Any]:
    """What every rank has, in their order; a collective call."""
    if ranks() == 1:
        return [value]
    gathered: list[Any] = [None] * ranks()
    dist.all_gather_object(gathered, value)
    return gathered


@dataclass
class Training:
    """Everything that changes while training, and what a checkpoint holds of it.

    Args:
        network: on its device; called with images and labels it gives a `DNCLoss`.
        steps: of the whole training.
        learning: optimizer and learning rate.
        run: options that identify the run (network, data, seed and the like); a checkpoint of another run is refused.
        out: folder of log and checkpoints.
        about: what it takes to build network and data again; `open_run` reads it. Written to the checkpoint, not compared.
        amp: dtype that most of the forward pass runs in; None: that of the weights.
        ema: share of the old average that a step keeps in a moving average of the weights, which then is what is evaluated;
            None: no average.
    """

    network: nn.Module
    steps: int
    learning: Learning
    run: dict[str, Any]
    out: Path
    about: dict[str, Any]
    amp: torch.dtype | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        self.optimizer = self.learning.optimizer_of(self.network)
        self.schedule = self.learning.schedule_of(self.optimizer, self.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.average: AveragedModel | None = None
        if self.ema is not None:
            average = get_ema_multi_avg_fn(self.ema)
            self.average = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.called: nn.Module = self.network
        if ranks() > 1:
            self.called = DistributedDataParallel(self.network)
        self.step = 0
        self.saved_at = -1
        self.seconds: list[float] = []
        """Of every step of this process."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def evaluated(self) -> Any:
        """The network to measure: the moving average if there is one."""
        return self.network if self.average is None else self.average.module

    @property
    def log(self) -> Path:
        """The file of the log: one JSON object per line, for every step and every evaluation; a NaN is null there."""
        return self.out / "log.jsonl"

    def save(self) -> None:
        """Write a checkpoint, unless this step has one. A collective call."""
        if self.saved_at == self.step:
            return
        states = of_all_ranks(random_state())
        if rank() == 0:
            content = {
                "run": self.run, "about": self.about, "step": self.step, "model": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "random": states,
            }  # fmt: skip
            if self.average is not None:
                content["average"] = self.average.module.state_dict()
            if self.scaler.is_enabled():
                content["scaler"] = self.scaler.state_dict()
            save(self.out, self.step, content)
        self.saved_at = self.step

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Go on where a checkpoint was written, and drop the log's rows of later steps.

        Raises:
            CheckpointError: it is of another run.
        """
        for name, now in self.run.items():
            then = content["run"].get(name)
            if then != now:
                raise CheckpointError(f"{path}: expected a run with {name} {now}; got {then}; use the options it began with")
        try:
            self.network.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            if self.average is not None:
                for name, value in self.average.module.state_dict().items():
                    value.copy_(content["average"][name])  # loading would make averaged sub-centroids unit length again
                self.average.n_averaged.fill_(content["step"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(content["scaler"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path}: expected the weights of this network; got {reason}; use the package versions it began with"
            ) from None
        self.step = self.saved_at = content["step"]
        set_random_state(content["random"][rank()])
        if rank() == 0 and self.log.exists():
            rows = [row for row in _rows(self.log) if row["step"] <= self.step]
            with replacing(self.log) as file:
                file.write("".join(dumps(row) + "\n" for row in rows).encode())

    def learn(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """One step on images [B,3,H,W] uint8 and their labels; its row for the log, of this rank's part of the batch."""
        rate = float(self.schedule.get_last_lr()[0])
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            result = self.called(network_input(images, self.device), labels.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(result.loss).backward()
        if self.learning.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.learning.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.step += 1
        values = {name: float(value.detach()) for name, value in result._asdict().items()}
        return {"step": self.step, **values, "learning_rate": rate}


def _rows(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return  # a crash while writing the last line


@contextmanager
def stop_requested() -> Iterator[Callable[[], int]]:
    """A function that gives the number of the first SIGINT or SIGTERM in the block, or 0. A second one has its usual effect.

    Of several ranks all have to ask together, and all get the same answer.
    """
    received = 0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        signal.signal(number, before[signal.Signals(number)])

    def asked() -> int:
        if ranks() == 1:
            return received
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        anywhere = torch.tensor(received, device=where)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return int(anywhere)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_or_begin(training: Training, resume: str | None) -> Path | None:
    """Go on from a checkpoint if asked to, and return it; refuse to overwrite a run if not.

    Args:
        training: not begun.
        resume: a checkpoint; empty: the last one in the folder of the run; None: begin.

    Raises:
        CheckpointError: there is nothing to resume, or a run that would be overwritten.
    """
    out = training.out
    out.mkdir(parents=True, exist_ok=True)
    there = found(out)
    if resume is None:
        if there:
            raise CheckpointError(
                f"{out}: expected a folder without a run; got {there[-1].name}; add --resume to go on with it, or choose "
                "another --out"
            )
        if rank() == 0:
            training.log.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        return None
    if not there and resume == "":
        raise CheckpointError(f"{out}: expected a checkpoint to resume; got none; leave --resume out to begin")
    path = there[-1] if resume == "" else Path(resume)
    training.restore(load(path), path)
    return path


def train(
    training: Training,
    batches: StepBatches,
    evaluate_now: Callable[[], dict[str, float]],
    report: Report,
    *,
    evaluate_every: int,
    checkpoint_every: int,
    stop_at: int | None = None,
    note: Callable[[dict[str, Any]], None] = lambda row: None,
) -> int:
    """Train to the end, or to the step at which a signal came; return the signal's number, or 0.

    Whatever ends it (the last step, a signal, a file that cannot be read), there is a checkpoint of the last step.

    Args:
        training: what to train.
        batches: of its steps.
        evaluate_now: measures of the network as it is, the most telling one first.
        report: called after every step: its number, cross-entropy, accuracy and, where it was measured, that first measure.
        evaluate_every: steps between evaluations; the last step always has one.
        checkpoint_every: steps between checkpoints.
        stop_at: a step to stop at as if interrupted.
        note: called with every row of the log.

    Raises:
        DataError: a file of the user's cannot be read or used.
    """
    last = training.steps if stop_at is None else min(stop_at, training.steps)
    training.network.train()
    target = training.log if rank() == 0 else Path(os.devnull)
    with stop_requested() as stopped, target.open("a") as log:

        def write(row: dict[str, Any]) -> None:
            log.write(dumps(row) + "\n")
            note(row)

        try:
            for images, labels in batches.steps(training.step + 1, last):
                begun = time.perf_counter()
                row = training.learn(images, labels)
                training.seconds.append(time.perf_counter() - begun)
                write(row)
                measured = None
                if training.step % evaluate_every == 0 or training.step == training.steps:
                    measures = evaluate_now()
                    write({"step": training.step, **measures})
                    measured = next(iter(measures.values()))
                log.flush()
                report(training.step, row["cross_entropy"], row["accuracy"], measured)
                signalled = stopped()
                if training.step % checkpoint_every == 0 or signalled:
                    training.save()
                if signalled:
                    return signalled
        except DataError:
            if ranks() == 1:  # the others are at another step, and would be waited for
                training.save()
            raise
        training.save()
        return 0


@torch.no_grad()
def evaluate(network: Any, batches: Iterator[tuple[Tensor, Tensor]], classes: int, ignore_index: int) -> float:
    """Mean over the classes of intersection over union on images [B,3,H,W] uint8 and labels [B,H,W]."""
    device = next(network.parameters()).device
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    before = network.training
    network.eval()
    try:
        for images, labels in batches:
            predicted = network.predict(network_input(images, device)).cpu()
            counted = labels != ignore_index
            confusion += (labels[counted] * classes + predicted[counted]).bincount(minlength=classes * classes)
    finally:
        network.train(before)
    return float(class_iou(confusion.view(classes, classes)).nanmean())
