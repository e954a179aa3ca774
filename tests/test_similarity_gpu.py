"""Class scores, the nearest sub-centroid and the loss in Triton and in CUDA C++, where both owe the same: on a GPU, or on tiny shapes
under Triton's interpreter and as host C++.
"""

import math
from functools import partial

import gpu_check
import pytest
import torch
from cuda_on_cpu import DEVICE
from gpu_check import needs_gpu, on, replays
from similarity_check import DTYPE, ENGINES, METRICS, loss_and_grads, options_of, problem, set_engine

from dnc_kernels import ops

CUDA = tuple(f"cuda sm{engine}" for engine in ENGINES)
sizes = partial(gpu_check.sizes, ways=CUDA)


@pytest.fixture(params=[on(name) for name in ("triton", *CUDA)])
def backend(request):
    """Triton, and CUDA C++ of either kind of GPU."""
    name, _, engine = request.param.partition(" sm")
    if name == "triton":
        pytest.importorskip("triton")
    else:
        set_engine(request.getfixturevalue("cuda"), int(engine))
    return name


@sizes("metric", triton=("dot",), cuda=METRICS)
def test_pixels_that_are_not_finite(metric, backend):
    x, p, labels = problem(c=37, dtype=DTYPE[backend])
    x[3, 7], x[4, 0], x[5, 39] = math.nan, math.inf, -math.inf
    labels[3], labels[4], labels[5] = 2, -100, 36
    scores = ops.class_scores(x, p, metric=metric, backend=backend).scores
    assert scores[3:6].isnan().all() and scores[6:].isfinite().all() and scores[:3].isfinite().all()
    near = ops.nearest_centroid(x, p, metric=metric, backend=backend)
    assert near.label[3:6].eq(-1).all() and near.sub[3:6].eq(-1).all() and near.score[3:6].isnan().all()
    assert near.label[6:].ge(0).all()
    x.requires_grad_()
    out = ops.centroid_cross_entropy(x, p, labels, metric=metric, reduction="none", backend=backend)
    assert out.loss[3].isnan() and out.loss[5].isnan() and out.loss[4] == 0
    assert out.prediction[3:6].eq(-1).all() and out.prediction[6:].ge(0).all()
    counted = (labels >= 0) & (labels < 37)
    made = torch.autograd.grad(out.loss[6:].sum() + out.loss[4], x)[0]
    assert made[4].eq(0).all() and made[6:][~counted[6:]].eq(0).all() and made[6:].isfinite().all()
    if backend == "triton":  # which CUDA C++ leaves the gradient of sub-centroids to
        x, q = x.detach()[[0, 4, 6, 7]], p.clone().requires_grad_()
        out = ops.centroid_cross_entropy(x, q, labels[[0, 4, 6, 7]], metric=metric, reduction="sum", backend=backend)
        assert torch.autograd.grad(out.loss, q)[0].isfinite().all()


def test_an_ignored_pixel_that_is_not_finite_sends_nothing_to_the_parameters(backend):
    x, p, labels = problem(n=18, c=7, k=2, d=24, dtype=DTYPE[backend])
    options = {**options_of(7, True, False, 0.1), "reduction": "sum"}
    labels[4] = -100
    clean = loss_and_grads(backend, x, p, labels, backend == "triton", **options)
    x[4, 7] = math.nan
    dirty = loss_and_grads(backend, x, p, labels, backend == "triton", **options)
    assert all(torch.equal(a, b) for a, b in zip(clean[4:], dirty[4:], strict=True)) and dirty[0].isfinite()


def test_cosine_of_a_zero_pixel_is_zero(backend):
    x, p, labels = problem(n=18, c=7, k=2, d=24, dtype=DTYPE[backend])
    x[3], labels[3] = 0, 2
    x.requires_grad_()
    assert ops.class_scores(x, p, metric="cosine", backend=backend).scores[3].eq(0).all()
    loss = ops.centroid_cross_entropy(x, p, labels, metric="cosine", reduction="none", backend=backend).loss
    assert loss.isfinite().all()
    made, alone = (torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in (loss, loss[4:]))
    assert made.isfinite().all() and made[3].any() and torch.equal(made[4:], alone[4:])


def test_ties_go_to_the_lowest_index(backend):
    # small integers: no order of summation rounds
    x = torch.randint(-3, 4, (20, 24), device=DEVICE).to(DTYPE[backend])
    p = torch.randint(-3, 4, (1, 1, 24), device=DEVICE).to(DTYPE[backend]).expand(19, 3, 24)
    assert ops.class_scores(x, p, backend=backend).winner.eq(0).all()
    near = ops.nearest_centroid(x, p, backend=backend)
    assert near.label.eq(0).all() and near.sub.eq(0).all()
    labels = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    assert ops.centroid_cross_entropy(x, p, labels, backend=backend).prediction.eq(0).all()


def test_nothing_to_count(backend):
    x, p, labels = problem(c=21, dtype=DTYPE[backend])
    x.requires_grad_()
    out = ops.centroid_cross_entropy(x, p, torch.full_like(labels, -100), backend=backend)
    assert out.loss.isnan() and out.own_similarity.eq(0).all()
    assert torch.autograd.grad(out.loss, x)[0].eq(0).all()
    for options in ({}, {"norm_weight": torch.ones(21, device=DEVICE)}):
        q = p.clone().requires_grad_(backend == "triton")
        none = ops.centroid_cross_entropy(x[:0], q, labels[:0], reduction="sum", backend=backend, **options)
        assert none.loss == 0 and none.prediction.shape == (0,)
        assert backend == "cuda" or torch.autograd.grad(none.loss, q)[0].eq(0).all()
    assert ops.class_scores(x[:0], p, labels[:0], backend=backend).scores.shape == (0, 21)
    assert ops.nearest_centroid(x[:0], p, backend=backend).label.shape == (0,)


@sizes("n,to_centroids", triton=((90, False), (90, True)), cuda=((300, False),))
def test_results_repeat_bit_for_bit(n, to_centroids, backend):
    x, p, labels = problem(n=n, c=37, dtype=DTYPE[backend])
    options = options_of(37, backend == "cuda", False, 0.0)
    runs = 50 if DEVICE == "cuda" else 2
    first, *others = (loss_and_grads(backend, x, p, labels, to_centroids, **options) for _ in range(runs))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_opcheck(backend):
    from dnc_kernels.ops.similarity import op, op_loss

    x, p, labels = problem(n=8, c=3, k=2, d=16, dtype=DTYPE[backend])
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.class_scores.overload, (x, p, labels, "dot", backend), test_utils=utilities)
    torch.library.opcheck(op.nearest_centroid.overload, (x, p, "dot", backend), test_utils=utilities)
    x.requires_grad_()
    options = ("dot", torch.ones(3, device=DEVICE), None, 1e-5, None, 1.0, None, -100, 0.1, "sum", None, backend)
    arguments = (x, p, labels, *options, [True, False, False, False, False])
    torch.library.opcheck(op_loss._loss.overload, arguments, test_utils=utilities)


def test_traces_whole(backend):
    x, p, labels = problem(n=24, c=5, d=16, dtype=DTYPE[backend])

    def step(x, p, labels):
        loss = ops.centroid_cross_entropy(x, p, labels, backend=backend).loss
        return loss if backend == "cuda" else loss + ops.class_scores(x, p, backend=backend).scores.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (24, 13):
        part = x[:n].clone().requires_grad_()
        made, expected = (torch.autograd.grad(f(part, p, labels[:n]), part)[0] for f in (compiled, step))
        torch.testing.assert_close(made, expected)


@needs_gpu
def test_capture_in_a_cuda_graph_and_no_synchronisation(backend):
    x, p, labels = problem(n=5000, c=150, k=10, d=256, dtype=torch.bfloat16)
    weight = torch.ones(150, device=DEVICE)
    x.requires_grad_()
    replays(lambda: torch.autograd.grad(ops.centroid_cross_entropy(x, p, labels, norm_weight=weight, backend=backend).loss, x))
