"""CUDA C++ beside Triton, one problem a family: two programs of one op agree, to within the bounds that each keeps to float64."""

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from tolerances import assert_close

from dnc_kernels import ops

pytest.importorskip("triton")
pytestmark = [pytest.mark.cuda, pytest.mark.triton, pytest.mark.usefixtures("cuda")]
BACKENDS = ("cuda", "triton")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def close(actual, expected, rule, terms, scale=1.0):
    """`terms` fourfold: the error bound of either result, added."""
    assert_close(actual.detach(), expected.detach().double(), rule, terms=4 * terms, scale=scale)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def both(step, *inputs):
    """step(backend, *inputs) and its gradients, one after the other: every float tensor of `inputs` is a leaf."""
    results = []
    for backend in BACKENDS:
        leaves = [t.detach().requires_grad_() for t in inputs]
        value, *rest = step(backend, *leaves)
        torch.manual_seed(1)
        results.append((value, *rest, *torch.autograd.grad(value, leaves, normal(*value.shape, dtype=value.dtype))))
    return results


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("metric", ("dot", "cosine", "sqeuclidean"))
@pytest.mark.parametrize("planes", (False, True), ids=("rows", "planes"))
def test_similarity(planes, metric, dtype):
    b, h, w, c, k, d = 2, 4, 6, 19, 3, 40
    x = F.normalize(normal(b, d, h, w), dim=1).to(dtype)
    x, p = x if planes else x.contiguous(memory_format=torch.channels_last), F.normalize(normal(c, k, d), dim=2).to(dtype)
    label = torch.randint(-1, c, (b, h, w), device=DEVICE)
    scale = 4.0 if metric == "sqeuclidean" else 1.0
    made, expected = (ops.class_scores(x, p, label, metric=metric, backend=name) for name in BACKENDS)
    close(made.scores, expected.scores, "similarity", d, scale)
    close(made.own_similarity, expected.own_similarity, "similarity", d, scale)
    near, other = (ops.nearest_centroid(x, p, metric=metric, backend=name) for name in BACKENDS)
    close(near.score, other.score, "similarity", d, scale)
    first, second = expected.scores.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-3
    assert clear.any() and torch.equal(near.label[clear], other.label[clear])

    def loss(backend, x, gain, shift):
        options = {"ignore_index": -1, "norm_weight": gain, "norm_bias": shift, "label_smoothing": 0.1, "reduction": "none"}
        out = ops.centroid_cross_entropy(x, p, label, metric=metric, backend=backend, **options)
        return out.loss, out.own_similarity

    made, expected = both(loss, x, 1 + 0.1 * normal(c), normal(c))
    close(made[0], expected[0], "loss", d, scale)
    close(made[1], expected[1], "similarity", d, scale)
    for a, e in zip(made[2:], expected[2:], strict=True):
        close(a, e, "loss_gradient", d, max(scale, float(e.abs().max())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn(dtype):
    similarity, group = normal(300, 10, dtype=dtype).clamp(-1, 1), torch.randint(-1, 7, (300,), device=DEVICE)
    terms = int((2 / 0.05) ** 2) + 300
    made, expected = both(lambda name, s: (ops.sinkhorn_plan(s, group, 7, backend=name),), similarity)
    close(made[0], expected[0], "plan", terms)
    close(made[1], expected[1], "plan_gradient", terms, 5 / 0.05)
    made, other = (ops.sinkhorn_assign(similarity, group, 7, backend=name) for name in BACKENDS)
    first, second = expected[0].detach().topk(2, dim=1).values.unbind(1)
    clear = (first > 1.01 * second) | (group < 0)
    assert clear.sum() > 250 and torch.equal(made[clear], other[clear])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deterministic", (False, True))
def test_momentum(deterministic, dtype):
    x, cluster = normal(2, 24, 5, 20, dtype=dtype), torch.randint(-1, 12, (2, 5, 20), device=DEVICE)
    made, expected = (ops.cluster_sums(x, cluster, 12, backend=name) for name in BACKENDS)
    assert torch.equal(made.counts, expected.counts)
    most, size = int(made.counts.max()), float(x.abs().max())
    close(made.sums, expected.sums, "sum", most, size)
    p = F.normalize(normal(4, 3, 24), dim=2)
    updated = {name: p.clone() for name in BACKENDS}
    for name, centroids in updated.items():
        ops.momentum_update_(centroids, x, cluster, momentum=0.9, deterministic=deterministic, backend=name)
    close(updated["cuda"], updated["triton"], "direction", most)
    applied = {name: p.clone() for name in BACKENDS}
    for name, centroids in applied.items():
        ops.apply_momentum_(centroids, made.sums, made.counts, momentum=0.9, backend=name)
    close(applied["cuda"], applied["triton"], "direction", 24)
    close(applied["cuda"], updated["cuda"], "direction", most)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (8, 7))
def test_embedding(width, dtype):
    d = 40
    x, weight, bias = normal(2, d, 3, width, dtype=dtype), 1 + 0.1 * normal(d), 0.1 * normal(d)
    made, expected = both(lambda name, *t: (ops.normalize_embedding(*t, backend=name),), x, weight, bias)
    close(made[0], expected[0], "embedding", d)
    close(made[1], expected[1], "embedding_grad", d, 4.0)
    for a, e in zip(made[2:], expected[2:], strict=True):
        close(a, e, "embedding_param_grad", x.numel() // d, 4.0)


@pytest.mark.parametrize(
    ("align_corners", "dtype"), ((False, torch.float32), (True, torch.bfloat16), (False, torch.float16)), ids=str
)
def test_upsample(align_corners, dtype):
    scores, labels = normal(2, 9, 2, 3, dtype=dtype), torch.randint(-1, 9, (2, 7, 10), device=DEVICE)
    options = {"align_corners": align_corners, "ignore_index": -1, "label_smoothing": 0.1, "reduction": "none"}
    made, expected = both(lambda name, s: (ops.upsample_cross_entropy(s, labels, backend=name, **options),), scores)
    size = 1 + float(scores.abs().max())
    close(made[0], expected[0], "interpolated_loss", 9, size)
    close(made[1], expected[1], "interpolated_loss", 9, size * float(expected[1].abs().max()))
    made, other = (ops.upsample_argmax(scores, (7, 10), align_corners=align_corners, backend=name) for name in BACKENDS)
    assert (made != other).float().mean() <= 0.01  # ties to within rounding
