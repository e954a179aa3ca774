"""`diagnose`, `Monitor` and the warning say whether sub-centroids are alive, and notice when they are dead."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from dnc_kernels import nn, ops
from dnc_kernels.nn._usage import dead_below, mean_pairwise, shares, usage

C, K, D = 3, 4, 16
pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(n=1200, spread=0.1, seed=100):
    """Samples [n,D] of K directions in each class, their classes, and the directions [C,K,D]."""
    g = generator(seed)
    centres = F.normalize(torch.randn(C, K, D, generator=g), dim=2)
    labels = torch.arange(n) % C
    return centres[labels, torch.randint(0, K, (n,), generator=g)] + spread * torch.randn(n, D, generator=g), labels, centres


class Net(torch.nn.Module):
    """A layer that the loss can train: it pulls the features of a class to one sub-centroid, as a backbone does."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Sequential(torch.nn.Linear(D, 64), torch.nn.ReLU(), torch.nn.Linear(64, D))
        self.head = nn.DNCClassifier(D, C, K, generator=generator(), **options)

    def forward(self, x, labels):
        return self.head.loss(self.backbone(x), labels)


def trained(steps, **options):
    """A net after so many steps, its data, and the warnings of the switch to evaluation."""
    net, (x, labels, _) = Net(**options), clusters()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    g = generator(1)
    for _ in range(steps):
        some = torch.randint(0, len(x), (64,), generator=g)
        optimizer.zero_grad()
        net(x[some], labels[some]).loss.backward()
        optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net.eval()
    return net, x, labels, [w for w in caught if issubclass(w.category, nn.DeadSubCentroidsWarning)]


@pytest.fixture(scope="module")
def slow():
    """The released momentum, too slow for so short a training: what the loss pulls to one sub-centroid stays there."""
    return trained(150, recipe="released")


def test_dead_sub_centroids_are_reported_and_warned_of(slow):
    net, x, labels, caught = slow
    diagnosis = net.head.diagnose([(x, labels)], backbone=net.backbone)
    assert diagnosis.overall["dead"] > 0.5 and diagnosis.overall["usage"] < 0.5
    assert diagnosis.overall["win_kmeans"] > diagnosis.overall["win"] + 0.05
    assert f"dead: {round(diagnosis.overall['dead'] * C * K)} of {C * K}" in str(diagnosis)
    (warning,) = caught
    assert f"of {C * K} sub-centroids are dead" in str(warning.message) and "refit_(data)" in str(warning.message)
    net.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.eval()  # once


def test_refitted_sub_centroids_are_alive(slow):
    net, x, labels, _ = copy.deepcopy(slow[0]), *slow[1:]
    net.head._warned_of_dead = False
    net.head.refit_([(x, labels)], backbone=net.backbone)
    diagnosis = net.head.diagnose([(x, labels)], backbone=net.backbone)
    assert diagnosis.overall["dead"] == 0 and diagnosis.overall["usage"] > 0.7
    assert diagnosis.overall["win"] == pytest.approx(diagnosis.overall["win_kmeans"], abs=0.02)
    with torch.no_grad():
        features = net.backbone(x)
    net.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.eval()  # nothing is known of the new ones yet
        net.train()
        for _ in range(120):
            net.head.loss(features, labels)
        net.eval()
    assert net.head.wins.sum() > 1000


@pytest.mark.parametrize(
    ("wins", "updates", "options", "warns"),
    [
        ([[90, 0, 0, 0], [90, 0, 0, 0], [30, 30, 30, 30]], 100, {}, False),  # 6 of 12
        ([[90, 0, 0, 0], [90, 0, 0, 0], [30, 30, 30, 0]], 100, {}, True),
        ([[90, 0, 0, 0], [90, 0, 0, 0], [30, 30, 30, 0]], 99, {}, False),
        ([[90, 0, 0, 0], [90, 0, 0, 0], [30, 30, 30, 0]], 150, {"warmup_steps": 100}, False),
        ([[90, 0, 0, 0], [90, 0, 0, 0], [30, 30, 30, 0]], 200, {"warmup_steps": 100}, True),
        ([[11, 0, 0, 0], [2, 0, 0, 0], [30, 30, 30, 30]], 100, {}, False),  # a few samples may well fall to one
        ([[0, 0, 0, 0]] * 3, 100, {}, False),
    ],
)
def test_when_it_warns(wins, updates, options, warns):
    module = nn.SubCentroids(C, K, D, **options)
    module.wins.copy_(torch.tensor(wins))
    module.num_updates.fill_(updates)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.eval()
    assert len(caught) == warns


# every number


def by_hand(p, e, labels, c):
    mine = e[labels == c].double()
    similarity = mine @ p[c].double().T
    share = torch.bincount(similarity.argmax(1), minlength=K) / len(mine)
    entropy = -(share[share > 0] * share[share > 0].log()).sum() / torch.tensor(float(K)).log()
    pairs = (p[c].double() @ p[c].double().T)[~torch.eye(K, dtype=torch.bool)]
    plan = ops.sinkhorn_plan(similarity, epsilon=0.05, iterations=3)
    return {
        "share": share,
        "usage": entropy,
        "dead": (share < 0.01).double().mean(),
        "win": similarity.amax(1).mean(),
        "to_mean": (mine @ F.normalize(mine.mean(0), dim=0)).mean(),
        "intra": pairs.mean(),
        "marginal_error": (plan.mean(0) - 1 / K).abs().sum() / 2,
    }


def test_numbers_are_those_computed_by_hand():
    x, labels, _ = clusters(300, spread=0.4)
    labels[labels == 2] = -1  # class 2 has no sample
    head = nn.DNCClassifier(D, C, K, generator=generator())
    start = head.prototypes.roll(1, 1)
    diagnosis = head.diagnose(x, labels, start=start)
    e = head.embed(x).detach()
    for c in range(2):
        for name, expected in by_hand(head.prototypes, e, labels, c).items():
            assert getattr(diagnosis, name)[c].tolist() == pytest.approx(expected.tolist(), abs=1e-5), name
    assert diagnosis.to_start[0] == pytest.approx(float((head.prototypes[0] * start[0]).sum(1).mean()), abs=1e-6)
    assert diagnosis.counts.tolist() == [100, 100, 0]
    for name in ("usage", "dead", "win", "to_mean", "win_kmeans", "intra", "intra_kmeans", "to_start", "marginal_error"):
        values = getattr(diagnosis, name)
        assert values[2].isnan()
        assert diagnosis.overall[name] == pytest.approx(float(values[:2].mean()), abs=1e-9), name
    assert head.diagnose(x, labels).to_start.isnan().all()


def test_marginals_are_weighted_means_of_the_batches():
    x, labels, _ = clusters(90, spread=0.4)
    head = nn.DNCClassifier(D, C, K, generator=generator())
    parts = [head.diagnose(x[a:b], labels[a:b]) for a, b in ((0, 60), (60, 90))]
    both = head.diagnose([(x[:60], labels[:60]), (x[60:], labels[60:])])
    expected = (2 * parts[0].marginal_error + parts[1].marginal_error) / 3
    assert both.marginal_error.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_k_means_is_what_the_features_set():
    """Sub-centroids at the true directions are as far apart as k-means finds, and as near to the samples."""
    x, labels, _ = clusters(spread=0.02)
    module = nn.SubCentroids(C, K, D, generator=generator())
    random = module.diagnose(x, labels)
    module.refit_(x, labels)
    fitted = module.diagnose(x, labels)
    assert fitted.intra.tolist() == pytest.approx(random.intra_kmeans.tolist(), abs=1e-4)
    assert fitted.overall["win"] == pytest.approx(random.overall["win_kmeans"], abs=1e-4)
    assert random.overall["to_mean"] < random.overall["win_kmeans"]


def test_one_sub_centroid_and_one_sample():
    head = nn.DNCClassifier(D, 2, 1, generator=generator())
    diagnosis = head.diagnose(torch.randn(1, D, generator=generator()), torch.tensor([1]))
    assert diagnosis.usage[1] == 1 and diagnosis.dead[1] == 0 and diagnosis.share[1].tolist() == [1]
    assert diagnosis.intra[1].isnan() and diagnosis.intra_kmeans[1].isnan() and diagnosis.marginal_error[1].isnan()
    assert diagnosis.win_kmeans[1] == pytest.approx(1, abs=1e-6)


def test_no_sample_at_all():
    head = nn.DNCHead(D, C, K)
    for data in ([], [(torch.randn(1, D, 2, 3), torch.full((1, 4, 6), 255))]):
        diagnosis = head.diagnose(data)
        assert not diagnosis.counts.any() and "nothing is known" in str(diagnosis)
        assert diagnosis.as_dict()["overall"]["dead"] is None


def test_diagnosis_changes_nothing():
    x, labels, _ = clusters()
    head = nn.DNCClassifier(D, C, K, generator=generator())
    head.loss(x, labels)
    before, state = copy.deepcopy(head), torch.get_rng_state()
    first, second = head.diagnose(x, labels), head.diagnose(x, labels)
    assert first.as_dict() == second.as_dict() and head.training
    assert all(torch.equal(a, b) for a, b in zip(head.buffers(), before.buffers(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(head.generator.get_state(), before.generator.get_state())


def test_it_reads_well_and_dumps_as_json():
    x, labels, _ = clusters(60)
    head = nn.DNCClassifier(D, 20, K, generator=generator())
    diagnosis = head.diagnose(x, labels)
    text, values = str(diagnosis), json.loads(json.dumps(diagnosis.as_dict(), allow_nan=False))
    assert all(len(line) < 128 for line in text.splitlines())
    assert "8 classes of higher usage" in text and text.splitlines()[-1] == diagnosis.verdict
    assert values["counts"][:4] == [20, 20, 20, 0] and values["usage"][3] is None and len(values["share"][0]) == K


def test_start_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"SubCentroids.diagnose: start must be \[C,K,D\]"):
        nn.SubCentroids(C, K, D).diagnose([], start=torch.zeros(C, D))


def test_usage_and_the_threshold():
    share = shares(torch.tensor([[1.0, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]]))
    assert usage(share)[:3].tolist() == pytest.approx([1, 0, 0.5]) and usage(share)[3].isnan()
    assert usage(shares(torch.tensor([[3.0], [0]])))[0] == 1
    # sub-centroids of equal share are never dead
    assert dead_below(4) == 0.01 and all(dead_below(k) < 1 / k for k in (10, 100, 256))
    rows = F.normalize(torch.randn(2, 3, 5), dim=2)
    first = rows[0, :2].double()
    assert float(mean_pairwise(rows, torch.tensor([[True, True, False], [True, False, False]]))[0]) == pytest.approx(
        float(first[0] @ first[1]), abs=1e-6
    )


# the monitor


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_monitor_sees_every_update():
    x, labels, _ = clusters(300)
    head = nn.DNCClassifier(D, C, K, momentum=0.5, memory_size=0, generator=generator())
    start, logged, writer = head.prototypes.clone(), [], Writer()
    with nn.Monitor(head, writer=writer, every=2, log=lambda values, step: logged.append((step, values))) as monitor:
        for _ in range(5):
            before = head.prototypes.clone()
            own = ops.class_scores(head.embed(x).detach(), before, labels).own_similarity
            head.loss(x, labels)
            if monitor.latest.get("step") == int(head.num_updates):
                latest = monitor.latest
                assert latest["win"] == pytest.approx(float(own.amax(1).mean()), abs=1e-5)
                assert latest["drift"] == pytest.approx(float((1 - (before * head.prototypes).sum(2)).mean()), abs=1e-6)
                assert latest["to_start"] == pytest.approx(float((start * head.prototypes).sum(2).mean()), abs=1e-6)
                cluster = head.cluster(own, labels)
                counts = torch.bincount(cluster, minlength=C * K).view(C, K) / 100
                assert latest["marginal_error"] == pytest.approx(float((counts - 0.25).abs().sum(1).mean() / 2), abs=1e-6)
                assert latest["usage"] == pytest.approx(float(usage(shares(head.wins)).mean()), abs=1e-6)
                assert latest["dead"] == pytest.approx(float((shares(head.wins) < 0.01).float().mean()), abs=1e-6)
    assert [record["step"] for record in monitor.history] == [2, 4]
    assert [step for step, _ in logged] == [2, 4] and "dnc/dead" in logged[0][1]
    assert {tag for tag, _, _ in writer.scalars} == {f"dnc/{name}" for name in monitor.latest if name != "step"}
    assert head.diagnose(x, labels).to_start.isnan().all()  # closed
    head.loss(x, labels)
    assert len(monitor.history) == 2


def test_monitor_knows_a_start_from_data():
    x, labels, _ = clusters(300)
    head = nn.DNCClassifier(D, C, K, init="data", init_step=1, momentum=1.0, generator=generator())
    with nn.Monitor(head) as monitor:
        for _ in range(3):
            head.loss(x, labels)
        assert [round(record["to_start"], 5) for record in monitor.history] == [1, 1, 1]
        assert monitor.history[1]["drift"] > 0.1
        assert head.diagnose(x, labels).overall["to_start"] == pytest.approx(1, abs=1e-6)


def test_segmentation_head_in_bands_and_without():
    records = []
    for checkpoint in ("all", "none"):
        torch.manual_seed(0)
        head = nn.DNCHead(D, C, K, checkpoint=checkpoint, generator=generator())
        x, labels = torch.randn(2, D, 4, 5), torch.randint(0, C, (2, 8, 10))
        labels[0, 0] = 255
        with nn.Monitor(head) as monitor:
            head.loss(x, labels)
        records.append(monitor.latest)
    assert records[0] == pytest.approx(records[1], abs=1e-5)


def test_update_by_hand_knows_no_similarities():
    module, writer = nn.SubCentroids(C, K, D), Writer()
    with nn.Monitor(module, writer=writer) as monitor:
        module.update_(F.normalize(torch.randn(12, D), dim=1), torch.arange(12))
    assert monitor.latest["win"] != monitor.latest["win"] and monitor.latest["marginal_error"] == 0
    assert {tag for tag, _, _ in writer.scalars} == {"dnc/drift", "dnc/to_start", "dnc/marginal_error"}


def test_copies_and_files_have_no_monitor():
    head = nn.DNCClassifier(D, C, K, generator=generator())
    keys = set(head.state_dict())
    with nn.Monitor(head) as monitor:
        saved = io.BytesIO()
        torch.save(head, saved)
        saved.seek(0)
        twins = [copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(saved, weights_only=False)]
        assert set(head.state_dict()) == keys
        for twin in twins:
            twin.loss(*clusters(30)[:2])
            assert torch.equal(twin.wins.sum(1), torch.full((C,), 10.0))
        assert not monitor.history
        head.loss(*clusters(30)[:2])
        assert len(monitor.history) == 1


def test_compiled_steps_are_watched_and_count_wins():
    torch._dynamo.reset()
    head, (x, labels, _) = nn.DNCClassifier(D, C, K, memory_size=0, generator=generator()), clusters(30)
    compiled = torch.compile(head, backend="eager")
    with nn.Monitor(head) as monitor:
        for _ in range(2):
            compiled(x, labels)
        assert [record["step"] for record in monitor.history] == [1, 2]
    wins = head.wins.clone()
    torch.compile(head, backend="eager", fullgraph=True)(x, labels)
    assert len(monitor.history) == 2 and (head.wins.sum(1) > wins.sum(1)).all()


def test_two_monitors_close_by_themselves():
    head = nn.DNCClassifier(D, C, K)
    first, second = nn.Monitor(head), nn.Monitor(head)
    first.close()
    first.close()
    head.loss(*clusters(30)[:2])
    assert not first.history and len(second.history) == 1


@pytest.mark.parametrize("options", [{"every": 0}, {"writer": 3}])
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=f"^Monitor: {next(iter(options))} must be"):
        nn.Monitor(nn.SubCentroids(C, K, D), **options)
