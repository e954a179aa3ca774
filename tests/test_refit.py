"""`refit_` is spherical k-means of each class over all the data, however they come."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from two_processes import results_of_ranks

from dnc_kernels import nn
from dnc_kernels.nn import _kmeans, _starts
from dnc_kernels.nn._batches import embedded

C, K, D = 3, 4, 16
pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(n=600, spread=0.25, seed=100, classes=C, k=K, channels=D):
    """Samples [n,D] of K directions in each class, their classes, and the directions [C,K,D]."""
    g = generator(seed)
    centres = F.normalize(torch.randn(classes, k, channels, generator=g), dim=2)
    labels = torch.arange(n) % classes
    which = torch.randint(0, k, (n,), generator=g)
    x = centres[labels, which] + spread * torch.randn(n, channels, generator=g) / channels**0.5 * 4
    return x, labels, centres


def cosine(prototypes, x, labels):
    """Mean cosine of the samples to their nearest own sub-centroid, in float64."""
    e, p = F.normalize(x.double(), dim=1), F.normalize(prototypes.double(), dim=2)
    return float((e[:, None] * p[labels]).sum(2).amax(1).mean())


def sub_centroids(**options):
    return nn.SubCentroids(C, K, D, generator=generator(), **options)


@pytest.fixture
def little_memory(monkeypatch):
    """A draw of 4 K samples of each class, so that the steps go through the data again."""
    monkeypatch.setattr(_kmeans, "RESERVOIR", 1)


def test_finds_the_clusters_that_are_there():
    x, labels, centres = clusters(spread=0.05)
    module = sub_centroids()
    before = cosine(module.prototypes, x, labels)
    result = module.refit_(x, labels)
    found = (module.prototypes[:, :, None] * centres[:, None]).sum(3)
    assert (found.amax(1) > 0.99).all()  # every direction by some sub-centroid
    assert result.before == pytest.approx(before, abs=1e-5)
    assert result.after == pytest.approx(cosine(module.prototypes, x, labels), abs=1e-5)
    assert result.counts.sum(1).tolist() == [200] * C and (result.counts > 20).all()
    assert_close(module.prototypes.norm(dim=2), torch.ones(C, K, dtype=torch.float64), "direction", terms=D)


@pytest.mark.parametrize("spread", [0.15, 0.5])
@pytest.mark.parametrize("fits", [True, False])
def test_is_as_good_as_scikit_learn(spread, fits, monkeypatch):
    cluster = pytest.importorskip("sklearn.cluster")
    if not fits:
        monkeypatch.setattr(_kmeans, "RESERVOIR", 1)
    x, labels, _ = clusters(1500, spread)
    module = sub_centroids()
    batches = list(zip(x.split(200), labels.split(200), strict=True))
    ours = module.refit_(batches, iterations=30).after
    e = F.normalize(x, dim=1)
    centres = []
    for c in range(C):
        found = cluster.KMeans(K, n_init=10, random_state=0).fit(e[labels == c].numpy()).cluster_centers_
        centres.append(F.normalize(torch.from_numpy(found), dim=1))
    theirs = cosine(torch.stack(centres), x, labels)
    assert ours == pytest.approx(cosine(module.prototypes, x, labels), abs=1e-5)
    # of the way from one centre a class to k-means
    one = cosine(torch.stack([F.normalize(e[labels == c].mean(0), dim=0)[None] for c in range(C)]), x, labels)
    assert ours - one >= 0.97 * (theirs - one)


@pytest.mark.parametrize("start", ["data", "current"])
def test_batches_give_what_one_tensor_gives(start, little_memory):
    x, labels, _ = clusters()
    once, streamed, loaded = (sub_centroids() for _ in range(3))
    expected = once.refit_(x, labels, start=start)
    batches = [(a, b, "further items") for a, b in zip(x.split(70), labels.split(70), strict=True)]
    result = streamed.refit_(batches, start=start)
    assert result.iterations == expected.iterations > 0
    assert torch.equal(result.counts, expected.counts)
    assert result.after == pytest.approx(expected.after, abs=1e-6)
    assert_close(streamed.prototypes, once.prototypes.double(), "direction", terms=600)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=70)
    loaded.refit_(loader, start=start)
    assert torch.equal(loaded.prototypes, streamed.prototypes)  # and the same bits again


def test_steps_over_all_samples_improve_on_the_draw(little_memory):
    x, labels, _ = clusters(1500, 0.5)
    results = []
    for iterations in (0, 1, 20):
        module = sub_centroids()
        results.append(module.refit_(x, labels, iterations=iterations, tolerance=0))
        assert results[-1].after == pytest.approx(cosine(module.prototypes, x, labels), abs=1e-5)
        assert results[-1].iterations <= iterations
    assert results[0].iterations == 0 and results[1].iterations == 1
    assert results[0].after < results[1].after < results[2].after
    assert sub_centroids().refit_(x, labels, iterations=20, tolerance=1.0).iterations == 1


def test_no_step_lowers_the_cosine(little_memory):
    x, labels, _ = clusters(900, 0.5)
    module = sub_centroids()
    reached = []
    for _ in range(6):
        result = module.refit_(x, labels, start="current", iterations=1, tolerance=0)
        reached += [result.before, result.after]
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(reached))


def test_dead_sub_centroids_start_anew_from_the_draw(little_memory):
    x, labels, centres = clusters(spread=0.05)
    module = sub_centroids()
    module.prototypes.copy_(-centres.mean(1, keepdim=True) + 0.01 * torch.randn(C, K, D, generator=generator(1)))
    module.prototypes[:, 0] = centres[:, 0]  # wins everything
    module.prototypes.copy_(F.normalize(module.prototypes, dim=2))
    result = module.refit_(x, labels, start="current")
    assert (result.counts > 0).all() and result.after > 0.9


def test_classes_without_enough_samples_keep_the_rest():
    x, labels = torch.eye(D)[[0, 0, 1, 5]], torch.tensor([0, 0, 0, 1])
    module = sub_centroids()
    before = module.prototypes.clone()
    result = module.refit_(x, labels)
    assert result.after == pytest.approx(1, abs=1e-6)
    for c, directions in ((0, (0, 1)), (1, (5,)), (2, ())):
        kept = (module.prototypes[c][:, None] == before[c]).all(2).any(1)
        assert int(kept.sum()) == K - len(directions)
        assert (module.prototypes[c] @ torch.eye(D)[list(directions)].T > 0.999).sum() == len(directions)
    assert result.counts.sum(1).tolist() == [3, 1, 0]


def test_nothing_labelled_changes_nothing():
    module = sub_centroids()
    before = module.prototypes.clone()
    result = module.refit_(torch.randn(5, D), torch.full((5,), -1))
    assert torch.equal(module.prototypes, before) and math.isnan(result.before) and math.isnan(result.after)
    assert not module.refit_([]).counts.any()


def test_segmentation_head_and_its_backbone():
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, D, 1), torch.nn.BatchNorm2d(D), torch.nn.Dropout(0.5))
    head = nn.DNCHead(D, C, K, embed_channels=8, generator=generator())
    images = torch.randint(0, 255, (6, 3, 4, 5), generator=generator(), dtype=torch.uint8)
    labels = torch.randint(-1, C, (6, 8, 10), generator=generator())  # twice the size of the features
    labels[0] = 255
    statistics = backbone[1].running_mean.clone()
    batches = [(images[i : i + 2], labels[i : i + 2], ["name"]) for i in (0, 2, 4)]
    twin = nn.DNCHead(D, C, K, embed_channels=8, generator=generator())
    twin.load_state_dict(head.state_dict())
    result = head.refit_(batches, backbone=backbone, prepare=lambda images: images / 255)
    assert backbone.training and backbone[2].training and head.training
    assert torch.equal(backbone[1].running_mean, statistics)
    with torch.no_grad():
        features = backbone.eval()(images / 255)
    assert twin.refit_(features, labels).after == pytest.approx(result.after, abs=1e-5)
    used = nn.resize_labels(labels, (4, 5))
    assert result.counts.sum(1).tolist() == [int((used == c).sum()) for c in range(C)]
    with torch.no_grad():
        e, ids = head.embed(features).permute(0, 2, 3, 1).reshape(-1, 8), used.reshape(-1)
    kept = (ids >= 0) & (ids < C)
    assert result.after == pytest.approx(cosine(head.prototypes, e[kept], ids[kept]), abs=1e-5)


def test_classifier_in_half_and_in_double_precision():
    x, labels, _ = clusters()
    x[0, 0], labels[1] = float("nan"), -100
    reached = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        head = nn.DNCClassifier(D, C, K, generator=generator(), dtype=dtype)
        result = head.refit_(x.to(dtype), labels)
        assert int(result.counts.sum()) == 598 and head.prototypes.isfinite().all()
        reached[dtype] = result.after
    assert reached[torch.float64] == pytest.approx(reached[torch.float32], abs=1e-3)
    assert reached[torch.bfloat16] == pytest.approx(reached[torch.float32], abs=2e-2)


def test_counters_of_the_old_sub_centroids_go():
    x, labels, _ = clusters()
    head = nn.DNCClassifier(D, C, K, init="data", init_step=5, revive_after=1)
    head.loss(x, labels)
    head.idle_updates.fill_(3)
    assert head.wins.any()
    head.refit_(x, labels)
    assert not head.wins.any() and not head.idle_updates.any()
    placed = head.prototypes.clone()
    for _ in range(6):  # the start from data that was due does not come
        head.loss(x, labels)
    assert (placed * head.prototypes).sum(2).min() > 0.9


def test_what_cannot_be_gone_through_again_is_refused(little_memory):
    x, labels, _ = clusters()
    batches = zip(x.split(100), labels.split(100), strict=True)
    with pytest.raises(ValueError, match=r"refit_: data must be something that can be gone through again"):
        sub_centroids().refit_(batches)


def test_what_fits_needs_one_pass():
    x, labels, _ = clusters()
    once, twin = sub_centroids(), sub_centroids()
    once.refit_(zip(x.split(100), labels.split(100), strict=True))
    twin.refit_(x, labels)
    assert_close(once.prototypes, twin.prototypes.double(), "direction", terms=600)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((torch.zeros(4, D),), {}, ValueError, "labels must be given with a tensor"),
        (([], torch.zeros(4)), {}, ValueError, "labels must be None"),
        ((3,), {}, TypeError, "data must be a tensor or batches"),
        (([torch.zeros(4, D)],), {}, TypeError, "data must be batches"),
        ((torch.zeros(4, D), torch.zeros(4, dtype=torch.int64)), {"prepare": abs}, ValueError, "prepare must be None"),
        ((torch.zeros(4, D + 1), torch.zeros(4, dtype=torch.int64)), {}, ValueError, f"features must be of D={D}"),
        ((torch.zeros(4, D), torch.zeros(3, dtype=torch.int64)), {}, ValueError, "labels must be"),
        ((torch.zeros(4, D), torch.full((4,), C)), {}, ValueError, "labels must be in"),
        (([],), {"start": "random"}, ValueError, "start must be one of"),
        (([],), {"tolerance": -1}, ValueError, "tolerance must be"),
        (([],), {"iterations": -1}, ValueError, "iterations must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, text):
    with pytest.raises(error, match=f"^SubCentroids.refit_: {text}"):
        sub_centroids().refit_(*arguments, **options)


# the parts


@pytest.mark.parametrize("n", [5, 40])  # fewer samples than sub-centroids, and more
def test_totals_are_sums_of_what_is_won(n):
    x, labels, centres = clusters(n)
    x, labels = F.normalize(x, dim=1), torch.where(torch.arange(n) == 1, -1, labels)
    totals = _kmeans.Totals.zeros(centres)
    for _ in range(2):
        own = totals.add_(x, labels, centres)
    cluster = torch.where(labels >= 0, labels * K + own.argmax(1), C * K)
    expected = torch.zeros(C * K + 1, D, dtype=torch.float64).index_add_(0, cluster, 2 * x.double())[:-1]
    assert_close(totals.sums.float().view(C * K, D), expected, "sum", terms=n)
    assert torch.equal(totals.counts.flatten(), 2 * torch.bincount(cluster, minlength=C * K + 1)[:-1])
    kept = labels >= 0
    assert totals.mean_cosine(centres) == pytest.approx(cosine(centres, x[kept], labels[kept]), abs=1e-6)


def test_batches_leave_no_trace():
    """Neither a gradient, nor a mode of its own where nobody is computing."""
    backbone, head = torch.nn.Linear(5, D), nn.DNCClassifier(D, C, K).eval()
    batches = embedded(head, "test", [(torch.randn(4, 5), torch.arange(4) - 1)], backbone=backbone)
    for _ in range(2):
        for e, group in batches:
            assert torch.is_grad_enabled() and not e.requires_grad and backbone.training and not head.training
            assert group.tolist() == [-1, 0, 1, 2]
            assert_close(e.norm(dim=1), torch.ones(4, dtype=torch.float64), "embedding", terms=D)


def test_reservoir_is_an_even_draw_of_each_class(monkeypatch):
    monkeypatch.setattr(_kmeans, "RESERVOIR", 1)
    size, n = 4 * 8, 400
    seen = torch.zeros(n)
    for trial in range(200):
        reservoir = _kmeans.Reservoir(torch.zeros(2, 8, 1))
        reservoir._generator.manual_seed(trial)
        numbers = torch.arange(float(n))[:, None]
        for some in numbers.split([1, 9, 90, 300]):
            reservoir.add(some, torch.zeros(len(some), dtype=torch.int64))
            reservoir.add(some[:3], torch.tensor([1, -1, -1])[: len(some)])
        rows, group = reservoir.held()
        first, second = rows[group == 0, 0], rows[group == 1, 0]
        assert len(first.unique()) == size and second.tolist() == [0, 1, 10, 100]
        assert not reservoir.complete()
        seen[first.long()] += 1
    expected = 200 * size / n  # 16, a deviation of 3.8
    assert seen.min() > 2 and seen.max() < 36
    assert all(abs(float(part.mean()) - expected) < 2 for part in seen.split(100))


@pytest.mark.parametrize("classes", [2, 30])  # many rows of a class, and few
def test_similarities_are_those_of_the_own_class(classes):
    x, labels = F.normalize(torch.randn(50, D), dim=1), torch.randint(-1, classes, (50,))
    centres, kept = F.normalize(torch.randn(classes, K, D), dim=2), labels >= 0
    expected = (x[:, None].double() * centres[labels].double()).sum(2)
    assert_close(_starts.own_similarity(x, centres, labels)[kept], expected[kept], "similarity", terms=D)
    assert _starts.own_similarity(x[:0], centres, labels[:0]).shape == (0, K)


# ranks


def part(rank):
    x, labels, _ = clusters()
    return (x[:250], labels[:250]) if rank == 0 else (x[250:], labels[250:].where(labels[250:] > 0, -1))


def run(rank, start, parts):
    module = nn.SubCentroids(C, K, D, generator=generator(rank))
    module.prototypes.copy_(F.normalize(torch.randn(C, K, D, generator=generator(7)), dim=2))
    data = [pair for x, labels in parts for pair in zip(x.split(100), labels.split(100), strict=True)]
    result = module.refit_(data, start=start, tolerance=0, iterations=5)
    return {"prototypes": module.prototypes.clone(), "counts": result.counts, "after": torch.tensor(result.after)}


def diagnosed(rank):
    return nn.SubCentroids(C, K, D, generator=generator()).diagnose(*part(rank)).as_dict()


def with_little_memory(scenario):
    def of_rank(rank):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_kmeans, "RESERVOIR", 1)
            return scenario(rank)

    return of_rank


SCENARIOS = {
    "data": lambda rank: run(rank, "data", [part(rank)]),
    "current": lambda rank: run(rank, "current", [part(rank)]),
    "streamed": with_little_memory(lambda rank: run(rank, "data", [part(rank)])),
    "diagnosis": with_little_memory(diagnosed),
}


def test_two_processes_do_what_one_does(tmp_path):
    a, b = results_of_ranks(__name__, tmp_path)
    for name in ("data", "current", "streamed"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
    for start in ("data", "current"):
        expected = run(0, start, [part(0), part(1)])
        assert torch.equal(a[start]["counts"], expected["counts"])
        assert_close(a[start]["prototypes"], expected["prototypes"].double(), "direction", terms=600)
    assert float(a["streamed"]["after"]) == pytest.approx(float(a["data"]["after"]), abs=0.02)
    assert a["diagnosis"] == b["diagnosis"]
    x, labels = map(torch.cat, zip(part(0), part(1), strict=True))
    alone = nn.SubCentroids(C, K, D, generator=generator()).diagnose(x, labels)
    assert a["diagnosis"]["counts"] == alone.counts.tolist()
    for name in ("usage", "dead", "win", "to_mean", "intra"):
        assert a["diagnosis"][name] == pytest.approx(getattr(alone, name).tolist(), abs=1e-5)
