"""Command line of `explain_run`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from .gallery import DEAD_WARNING
from .pictures import percent
from .run import Explained, explain_run

NAME = "dnc_kernels explain"


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit status: 0, 1 for a failure, 2 for wrong options, 130 when interrupted."""
    o = parse(argv)
    try:
        done = explain_run(
            o.checkpoint, o.data, out=o.out, refit=o.refit, queries=o.queries, top=o.top, seed=o.seed, device=o.device,
            say=lambda line: print(f"{NAME}: {line}", file=sys.stderr),
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dnc_kernels"):
            raise
        print(f'{NAME}: the run needs {error.name}: run `pip install "dnc_kernels[explain,demo,networks]"`', file=sys.stderr)
        return 1
    except (ValueError, TypeError, RuntimeError, OSError) as error:  # those of runs and data derive from these
        print(f"{NAME}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print("\n".join(summary(done)))
    return 0


def summary(done: Explained) -> list[str]:
    """What anchoring cost, what was dead, and the files, as lines."""
    anchors, before, after = done.anchors, done.anchors.before, done.anchors.after
    lines = []
    if before is not None and after is not None:
        first = "" if done.trained is None else f"{percent(done.trained.value)} as trained, "
        which = "refitted" if done.trained is not None else "before anchoring"
        change = 100 * (after.value - (before if done.trained is None else done.trained).value)
        lines.append(
            f"{before.name}: {first}{percent(before.value)} {which}, {percent(after.value)} with training samples as "
            f"sub-centroids ({change:+.1f} points{'' if done.trained is None else ' in all'})"
        )
    real = int((anchors.sample >= 0).sum())
    lines.append(f"sub-centroids: {real} of {anchors.sample.numel()} are training samples now")
    if anchors.dead >= DEAD_WARNING:
        fix = "" if done.trained is not None else "; --refit fits them to the data first"
        won = f"each won under {100 * anchors.dead_below:g}% of its class"
        lines.append(f"warning: {percent(anchors.dead)} of them were dead before, {won}{fix}")
    return [*lines, f"written: {', '.join(str(file) for file in done.files)}"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of a command line; wrong ones end the program with status 2 and a line that says what is expected."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}",
        description="Make every sub-centroid of a trained run a real training sample, measure what that costs, and show by "
        "which samples the network decides: anchors.safetensors, anchors.json, a page (index.html) and pictures.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="folder of a run, or a checkpoint in it")
    add("--data", type=Path, metavar="DIR", help="the data of the run, if it does not say where they are")
    add("--out", type=Path, default=Path("explain-out"), metavar="DIR", help="where the files go (default explain-out)")
    add("--refit", action="store_true", help="fit the sub-centroids to the training data first: where they are dead")
    add("--queries", type=int, default=12, metavar="N", help="pictures of the test data to explain (default 12)")
    add("--top", type=int, default=4, metavar="N", help="classes that each explanation shows (default 4)")
    add("--seed", type=int, default=0, help="of the draw of the queries, and of the refit (default 0)")
    add("--device", default="cpu", metavar="cpu|cuda", help="where to compute (default cpu)")
    o = parser.parse_args(argv)
    for option, value, least in (("--queries", o.queries, 0), ("--top", o.top, 1), ("--seed", o.seed, 0)):
        if value < least:
            parser.error(f"{option} must be at least {least}; got {value}")
    if not o.checkpoint.exists():
        parser.error(f"--checkpoint must be a folder of a run or a checkpoint; got {o.checkpoint}, which does not exist")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", o.device):
        parser.error(f"--device must be cpu, cuda or cuda:N; got {o.device!r}")
    if o.device != "cpu" and (torch.device(o.device).index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {o.device}: torch finds no such GPU; python -m dnc_kernels doctor says why")
    return o
