"""Command line of the demo: options, one training process after another, the table, the figures and the pictures."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ..nn import RECIPES, DNCHead
from . import pictures, report
from .explanations import explain
from .network import SmallBackbone
from .progress import make_progress
from .scenes import SceneConfig
from .training import HEADS, HeadName, Run, Settings, read_scenes, write_scenes
from .worker import TrainingFailedError, train_in_process

PLAIN_WIDTH = 100  # columns of what is printed where there is no terminal to ask
# Seconds instead of minutes: for tests, and to see that everything is in place.
QUICK = Settings(steps=16, batch=2, height=64, width=64, train_scenes=24, test_scenes=8, evaluations=2)


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    settings: Settings
    seeds: list[int]
    heads: list[HeadName]
    out: Path
    quick: bool


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit status: 0, 1 for a failure, 2 for wrong options, 130 when interrupted."""
    begun = time.perf_counter()
    options = parse(argv)
    settings = options.settings
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="dnc-demo-") as folder, make_progress(console, settings.steps) as progress:
            runs: list[Run] = []
            for seed in options.seeds:
                write_scenes(Path(folder), seed, settings)
                if seed == options.seeds[0]:
                    scenes = read_scenes(Path(folder))
                for head in options.heads:
                    runs.append(train_in_process(head, seed, Path(folder), settings, progress.begin(head, seed)))
        files = draw(runs, scenes, options)
        seconds = time.perf_counter() - begun
        files.append(report.write_metrics(options.out, runs, settings, quick=options.quick, seconds=seconds))
    except KeyboardInterrupt:
        print("dnc_kernels demo: interrupted, nothing was written", file=sys.stderr)
        return 130
    except (TrainingFailedError, OSError) as error:
        print(f"dnc_kernels demo: {error}", file=sys.stderr)
        return 1
    if options.quick:
        console.print("A quick run of a few steps shows that everything works. Its numbers mean nothing.")
    console.print(report.table(runs, settings))
    console.print(f"{seconds:.0f} s in all. Written: {', '.join(str(file) for file in files)}", soft_wrap=True, highlight=False)
    return 0


def draw(runs: list[Run], scenes: pictures.Scenes, options: Options) -> list[Path]:
    """Draw every picture that the runs allow; those of scenes and pixels show the first seed."""
    first = [run for run in runs if run.seed == options.seeds[0]]
    out, written = options.out, []
    written.append(pictures.predictions(out / "predictions.png", first, scenes))
    written.append(pictures.curves(out / "curves.png", runs))
    for run in first:
        if run.head == "dnc":
            explained = explain(run, scenes, options.settings)
            written.append(pictures.explanations(out / "explanations.png", explained, scenes, run))
            written.append(pictures.subcentroids(out / "subcentroids.png", explained, scenes))
    return written


def parse(argv: list[str] | None) -> Options:
    """Options of a command line; wrong ones end the program with status 2 and a line that says what is expected."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m dnc_kernels demo",
        description="Train a small network with a DNC head to segment handwritten digits on textured scenes, and the same "
        "network with an ordinary softmax head. Both have the same budget, seed, optimiser, schedule and data order.",
    )
    add = parser.add_argument
    add("--steps", type=int, help=f"training steps of each head (default {default.steps})")
    add("--batch", type=int, help=f"scenes per step (default {default.batch})")
    add("--seed", type=int, default=0, help="seed of weights, training scenes and data order (default 0)")
    add(
        "--seeds", type=int, default=1, metavar="N", help="train with N seeds, --seed and those after it, and show mean and std"
    )
    add("--size", metavar="HxW", help=f"size of the scenes in pixels (default {default.height}x{default.width})")
    add("--device", default="cpu", metavar="cpu|cuda", help="where to train (default cpu)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--recipe", default="default", help=f"recipe of the DNC head: {', '.join(RECIPES)} (default: {DNCHead.default_recipe})")
    add("--subcentroids", type=int, metavar="K", help=f"sub-centroids per class (default {default.subcentroids})")
    add("--heads", default=",".join(HEADS), help=f"heads to train, separated by commas (default {','.join(HEADS)})")
    add("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="where figures and pictures go (default demo-out)")
    add("--quick", action="store_true", help="a tiny run that takes seconds: shows that everything works, learns nothing")
    given = parser.parse_args(argv)
    base = QUICK if given.quick else default
    size = (base.height, base.width) if given.size is None else _size(parser, given.size)
    settings = Settings(
        **{
            **vars(base),
            "height": size[0],
            "width": size[1],
            "steps": base.steps if given.steps is None else given.steps,
            "batch": base.batch if given.batch is None else given.batch,
            "subcentroids": base.subcentroids if given.subcentroids is None else given.subcentroids,
            "recipe": given.recipe,
            "device": given.device,
            "threads": given.threads,
        }
    )
    heads = list(dict.fromkeys(given.heads.split(",")))
    if not set(heads) <= set(HEADS):
        parser.error(f"--heads must be {' or '.join(HEADS)}, or both with a comma between; got {given.heads!r}")
    if settings.recipe not in ("default", *RECIPES):
        parser.error(f"--recipe must be one of {', '.join(RECIPES)}; got {settings.recipe!r}")
    # Under ten steps the schedule would have no step to warm up in.
    for option, value, least in (
        ("--steps", settings.steps, 10),
        ("--batch", settings.batch, 1),
        ("--seed", given.seed, 0),
        ("--seeds", given.seeds, 1),
        ("--threads", 1 if settings.threads is None else settings.threads, 1),
        ("--subcentroids", settings.subcentroids, 1),
    ):
        if value < least:
            parser.error(f"{option} must be at least {least}; got {value}")
    if settings.subcentroids > 256:
        parser.error(f"--subcentroids must be at most 256; got {settings.subcentroids}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", settings.device):
        parser.error(f"--device must be cpu, cuda or cuda:N; got {settings.device!r}")
    if settings.device != "cpu":
        devices = torch.cuda.device_count()
        if (torch.device(settings.device).index or 0) >= devices:
            hint = "python -m dnc_kernels doctor says why" if devices == 0 else f"there are {devices}"
            parser.error(f"--device {settings.device}: torch finds no such GPU; {hint}")
    return Options(settings, list(range(given.seed, given.seed + given.seeds)), heads, given.out, given.quick)


def _size(parser: argparse.ArgumentParser, text: str) -> tuple[int, int]:
    """Height and width of ``HxW``."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        parser.error(f"--size must be HEIGHTxWIDTH in pixels, such as 128x128; got {text!r}")
    height, width = int(found[1]), int(found[2])
    stride = SmallBackbone.stride
    if height % stride or width % stride:
        parser.error(f"--size must be multiples of {stride}, the stride of the network; got {text}")
    try:
        SceneConfig(height, width)
    except ValueError:
        parser.error(f"--size must be at least 36x36, so that the largest digit fits; got {text}")
    return height, width
