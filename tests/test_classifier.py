"""DNCClassifier and FeatureMemory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, assert_golden

from dnc_kernels import nn, ops

C, K, D = 6, 3, 12


pytestmark = pytest.mark.usefixtures("one_thread")


def make(**options):
    options = {"recipe": "released", "momentum": 0.9, "generator": torch.Generator().manual_seed(0), **options}
    return nn.DNCClassifier(D, C, K, **options)


def batch(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (n,), generator=g)
    labels[::9] = -100
    return torch.randn(n, D, generator=g), labels


# memory


class Rings:
    """The same memory as lists, one feature at a time."""

    def __init__(self, classes, size):
        self.size, self.lists, self.pushed = size, [[None] * size for _ in range(classes)], [0] * classes

    def push(self, features, labels):
        for feature, label in zip(features, labels.tolist(), strict=True):
            if label >= 0 and feature.isfinite().all():
                self.lists[label][self.pushed[label] % self.size] = feature
                self.pushed[label] += 1


@given(st.integers(1, 4), st.integers(1, 5), st.lists(st.integers(0, 14), min_size=1, max_size=5), st.integers(0, 99))
def test_memory_is_a_ring_for_each_class(classes, size, batches, seed):
    g = torch.Generator().manual_seed(seed)
    memory, rings = nn.FeatureMemory(classes, size, 3), Rings(classes, size)
    for n in batches:
        features = torch.randn(n, 3, generator=g)
        features[torch.rand(n, generator=g) < 0.1] = float("nan")
        labels = torch.randint(-2, classes, (n,), generator=g)
        memory.push(features, labels)
        rings.push(features, labels)
    held, labels = memory.read()
    for c in range(classes):
        for i, feature in enumerate(rings.lists[c]):
            row = c * size + i
            assert labels[row] == (-1 if feature is None else c)
            assert feature is None or torch.equal(held[row], feature)
    assert memory.pushed.tolist() == rings.pushed


def test_memory_keeps_no_graph_and_its_own_copy():
    memory = nn.FeatureMemory(2, 3, 4)
    x = torch.randn(2, 4, requires_grad=True)
    memory.push(x, torch.tensor([0, 1]))
    before = memory.read().features.clone()
    with torch.no_grad():
        x.zero_()
    assert not memory.read().features.requires_grad
    assert torch.equal(memory.read().features, before)


def test_own_similarity_of_the_memory_is_that_of_the_op():
    memory = nn.FeatureMemory(C, 5, D)
    x, labels = batch()
    memory.push(x, labels)
    p = make().prototypes
    held, owners = memory.read()
    expected = ops.class_scores(held.double(), p.double(), owners).own_similarity
    keep = owners >= 0
    assert keep.sum() < len(owners)
    assert_close(memory.own_similarity(p)[keep], expected[keep], "head", terms=D, scale=5)


def test_memory_resumes_exactly_and_forgets_on_demand():
    memory, twin = nn.FeatureMemory(C, 4, D), nn.FeatureMemory(C, 4, D)
    memory.push(*batch())
    twin.load_state_dict(copy.deepcopy(memory.state_dict()))
    for module in (memory, twin):
        module.push(*batch(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(memory.read(), twin.read(), strict=True))
    memory.clear()
    assert (memory.read().labels == -1).all() and int(memory.filled().sum()) == 0


def test_memory_checks_its_input():
    memory = nn.FeatureMemory(2, 3, 4)
    with pytest.raises(ValueError, match=r"FeatureMemory\.push: features must be \[N,4\]"):
        memory.push(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be \[2\] to match features"):
        memory.push(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="labels must be an integer tensor"):
        memory.push(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"push: labels must be in \[0,C\); any negative id .* out; got 2 at pixel 1 \(C=2\)"):
        memory.push(torch.zeros(2, 4), torch.tensor([-5, 2]))
    with pytest.raises(ValueError, match="size must be a positive integer"):
        nn.FeatureMemory(2, 0, 4)


# classifier


@pytest.mark.parametrize("scores", ["norm", "temperature", "scale"])
def test_loss_and_gradients_are_those_of_plain_torch(scores):
    model = make(
        scores=scores, memory_size=0, ppc_weight=0.3, ppd_weight=0.2, label_smoothing=0.1, class_weight=[1.0] * 5 + [3.0]
    )
    model.double()
    x, labels = batch()
    x, p = x.double().requires_grad_(), model.prototypes.clone()
    own = ops.class_scores(model.embed(x), p, labels).own_similarity
    cluster = model.cluster(own, labels)
    e = F.normalize(F.layer_norm(x, (D,), model.feat_norm.weight, model.feat_norm.bias), dim=1)
    s = e @ p.flatten(0, 1).T
    o = s.view(-1, C, K).amax(2)
    o = (
        F.layer_norm(o, (C,), model.mask_norm.weight, model.mask_norm.bias)
        if scores == "norm"
        else o / model.logit_temperature()
    )
    keep = cluster >= 0
    weight = model.class_weight.double()
    expected = (
        F.cross_entropy(o, labels, weight, label_smoothing=0.1)
        + 0.3 * F.cross_entropy(s, cluster, ignore_index=-1)
        + 0.2 * (1 - s[keep].gather(1, cluster[keep, None])).square().mean()
    )
    actual = model.loss(x, labels).loss
    assert_golden(actual, expected.detach(), "loss")
    tensors = [x, *model.parameters()]
    for a, b in zip(torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors), strict=True):
        assert_golden(a, b, "gradient")


def test_memory_feeds_the_clustering():
    model = make(memory_size=8, ppc_weight=0.0, ppd_weight=0.0, update_from="all")
    twin = copy.deepcopy(model)
    x, labels = batch(120)
    with torch.no_grad():
        past, past_labels = twin.embed(x[:100]), labels[:100]
        model.memory.push(past, past_labels)
        model.loss(x[100:], labels[100:])
        e = twin.embed(x[100:])
        held, owners = copy.deepcopy(nn.FeatureMemory(C, 8, D)), None
        held.push(past, past_labels)
        features, owners = held.read()
        both, group = torch.cat([e, features]), torch.cat([labels[100:], owners])
        own = ops.class_scores(both, twin.prototypes, group).own_similarity
        cluster = twin.cluster(own, group)[:20]
        twin.update_(e, cluster)
    assert torch.equal(model.last_counts, twin.last_counts)
    assert_close(model.prototypes, twin.prototypes.double(), "direction", terms=D)


def test_memory_takes_the_batch_after_the_step_and_gives_no_gradient():
    model = make(memory_size=8)
    x, labels = batch()
    result = model.loss(x.requires_grad_(), labels)
    held, owners = model.memory.read()
    assert int((owners >= 0).sum()) == int((labels >= 0).sum())
    assert_close(held[owners >= 0].norm(dim=1), torch.ones(int((owners >= 0).sum())).double(), "direction", terms=D)
    result.loss.backward()
    x.grad = None
    model.loss(x, labels).loss.backward()
    assert x.grad.isfinite().all()


def test_all_ignored_batch_gives_zeros_and_moves_nothing():
    model = make()
    before = model.prototypes.clone()
    x = torch.randn(5, D, requires_grad=True)
    result = model.loss(x, torch.full((5,), -100))
    result.loss.backward()
    assert [v.item() for v in result] == [0, 0, 0, 0, 0]
    assert x.grad.abs().max() == 0
    assert torch.equal(model.prototypes, before)
    assert int(model.memory.pushed.sum()) == 0


def test_empty_batch_gives_zeros():
    model = make()
    result = model.loss(torch.empty(0, D), torch.empty(0, dtype=torch.int64))
    assert result.loss == 0 and result.accuracy == 0
    assert model.eval().predict(torch.empty(0, D)).shape == (0,)


def test_non_finite_sample_gives_nan_loss_and_poisons_nothing():
    model, twin = make(), make()
    x, labels = batch()
    masked = labels.clone()
    masked[4] = -100
    twin.loss(x, masked)
    x[4, 2] = float("inf")
    assert model.loss(x, labels).loss.isnan()
    assert torch.equal(model.prototypes, twin.prototypes)
    assert torch.equal(model.memory.read().features, twin.memory.read().features)
    assert int(model.nonfinite_pixels) == 1


def test_evaluation_moves_nothing_and_remembers_nothing():
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    model.loss(*batch())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scores", ["norm", "scale"])
def test_prediction_is_the_argmax_of_the_logits(scores):
    model = make(scores=scores).eval()
    x, _ = batch(300)
    assert torch.equal(model.predict(x), model(x).argmax(1))


def test_class_counts_and_wrong_labels():
    model = make()
    x, labels = batch()
    model.loss(x, labels)
    assert model.class_counts.tolist() == torch.bincount(labels[labels >= 0], minlength=C).tolist()
    labels[3] = C
    with pytest.raises(
        ValueError, match=r"DNCClassifier\.loss: labels must be in \[0,6\); ignore_index -100 .*; got 6 at pixel 3"
    ):
        model.loss(x, labels)
    with pytest.raises(ValueError, match=r"features must be \[N,12\]"):
        model.loss(torch.randn(4, D + 1), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ignore_index must be outside \[0,6\)"):
        make(ignore_index=2)
    with pytest.raises(ValueError, match="memory_size must be a non-negative integer"):
        make(memory_size=-1)


def test_data_start_takes_batch_and_memory():
    model = make(init="data", init_step=1, memory_size=30)
    for seed in range(2):
        model.loss(*batch(60, seed))
    _, owners = model.memory.read()
    near, far = (model.memory.own_similarity(p).amax(1)[owners >= 0].mean() for p in (model.prototypes, make().prototypes))
    assert near > far + 0.2
    assert int(model.num_updates) == 2
    assert int((owners >= 0).sum()) > 60


def test_state_dict_round_trip_goes_on_exactly():
    model, twin = make(), make()
    model.loss(*batch())
    assert {"prototypes", "memory.storage", "memory.pushed"} < set(model.state_dict())
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    a, b = model.loss(*batch(seed=1)), twin.loss(*batch(seed=1))
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    assert torch.equal(model.prototypes, twin.prototypes)


def test_released_checkpoint_without_memory_loads():
    state = {f"head.{k}": v for k, v in make(memory_size=0).state_dict().items()}
    report = nn.load_released_state_dict(make(), state)
    assert report.kept == ["memory.pushed", "memory.storage"]


def test_training_learns_blobs():
    torch.manual_seed(0)
    centers = torch.randn(C, 2, 5)  # two modes a class
    net = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.ReLU(), torch.nn.Linear(32, D))
    model = make(scores="scale", momentum=0.99)
    optimizer = torch.optim.AdamW([*net.parameters(), *model.parameters()], lr=0.01)
    for _ in range(60):
        labels = torch.randint(0, C, (64,))
        x = centers[labels, torch.randint(0, 2, (64,))] + 0.1 * torch.randn(64, 5)
        result = model.loss(net(x), labels)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    labels = torch.arange(C).repeat(20)
    x = centers[labels, torch.arange(20).repeat_interleave(C) % 2] + 0.1 * torch.randn(120, 5)
    assert (model.eval().predict(net(x)) == labels).float().mean() > 0.95


def test_training_step_compiles():
    eager, twin = make(), make()
    compiled = torch.compile(twin.loss, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, labels = batch(seed=seed)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        eager.loss(a, labels).loss.backward()
        compiled(b, labels).loss.backward()
        assert_golden(b.grad, a.grad, "gradient")
    assert_close(twin.prototypes, eager.prototypes.double(), "direction", terms=D)
    assert torch.equal(twin.memory.pushed, eager.memory.pushed)


# what a sub-centroid stands for


def brute_force(prototypes, embedding, labels, count, nearest_only=False):
    """Lists of (similarity, sample, pixel), one for each sub-centroid."""
    maps = embedding if embedding.ndim == 4 else embedding[:, :, None, None]
    labels = labels.view(len(maps), -1)
    lists = []
    for c in range(len(prototypes)):
        for k in range(prototypes.shape[1]):
            found = []
            for i, image in enumerate(maps.flatten(2)):
                candidates = []
                for pixel in range(image.shape[1]):
                    own = prototypes[c] @ image[:, pixel]
                    if labels[i, pixel] == c and own.isfinite().all() and not (nearest_only and own.argmax() != k):
                        candidates.append((-float(own[k]), i, pixel))
                found += sorted(candidates)[:1]
            lists.append(sorted(found)[:count])
    return lists


@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 4), st.integers(0, 99))
def test_nearest_samples_are_those_of_a_search(classes, k, maps, nearest_only, count, seed):
    g = torch.Generator().manual_seed(seed)
    model = nn.SubCentroids(classes, k, 4, generator=g, dtype=torch.float64)
    shape = (7, 4, 2, 3) if maps else (17, 4)
    x = F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=1)
    x[2] = float("nan")
    labels = torch.randint(-2, classes, shape[:1] + shape[2:], generator=g)
    accumulator = nn.NearestSamples(model, count, nearest_only=nearest_only)
    for part in (slice(0, 3), slice(3, 3), slice(3, None)):  # one of the batches is empty
        accumulator.add(x[part], labels[part])
    result = accumulator.result()
    expected = brute_force(model.prototypes, x, labels, count, nearest_only)
    for row, found in enumerate(expected):
        c, s = divmod(row, k)
        n = len(found)
        assert result.sample[c, s].tolist() == [f[1] for f in found] + [-1] * (count - n)
        assert result.pixel[c, s].tolist() == [f[2] for f in found] + [-1] * (count - n)
        assert result.similarity[c, s, :n].tolist() == pytest.approx([-f[0] for f in found], abs=1e-12)
        assert (result.similarity[c, s, n:] == -torch.inf).all()


def test_nearest_samples_of_one_call_with_numbers_of_its_own():
    model = make()
    x, labels = batch()
    e = model.embed(x).detach()
    whole = nn.nearest_samples(model, e, labels, 4)
    accumulator = nn.NearestSamples(model, 4)
    accumulator.add(e, labels, torch.arange(40) + 1000)
    assert torch.equal(accumulator.result().sample, torch.where(whole.sample < 0, -1, whole.sample + 1000))
    valid = whole.sample >= 0
    classes = torch.arange(C)[:, None, None].expand_as(valid)
    assert torch.equal(labels[whole.sample[valid]], classes[valid])


@pytest.mark.parametrize("nearest_only", [True, False])
def test_nearest_samples_count_whom_each_sub_centroid_wins(nearest_only):
    model = make()
    x, labels = batch()
    e = model.embed(x).detach()
    e[3], labels[5] = torch.nan, -1
    accumulator = nn.NearestSamples(model, 1, nearest_only=nearest_only)
    for part in (slice(0, 7), slice(7, None)):
        accumulator.add(e[part], labels[part])
    expected = torch.zeros(C, K, dtype=torch.int64)
    for i in range(len(e)):
        if i != 3 and labels[i] >= 0:
            expected[labels[i], (model.prototypes[labels[i]] @ e[i]).argmax()] += 1
    assert torch.equal(accumulator.wins, expected)


def test_nearest_samples_do_not_follow_later_training():
    model = make()
    x, labels = batch()
    accumulator = nn.NearestSamples(model, 2)
    expected = nn.nearest_samples(model, model.embed(x).detach(), labels, 2)
    e = model.embed(x).detach()
    model.loss(x, labels)
    accumulator.add(e, labels)
    assert all(torch.equal(a, b) for a, b in zip(accumulator.result(), expected, strict=True))


def test_nearest_samples_check_their_input():
    accumulator = nn.NearestSamples(make(), 2)
    with pytest.raises(ValueError, match=r"NearestSamples\.add: labels must be \[N\]=\[3\] to match embedding"):
        accumulator.add(torch.zeros(3, D), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"samples must be \[3\]"):
        accumulator.add(torch.zeros(3, D), torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"NearestSamples\.add: embedding must be of unit length; got .* \(pass head\.embed"):
        accumulator.add(torch.full((3, D), 9.0) * accumulator.prototypes[0, 0], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="count must be a positive integer"):
        nn.NearestSamples(make(), 0)
    with pytest.raises(
        ValueError, match=r"labels must be in \[0,6\); ignore_index -100 or any negative id .*; got 6 at pixel 1"
    ):
        accumulator.add(torch.zeros(3, D), torch.tensor([-5, 6, 0]))
    with pytest.raises(ValueError, match=r"labels must be in \[0,C\); any negative id leaves a pixel out; got 6 at pixel 1"):
        nn.NearestSamples(nn.SubCentroids(C, K, D), 2).add(torch.zeros(3, D), torch.tensor([-5, 6, 0]))


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 3, 6), (3, 4, 6), (24,), (2, 1, 4, 6)], ids=str)
def test_nearest_samples_refuse_labels_of_other_pixels(shape):
    head = nn.DNCHead(D, C, K)
    with pytest.raises(
        ValueError, match=r"NearestSamples\.add: labels must be \[N\]=\[48\] or \[B,H,W\]=\[2, 4, 6\], or larger"
    ):
        nn.NearestSamples(head, 2).add(torch.zeros(2, D, 4, 6), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("recipe", ["default", "released"])
def test_nearest_samples_resize_the_labels_of_the_images_as_the_loss_does(recipe):
    head = nn.DNCHead(D, C, K, recipe=recipe).eval()
    e, labels = head.embed(torch.randn(2, D, 4, 6)).detach(), torch.randint(0, C, (2, 13, 18), dtype=torch.uint8)
    labels[0, :5] = 255
    mode = {"default": "nearest-exact", "released": "nearest"}[recipe]
    small = F.interpolate(labels[:, None].double(), (4, 6), mode=mode)[:, 0].long()
    expected = nn.nearest_samples(head, e, torch.where(small == 255, -1, small), 3)
    for ids in (labels, small, small.reshape(-1)):
        assert all(torch.equal(a, b) for a, b in zip(nn.nearest_samples(head, e, ids, 3), expected, strict=True))


def test_nearest_samples_leave_out_what_the_caller_names():
    module, x = nn.SubCentroids(C, K, D), F.normalize(torch.randn(30, D), dim=1)
    labels = torch.randint(0, C, (30,))
    labels[::3] = 77
    expected = nn.nearest_samples(module, x, torch.where(labels == 77, -1, labels), 3)
    odd = labels.clone()
    odd[::6] = -9
    for ids in (labels, odd):
        assert all(
            torch.equal(a, b) for a, b in zip(nn.nearest_samples(module, x, ids, 3, ignore_index=77), expected, strict=True)
        )


@pytest.mark.parametrize("function", ["forward", "embed", "predict", "explain", "loss", "initialize_from_"])
def test_errors_name_the_function_that_was_called(function):
    arguments = (torch.zeros(3, dtype=torch.int64),) if function in ("loss", "initialize_from_") else ()
    with pytest.raises(ValueError, match=rf"^DNCClassifier\.{function}: features must be"):
        getattr(make(), function)(torch.randn(3, D + 1), *arguments)


def test_any_negative_label_leaves_a_sample_out():
    (x, labels), outcomes = batch(), []
    for ids in (labels, torch.where(labels < 0, torch.randint(-150, 0, labels.shape), labels)):
        model, y = make(), x.clone().requires_grad_()
        result = model.loss(y, ids)
        result.loss.backward()
        assert int(model.bad_labels) == 0
        started = make().initialize_from_(x, ids)
        outcomes.append([*result, y.grad, model.prototypes, model.class_counts, *model.memory.read(), started])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_forward_with_labels_is_the_loss():
    model, twin, (x, labels) = make(), make(), batch()
    assert all(torch.equal(a, b) for a, b in zip(model(x, labels), twin.loss(x, labels), strict=True))
    assert torch.equal(model.prototypes, twin.prototypes) and int(model.memory.pushed.sum()) > 0
    model.eval()(x, labels)
    assert int(model.num_updates) == 1
    with pytest.raises(ValueError, match=r"DNCClassifier\.forward: update must be None without labels"):
        model(x, update=False)


def test_samples_of_several_losses_move_the_sub_centroids_once():
    options = {"momentum": 0.5, "memory_size": 0, "update_from": "all", "ppc_weight": 0, "ppd_weight": 0}
    model, twin = make(accumulation_steps=2, **options), make(**options)
    (x, labels), start = batch(), model.prototypes.clone()
    e = model.embed(x).detach()
    total = torch.zeros(len(start) * start.shape[1], x.shape[1])
    for _ in range(2):
        assert torch.equal(model.prototypes, start) and int(model.num_updates) == 0
        own = ops.class_scores(e, start, labels, ignore_index=-1).own_similarity
        total += ops.cluster_sums(e, twin.cluster(own, labels), len(total)).sums
        model.loss(x, labels)
    ops.apply_momentum_(twin.prototypes, total, (total != 0).any(1).to(torch.int64), momentum=0.5)
    assert int(model.num_updates) == 1 and not torch.equal(model.prototypes, start)
    assert_close(model.prototypes, twin.prototypes.double(), "direction", terms=x.shape[1])
