"""Anchoring, explanations and the page of a training run, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import whole_number
from ._stream import Model, Prepare, evaluating, head_of, stream
from .anchoring import anchor, measure, predictions
from .anchors import Anchors, Figures
from .explanations import Explanation, explain_images
from .gallery import write_gallery
from .pictures import draw

if TYPE_CHECKING:
    from ..runs.opened import Opened, Samples

PAGE = "index.html"
SHOWN_REGIONS = 3  # of a query in segmentation
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Explained:
    """What `explain_run` made.

    Args:
        anchors: of the model.
        explanations: of the queries.
        trained: figures before the sub-centroids were refitted; None where they were not.
        files: that were written.
        model: the anchored model.
    """

    anchors: Anchors
    explanations: list[Explanation]
    trained: Figures | None
    files: list[Path]
    model: Model


def explain_run(
    run: Path | str | Opened,
    data: Path | str | None = None,
    *,
    out: Path | str | None = None,
    refit: bool = False,
    queries: int = 12,
    top: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    say: Say = lambda line: None,
) -> Explained:
    """Anchor the sub-centroids of a training run, measure what that costs and explain decisions of the test data.

    Writes ``anchors.safetensors`` and ``anchors.json`` (`Anchors.load`), ``index.html``, and ``wrong.png`` and ``right.png``
    where there are such decisions. The run itself stays as it is.

    Args:
        run: folder of a run or a checkpoint of it, as examples/train.py writes them; or what `open_run` made of one.
        data: its data, where the run needs a path.
        out: folder for the files; None: nothing is written.
        refit: fit the sub-centroids to the training data first (`SubCentroids.refit_`).
        queries: pictures of the test data to explain. In image classification as many wrong as right ones, as far as there are,
            drawn evenly over the classes; in segmentation half are those with the largest share of wrong pixels.
        top: classes of each explanation.
        seed: of the draw, and of what the refit draws.
        device: to compute on.
        say: told what is going on, a line at a time.
    """
    queries, top = whole_number("explain_run", "queries", queries, 0), whole_number("explain_run", "top", top)
    name = "run"
    if isinstance(run, (str, Path)):
        from ..runs.opened import open_run

        name = Path(run).resolve().name
        run = open_run(Path(run), None if data is None else Path(data), device=str(device))
    model, prepare = run.model, run.prepare
    trained = None
    if refit:
        say("measuring the trained classifier")
        trained = measure(model, run.test, prepare=prepare)
        say("refitting the sub-centroids to the training data")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.head.refit_(run.train, backbone=model.backbone, prepare=prepare)
    say(f"anchoring to {len(run.train)} training samples, measuring on {len(run.test)}")
    anchors = anchor(model, run.train, prepare=prepare, classes=run.classes, evaluate=run.test)
    say(f"explaining {min(queries, len(run.test))} queries")
    explanations = _queries(model, anchors, run.test, prepare, queries, top, seed) if queries else []
    files: list[Path] = []
    if out is not None:
        out = Path(out)
        files += anchors.save(out)
        files.append(write_gallery(out / PAGE, anchors, explanations, trained=trained, title=f"{name}: what it compares with"))
        for file, title, some in (
            ("wrong.png", "Wrong decisions", [one for one in explanations if one.right is False]),
            ("right.png", "Right decisions", [one for one in explanations if one.right]),
        ):
            if some:
                files.append(draw(out / file, some, anchors, f"{title}, and the nearest exemplars of the likeliest classes"))
            else:
                (out / file).unlink(missing_ok=True)  # of an earlier call
    return Explained(anchors, explanations, trained, files, model)


def _queries(
    model: Model, anchors: Anchors, data: Samples, prepare: Prepare, count: int, top: int, seed: int
) -> list[Explanation]:
    """Explanations of samples that are worth a look, each batch read when its turn comes."""
    op = "explain_run"
    head, segmentation = head_of(op, model)
    numbers, share, classes = [], [], []
    with evaluating(model):
        for batch in stream(op, model, data, prepare):
            right = predictions(head, batch.features(), batch.labels) == batch.labels
            for index, labels in enumerate(batch.labels):
                labelled = labels >= 0
                if labelled.any():
                    numbers.append(batch.first + index)
                    share.append(float(right[index][labelled].double().mean()))
                    classes.append(int(labels) if not segmentation else 0)
    chosen = set(_chosen(numbers, share, classes, count, seed, segmentation))
    found: list[Explanation] = []
    for batch in stream(op, model, data, prepare):
        for index in range(len(batch.images)):
            number = batch.first + index
            if number not in chosen:
                continue
            given = str(number) if batch.ids is None else batch.ids[index]
            found += explain_images(
                model, anchors, batch.images[index][None], prepare=prepare, labels=batch.labels[index][None], ids=[given],
                top=top, regions=SHOWN_REGIONS,
            )  # fmt: skip
    return found


def _chosen(
    numbers: Sequence[int], share: Sequence[float], classes: Sequence[int], count: int, seed: int, segmentation: bool
) -> Iterator[int]:
    """Numbers of the samples to explain."""
    order = np.random.default_rng(seed).permutation(len(numbers)).tolist()
    if segmentation:
        worst = sorted(order, key=lambda i: share[i])[: -(-count // 2)]
        rest = [i for i in order if i not in worst]
        return (numbers[i] for i in [*worst, *rest[: count - len(worst)]])
    wrong, right = (_spread([i for i in order if (share[i] == 1) == good], classes) for good in (False, True))
    of_wrong = max(min(len(wrong), count // 2), min(len(wrong), count - len(right)))
    return (numbers[i] for i in [*wrong[:of_wrong], *right[: count - of_wrong]])


def _spread(indices: Sequence[int], classes: Sequence[int]) -> list[int]:
    """Indices in an order in which the classes take turns."""
    seen: dict[int, int] = {}
    turn = {}
    for index in indices:
        turn[index] = seen.get(classes[index], 0)
        seen[classes[index]] = turn[index] + 1
    return sorted(indices, key=lambda index: turn[index])
