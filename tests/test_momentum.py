"""cluster_sums, apply_momentum_ and momentum_update_ against float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, assert_golden

from dnc_kernels import backends, ops
from dnc_kernels.ops.momentum import op, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (
    "rows",
    "sliced rows",
    "strided rows",
    "every other channel",
    "planes",
    "channels_last",
    "crop",
    "crop channels_last",
)


def make(layout, pixels, channels, dtype=torch.float32):
    """Features of about `pixels` pixels in a memory layout."""
    if layout == "rows":
        return torch.randn(pixels, channels).to(dtype)
    if layout == "sliced rows":
        return torch.randn(pixels, channels + 5).to(dtype)[:, 2 : 2 + channels]
    if layout == "strided rows":
        return torch.randn(2 * pixels, channels).to(dtype)[::2]
    if layout == "every other channel":
        return torch.randn(pixels, 2 * channels).to(dtype)[:, ::2]
    height, width = 5, max(1, pixels // 10)
    memory = torch.channels_last if "channels_last" in layout else torch.contiguous_format
    if "crop" in layout:
        return torch.randn(2, channels, height + 3, width + 7).to(dtype).contiguous(memory_format=memory)[:, :, 2:-1, 3:-4]
    return torch.randn(2, channels, height, width).to(dtype).contiguous(memory_format=memory)


def flat(x):
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def clusters_for(x, clusters, low=-1):
    """Random clusters with runs, of the shape of the pixels."""
    shape = x.shape[:1] if x.ndim == 2 else (x.shape[0], *x.shape[2:])
    flat_clusters = torch.randint(low, clusters, (flat(x).shape[0],))
    runs = torch.rand(flat_clusters.shape) < 0.6
    return torch.where(runs, flat_clusters.roll(1), flat_clusters).view(shape)


def expected_sums(x, cluster, clusters):
    """float64 sums and counts, by a loop."""
    pixels, cluster = flat(x).double(), cluster.flatten()
    sums, counts = torch.zeros(clusters, x.shape[1], dtype=torch.float64), torch.zeros(clusters, dtype=torch.int64)
    good = pixels.isfinite().all(1)
    for m in range(clusters):
        own = (cluster == m) & good
        sums[m], counts[m] = pixels[own].sum(0), own.sum()
    return sums, counts


def expected_update(centroids, x, cluster, momentum):
    """float64 sub-centroids after the update, by a loop over those that have pixels."""
    result = centroids.double().flatten(0, 1).clone()
    sums, counts = expected_sums(x, cluster, len(result))
    for m in range(len(result)):
        if counts[m] > 0 and sums[m].norm() > 0:
            result[m] = F.normalize(momentum * result[m] + (1 - momentum) * F.normalize(sums[m], dim=0), dim=0)
    return result.view_as(centroids)


def assert_sums(result, x, cluster, clusters):
    sums, counts = expected_sums(x, cluster, clusters)
    assert torch.equal(result.counts, counts)
    scale = float(flat(x).double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 1.0
    most = int(counts.max()) if len(counts) else 1
    assert_close(result.sums, sums, "sum", terms=most, scale=scale)


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_equal_float64(isa, layout, dtype):
    x = make(layout, 700, 39, dtype)
    cluster = clusters_for(x, 11)
    result = ops.cluster_sums(x, cluster, 11)
    assert result.sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_sums(result, x, cluster, 11)


@pytest.mark.parametrize("channels", [1, 7, 8, 16, 17, 31, 33, 64, 130, 257])
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_every_width_of_the_last_vector(isa, layout, channels):
    x = make(layout, 90, channels)
    cluster = clusters_for(x, 4)
    assert_sums(ops.cluster_sums(x, cluster, 4), x, cluster, 4)


@pytest.mark.parametrize("layout", ["rows", "planes", "channels_last"])
def test_many_clusters_few_pixels(isa, layout):
    x = make(layout, 60, 24)
    cluster = clusters_for(x, 5000)
    assert_sums(ops.cluster_sums(x, cluster, 5000), x, cluster, 5000)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_reruns_give_the_same_bits(isa, layout, dtype):
    x = make(layout, 6000, 150, dtype)
    cluster = clusters_for(x, 30)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 13, 1):
            torch.set_num_threads(threads)
            results.append(ops.cluster_sums(x, cluster, 30))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.sums, results[0].sums)
        assert torch.equal(other.counts, results[0].counts)


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_a_long_sum_of_equal_values_does_not_drift(isa, layout):
    # one after the other, 300,000 times 0.1f in float32 is off by 1e-3 of the sum
    x = torch.full((300_000, 2), 0.1) if layout == "rows" else torch.full((1, 2, 600, 500), 0.1)
    sums, counts = ops.cluster_sums(x, torch.zeros(300_000, dtype=torch.int64), 1)
    assert counts.item() == 300_000
    expected = float(torch.tensor(0.1).double()) * 300_000
    assert (sums.double() / expected - 1).abs().max() < 3e-5


def test_layouts_give_the_same_sums_as_their_rows(isa):
    x = make("planes", 400, 20)
    cluster = clusters_for(x, 5)
    rows = ops.cluster_sums(flat(x), cluster.flatten(), 5)
    for memory in (torch.contiguous_format, torch.channels_last):
        other = ops.cluster_sums(x.contiguous(memory_format=memory), cluster, 5)
        assert_close(other.sums, rows.sums.double(), "sum", terms=100, scale=10)
        assert torch.equal(other.counts, rows.counts)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(0, 6), (2, 6, 0, 4), (0, 6, 3, 3)])
def test_no_pixels(backend, shape):
    x = torch.empty(shape)
    cluster = torch.empty(x[:, 0].shape, dtype=torch.int64)
    sums, counts = ops.cluster_sums(x, cluster, 3, backend=backend)
    assert torch.equal(sums, torch.zeros(3, 6)) and torch.equal(counts, torch.zeros(3, dtype=torch.int64))
    centroids = unit(3, 1, 6)
    before = centroids.clone()
    ops.momentum_update_(centroids, x, cluster, backend=backend)
    assert torch.equal(centroids, before)


def test_one_pixel_one_channel_one_cluster(isa):
    assert ops.cluster_sums(torch.tensor([[3.0]]), torch.tensor([0]), 1).sums.item() == 3
    centroids = torch.tensor([[[1.0]]])
    ops.momentum_update_(centroids, torch.tensor([[-3.0]]), torch.tensor([0]), momentum=0.25)
    assert centroids.item() == -1


def test_all_pixels_left_out(isa):
    x = make("rows", 50, 12)
    sums, counts = ops.cluster_sums(x, torch.full((50,), -1), 3)
    assert not sums.any() and not counts.any()


def test_expanded_pixels(isa):
    x = torch.randn(1, 24).expand(70, 24)
    cluster = clusters_for(x, 3)
    assert_sums(ops.cluster_sums(x, cluster, 3), x, cluster, 3)


@pytest.mark.parametrize("labels", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_label_dtypes(labels):
    x = make("rows", 60, 8)
    cluster = clusters_for(x, 5, low=0)
    result = ops.cluster_sums(x, cluster.to(labels), 5)
    assert torch.equal(result.sums, ops.cluster_sums(x, cluster, 5).sums)
    assert result.counts.dtype == torch.int64


def test_strided_and_flat_labels():
    x = make("planes", 60, 8)
    cluster = clusters_for(x, 5)
    wide = torch.stack([cluster, torch.zeros_like(cluster)], -1)[..., 0]
    expected = ops.cluster_sums(x, cluster, 5).sums
    assert torch.equal(ops.cluster_sums(x, wide, 5).sums, expected)
    assert torch.equal(ops.cluster_sums(x, cluster.flatten(), 5).sums, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_that_are_not_finite_are_left_out(isa, layout, bad):
    x = make(layout, 400, 37)
    cluster = clusters_for(x, 6)
    pixels = x if x.ndim == 2 else x.permute(0, 2, 3, 1)
    pixels[0, ..., 36] = bad  # a row, or a whole sample
    pixels[-1, ..., 3] = bad
    if x.ndim == 4:
        pixels[0] = torch.randn_like(pixels[0])
        pixels[0, 1, 2, 0] = bad
    result = ops.cluster_sums(x, cluster, 6)
    assert result.sums.isfinite().all()
    assert_sums(result, x, cluster, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_infinities_that_cancel_are_found(isa, layout, dtype):
    x = make(layout, 300, 5, dtype)
    cluster = torch.zeros_like(clusters_for(x, 1))
    pixels = x if x.ndim == 2 else x[0].permute(1, 2, 0).flatten(0, 1)
    view = x if x.ndim == 2 else x[0, :, 0].T
    view[0, 0], view[1, 0] = float("inf"), -float("inf")
    assert pixels.shape[1] == 5
    assert_sums(ops.cluster_sums(x, cluster, 1), x, cluster, 1)


def test_only_pixels_that_are_not_finite():
    x = torch.full((40, 6), float("nan"))
    sums, counts = ops.cluster_sums(x, torch.zeros(40, dtype=torch.int64), 2)
    assert not sums.any() and not counts.any()


def test_a_bad_pixel_that_is_left_out_anyway_changes_nothing(isa):
    x = make("rows", 100, 9)
    cluster = clusters_for(x, 3)
    cluster[17] = -1
    expected = ops.cluster_sums(x, cluster, 3)
    x[17] = float("nan")
    assert torch.equal(ops.cluster_sums(x, cluster, 3).sums, expected.sums)


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_finite_pixels_whose_sum_overflows_leave_their_sub_centroid_alone(isa, layout):
    x = torch.full((8, 20), 3e38) if layout == "rows" else torch.full((1, 20, 2, 4), 3e38)
    cluster = torch.tensor([0, 0, 1, 0, 0, -1, 0, 0])
    sums, counts = ops.cluster_sums(x, cluster, 3)
    assert not sums[0].isfinite().any() and torch.equal(counts, torch.tensor([6, 1, 0]))
    centroids = unit(3, 1, 20)
    before = centroids.clone()
    ops.momentum_update_(centroids, x, cluster)
    assert torch.equal(centroids[[0, 2]], before[[0, 2]]) and not torch.equal(centroids[1], before[1])


@pytest.mark.parametrize("sums_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.999, 1.0])
def test_momentum_step_equals_float64(isa, momentum, dtype, sums_dtype):
    centroids, sums = unit(5, 3, 43, dtype=dtype), torch.randn(15, 43).to(sums_dtype)
    counts = torch.randint(0, 3, (15,))
    expected = centroids.double().flatten(0, 1).clone()
    for m in counts.nonzero().flatten().tolist():
        direction = F.normalize(sums[m].double(), dim=0)
        expected[m] = F.normalize(momentum * expected[m] + (1 - momentum) * direction, dim=0)
    before = centroids.clone()
    ops.apply_momentum_(centroids, sums, counts, momentum=momentum)
    assert_close(centroids, expected.view(5, 3, 43), "direction", terms=1, scale=0.1)
    empty = (counts == 0).view(5, 3)
    assert torch.equal(centroids[empty], before[empty])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_length_of_a_sum_cannot_overflow_or_vanish(backend, scale):
    direction = torch.tensor([3.0, -4.0, 0.0, 12.0])
    centroids = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    ops.apply_momentum_(centroids, (direction * scale)[None], torch.tensor([1]), momentum=0.0, backend=backend)
    assert torch.allclose(centroids[0], direction / 13, rtol=0, atol=1e-3 if scale == 1e-42 else 1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("row", [0.0, float("nan"), float("inf")])
def test_a_sum_without_a_direction_keeps_the_sub_centroid(backend, row):
    centroids = unit(2, 9)
    before = centroids.clone()
    sums = torch.randn(2, 9)
    sums[0] = row
    ops.apply_momentum_(centroids, sums, torch.tensor([4, 4]), momentum=0.5, backend=backend)
    assert torch.equal(centroids[0], before[0]) and not torch.equal(centroids[1], before[1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_result_without_a_direction_keeps_the_sub_centroid(backend):
    centroids = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    before = centroids.clone()
    ops.apply_momentum_(centroids, torch.tensor([[0.0, -4.0], [1.0, 1.0]]), torch.tensor([1, 1]), momentum=0.5, backend=backend)
    assert torch.equal(centroids[0], before[0])
    assert torch.equal(centroids[1].isnan(), before[1].isnan()) and centroids[1, 1] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "planes", "channels_last", "crop"])
def test_update_equals_float64(isa, layout, dtype):
    x = make(layout, 300, 32, dtype)
    cluster = clusters_for(x, 12)
    cluster[cluster == 5] = -1
    centroids = unit(4, 3, 32)
    before = centroids.clone()
    expected = expected_update(before, x, cluster, 0.9)
    ops.momentum_update_(centroids, x, cluster, momentum=0.9)
    assert_close(centroids, expected, "direction", terms=10, scale=0.2)
    assert torch.equal(centroids[1, 2], before[1, 2])  # cluster 5 is absent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_is_its_two_steps(dtype):
    x = make("rows", 200, 16)
    cluster = clusters_for(x, 6)
    one = unit(3, 2, 16, dtype=dtype)
    two = one.clone()
    ops.momentum_update_(one, x, cluster)
    ops.apply_momentum_(two, *ops.cluster_sums(x, cluster, 6))
    assert torch.equal(one, two)


def test_parts_of_the_pixels_add_up_to_the_whole():
    # data parallel: sums and counts of the ranks are added, then the step is made once
    x = make("rows", 400, 24)
    cluster = clusters_for(x, 9)
    cluster[:200][cluster[:200] == 4] = -1  # one rank alone sees cluster 4
    whole, parts = unit(3, 3, 24), None
    split = whole.clone()
    ops.momentum_update_(whole, x, cluster, momentum=0.9)
    for rank in (slice(0, 200), slice(200, 400)):
        own = ops.cluster_sums(x[rank], cluster[rank], 9)
        parts = own if parts is None else ops.ClusterSums(parts.sums + own.sums, parts.counts + own.counts)
    ops.apply_momentum_(split, *parts, momentum=0.9)
    assert_close(split, whole.double(), "direction", terms=1, scale=0.2)


@pytest.mark.parametrize("name", ["cityscapes_f32", "cityscapes_f64", "hard_f64", "missing_classes_f64"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_released_update(name, backend):
    golden = np.load(Path(__file__).parent / "data" / f"golden_{name}.npz")
    tensor = {k: torch.from_numpy(golden[k]) for k in golden.files}
    correct = (tensor["prediction"] == tensor["labels"]) & (tensor["labels"] != tensor["ignore_index"])
    cluster = torch.where(correct, tensor["contrast_target"], -1)
    centroids = F.normalize(tensor["prototypes"], dim=-1)
    before = centroids.clone()
    ops.momentum_update_(centroids, tensor["embedding"], cluster, momentum=float(tensor["gamma"]), backend=backend)
    assert_golden(centroids, tensor["updated_prototypes"], "prototypes")
    moved = torch.zeros(centroids[..., 0].numel(), dtype=torch.bool)
    moved[cluster[correct]] = True
    assert torch.equal(centroids.flatten(0, 1)[~moved], before.flatten(0, 1)[~moved])
    assert (centroids - before).abs().max() > 1e-4  # the bound above would notice a missing update


@given(
    pixels=st.integers(0, 70),
    channels=st.integers(1, 40),
    clusters=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    isa=st.sampled_from(backends.usable_isas()),
    bad=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(pixels, channels, clusters, dtype, layout, isa, bad, seed):
    torch.manual_seed(seed)
    x = make(layout, pixels, channels, dtype)
    if bad and x.numel():
        x.view(x.shape).select(1, seed % channels)[0] = float("nan")
    cluster = clusters_for(x, clusters)
    with backends.use_isa(isa):
        result = ops.cluster_sums(x, cluster, clusters)
    assert_sums(result, x, cluster, clusters)


@given(rows=st.integers(1, 20), channels=st.integers(1, 70), momentum=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_results_are_unit_vectors_or_unchanged(rows, channels, momentum, seed):
    torch.manual_seed(seed)
    centroids, sums = unit(rows, channels), torch.randn(rows, channels)
    counts = torch.randint(0, 2, (rows,))
    before = centroids.clone()
    ops.apply_momentum_(centroids, sums, counts, momentum=momentum)
    same = (centroids == before).all(1)
    length = centroids.double().norm(dim=1)
    assert ((length - 1).abs() < 1e-6)[~same].all()
    assert same[counts == 0].all()


def test_reference_equals_kernel(isa):
    x = make("planes", 200, 24)
    x[0, 3, 1, 1] = float("inf")
    cluster = clusters_for(x, 8)
    expected = ops.cluster_sums(x.double(), cluster, 8, backend="reference")
    result = ops.cluster_sums(x, cluster, 8, backend="cpu")
    assert torch.equal(result.counts, expected.counts)
    assert_close(result.sums, expected.sums, "sum", terms=50, scale=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype):
    x = make("planes", 60, 12, dtype)
    cluster = clusters_for(x, 6).flatten()
    torch.library.opcheck(op.cluster_sums.overload, (x, cluster, "cpu", 6))
    sums, counts = ops.cluster_sums(x, cluster, 6)
    torch.library.opcheck(op.apply_momentum_.overload, (unit(2, 3, 12), sums, counts, 0.9, "cpu"))
    torch.library.opcheck(op.momentum_update_.overload, (unit(2, 3, 12), x, cluster, 0.9, True, "cpu"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_compiles_whole_with_the_mutation(backend, layout):
    def step(centroids, x, cluster):
        scaled = x * 2
        ops.momentum_update_(centroids, scaled, cluster, momentum=0.5, backend=backend)
        return centroids.sum() + ops.cluster_sums(scaled, cluster, 6, backend=backend).sums.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for pixels in (40, 57):
        x = make(layout, pixels, 10)
        cluster = clusters_for(x, 6)
        eager, traced = unit(3, 2, 10), None
        traced = eager.clone()
        expected, actual = step(eager, x, cluster), compiled(traced, x, cluster)
        assert torch.equal(eager, traced) and torch.allclose(expected, actual)


@pytest.mark.slow
def test_compiles_with_inductor():
    buffer = unit(3, 2, 10)

    def step(x, cluster):
        ops.momentum_update_(buffer, x * 2, cluster, momentum=0.5)
        return buffer * 1

    x = make("rows", 50, 10)
    cluster = clusters_for(x, 6)
    expected = expected_update(buffer, x, cluster, 0.5)
    result = torch.compile(step, fullgraph=True)(x, cluster)
    assert torch.equal(result, buffer)
    assert_close(buffer, expected, "direction", terms=10, scale=0.2)


def test_autocast_changes_no_bit():
    x = make("rows", 100, 16)
    cluster = clusters_for(x, 4)
    one = unit(2, 2, 16)
    two = one.clone()
    ops.momentum_update_(one, x, cluster)
    with torch.autocast("cpu", torch.bfloat16):
        ops.momentum_update_(two, x, cluster)
        assert ops.cluster_sums(x.bfloat16(), cluster, 4).sums.dtype == torch.float32
    assert torch.equal(one, two)


def test_features_and_parameters_that_require_gradients():
    x = make("rows", 30, 8).requires_grad_()
    centroids = torch.nn.Parameter(unit(2, 2, 8))
    before = centroids.detach().clone()
    ops.momentum_update_(centroids, x, clusters_for(x, 4), momentum=0.5)
    assert not torch.equal(centroids.detach(), before)
    assert not ops.cluster_sums(x, clusters_for(x, 4), 4).sums.requires_grad


def test_inputs_are_not_changed():
    x = make("rows", 60, 8)
    cluster = clusters_for(x, 4)
    x[3, 1] = float("nan")
    copies = x.clone(), cluster.clone()
    sums, counts = ops.cluster_sums(x, cluster, 4)
    kept = sums.clone()
    ops.apply_momentum_(unit(4, 8), sums, counts)
    assert torch.equal(x.nan_to_num(9), copies[0].nan_to_num(9)) and torch.equal(cluster, copies[1]) and torch.equal(sums, kept)


def test_saved_tensors_notice_the_mutation():
    # the update bumps the version counter: autograd refuses a backward that would read changed sub-centroids
    centroids, x = unit(2, 2, 8), make("rows", 10, 8).requires_grad_()
    loss = (x @ centroids.flatten(0, 1).T).sum()
    ops.momentum_update_(centroids, x, clusters_for(x, 4, low=0), momentum=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


X, CLUSTER, P = torch.randn(20, 6), torch.zeros(20, dtype=torch.int64), torch.randn(2, 3, 6)
ERRORS = [
    (
        lambda: ops.cluster_sums(X.int(), CLUSTER, 3),
        TypeError,
        r"cluster_sums: x must be a float32, .* tensor; got \[20, 6\] int32",
    ),
    (lambda: ops.cluster_sums(X[0], CLUSTER, 3), ValueError, r"cluster_sums: x must be \[N,D\] or \[B,D,H,W\]; got \[6\]"),
    (lambda: ops.cluster_sums(X, CLUSTER.float(), 3), TypeError, r"cluster_sums: labels must be an integer tensor"),
    (
        lambda: ops.cluster_sums(X, CLUSTER[1:], 3),
        ValueError,
        r"cluster_sums: labels must be \[N\]=\[20\] to match x; got \[19\]",
    ),
    (
        lambda: ops.cluster_sums(torch.randn(2, 6, 2, 5), CLUSTER.view(2, 5, 2), 3),
        ValueError,
        r"labels must be \[B,H,W\]=\[2, 2, 5\] to match x; got \[2, 5, 2\]",
    ),
    (lambda: ops.cluster_sums(X, CLUSTER, 0), ValueError, r"num_clusters must be a positive integer; got 0"),
    (
        lambda: ops.cluster_sums(X, CLUSTER, 3, backend="cuda"),
        RuntimeError,
        r"cluster_sums: .* the cuda backend runs on cuda tensors, not cpu",
    ),
    (lambda: ops.cluster_sums(X, CLUSTER, 3, backend="gpu"), ValueError, r"backend must be one of"),
    (lambda: ops.momentum_update_(P.half(), X, CLUSTER), TypeError, r"momentum_update_: centroids .*a 16-bit EMA would lose"),
    (lambda: ops.momentum_update_(P[0], X, CLUSTER), ValueError, r"momentum_update_: centroids must be \[C,K,D\]"),
    (lambda: ops.momentum_update_(P.mT, X, CLUSTER), ValueError, r"centroids must be contiguous; got strides"),
    (
        lambda: ops.momentum_update_(P[..., :5].clone(), X, CLUSTER),
        ValueError,
        r"\[C,K,D\] with D=6 to match x; got \[2, 3, 5\]",
    ),
    (lambda: ops.momentum_update_(P, X, CLUSTER, momentum=1.5), ValueError, r"momentum must be in \[0,1\]; got 1.5"),
    (lambda: ops.momentum_update_(P, X, CLUSTER, momentum=float("nan")), ValueError, r"momentum must be in \[0,1\]; got nan"),
    (lambda: ops.momentum_update_(P, X, CLUSTER.to("meta")), ValueError, r"labels must be on cpu like x; got meta"),
    (lambda: ops.momentum_update_(P, X, CLUSTER, backend="cuda"), RuntimeError, r"'cuda' was asked for but cannot run"),
    (lambda: ops.apply_momentum_(P, X, CLUSTER), ValueError, r"sums must be \[M,D\]=\[6,6\] to match centroids; got \[20, 6\]"),
    (lambda: ops.apply_momentum_(P, X[:6], CLUSTER), ValueError, r"counts must be \[M\]=\[6\] to match centroids; got \[20\]"),
    (lambda: ops.apply_momentum_(P, X[:6], X[:6, 0]), TypeError, r"counts must be an integer tensor"),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_error_messages(case):
    call, kind, pattern = ERRORS[case]
    with pytest.raises(kind, match=pattern):
        call()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("value", "pixel"), [(3, 7), (10**12, 19)])
def test_cluster_out_of_range(backend, value, pixel):
    cluster = CLUSTER.clone()
    cluster[pixel:] = value
    message = rf": labels must be in \[0,(3|num_clusters)\), ignore_index or negative; got {value} at pixel {pixel}"
    with pytest.raises(ValueError, match="^cluster_sums" + message):
        ops.cluster_sums(X, cluster, 3, backend=backend)
    centroids = unit(3, 1, 6)
    before = centroids.clone()
    with pytest.raises(ValueError, match="^momentum_update_" + message):
        ops.momentum_update_(centroids, X, cluster, backend=backend)
    assert torch.equal(centroids, before)


def test_reference_leaves_out_of_range_clusters_out_while_compiling():
    cluster = CLUSTER.clone()
    cluster[4] = 99
    assert reference.sums_of(X, cluster, 3)[1].tolist() == [19, 0, 0]


@pytest.mark.parametrize("force", [False, True])
def test_a_momentum_in_a_tensor_moves_as_its_number(force, monkeypatch):
    """As a schedule gives it; where it cannot be read without a wait, plain torch moves."""
    if force:
        monkeypatch.setattr("dnc_kernels.ops.momentum.readable", lambda t: False)
    p = torch.nn.functional.normalize(torch.randn(3, 2, 5), dim=2)
    sums, counts = torch.randn(6, 5), torch.tensor([1, 0, 2, 3, 0, 1])
    expected, moved = p.clone(), p.clone()
    ops.apply_momentum_(expected, sums, counts, momentum=0.9, backend="reference")
    ops.apply_momentum_(moved, sums, counts, momentum=torch.tensor(0.9, dtype=torch.float64))
    torch.testing.assert_close(moved, expected)
    with pytest.raises(ValueError, match=r"apply_momentum_: momentum must be a number or a tensor \[\]; got \[1\] float32"):
        ops.apply_momentum_(p, sums, counts, momentum=torch.tensor([0.9]))
    if not force:
        with pytest.raises(ValueError, match=r"momentum must be in \[0,1\]; got 1.5"):
            ops.apply_momentum_(p, sums, counts, momentum=torch.tensor(1.5))
