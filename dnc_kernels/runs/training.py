"""The training loop: steps, the log, evaluations, checkpoints, and a stop at any step that loses nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from .checkpoint import CheckpointError, random_state, replacing, save, set_random_state
from .data import Batches, DataError, network_input
from torch import Tensor

from ..demo.training import class_iou
from ..integrations import DNCSegmenter

POWER = 0.9  # of the polynomial decay, as in the training recipes of DeepLab, UPerNet and SegFormer
WARM_UP = 0.1  # of all steps, a linear rise of the learning rate
Report = Callable[[int, float, float, "float | None"], None]


@dataclass
class Training:
    """Everything that changes while training, and what a checkpoint holds of it.

    Args:
        network: on its device.
        steps: of the whole training; the learning rate falls towards 0 at its end.
        learning_rate: the peak of the schedule.
        weight_decay: AdamW's, on matrices and convolutions only.
        run: options that identify the run (network, data, seed and the like); a checkpoint of another run is refused.
        out: folder of log and checkpoints.
    """

    network: DNCSegmenter
    steps: int
    learning_rate: float
    weight_decay: float
    run: dict[str, Any]
    out: Path

    def __post_init__(self) -> None:
        learnable = [p for p in self.network.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in learnable if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in learnable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step = 0
        self.saved_at = -1

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def log(self) -> Path:
        """The file of the log: one JSON object per line, for every step and every evaluation."""
        return self.out / "log.jsonl"

    def _rate(self, done: int) -> float:
        rise = min(1.0, (done + 1) / max(1, round(WARM_UP * self.steps)))
        return rise * max(0.0, 1 - done / self.steps) ** POWER

    def save(self) -> Path | None:
        """Write a checkpoint, unless this step has one."""
        if self.saved_at == self.step:
            return None
        path = save(self.out, self.step, {
            "run": self.run, "step": self.step, "model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "random": random_state(),
        })  # fmt: skip
        self.saved_at = self.step
        return path

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
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path}: expected the weights of this network; got {reason}; use the package versions it began with"
            ) from None
        self.step = self.saved_at = content["step"]
        set_random_state(content["random"])
        if self.log.exists():
            rows = [row for row in _rows(self.log) if row["step"] <= self.step]
            with replacing(self.log) as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def learn(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """One step on images [B,3,H,W] uint8 and labels [B,H,W]; its row for the log."""
        rate = float(self.schedule.get_last_lr()[0])
        result = self.network(network_input(images, self.device), labels.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        self.optimizer.step()
        self.schedule.step()
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
    """A function that gives the number of the first SIGINT or SIGTERM in the block, or 0. A second one has its usual effect."""
    received = 0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    training: Training,
    batches: Batches,
    evaluate_now: Callable[[], float],
    report: Report,
    *,
    evaluate_every: int,
    checkpoint_every: int,
    stop_at: int | None = None,
) -> int:
    """Train to the end, or to the step at which a signal came; return the signal's number, or 0.

    Whatever ends it (the last step, a signal, a file that cannot be read), there is a checkpoint of the last step.

    Args:
        training: what to train.
        batches: of its steps.
        evaluate_now: mIoU of the network as it is.
        report: called after every step: its number, cross-entropy, accuracy and, where it was measured, mIoU.
        evaluate_every: steps between evaluations; the last step always has one.
        checkpoint_every: steps between checkpoints.
        stop_at: a step to stop at as if interrupted.

    Raises:
        DataError: a file of the user's cannot be read or used.
    """
    last = training.steps if stop_at is None else min(stop_at, training.steps)
    training.network.train()
    with stop_requested() as stopped, training.log.open("a") as log:
        try:
            for images, labels in batches.steps(training.step + 1, last):
                row = training.learn(images, labels)
                log.write(json.dumps(row) + "\n")
                miou = None
                if training.step % evaluate_every == 0 or training.step == training.steps:
                    miou = evaluate_now()
                    log.write(json.dumps({"step": training.step, "miou": miou}) + "\n")
                log.flush()
                report(training.step, row["cross_entropy"], row["accuracy"], miou)
                if training.step % checkpoint_every == 0 or stopped():
                    training.save()
                if stopped():
                    return stopped()
        except DataError:
            training.save()
            raise
        training.save()
        return 0


@torch.no_grad()
def evaluate(network: DNCSegmenter, batches: Iterator[tuple[Tensor, Tensor]], classes: int, ignore_index: int) -> float:
    """Mean over the classes of intersection over union on images [B,3,H,W] uint8 and labels [B,H,W]."""
    device = next(network.parameters()).device
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    network.eval()
    try:
        for images, labels in batches:
            predicted = network.predict(network_input(images, device)).cpu()
            counted = labels != ignore_index
            confusion += (labels[counted] * classes + predicted[counted]).bincount(minlength=classes * classes)
    finally:
        network.train()
    return float(class_iou(confusion.view(classes, classes)).nanmean())
