"""The head trains a network as the plain float64 step of reference_head.py does; its sub-centroids do not collapse."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from gpu_check import on
from reference_head import ReferenceHead
from small_network import CHANNELS, CHECKPOINTS, make_head, scenes
from tolerances import assert_close

from dnc_kernels import nn, ops, use_backend

STEPS, BATCH, MOMENTUM = 50, 2, 0.9
RECIPES = {
    "released": {"scores": "norm", "confidence": "none", "label_mode": "nearest"},
    "default": {
        "scores": "scale",
        "confidence": "length",
        "label_mode": "nearest-exact",
        "ppc_weight": 0.1,
        "ppc_temperature": 0.1,
        "ppd_weight": 0.1,
    },
}


pytestmark = pytest.mark.usefixtures("one_thread")


def reference(recipe, kind=ReferenceHead, **options):
    """The plain step with the weights and sub-centroids that the head of a recipe starts from."""
    head = make_head(recipe=recipe).double()
    plain = kind(head.prototypes, **{**RECIPES[recipe], "momentum": MOMENTUM, **options})
    plain.load_state_dict(head.state_dict())
    return plain


def train(head, dtype, after_step=None, side=40):
    """Losses [STEPS] and sub-centroids of a network trained on digit scenes, in float64 whatever they were computed in."""
    images, labels = (t[..., :side, :side] for t in scenes(8))
    images = images.to(dtype)
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1), torch.nn.GELU(), torch.nn.Conv2d(16, CHANNELS, 3, stride=2, padding=1)
    )  # fmt: skip
    network = torch.nn.Sequential(backbone, head).to(dtype)
    # slow enough that a rounding error grows little in 50 steps: test_rounding_stays_small holds it to that
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    history = []
    for step in range(STEPS):
        batch = [(BATCH * step + i) % len(images) for i in range(BATCH)]
        loss = head.loss(backbone(images[batch]), labels[batch])
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
        if after_step is not None:
            after_step(network)
    return torch.stack(history), head.prototypes


@cache
def plain_run(recipe):
    return train(reference(recipe), torch.float64)


@cache
def float32_run(recipe):
    return train(make_head(recipe=recipe), torch.float32)


def assert_same_training(actual, expected):
    """Losses and sub-centroids agree: every step rounds the sums of its channels once more."""
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, "training", terms=STEPS * CHANNELS)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fifty_steps_in_float64_are_those_of_the_plain_step(recipe, checkpoint):
    assert_same_training(train(make_head(checkpoint, recipe=recipe), torch.float64), plain_run(recipe))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fifty_steps_in_float32_are_those_of_the_plain_step(recipe, checkpoint):
    run = float32_run(recipe) if checkpoint == "none" else train(make_head(checkpoint, recipe=recipe), torch.float32)
    assert_same_training(run, plain_run(recipe))
    history, prototypes = run
    assert history[-10:].mean() < 0.5 * history[0]
    moved = (prototypes - make_head(recipe=recipe).prototypes).norm(dim=2) > 0.1
    assert moved.any(1).sum() >= 3  # classes with pixels that were classified correctly


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend,recipe",
    [on("triton", "default"), on("cuda", "released")],  # the interpreter takes two seconds for a step
    indirect=["backend"],
)  # fmt: skip
def test_fifty_steps_on_the_kernels_of_a_gpu_are_those_of_the_plain_step(backend, recipe):
    """Corners of the scenes: Triton's interpreter is slow."""
    with use_backend(backend):
        run = train(make_head(recipe=recipe), torch.float32, side=8)
    assert_same_training(run, train(reference(recipe), torch.float64, side=8))


@pytest.mark.parametrize("recipe", RECIPES)
def test_rounding_stays_small(recipe):
    """What float32 does to the weights alone, done to the float64 run after every step, leaves it within the table's bound.

    Without this the bound would say nothing: past the point where errors grow on their own, no two runs agree.
    """
    generator = torch.Generator().manual_seed(1)

    def as_float32_would(network):
        with torch.no_grad():
            for tensor in (*network.parameters(), network[1].prototypes):
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 0.5
                tensor.mul_(1 + torch.finfo(torch.float32).eps * noise)

    history, prototypes = train(reference(recipe), torch.float64, as_float32_would)
    assert_same_training((history.float(), prototypes.float()), plain_run(recipe))


class PixelsFirst(ReferenceHead):
    """Sinkhorn that ends with the sub-centroids' marginal."""

    def transport(self, log_plan):
        for _ in range(self.iterations):
            log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
        return log_plan


class Nearest(ReferenceHead):
    """Clustering without the transport: everyone takes the nearest sub-centroid."""

    def assign(self, similarity):
        return similarity.argmax(1)


class PlainMean(ReferenceHead):
    """Momentum towards the mean of the pixels, not towards its direction."""

    def move(self, e, target, correct):
        for i in range(self.classes * self.k):
            mine = (target == i) & correct
            if mine.any():
                row = self.prototypes.view(-1, self.channels)[i]
                row.copy_(F.normalize(self.momentum * row + (1 - self.momentum) * e[mine].mean(0), dim=0))


MISTAKES = {
    "momentum from every pixel": {"update_from": "all"},
    "PPC twice": {"ppc_weight": 0.02},
    "PPD twice": {"ppd_weight": 0.002},
    "PPD left out": {"ppd_weight": 0.0},
    "corners aligned": {"align_corners": True},
    "two iterations": {"iterations": 2},
    "softer plan": {"epsilon": 0.06},
    "slower momentum": {"momentum": 0.905},
    "labels of another pixel": {"label_mode": "nearest"},
    "length divided out": {"confidence": "none"},
    "pixels' marginal first": {"kind": PixelsFirst},
    "no transport": {"kind": Nearest},
    "mean not normalised": {"kind": PlainMean},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_step_with_one_mistake_is_told_apart(mistake):
    history, prototypes = train(reference("default", **MISTAKES[mistake]), torch.float64)
    for actual, expected in zip(float32_run("default"), (history, prototypes), strict=True):
        with pytest.raises(AssertionError, match="training: element"):
            assert_close(actual, expected, "training", terms=STEPS * CHANNELS)


# clustering

PLANTED_CLASSES, PLANTED, PLANTED_CHANNELS = 5, 10, 64


def planted_modes(generator):
    """Orthogonal directions [C,K,D]: the clusters that each class is made of."""
    rows = torch.linalg.qr(torch.randn(PLANTED_CHANNELS, PLANTED_CHANNELS, generator=generator)).Q
    return rows[: PLANTED_CLASSES * PLANTED].view(PLANTED_CLASSES, PLANTED, PLANTED_CHANNELS)


def planted_batch(modes, generator, each=40, noise=2.0):
    """Unit pixels [N,D] around the modes, and their labels [N]. The noise is twice as long as a mode, spread over D."""
    which = torch.randint(0, PLANTED_CLASSES * PLANTED, (PLANTED_CLASSES * PLANTED * each,), generator=generator)
    x = modes.flatten(0, 1)[which]
    x = x + noise * torch.randn(x.shape, generator=generator) / math.sqrt(PLANTED_CHANNELS)
    return F.normalize(x, dim=1), which // PLANTED


def by_sub_centroids(assignment, seed):
    """Sub-centroids that momentum alone has moved."""
    generator = torch.Generator().manual_seed(seed)
    modes = planted_modes(generator)
    module = nn.SubCentroids(
        PLANTED_CLASSES, PLANTED, PLANTED_CHANNELS, momentum=0.9, assignment=assignment, generator=generator
    )  # fmt: skip
    for _ in range(100):
        x, labels = planted_batch(modes, generator)
        own = ops.class_scores(x, module.prototypes, labels).own_similarity
        module.update_(x, module.cluster(own, labels))
    return modes, module.prototypes


def by_head(assignment, seed):
    """The same through the head's training step, without an optimizer: its default start, moved by correct pixels."""
    generator = torch.Generator().manual_seed(seed)
    modes = planted_modes(generator)
    head = nn.DNCHead(
        PLANTED_CHANNELS, PLANTED_CLASSES, PLANTED, momentum=0.9, assignment=assignment, generator=generator
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(100):
            x, labels = planted_batch(modes, generator)
            head.loss(x.view(1, -1, 1, PLANTED_CHANNELS).permute(0, 3, 1, 2), labels.view(1, -1, 1))
    return modes, head.prototypes


def intra_class_cosine(prototypes):
    """Mean cosine between different sub-centroids of a class."""
    return float((prototypes @ prototypes.mT)[:, ~torch.eye(PLANTED, dtype=torch.bool)].mean())


def coverage(modes, prototypes):
    """Share of planted modes that a sub-centroid of their class has found: a cosine above 0.9, which a blend of two modes
    (0.71 with each) cannot reach."""
    return float(((modes @ prototypes.mT).amax(2) > 0.9).double().mean())


@pytest.mark.parametrize("run", [by_sub_centroids, by_head])
@pytest.mark.parametrize("seed", range(3))
def test_sub_centroids_find_planted_clusters_and_do_not_collapse(run, seed):
    modes, prototypes = run("argmax", seed)
    assert intra_class_cosine(prototypes) < 0.1
    assert coverage(modes, prototypes) > 0.95


@pytest.mark.parametrize("run", [by_sub_centroids, by_head])
def test_gumbel_assignment_collapses_the_sub_centroids_of_a_class(run):
    modes, prototypes = run("gumbel", 0)
    assert intra_class_cosine(prototypes) > 0.5
    assert coverage(modes, prototypes) == 0
