"""One way to say which class, and which pixel does not count: the same in every op, on every backend."""

import warnings

import numpy as np
import pytest
import torch
from cuda_on_cpu import DEVICE

from dnc_kernels import backends, ops
from dnc_kernels._tensors import pixel_map

B, D, H, W, C, K = 2, 16, 2, 8, 4, 3
N, M = B * H * W, C * K
BACKENDS = ("reference", "cpu", pytest.param("triton", marks=pytest.mark.triton), pytest.param("cuda", marks=pytest.mark.cuda))


def features(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x, p = torch.randn(B, D, H, W, generator=generator), torch.randn(C, K, D, generator=generator)
    return torch.nn.functional.normalize(x, dim=1).to(dtype), torch.nn.functional.normalize(p, dim=2)


def ids(bound):
    """Labels [B,H,W] in [0,bound), every third left out by -100."""
    labels = torch.arange(N) * 5 % bound
    labels[::3] = -100
    return labels.view(B, H, W)


def _class_scores(x, p, y, **options):
    out = ops.class_scores(x, p, y, **options)
    return out.scores, out.winner, out.own_similarity


def _assign(x, p, y, **options):
    own = x[:, :K] if x.ndim == 2 else x[:, :K].contiguous()
    return ops.sinkhorn_assign(own, y, C, **options), ops.sinkhorn_plan(own, y, C, **options)


def _move(x, p, y, **options):
    p = p.clone()
    ops.momentum_update_(p, x, y, momentum=0.5, **options)
    return (p,)


#: Op -> a call that returns tensors, and the number of ids.
CALLS = {
    "class_scores": (_class_scores, C),
    "centroid_cross_entropy": (lambda x, p, y, **o: tuple(ops.centroid_cross_entropy(x, p, y, **o)), C),
    "subcentroid_cross_entropy": (lambda x, p, y, **o: (ops.subcentroid_cross_entropy(x, p, y, **o),), M),
    "sinkhorn_assign": (_assign, C),
    "cluster_sums": (lambda x, p, y, **o: tuple(ops.cluster_sums(x, y, M, **o)), M),
    "momentum_update_": (_move, M),
    "upsample_cross_entropy": (lambda x, p, y, **o: (ops.upsample_cross_entropy(x[:, :C], y, **o),), C),
}


def call(op, backend, y, device=None, **options):
    f, _ = CALLS[op]
    kernel = backends.KERNELS[op].get(backend)
    if backend != "reference" and kernel is None:
        pytest.skip(f"{op} has no {backend} kernel")
    dtype = torch.float32 if backend == "reference" or torch.float32 in kernel.dtypes else torch.bfloat16
    device = device or ("cpu" if backend in ("reference", "cpu") or not torch.cuda.is_available() else DEVICE)
    x, p = (t.to(device) for t in features(dtype))
    p = p.to(torch.float32 if op == "momentum_update_" else dtype)
    if y.ndim == 1 and op != "upsample_cross_entropy" and options.pop("rows", False):
        x = x.permute(0, 2, 3, 1).reshape(N, D)
    return f(x, p, y.to(device), backend=backend, **options)


def same(a, b):
    return all(torch.equal(s.cpu().nan_to_num(7), t.cpu().nan_to_num(7)) for s, t in zip(a, b, strict=True))


@pytest.fixture
def host(request):
    if "cuda" in request.node.callspec.params.get("backend", ""):
        request.getfixturevalue("cuda")


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CALLS)
def test_ignore_index_or_any_negative_id_leaves_a_pixel_out(op, backend):
    y = ids(CALLS[op][1])
    expected = call(op, backend, y)
    out = y < 0
    mixed = torch.where(out, torch.tensor([-1, -2, -100, 255, -(2**40)])[torch.arange(N) % 5].view(B, H, W), y)
    assert set(mixed[out].tolist()) == {-1, -2, -100, 255, -(2**40)}
    assert same(call(op, backend, mixed, ignore_index=255), expected)
    assert same(call(op, backend, torch.where(out, 255, y).to(torch.uint8), ignore_index=255), expected)
    assert same(call(op, backend, torch.where(out, -7, y), ignore_index=np.int64(255)), expected)
    counted = torch.where(
        out, torch.where(torch.arange(N).view(B, H, W) % 2 > 0, 1, -1), y
    )  # left out is not counted: it matters
    assert not same(call(op, backend, counted), expected)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("op", CALLS)
def test_an_id_at_or_beyond_the_bound_is_an_error_that_names_the_call(op, backend):
    bound = CALLS[op][1]
    for value in (bound, 254, 2**40):
        y = ids(bound)
        y[1, 0, 1] = value
        number = r"(\d+|C|C\*K|num_classes|num_clusters)"
        text = rf"^{op}: labels must be in \[0,{number}\), ignore_index or negative; got {value} at pixel 17$"
        with pytest.raises(ValueError, match=text):
            call(op, backend, y, ignore_index=255)


@pytest.mark.parametrize("op", CALLS)
def test_an_ignore_index_among_the_ids_is_an_error(op):
    bound = CALLS[op][1]
    with pytest.raises(ValueError, match=rf"^{op}: ignore_index must be outside \[0,{bound}\); got {bound - 1}"):
        call(op, "cpu", ids(bound), ignore_index=bound - 1)
    with pytest.raises(TypeError, match=rf"^{op}: ignore_index must be an integer; got 1.5"):
        call(op, "cpu", ids(bound), ignore_index=1.5)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [op for op in CALLS if op != "upsample_cross_entropy"])
def test_a_map_gives_maps_and_rows_give_rows(op, backend):
    y = ids(CALLS[op][1])
    per_pixel = {"reduction": "none"} if op.endswith("cross_entropy") else {}
    maps = call(op, backend, y, **per_pixel)
    assert same(call(op, backend, y.flatten(), **per_pixel), maps), "flat labels of a map"
    rows = call(op, backend, y.flatten(), rows=True, **per_pixel)
    x = features()[0]
    for m, r in zip(maps, rows, strict=True):
        if len(r) != N:  # per cluster
            assert m.shape == r.shape
            continue
        want = pixel_map(x, r.cpu()) if r.ndim == 2 else r.cpu().view(B, H, W)
        assert m.shape == want.shape
        assert torch.allclose(m.cpu().float(), want.float(), atol=2e-2 if backend == "cuda" else 1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_distances_of_a_map_are_a_map(backend):
    x, p = features()
    rows = ops.centroid_distance(x.permute(0, 2, 3, 1).reshape(N, D), p, backend=backend)
    maps = ops.centroid_distance(x, p, backend=backend)
    assert rows.shape == (N, C, K) and maps.shape == (B, C, K, H, W)
    torch.testing.assert_close(maps.permute(0, 3, 4, 1, 2).reshape(N, C, K), rows)


def test_own_similarities_of_a_map_go_straight_into_the_clustering_without_a_copy():
    x, p = features()
    y = ids(C)
    own = ops.class_scores(x, p, y).own_similarity
    assert own.shape == (B, K, H, W) and own.permute(0, 2, 3, 1).is_contiguous()
    sub = ops.sinkhorn_assign(own, y, C)
    assert sub.shape == (B, H, W) and sub.dtype == torch.int64
    flat = ops.sinkhorn_assign(own.permute(0, 2, 3, 1).reshape(N, K), y.flatten(), C)
    assert torch.equal(sub.flatten(), flat)
    plan = ops.sinkhorn_plan(own, y, C)
    assert plan.shape == (B, K, H, W)
    torch.testing.assert_close(plan.sum(1), (y >= 0).float())
    assert ops.sinkhorn_plan(own).shape == (B, K, H, W)  # all pixels one class
    leaf = own.detach().clone().requires_grad_()
    (ops.sinkhorn_plan(leaf, y, C) * torch.rand(B, K, H, W)).sum().backward()
    assert leaf.grad.shape == leaf.shape and leaf.grad[(y < 0)[:, None].expand_as(leaf)].eq(0).all()


@pytest.mark.parametrize(
    ("old", "new", "f"),
    [
        ({"group": "labels"}, {}, lambda x, p, y, o: ops.sinkhorn_assign(x[:, :K], num_classes=C, **o)),
        ({"num_groups": "num_classes"}, {"num_classes": C}, lambda x, p, y, o: ops.sinkhorn_assign(x[:, :K], y, **o)),
        ({"group": "labels"}, {}, lambda x, p, y, o: ops.sinkhorn_plan(x[:, :K], num_classes=C, **o)),
        ({"cluster": "labels"}, {}, lambda x, p, y, o: ops.cluster_sums(x, num_clusters=C, **o).sums),
        ({"target": "labels"}, {}, lambda x, p, y, o: ops.subcentroid_cross_entropy(x, p, **o)),
        (
            {"class_weight": "weight"},
            {"weight": torch.rand(C)},
            lambda x, p, y, o: ops.upsample_cross_entropy(x[:, :C], y, **o),
        ),
        (
            {"class_weight": "weight"},
            {"weight": torch.rand(C)},
            lambda x, p, y, o: ops.centroid_cross_entropy(x, p, y, **o).loss,
        ),
        ({"cluster": "labels"}, {}, lambda x, p, y, o: ops.momentum_update_(p, x, **o) or p.clone()),
    ],
)
def test_an_old_name_works_for_one_version_and_says_so(old, new, f):
    (before, now), (x, p), y = next(iter(old.items())), features(), ids(C)
    value = new.get(now, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = f(x, features()[1], y, {now: value})
    with pytest.warns(FutureWarning, match=rf"^\w+: {before} is now called {now}; {before} will go in 0.2") as record:
        assert torch.equal(f(x, p, y, {before: value}), expected)
    assert record[0].filename == __file__
    with pytest.raises(TypeError, match=f"{before} is the old name of {now}"):
        f(x, p, y, {before: value, now: value})


def test_numbers_of_numpy_are_numbers():
    x, p = features()
    y = ids(C)
    assert torch.equal(ops.upsample_argmax(x, np.int64(7)), ops.upsample_argmax(x, (7, 7)))
    assert torch.equal(ops.upsample_argmax(x, torch.Size((6, 9))), ops.upsample_argmax(x, [np.int32(6), 9]))
    own = ops.class_scores(x, p, y).own_similarity
    assert torch.equal(
        ops.sinkhorn_assign(own, y, np.int64(C), iterations=np.int32(2)), ops.sinkhorn_assign(own, y, C, iterations=2)
    )
    assert torch.equal(ops.cluster_sums(x, y, np.uint8(C)).sums, ops.cluster_sums(x, y, C).sums)
    for size in (True, 2.0, (3, 0), (3,), (1, 2, 3), "ab", None):
        with pytest.raises((ValueError, TypeError), match=r"^upsample_argmax: size must be"):
            ops.upsample_argmax(x, size)


@pytest.mark.parametrize("bad", [torch.zeros(B, W, H, dtype=torch.int64), torch.zeros(N + 1, dtype=torch.int64)])
@pytest.mark.parametrize("op", [op for op in CALLS if op != "upsample_cross_entropy"])
def test_labels_of_another_shape_are_an_error(op, bad):
    with pytest.raises(ValueError, match=rf"^{op}: labels must be \[B,H,W\]=\[{B}, {H}, {W}\] to match "):
        call(op, "cpu", bad)


def test_a_loss_in_a_tuple_says_where_it_is():
    x, p = features()
    result = ops.centroid_cross_entropy(x, p, ids(C))
    with pytest.raises(
        AttributeError, match=r"^CentroidLoss is a tuple \(loss, prediction, own_similarity\) .*: use .loss.backward"
    ):
        result.backward()
    with pytest.raises(TypeError, match=r"use .loss with '\*'"):
        result * 2
    loss, *_ = result
    assert loss is result.loss and not hasattr(result, "no_such_thing")
