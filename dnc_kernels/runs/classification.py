"""A classification run: the network and head, trained by a recipe and measured; its figures and their table."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .._json import dumps
from ..demo.training import PeakMemory
from ..integrations import DNCImageClassifier
from ..nn import Monitor
from .checkpoint import replacing
from .data import network_input
from .images import Dataset, Images
from .networks import make_classifier
from .schedules import Learning
from .training import Report, Training, of_all_ranks, rank, ranks, resume_or_begin, train
from .views import ImageBatches, InOrder, Views

BINS = 15  # of the calibration error, as in Guo et al., 2017
EVALUATION_BATCH = 128
MONITOR_EVERY = 10  # updates between what TensorBoard shows of the sub-centroids


class NetworkError(ValueError):
    """There is no network of that name, its package is missing, or it does not take these options."""


@dataclass(frozen=True)
class Measures:
    """On the images to measure on."""

    test_accuracy: float
    test_ece: float
    """Expected calibration error."""


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over bins of equal width, by their share.

    Args:
        confidence: [N], of the predictions, in [0,1]; a bin takes its upper edge.
        correct: [N], whether they were right.
        bins: number of bins.
    """
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, confidence.double() - correct.double())
    return float(gap.abs().sum() / max(1, len(confidence)))


@torch.no_grad()
def measure(model: Any, images: Images, views: Views, amp: torch.dtype | None = None) -> Measures:
    """Accuracy and calibration error of a model on images without augmentation. Of several ranks each does a part."""
    device = next(model.parameters()).device
    confidences, corrects = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    before = model.training
    model.eval()
    try:
        for pictures, labels, _ in InOrder(images, views, EVALUATION_BATCH, rank(), ranks()):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(network_input(pictures, device))
            confidence, predicted = logits.float().softmax(1).max(1)
            confidences.append(confidence.cpu())
            corrects.append(predicted.cpu() == labels)
    finally:
        model.train(before)
    parts = of_all_ranks((torch.cat(confidences), torch.cat(corrects)))
    confidence, correct = (torch.cat(each) for each in zip(*parts, strict=True))
    return Measures(float(correct.double().mean()), calibration_error(confidence, correct))


@dataclass(frozen=True)
class Result:
    """The figures of a run, as metrics.json has them."""

    head: str
    accuracy: float
    ece: float | None
    """None where it is NaN: of a network that gives NaN."""
    learnable: int
    """Numbers that the optimizer moves, in the whole network."""
    learnable_head: int
    moved: int
    """Numbers that training moves without a gradient: the sub-centroids."""
    step_ms: float | None
    """Median time of a step of the last process, without reading its batch; None: it made none."""
    peak_mb: float | None
    """Peak memory of training up to the first evaluation, in 10^6 bytes (`demo.training.PeakMemory`); None: not known."""
    steps: int
    batch: int
    ranks: int
    device: str
    torch: str


@dataclass
class Evaluation:
    """What `runs.training.train` calls to measure a run; it remembers the last measures, and the peak memory before them."""

    training: Training
    images: Images
    views: Views
    memory: PeakMemory | None
    last: Measures | None = None
    peak_mb: float | None = None

    def __call__(self) -> dict[str, float]:
        """Measures by their name in the log."""
        if self.last is None and self.memory is not None:
            self.peak_mb = self.memory.megabytes()
        self.last = measure(self.training.evaluated, self.images, self.views, self.training.amp)
        return asdict(self.last)

    def result(self, head: str, batch: int) -> Result:
        """The figures of the run as it stands; measured now if no step has been measured in this process."""
        if self.last is None:
            self.last = measure(self.training.evaluated, self.images, self.views, self.training.amp)
        network: Any = self.training.network
        learnable, in_head = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (network, network.head))
        seconds = self.training.seconds
        return Result(
            head=head, accuracy=self.last.test_accuracy,
            ece=None if math.isnan(self.last.test_ece) else self.last.test_ece, learnable=learnable, learnable_head=in_head,
            moved=network.head.prototypes.numel() if isinstance(network, DNCImageClassifier) else 0,
            step_ms=1000 * statistics.median(seconds) if seconds else None, peak_mb=self.peak_mb,
            steps=self.training.step, batch=batch, ranks=ranks(), device=str(self.training.device), torch=torch.__version__,
        )  # fmt: skip


def print_results(console: Console, results: list[Result]) -> None:
    """The table of the figures of one run or of both."""
    rows: list[tuple[str, Callable[[Result], str]]] = [
        ("accuracy", lambda r: f"{r.accuracy:.4f}"),
        (f"ECE ({BINS} bins)", lambda r: "-" if r.ece is None else f"{r.ece:.4f}"),
        ("learnable parameters", lambda r: f"{r.learnable:,}"),
        ("  of these in the head", lambda r: f"{r.learnable_head:,}"),
        ("moved without gradient", lambda r: f"{r.moved:,}"),
        ("step", lambda r: "-" if r.step_ms is None else f"{r.step_ms:.1f} ms"),
        ("peak memory", lambda r: "-" if r.peak_mb is None else f"{r.peak_mb:,.0f} MB"),
    ]
    table = Table(title=None)
    table.add_column("")
    for result in results:
        table.add_column({"dnc": "DNC head", "softmax": "softmax head"}[result.head], justify="right")
    for name, shown in rows:
        table.add_row(name, *map(shown, results))
    console.print(table)


@dataclass(frozen=True)
class Plan:
    """What a run does, whichever head it has.

    Args:
        dataset: to train and measure on.
        about: what `open_run` needs, and `make_classifier`; without the head.
        run: options that a resumed run must have in common with its checkpoint.
        learning: optimizer and learning rate.
        steps: in all.
        batch: images per step, of all ranks together.
        seed: of weights, order and augmentation.
        evaluate_every: steps between evaluations.
        checkpoint_every: steps between checkpoints.
        stop_after: steps after which to stop as if interrupted; None: never.
        device: of the network.
        amp: see `Training`.
        ema: see `Training`.
        compile: backend of torch.compile; None: not compiled.
        workers: processes that read ahead.
        monitor: write curves for TensorBoard too.
    """

    dataset: Dataset
    about: dict[str, Any]
    run: dict[str, Any]
    learning: Learning
    steps: int
    batch: int
    seed: int
    evaluate_every: int
    checkpoint_every: int
    stop_after: int | None
    device: torch.device
    amp: torch.dtype | None
    ema: float | None
    compile: str | None
    workers: int
    monitor: bool

    @property
    def views(self) -> Views:
        """How the images are seen."""
        return Views(self.about["size"], self.about["augment"])


@dataclass(frozen=True)
class Done:
    """How a run ended."""

    step: int
    signalled: int
    """Number of the signal that stopped it, or 0."""
    result: Result | None
    """None if it stopped before its end."""
    model: Any


def seed_everything(seed: int) -> None:
    """Seed the generators that networks draw from."""
    for one in (torch.manual_seed, np.random.seed, random.seed):
        one(seed)


def run_head(
    plan: Plan,
    head: str,
    out: Path,
    begin: Callable[[int], Report],
    say: Callable[[str], None],
    *,
    resume: str | None,
    alone: bool,
) -> Done:
    """Train and measure the network with one of the heads.

    Equal plans give both heads the same backbone, data, order and dropout.

    Args:
        plan: everything else.
        head: ``dnc`` or ``softmax``.
        out: folder of log.jsonl, checkpoints and metrics.json.
        begin: given the steps already done, the function to call after every step.
        say: shows a line.
        resume: see `resume_or_begin`.
        alone: no other run came before in this process, so that on a CPU peak memory is of this one.

    Raises:
        DataError, CheckpointError: files cannot be used.
        NetworkError: the network cannot be built.
    """
    about = {**plan.about, "head": head}
    seed_everything(plan.seed)
    try:
        network = make_classifier(about).to(plan.device)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        raise NetworkError(str(error)) from None
    seed_everything(plan.seed + 1 + rank())  # heads draw different numbers, and ranks need their own dropout
    run = {**plan.run, "--head": head}
    training = Training(network, plan.steps, plan.learning, run, out, about, plan.amp, plan.ema)
    resumed = resume_or_begin(training, resume)
    if resumed is not None:
        say(f"Resumed {resumed} after step {training.step}")
    metrics = out / "metrics.json"
    if training.step == plan.steps and metrics.exists():
        return Done(training.step, 0, Result(**json.loads(metrics.read_text())), training.evaluated)
    if plan.compile is not None:
        network.compile(backend=plan.compile)
    evaluation = Evaluation(training, plan.dataset.test, plan.views, _peak(plan.device, alone))
    batches = ImageBatches(plan.dataset.train, plan.views, plan.batch, plan.seed, plan.workers, rank(), ranks())
    with _curves(out if plan.monitor and rank() == 0 else None, network, training.step) as note:
        signalled = train(
            training, batches, evaluation, begin(training.step),
            evaluate_every=plan.evaluate_every, checkpoint_every=plan.checkpoint_every,
            stop_at=None if plan.stop_after is None else training.step + plan.stop_after, note=note,
        )  # fmt: skip
    if training.step < plan.steps:
        return Done(training.step, signalled, None, training.evaluated)
    result = evaluation.result(head, plan.batch)
    if rank() == 0:
        with replacing(metrics) as file:
            file.write((dumps(asdict(result), indent=2) + "\n").encode())
    return Done(training.step, 0, result, training.evaluated)


def _peak(device: torch.device, alone: bool) -> PeakMemory | None:
    if device.type == "cpu":
        if not alone:
            return None  # what the first run has left to the allocator would count as free
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far, of reading the data, is forgotten
    return PeakMemory(device)


@contextmanager
def _curves(out: Path | None, network: Any, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes rows of the log as curves of TensorBoard, beside those of `nn.Monitor`; without a folder it does
    nothing.
    """
    if out is None:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with ExitStack() as open_until_then:
        writer = open_until_then.enter_context(SummaryWriter(out / "tensorboard", purge_step=done + 1))
        if isinstance(network, DNCImageClassifier):
            open_until_then.enter_context(Monitor(network.head, writer=writer, every=MONITOR_EVERY))

        def note(row: dict[str, Any]) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])

        yield note


def verdict_on_subcentroids(model: DNCImageClassifier, plan: Plan) -> str:
    """A line on how the training images use the sub-centroids: dead ones, usage, what k-means would do better.

    Of several ranks each reads a part; a collective call.
    """
    device = next(model.parameters()).device
    batches = InOrder(plan.dataset.train, plan.views, EVALUATION_BATCH, rank(), ranks())
    return model.head.diagnose(batches, backbone=model.backbone, prepare=partial(network_input, device=device)).verdict
