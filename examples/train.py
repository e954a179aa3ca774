"""Train a real network with a DNC head in place of its class layer, on scenes of digits or on your images and masks."""

from __future__ import annotations

import argparse
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dnc_kernels.demo.progress import make_progress
from dnc_kernels.demo.scenes import NUM_CLASSES
from dnc_kernels.nn import RECIPES
from dnc_kernels.runs.checkpoint import CheckpointError, found
from dnc_kernels.runs.data import Batches, DataError, FolderScenes, Scenes, find_pairs, load_scenes, survey, tiles
from dnc_kernels.runs.networks import NAMES, make_backbone, make_segmenter
from dnc_kernels.runs.opened import scene_classes
from dnc_kernels.runs.pictures import draw_predictions
from dnc_kernels.runs.schedules import Learning
from dnc_kernels.runs.training import Training, evaluate, resume_or_begin, train

EPILOG = """examples:
  train.py --network segformer --tiny                 digits on textured ground, half a minute on two cores
  train.py --network timm:convnext_atto --steps 1000 --out run
  train.py --network timm:convnext_atto --steps 1000 --out run --resume
  train.py --images photos --masks masks --num-classes 19 --size 512x512 --device cuda

Needs the extras demo and networks. Nothing is downloaded: weights begin at random. More in docs/networks.md."""
WARM_UP = 0.1  # of all steps, a rise of the learning rate
SHOWN = 6  # images in predictions.png


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit status: 0, 1 for a failure, 2 for wrong options, 128 + N when signal N stopped it (Ctrl-C: 130)."""
    options = parse(argv)
    try:
        return run(options)
    except (DataError, CheckpointError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130


def run(o: argparse.Namespace) -> int:
    """Train as the options say."""
    console = Console() if sys.stdout.isatty() else Console(width=100)
    if o.threads:
        torch.set_num_threads(o.threads)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(o.seed)  # networks draw from all three
    scenes = data(o, console)
    try:
        backbone = make_backbone(o.network, o.size, tiny=o.tiny)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    about = about_run(o, scenes)
    network = make_segmenter(backbone, about).to(o.device)
    learning = Learning("adamw", o.lr, o.weight_decay, "poly", warm_up=WARM_UP)
    training = Training(network, o.steps, learning, identity(o, scenes), o.out, about)
    if resumed := resume_or_begin(training, o.resume):
        console.print(f"Resumed {resumed} after step {training.step}", highlight=False, soft_wrap=True)
    parameters = sum(p.numel() for p in network.parameters())
    console.print(
        f"{o.network}: {parameters / 1e6:.1f} M parameters, {backbone.channels} channels before the head, "
        f"on {described(scenes)}",
        highlight=False,
    )

    batches = Batches(scenes.train, o.batch, o.size, o.seed, o.flip, o.ignore_index)
    stop_at = None if o.stop_after is None else training.step + o.stop_after
    with make_progress(console, o.steps) as progress:
        signalled = train(
            training, batches,
            lambda: {"miou": evaluate(
                network, tiles(scenes.test, o.batch, o.size, o.ignore_index), o.num_classes, o.ignore_index
            )},
            progress.begin("dnc", o.seed, done=training.step),
            evaluate_every=o.evaluate_every, checkpoint_every=o.checkpoint_every, stop_at=stop_at,
        )  # fmt: skip
    if training.step < o.steps:
        console.print(f"Stopped after step {training.step}. To go on: the same command with --resume", highlight=False)
        return 128 + signalled if signalled else 0
    shown = next(tiles(scenes.test, SHOWN, o.size, o.ignore_index))
    picture = draw_predictions(o.out / "predictions.png", network, *shown, o.num_classes)
    console.print(f"Written: {picture}, {training.log}, {found(o.out)[-1]}", highlight=False, soft_wrap=True)
    return 0


def data(o: argparse.Namespace, console: Console) -> Scenes:
    """What to train on and what to measure on."""
    if o.images is not None and o.check_data:
        whole = FolderScenes(find_pairs(o.images, o.masks)[0], o.num_classes, o.ignore_index)
        for index in range(len(whole)):
            whole.read(index)
    scenes = load_scenes(
        o.images, o.masks, num_classes=o.num_classes, ignore_index=o.ignore_index, held_out=o.held_out, seed=o.seed, size=o.size
    )
    if isinstance(scenes.train, FolderScenes) and isinstance(scenes.test, FolderScenes):
        for line in (*scenes.notes, survey(scenes.train, o.masks, min(2, o.num_classes))):
            console.print(line, highlight=False, soft_wrap=True)
        survey(scenes.test, o.masks, 1, " that --seed holds out")
    return scenes


def described(scenes: Scenes) -> str:
    """What a run trains on, for a person."""
    if not scenes.pairs:
        return f"{len(scenes.train)} scenes of digits, measured on {len(scenes.test)} others"
    same = len(scenes.train) == scenes.pairs
    return f"{len(scenes.train)} images, measured on {'the same' if same else f'{len(scenes.test)} held out'}"


def identity(o: argparse.Namespace, scenes: Scenes) -> dict[str, Any]:
    """Options that a run must have in common with the checkpoint that it goes on from."""
    names = (
        "network", "tiny", "size", "batch", "steps", "seed", "lr", "weight_decay", "subcentroids", "embed_channels", "recipe",
        "num_classes", "ignore_index", "flip", "held_out",
    )  # fmt: skip
    values = {f"--{name.replace('_', '-')}": getattr(o, name) for name in names}
    return {**values, "--size": "x".join(map(str, o.size)), "image files": scenes.fingerprint}


def about_run(o: argparse.Namespace, scenes: Scenes) -> dict[str, Any]:
    """What `runs.opened.open_run` needs to build network and data again."""
    names = ("network", "tiny", "seed", "subcentroids", "embed_channels", "recipe", "num_classes", "ignore_index", "held_out")
    folders = {name: getattr(o, name) and str(getattr(o, name).resolve()) for name in ("images", "masks")}
    return {
        "task": "segmentation", **{name: getattr(o, name) for name in names}, **folders, "size": list(o.size),
        "classes": scene_classes(o.num_classes, o.images is None), "files": scenes.fingerprint,
    }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of a command line; wrong ones end the program with status 2 and a line that says what is expected."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    group = parser.add_argument_group("network").add_argument
    group("--network", default="segformer", metavar="NAME", help=f"{', '.join(NAMES)} (default segformer)")
    group("--tiny", action="store_true", help="segformer and upernet-swin with a few channels: seconds instead of minutes")
    group("--subcentroids", type=int, default=10, metavar="K", help="sub-centroids per class (default 10)")
    group("--embed-channels", type=int, metavar="D", help="project the features to D channels first (default: no projection)")
    group("--recipe", default="default", choices=sorted(RECIPES), help="of the head, see docs/recipes.md (default: default)")
    group = parser.add_argument_group("data (default: scenes of handwritten digits, 11 classes)").add_argument
    group("--images", type=Path, metavar="DIR", help="your images; subfolders count")
    group("--masks", type=Path, metavar="DIR", help="a mask of class ids for each, of the same name: PNG, palette or greyscale")
    group("--num-classes", type=int, metavar="C", help="ids are 0 to C-1; needed with --images")
    group("--ignore-index", type=int, default=255, metavar="ID", help="id of pixels to leave out (default 255)")
    group("--held-out", type=float, default=0.1, metavar="SHARE",
          help="share of the pairs to measure on and not train on; 0: measure on all (default 0.1)")  # fmt: skip
    group("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the crops (default: with --images)")
    group("--check-data", action="store_true", help="read every file before training, and not only when its turn comes")
    group("--size", default="128x128", metavar="HxW", help="size of the random crops, or of the scenes (default 128x128)")
    group = parser.add_argument_group("training").add_argument
    group("--steps", type=int, default=200, help="steps in all (default 200)")
    group("--batch", type=int, default=4, help="crops per step (default 4)")
    group("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (default 1e-3)")
    group("--weight-decay", type=float, default=0.01, help="of AdamW, on matrices and convolutions only (default 0.01)")
    group("--seed", type=int, default=0, help="seed of weights, scenes, crops and their order (default 0)")
    group("--device", default="cpu", metavar="cpu|cuda", help="where to train (default cpu)")
    group("--threads", type=int, help="CPU threads (default: torch's choice)")
    group = parser.add_argument_group("output").add_argument
    group("--out", type=Path, default=Path("train-out"), metavar="DIR",
          help="for log.jsonl, checkpoints and predictions.png (default train-out)")  # fmt: skip
    group("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE, or from the last checkpoint in --out")
    group("--checkpoint-every", type=int, default=100, metavar="N", help="steps between them (default 100); two are kept")
    group("--evaluate-every", type=int, metavar="N", help="steps between evaluations (default: a fifth of --steps)")
    group("--stop-after", type=int, metavar="N", help="stop after N steps with a checkpoint, as Ctrl-C would")
    o = parser.parse_args(argv)
    check(parser, o)
    return o


def check(parser: argparse.ArgumentParser, o: argparse.Namespace) -> None:
    """Check what argparse cannot, and fill in what depends on other options."""
    size = re.fullmatch(r"(\d+)x(\d+)", o.size)
    if size is None or min(int(size[1]), int(size[2])) < 32:
        parser.error(f"--size must be HEIGHTxWIDTH in pixels, at least 32x32; got {o.size!r}")
    o.size = (int(size[1]), int(size[2]))
    if (o.images is None) != (o.masks is None):
        parser.error("--images and --masks go together")
    if o.images is not None and o.num_classes is None:
        parser.error("--images needs --num-classes, the number of classes in the masks")
    if o.images is None:
        if o.num_classes not in (None, NUM_CLASSES):
            parser.error(f"--num-classes is {NUM_CLASSES} for the scenes of digits; got {o.num_classes}")
        if min(o.size) < 36:
            parser.error(
                f"--size must be at least 36x36 for the scenes, so that the largest digit fits; got {o.size[0]}x{o.size[1]}"
            )
        o.num_classes = NUM_CLASSES
    o.flip = o.images is not None if o.flip is None else o.flip  # a mirrored 2 is no digit
    o.evaluate_every = max(1, o.steps // 5) if o.evaluate_every is None else o.evaluate_every
    counts = (
        "steps",
        "batch",
        "num_classes",
        "checkpoint_every",
        "evaluate_every",
        "subcentroids",
        "embed_channels",
        "stop_after",
    )
    for name, least in (*((name, 1) for name in counts), ("threads", 1), ("seed", 0)):
        value = getattr(o, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
    if o.subcentroids > 256:
        parser.error(f"--subcentroids must be at most 256; got {o.subcentroids}")
    if not 0 <= o.held_out < 1:
        parser.error(f"--held-out must be in [0,1); got {o.held_out}")
    if 0 <= o.ignore_index < o.num_classes:
        parser.error(f"--ignore-index must not be a class; got {o.ignore_index} with {o.num_classes} classes; -1 is never one")
    if o.batch == 1 and o.network in ("upernet-swin", "deeplabv3-resnet50"):
        parser.error(f"--batch must be at least 2 for {o.network}: it batch-normalises one value per image and channel")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", o.device):
        parser.error(f"--device must be cpu, cuda or cuda:N; got {o.device!r}")
    if o.device != "cpu" and (torch.device(o.device).index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {o.device}: torch finds no such GPU; python -m dnc_kernels doctor says why")


if __name__ == "__main__":
    sys.exit(main())
