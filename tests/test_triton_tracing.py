"""Every op on Triton: torch's own checks, one graph for any size, and on a GPU a step without a wait, captured and replayed."""

import pytest
import torch
import torch.nn.functional as F
from gpu_check import needs_gpu, replays

from dnc_kernels import ops
from dnc_kernels.nn import DNCHead
from dnc_kernels.ops.embedding import op as embedding
from dnc_kernels.ops.momentum import op as momentum
from dnc_kernels.ops.similarity import op as similarity
from dnc_kernels.ops.similarity import op_loss
from dnc_kernels.ops.sinkhorn import op as sinkhorn
from dnc_kernels.ops.upsample import op as upsample

pytestmark = pytest.mark.triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C, K, D = 3, 2, 8
TRITON = {"backend": "triton"}


def unit(*shape):
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def integers(high, *shape):
    return torch.randint(-1, high, shape, device=DEVICE)


# torch's own checks


def checked_ops():
    """Name -> op and arguments."""
    n = 10
    x, p, y = unit(n, D), unit(C, K, D), integers(C, n)
    maps, map_labels = torch.randn(1, C, 2, 3, device=DEVICE), integers(C, 1, 4, 5)
    weight, rows = torch.rand(D, device=DEVICE), torch.rand(n, device=DEVICE)
    own, group = torch.randn(n, K, device=DEVICE), integers(4, n)
    history, steps = torch.zeros(4, 4, K, device=DEVICE), torch.full((4,), 3, device=DEVICE)
    cluster, counts = integers(C * K, n), torch.ones(C * K, dtype=torch.int64, device=DEVICE)
    losses = ("dot", None, None, 1e-5, None, 1.0, None, -1, 0.1)
    winner = torch.zeros(n, C, dtype=torch.uint8, device=DEVICE)
    to_scores = torch.randn(n, C, device=DEVICE)
    wanted = x.clone().requires_grad_()
    return {
        "centroid_distance": (similarity.centroid_distance, (wanted, p, "cosine", "triton")),
        "class_scores": (similarity.class_scores, (wanted, p, y, "dot", "triton")),
        "class_scores_backward": (
            similarity.class_scores_backward,
            (x, p, y, "dot", winner, to_scores, own, False, "triton", [True, True]),
        ),
        "nearest_centroid": (similarity.nearest_centroid, (x, p, "sqeuclidean", "triton")),
        "loss": (op_loss._loss, (wanted, p, y, *losses, "none", None, "triton", [False] * 5)),
        "loss_backward": (
            op_loss._loss_backward,
            (x, p, y, *losses, "sum", torch.ones((), device=DEVICE), "triton", [True, True, False, False, False]),
        ),
        "contrast": (op_loss._contrast, (x, p, cluster, 0.5, -1, "triton", False)),
        "sinkhorn_assign": (sinkhorn.sinkhorn_assign, (own, group, 4, 0.05, 3, -1.0, "triton")),
        "sinkhorn_plan": (sinkhorn.sinkhorn_plan, (own.clone().requires_grad_(), group, 4, 0.05, 3, -1.0, "triton")),
        "sinkhorn_plan_backward": (sinkhorn.sinkhorn_plan_backward, (own, group, 4, 0.05, history, steps, own.sin(), "triton")),
        "cluster_sums": (momentum.cluster_sums, (x, cluster, "triton", C * K)),
        "apply_momentum_": (momentum.apply_momentum_, (p.clone(), unit(C * K, D), counts, 0.9, "triton")),
        "momentum_update_": (momentum.momentum_update_, (p.clone(), x, cluster, 0.9, True, "triton")),
        "normalize_embedding": (embedding.normalize_embedding, (wanted, weight, None, 1e-5, "triton")),
        "normalize_embedding_backward": (
            embedding.normalize_embedding_backward,
            (x, weight, None, rows, rows, rows, x.sin(), rows, "triton", [True, True, False]),
        ),
        "upsample_loss": (
            upsample._loss,
            (maps.clone().requires_grad_(), map_labels, 0, 0, 0, 0, True, None, -1, 0.1, None, "triton", "none", False),
        ),
        "upsample_backward": (
            upsample._loss_backward,
            (maps, map_labels, 0, 0, 0, 0, False, None, -1, 0.0, torch.rand(1, 4, 5, device=DEVICE), "triton"),
        ),
        "upsample_argmax": (upsample.upsample_argmax, (maps, False, "triton", 4, 5)),
    }


@pytest.mark.parametrize("name", list(checked_ops()))
def test_opcheck(name):
    op, arguments = checked_ops()[name]
    torch.library.opcheck(op.overload, arguments)


@pytest.mark.parametrize("name", ["loss", "contrast", "upsample_loss"])
def test_opcheck_of_gradients_made_early(name):
    """Backward scales them in place, which the comparison of compiled outputs would see."""
    x, p, y = unit(10, D).requires_grad_(), unit(C, K, D), integers(C, 10)
    maps = torch.randn(1, C, 2, 3, device=DEVICE, requires_grad=True)
    op, arguments = {
        "loss": (
            op_loss._loss,
            (x, p, y, "dot", None, None, 1e-5, None, 1.0, None, -1, 0.1, "sum", None, "triton", [True, *[False] * 4]),
        ),
        "contrast": (op_loss._contrast, (x, p, y, 0.5, -1, "triton", True)),
        "upsample_loss": (
            upsample._loss,
            (maps, integers(C, 1, 4, 5), 0, 0, 0, 0, True, None, -1, 0.1, None, "triton", "mean", True),
        ),
    }[name]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.overload, arguments, test_utils=utilities)


# one graph, whatever the size; no wait; a CUDA graph


def problem(name, n, c=C, k=K, d=D):
    """A function of tensors, and tensors for `n` pixels (or, for maps, of that height): the first has a gradient."""
    p = unit(c, k, d)
    pixels, labels, clusters = unit(n, d), integers(c, n), integers(c * k, n)
    maps, map_labels = torch.randn(2, c, n, 3, device=DEVICE), integers(c, 2, n + 1, 5)

    def moved(p, x, cluster):
        p, scaled = p.clone(), x * 2
        ops.momentum_update_(p, scaled, cluster, momentum=0.5, **TRITON)
        sums, counts = ops.cluster_sums(scaled, cluster, c * k, **TRITON)
        ops.apply_momentum_(p, sums, counts, momentum=0.5, **TRITON)
        return p

    def clustered(s, group):
        plan = ops.sinkhorn_plan(s, group, c, **TRITON)
        return (plan * s).sum() + ops.sinkhorn_assign(s, group, c, **TRITON)

    return {
        "distance": (lambda x, p: ops.centroid_distance(x, p, metric="cosine", **TRITON), (pixels, p)),
        "scores": (lambda x, p, y: ops.class_scores(x, p, y, **TRITON).scores, (pixels, p, labels)),
        "nearest": (lambda x, p: ops.nearest_centroid(x.detach(), p, **TRITON).score, (pixels, p)),
        "loss": (lambda x, p, y: ops.centroid_cross_entropy(x, p, y, ignore_index=-1, **TRITON).loss, (pixels, p, labels)),
        "losses": (
            lambda p, x, y: ops.centroid_cross_entropy(x, p, y, ignore_index=-1, reduction="none", **TRITON).loss,
            (p, pixels, labels),
        ),
        "contrast": (lambda x, p, y: ops.subcentroid_cross_entropy(x, p, y, ignore_index=-1, **TRITON), (pixels, p, clusters)),
        "sinkhorn": (clustered, (torch.randn(n, k, device=DEVICE), labels)),
        "momentum": (lambda p, x, y: moved(p.detach(), x, y), (p, pixels, clusters)),
        "embedding": (lambda x, w, b: ops.normalize_embedding(x, w, b, **TRITON).sin(), (pixels, p[0, 0], p[0, 1])),
        "upsample": (lambda s, y: ops.upsample_cross_entropy(s, y, ignore_index=-1, **TRITON), (maps, map_labels)),
        "upsample losses": (
            lambda s, y: ops.upsample_cross_entropy(s, y, ignore_index=-1, reduction="none", **TRITON),
            (maps, map_labels),
        ),
        "argmax": (
            lambda s: ops.upsample_argmax(s.detach(), (s.shape[2] + 1, 5), **TRITON),
            (maps,),
        ),
    }[name]  # fmt: skip


NAMES = (
    "distance", "scores", "nearest", "loss", "losses", "contrast", "sinkhorn", "momentum", "embedding", "upsample",
    "upsample losses", "argmax",
)  # fmt: skip


def outcome(function, first, *rest):
    """Result of the function, and the gradient of its sum where it has one."""
    x = first.detach().clone().requires_grad_()
    result = function(x, *rest)
    return result.detach(), torch.autograd.grad(result.sum(), x)[0] if result.requires_grad else None


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_any_size(name):
    torch._dynamo.reset()
    compiled = torch.compile(problem(name, 8)[0], backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (8, 5):
        function, tensors = problem(name, n)
        for actual, expected in zip(outcome(compiled, *tensors), outcome(function, *tensors), strict=True):
            torch.testing.assert_close(actual, expected)


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_no_wait_and_capture(name):
    function, tensors = problem(name, 40 if name in ("upsample", "upsample losses", "argmax") else 3000, 19, 10, 64)
    replays(lambda: outcome(function, *tensors))


@needs_gpu
@pytest.mark.parametrize("checkpoint", ["all", "scores", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"ppc_weight": 0.1, "ppd_weight": 0.1}, {"scores": "norm"}, {"pixels_per_class": 9}, {"label_smoothing": 0.1}],
    ids=str,
)
def test_no_wait_and_capture_of_a_step_of_the_head(checkpoint, options):
    head = DNCHead(64, 19, 10, checkpoint=checkpoint, device=DEVICE, **options)
    if "pixels_per_class" in options:
        head.pixels_per_class = 10**6  # every pixel: what is drawn would differ from replay to replay
    start = head.prototypes.clone()
    x, labels = torch.randn(2, 64, 24, 20, device=DEVICE), torch.randint(0, 19, (2, 96, 80), device=DEVICE)

    def step():
        with torch.no_grad():
            head.prototypes.copy_(start)
        features = x.detach().clone().requires_grad_()
        loss = head.loss(features, labels).loss
        return loss.detach(), torch.autograd.grad(loss, features)[0], head.prototypes.clone()

    for _ in range(3):  # past the first steps, which may start the sub-centroids
        step()
    replays(step)
