"""Train an image classifier with a DNC head, with a softmax head, or with both side by side, by a named recipe."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from dnc_kernels.demo.progress import make_progress
from dnc_kernels.demo.training import HeadName
from dnc_kernels.nn import RECIPES
from dnc_kernels.runs.checkpoint import CheckpointError, found
from dnc_kernels.runs.classification import Done, NetworkError, Plan, print_results, run_head, verdict_on_subcentroids
from dnc_kernels.runs.data import DataError
from dnc_kernels.runs.images import DATASETS, load_dataset
from dnc_kernels.runs.networks import CLASSIFIER_NAMES
from dnc_kernels.runs.schedules import OPTIMIZERS, SCHEDULES, TRAINING_RECIPES, Learning
from dnc_kernels.runs.training import process_group, rank, ranks
from dnc_kernels.runs.views import AUGMENTS

HEADS: dict[str, list[HeadName]] = {"dnc": ["dnc"], "softmax": ["softmax"], "both": ["dnc", "softmax"]}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
EPILOG = f"""recipes:
{chr(10).join(f"  {name:18} {recipe.about}" for name, recipe in TRAINING_RECIPES.items())}

examples:
  classify.py                                          digits, half a minute on two cores
  classify.py --recipe fashion-14 --head both --out run
  classify.py --recipe fashion-14 --head both --out run --resume
  classify.py --data photos --epochs 20                photos/train/CLASS/*.jpg and photos/val/CLASS/*.jpg
  torchrun --nproc-per-node 8 examples/classify.py --recipe imagenet-resnet50 --data imagenet --device cuda --amp bf16

Needs the extras demo and networks. Nothing is downloaded: weights begin at random. More in docs/networks.md."""


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit status: 0, 1 for a failure, 2 for wrong options, 128 + N when signal N stopped it (Ctrl-C: 130)."""
    options = parse(argv)
    try:
        with process_group(torch.device(options.device)) as device:
            return run(options, device)
    except NetworkError as error:
        print(f"classify.py: {error}", file=sys.stderr)
        return 2
    except (DataError, CheckpointError, OSError) as error:
        print(f"classify.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("classify.py: interrupted", file=sys.stderr)
        return 130


def run(o: argparse.Namespace, device: torch.device) -> int:
    """Train as the options say."""
    console = Console(quiet=rank() > 0, width=None if sys.stdout.isatty() else 100)
    if o.threads:
        torch.set_num_threads(o.threads)
    plan = plan_of(o, device)
    for note in plan.dataset.notes:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(
        f"{o.network}, recipe {o.recipe}: {plan.steps} steps of {o.batch} on {len(plan.dataset.train)} images of "
        f"{len(plan.about['classes'])} classes, measured on {len(plan.dataset.test)}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    done: dict[str, Done] = {}
    heads = HEADS[o.head]
    with make_progress(console, plan.steps, "accuracy") as progress:
        for head in heads:
            out = o.out / head if len(heads) > 1 else o.out
            # of two runs the second may not have begun
            resume = None if len(heads) > 1 and done and not found(out) else o.resume
            done[head] = run_head(
                plan, head, out, partial(progress.begin, head, o.seed),
                lambda line: console.print(line, highlight=False, soft_wrap=True), resume=resume, alone=not done,
            )  # fmt: skip
            if done[head].result is None:
                break
    last = list(done.values())[-1]
    if last.result is None:
        console.print(f"Stopped after step {last.step}. To go on: the same command with --resume", highlight=False)
        return 128 + last.signalled if last.signalled else 0
    print_results(console, [d.result for d in done.values() if d.result is not None])
    if "dnc" in done:
        console.print(verdict_on_subcentroids(done["dnc"].model, plan), highlight=False, soft_wrap=True)
    console.print(f"Written: {o.out}", highlight=False, soft_wrap=True)
    return 0


def plan_of(o: argparse.Namespace, device: torch.device) -> Plan:
    """What both heads have in common."""
    dataset = load_dataset(o.dataset, o.data, o.size)
    if o.train_images is not None:
        dataset = dataset.first_of_draw(o.train_images)
    steps = math.ceil(o.epochs * len(dataset.train) / o.batch)
    learning = Learning(**{field.name: getattr(o, field.name) for field in fields(Learning)})
    shared = ("dataset", "network", "size", "augment", "train_images", "subcentroids", "memory", "head_recipe", "momentum")
    about = {
        "task": "classification", **{name: getattr(o, name) for name in shared}, "classes": dataset.train.classes,
        "data": o.data and str(o.data.resolve()), "files": dataset.fingerprint,
    }  # fmt: skip
    same = (*shared, *(field.name for field in fields(Learning)), "epochs", "batch", "seed", "amp", "ema")
    run = {"--lr" if name == "learning_rate" else f"--{name.replace('_', '-')}": getattr(o, name) for name in same}
    run |= {"--milestones": list(o.milestones), "number of processes": ranks(), "image files": dataset.fingerprint}
    epoch = max(1, round(len(dataset.train) / o.batch))
    return Plan(
        dataset=dataset, about=about, run=run, learning=learning, steps=steps, batch=o.batch, seed=o.seed,
        evaluate_every=o.evaluate_every or epoch, checkpoint_every=o.checkpoint_every or epoch, stop_after=o.stop_after,
        device=device, amp=AMP.get(o.amp), ema=o.ema, compile=o.compile, workers=o.workers, monitor=o.monitor,
    )  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of a command line; wrong ones end the program with status 2 and a line that says what is expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG)
    group = parser.add_argument_group("recipe, and options that override it").add_argument
    group("--recipe", choices=TRAINING_RECIPES, metavar="NAME", help="see below (default digits; with --data folder-resnet18)")
    group("--dataset", choices=DATASETS, metavar="NAME", help=", ".join(DATASETS))
    group(
        "--data", type=Path, metavar="DIR", help="the files of the dataset: *-ubyte.gz, cifar-10-batches-py, or train/ and val/"
    )
    group("--train-images", type=int, metavar="N", help="train on N images, drawn by seed 1234; 0: on all")
    group("--network", metavar="NAME", help=", ".join(CLASSIFIER_NAMES))
    group("--size", type=int, metavar="PIXELS", help="height and width of the images")
    group("--augment", choices=AUGMENTS, help="while training")
    group("--epochs", type=float, help="passes over the training images")
    group("--batch", type=int, help="images per step, of all processes together")
    group("--optimizer", choices=OPTIMIZERS, help="SGD has momentum 0.9")
    group("--lr", dest="learning_rate", type=float, help="peak learning rate")
    group("--weight-decay", type=float, help="on matrices and convolutions only")
    group("--schedule", choices=SCHEDULES, help="of the learning rate")
    group("--warm-up", type=float, metavar="SHARE", help="of the steps, in which the rate rises")
    group("--milestones", type=shares, metavar="SHARES", help="of the steps, where --schedule steps takes a tenth: 0.5,0.75")
    group("--clip", type=float, metavar="LENGTH", help="scale longer gradients down to it; 0: never")
    group = parser.add_argument_group("head").add_argument
    group("--head", default="dnc", choices=HEADS, help="both: the softmax twin is trained after the DNC head (default dnc)")
    group(
        "--head-recipe",
        default="default",
        choices=sorted(RECIPES),
        help="of the DNC head, see docs/recipes.md (default: default)",
    )
    group("--subcentroids", type=int, default=4, metavar="K", help="sub-centroids per class (default 4)")
    group("--memory", type=int, default=32, metavar="N", help="features remembered per class for clustering (default 32)")
    group("--momentum", type=float, help="share of the old sub-centroid that a step keeps (default: the head recipe's)")
    group = parser.add_argument_group("training").add_argument
    group("--seed", type=int, default=0, help="seed of weights, augmentation and order (default 0)")
    group("--device", default="cpu", metavar="cpu|cuda", help="where to train (default cpu)")
    group("--amp", choices=AMP, help="mixed precision")
    group("--ema", type=float, metavar="DECAY", help="measure a moving average of the weights, such as 0.999")
    group("--compile", nargs="?", const="inductor", metavar="BACKEND", help="with torch.compile (default backend inductor)")
    group("--workers", type=int, default=0, metavar="N", help="processes that read ahead, for each one that trains (default 0)")
    group("--threads", type=int, help="CPU threads (default: torch's choice)")
    group = parser.add_argument_group("output").add_argument
    group("--out", type=Path, default=Path("classify-out"), metavar="DIR",
          help="for log, checkpoints and metrics.json; of both heads in dnc/ and softmax/ (default classify-out)")  # fmt: skip
    group("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE, or from the last checkpoint in --out")
    group("--checkpoint-every", type=int, metavar="N", help="steps between them (default: an epoch); two are kept")
    group("--evaluate-every", type=int, metavar="N", help="steps between evaluations (default: an epoch)")
    group("--stop-after", type=int, metavar="N", help="stop after N steps with a checkpoint, as Ctrl-C would")
    group("--monitor", action="store_true", help="write curves for TensorBoard to --out/tensorboard")
    o = parser.parse_args(argv)
    fill_in(o)
    check(parser, o)
    return o


def shares(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(float(part) for part in text.split(","))


def fill_in(o: argparse.Namespace) -> None:
    """Take from the recipe what the command line leaves open."""
    o.recipe = o.recipe or ("digits" if o.data is None else "folder-resnet18")
    recipe = TRAINING_RECIPES[o.recipe]
    for part in (recipe, recipe.learning):
        for field in fields(part):
            if field.name not in ("about", "learning") and getattr(o, field.name) is None:
                setattr(o, field.name, getattr(part, field.name))
    o.clip, o.train_images = o.clip or None, o.train_images or None


def check(parser: argparse.ArgumentParser, o: argparse.Namespace) -> None:
    """Check what argparse cannot."""
    counts = ("train_images", "size", "batch", "subcentroids", "evaluate_every", "checkpoint_every", "stop_after", "threads")
    for name, least in (*((name, 1) for name in counts), *((name, 0) for name in ("memory", "workers", "seed"))):
        value = getattr(o, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
    for name, wanted, fits in (
        ("epochs", "positive", lambda v: 0 < v < math.inf), ("learning_rate", "positive", lambda v: 0 < v < math.inf),
        ("weight_decay", "at least 0", lambda v: 0 <= v < math.inf), ("clip", "at least 0", lambda v: 0 < v < math.inf),
        ("momentum", "in [0,1]", lambda v: 0 <= v <= 1), ("ema", "in [0,1)", lambda v: 0 <= v < 1),
        ("warm_up", "in [0,1)", lambda v: 0 <= v < 1), ("milestones", "in (0,1)", lambda v: all(0 < share < 1 for share in v)),
    ):  # fmt: skip
        value = getattr(o, name)
        if value is not None and not fits(value):
            parser.error(f"--{'lr' if name == 'learning_rate' else name.replace('_', '-')} must be {wanted}; got {value}")
    if o.subcentroids > 256:
        parser.error(f"--subcentroids must be at most 256; got {o.subcentroids}")
    if o.schedule == "steps" and not o.milestones:
        parser.error("--schedule steps needs --milestones, such as 0.5,0.75")
    if o.schedule == "one-cycle" and o.warm_up == 0:
        parser.error("--schedule one-cycle needs a --warm-up above 0, such as 0.2")
    if o.head == "both" and o.resume:
        parser.error(f"--resume takes no file with --head both, whose runs have one each; got {o.resume}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if o.batch % processes:
        parser.error(f"--batch must be a multiple of the number of processes, {processes}; got {o.batch}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", o.device):
        parser.error(f"--device must be cpu, cuda or cuda:N; got {o.device!r}")
    if o.device != "cpu" and (torch.device(o.device).index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {o.device}: torch finds no such GPU; python -m dnc_kernels doctor says why")
    if o.monitor and find_spec("tensorboard") is None:
        parser.error("--monitor needs tensorboard: run `pip install tensorboard`")


if __name__ == "__main__":
    sys.exit(main())
