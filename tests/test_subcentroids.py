"""SubCentroids: starts, clustering, updates, schedules, revival, what is saved."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from dnc_kernels import nn, ops


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def clustered(classes=3, k=4, channels=16, each=20, spread=0.05):
    """Unit features around K well separated directions a class, their labels, and the directions."""
    centers = F.normalize(torch.linalg.qr(torch.randn(channels, channels)).Q[: classes * k], dim=1)
    which = torch.arange(classes * k).repeat_interleave(each)
    x = F.normalize(centers[which] + spread * torch.randn(len(which), channels) / math.sqrt(channels), dim=1)
    shuffle = torch.randperm(len(which))
    return x[shuffle], (which // k)[shuffle], centers.view(classes, k, channels)


def own_similarity(module, x, labels):
    return ops.class_scores(x, module.prototypes, labels).own_similarity


def step(module, x, labels, **options):
    own = own_similarity(module, x, labels)
    module.update_(x, module.cluster(own, labels), own_similarity=own, **options)


# starts


@pytest.mark.parametrize("init", ["random", "orthogonal", "data"])
def test_start_is_of_unit_length_and_comes_from_the_generator(init):
    make = lambda seed: nn.SubCentroids(7, 5, 12, init=init, generator=generator(seed)).prototypes  # noqa: E731
    assert_close(make(0).norm(dim=2), torch.ones(7, 5, dtype=torch.float64), "direction", terms=12)
    assert torch.equal(make(0), make(0))
    assert not torch.equal(make(0), make(1))


def test_orthogonal_start_makes_the_sub_centroids_of_a_class_orthogonal():
    p = nn.SubCentroids(6, 4, 8, init="orthogonal").prototypes.double()
    assert_close((p @ p.mT).float(), torch.eye(4).double().expand(6, 4, 4), "direction", terms=8, scale=1)


def test_orthogonal_start_serves_more_rows_than_channels():
    p = nn.SubCentroids(5, 7, 3, init="orthogonal").prototypes
    assert p.shape == (5, 7, 3)
    assert p.isfinite().all()


def test_data_start_finds_separated_clusters():
    x, labels, centers = clustered()
    module = nn.SubCentroids(3, 4, 16, generator=generator())
    counts = module.initialize_from_(3 * x, labels)
    assert counts.tolist() == [80, 80, 80]
    similarity = centers @ module.prototypes.mT  # [C,K,K]: every centre has its own sub-centroid
    assert (similarity.amax(2) > 0.99).all()
    assert all(similarity[c].argmax(1).unique().numel() == 4 for c in range(3))


def test_data_start_keeps_the_random_start_of_absent_classes_and_of_missing_pixels():
    x, labels = unit(5, 16), torch.tensor([0, 0, 1, 1, -1])
    x[3] = x[2]  # class 1 has one distinct pixel
    module = nn.SubCentroids(3, 2, 16, generator=generator())
    before = module.prototypes.clone()
    module.initialize_from_(x, labels, refinements=2)
    assert torch.equal(module.prototypes[2], before[2])
    assert torch.equal(module.prototypes[1, 1], before[1, 1])
    assert_close(module.prototypes[1, 0], x[2].double(), "direction", terms=16)


def test_data_start_takes_feature_maps_and_leaves_out_what_is_not_finite():
    x, labels = torch.randn(2, 16, 3, 4), torch.zeros(2, 3, 4, dtype=torch.uint8)
    x[0, 3, 1, 1], x[1, 0, 2, 3] = float("nan"), float("inf")
    module = nn.SubCentroids(2, 3, 16)
    assert module.initialize_from_(x, labels).tolist() == [22, 0]
    assert module.prototypes.isfinite().all()


def test_data_start_happens_at_its_update_and_once():
    x, labels, _ = clustered(each=5)
    module = nn.SubCentroids(3, 4, 16, init="data", init_step=2, momentum=1.0, generator=generator())
    before = module.prototypes.clone()
    history = []
    for _ in range(4):
        step(module, x, labels)
        # momentum 1 renormalises: the last bit may change
        history.append(bool((module.prototypes - before).abs().max() < 1e-6))
        before = module.prototypes.clone()
    assert history == [True, True, False, True]
    assert (x @ module.prototypes.flatten(0, 1).T).amax(1).min() > 0.9


@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 3}, {"revive_after": 1}], ids=str)
def test_an_update_that_starts_from_data_does_nothing_else(options):
    options = {"init": "data", "init_step": 1, "momentum": 0.0, **options}
    module, other = (nn.SubCentroids(3, 4, 16, generator=generator(), **options) for _ in range(2))
    x, labels, _ = clustered()
    for each in (module, other):
        step(each, x, labels)
    assert module.wins.any()
    step(module, x, labels)
    other.initialize_from_(x, labels)
    assert torch.equal(module.prototypes, other.prototypes)
    assert not module.wins.any() and not module.idle_updates.any()
    if module.accumulated_counts is not None:
        assert not module.accumulated_counts.any() and not module.accumulated_sums.any()


def test_initialising_forgets_what_was_accumulated_for_other_sub_centroids():
    x, labels, _ = clustered()
    module = nn.SubCentroids(3, 4, 16, accumulation_steps=2, momentum=0.0, generator=generator())
    step(module, x, labels)
    module.initialize_from_(x, labels)
    started = module.prototypes.clone()
    step(module, x, labels)
    assert torch.equal(module.prototypes, started) and int(module.accumulated_updates) == 1


def test_empty_batch_starts_nothing():
    module = nn.SubCentroids(3, 2, 4)
    before = module.prototypes.clone()
    assert module.initialize_from_(torch.empty(0, 4), torch.empty(0, dtype=torch.int64)).tolist() == [0, 0, 0]
    assert torch.equal(module.prototypes, before)


# clustering


def test_cluster_numbers_the_assignment_of_the_op():
    module = nn.SubCentroids(4, 3, 8)
    x, labels = unit(50, 8), torch.randint(-3, 4, (50,))
    own = own_similarity(module, x, labels)
    group = labels.clamp(min=-1)
    sub = ops.sinkhorn_assign(own, group, 4)
    assert torch.equal(module.cluster(own, labels), torch.where(group < 0, -1, group * 3 + sub))


def test_cluster_leaves_out_pixels_without_finite_similarities_and_nobody_else_notices():
    module = nn.SubCentroids(2, 3, 8)
    x, labels = unit(30, 8), torch.arange(30) % 2
    own = own_similarity(module, x, labels)
    own[4], own[7, 1] = float("nan"), float("inf")
    cluster = module.cluster(own, labels)
    keep = torch.ones(30, dtype=torch.bool)
    keep[[4, 7]] = False
    assert (cluster[~keep] == -1).all()
    assert torch.equal(cluster[keep], module.cluster(own[keep], labels[keep]))


def test_cluster_balances_a_class():
    module = nn.SubCentroids(1, 4, 8, epsilon=0.01, iterations=50)
    x = unit(400, 8)
    labels = torch.zeros(400, dtype=torch.int64)
    cluster = module.cluster(own_similarity(module, x, labels), labels)
    counts = torch.bincount(cluster, minlength=4)
    assert counts.min() > 80 and counts.max() < 120


def test_maps_give_maps_and_rows_give_rows():
    module, twin = (nn.SubCentroids(4, 3, 8, momentum=0.5, revive_after=1, generator=generator()) for _ in range(2))
    maps, labels = unit(2, 5, 6, 8).permute(0, 3, 1, 2), torch.randint(-2, 4, (2, 5, 6), dtype=torch.int8)
    rows, flat = maps.permute(0, 2, 3, 1).reshape(-1, 8), labels.flatten()
    own = own_similarity(module, rows, flat)  # [N,K]
    own_map = own.view(2, 5, 6, 3).permute(0, 3, 1, 2)
    cluster, correct = module.cluster(own, flat), flat % 2 == 0
    assert cluster.shape == (60,) and torch.equal(module.cluster(own_map, labels), cluster.view(2, 5, 6))
    assert torch.equal(module.cluster(own_map, flat), cluster.view(2, 5, 6))
    for _ in range(2):
        module.update_(maps, cluster.view(2, 5, 6), correct=correct.view(2, 5, 6), own_similarity=own_map)
        twin.update_(rows, cluster, correct=correct, own_similarity=own)
    assert_close(module.prototypes, twin.prototypes.double(), "direction", terms=60)
    assert torch.equal(module.last_counts, twin.last_counts) and torch.equal(module.idle_updates, twin.idle_updates)


def test_any_negative_id_leaves_a_pixel_out():
    x, labels, _ = clustered()
    outcomes = []
    for left_out in (torch.full_like(labels, -1), torch.randint(-90, 0, labels.shape)):
        module = nn.SubCentroids(3, 4, 16, generator=generator())
        ids = torch.where(torch.arange(len(labels)) % 5 == 0, left_out, labels)
        own = own_similarity(module, x, ids.clamp(min=-1))
        cluster = module.cluster(own, ids)
        module.update_(x, torch.where(cluster < 0, left_out, cluster))
        outcomes.append([cluster, module.prototypes.clone(), module.last_counts, module.initialize_from_(x, ids)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("function", ["cluster", "update_", "initialize_from_"])
def test_an_id_beyond_the_bound_is_an_error_and_left_out_when_compiled(function):
    module = nn.SubCentroids(3, 2, 8)
    bound, name = (6, r"C\*K") if function == "update_" else (3, "C")
    x, labels = unit(4, 2 if function == "cluster" else 8), torch.tensor([0, bound, -4, 1])
    with pytest.raises(
        ValueError, match=rf"SubCentroids\.{function}: labels must be in \[0,{name}\); any .* got {bound} at pixel 1"
    ):
        getattr(module, function)(x, labels)
    twin = copy.deepcopy(module)
    result = torch.compile(getattr(module, function), backend="aot_eager")(x, labels)
    expected = getattr(twin, function)(x, labels.clamp(max=bound - 1) - bound * (labels == bound))
    assert result is expected is None or torch.equal(result, expected)
    assert function == "initialize_from_" or torch.equal(module.prototypes, twin.prototypes)  # which draws


@pytest.mark.parametrize(
    "function, arguments, text",
    [
        ("cluster", ((4, 3), (4,)), r"own_similarity must be \[N,K\] or \[B,K,H,W\] with K=2"),
        ("cluster", ((4, 2), (5,)), r"labels must be \[N\]=\[4\] to match own_similarity"),
        ("cluster", ((1, 2, 3, 4), (1, 4, 3)), r"labels must be \[N\]=\[12\] or \[B,H,W\]=\[1, 3, 4\] to match own_similarity"),
        ("update_", ((4, 7), (4,)), r"x must be \[N,D\] or \[B,D,H,W\] with D=8"),
        ("update_", ((1, 8, 3, 4), (1, 4, 3)), r"labels must be \[N\]=\[12\] or \[B,H,W\]=\[1, 3, 4\] to match x"),
        ("update_", ((4, 8), (5,)), r"labels must be \[N\]=\[4\] to match x"),
        ("initialize_from_", ((1, 8, 3, 4), (1, 4, 3)), r"labels must be .* to match features"),
    ],
)
def test_shapes_are_checked(function, arguments, text):
    x, labels = torch.zeros(arguments[0]), torch.zeros(arguments[1], dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"SubCentroids\.{function}: {text}"):
        getattr(nn.SubCentroids(3, 2, 8), function)(x, labels)
    with pytest.raises(TypeError, match=rf"SubCentroids\.{function}: labels must be an integer tensor"):
        getattr(nn.SubCentroids(3, 2, 8), function)(torch.zeros(4, 2 if function == "cluster" else 8), torch.zeros(4))


def test_update_checks_what_comes_with_it():
    module, x, labels = nn.SubCentroids(3, 2, 8), unit(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"update_: correct must be \[N\]=\[4\] to match x"):
        module.update_(x, labels, correct=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"update_: own_similarity must be \[N,K\] or \[B,K,H,W\] to match x"):
        module.update_(x, labels, own_similarity=torch.zeros(4, 3))


def test_gumbel_keeps_about_a_quarter_of_the_assignments_at_ten_sub_centroids():
    x, labels, centers = clustered(classes=1, k=10, each=400)
    module = nn.SubCentroids(1, 10, 16, assignment="gumbel", generator=generator())
    module.prototypes.copy_(centers)
    own = own_similarity(module, x, labels)
    certain = ops.sinkhorn_assign(own, labels, 1)
    kept = (module.cluster(own, labels) == certain).double().mean()
    expected = math.e / (math.e + 9)  # 0.23
    assert abs(kept - expected) < 4 * math.sqrt(expected * (1 - expected) / len(x))


def test_gumbel_repeats_with_its_seed():
    x, labels, _ = clustered()
    draws = []
    for seed in (1, 1, 2):
        module = nn.SubCentroids(3, 4, 16, assignment="gumbel", generator=generator(seed))
        draws.append(module.cluster(own_similarity(module, x, labels), labels))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# updates


def test_update_is_the_momentum_op():
    module = nn.SubCentroids(3, 2, 8, momentum=0.9)
    x, cluster = unit(40, 8), torch.randint(-1, 6, (40,))
    expected = module.prototypes.clone()
    ops.momentum_update_(expected, x, cluster, momentum=0.9)
    module.update_(x, cluster)
    assert torch.equal(module.prototypes, expected)
    assert torch.equal(module.last_counts, torch.bincount(cluster[cluster >= 0], minlength=6).view(3, 2))
    assert int(module.num_updates) == 1


@pytest.mark.parametrize("update_from", ["correct", "all"])
def test_only_correct_pixels_move_sub_centroids_unless_all_are_asked_for(update_from):
    module = nn.SubCentroids(2, 2, 8, momentum=0.5, update_from=update_from)
    x, cluster, correct = unit(20, 8), torch.arange(20) % 4, torch.arange(20) < 7
    module.update_(x, cluster, correct=correct)
    assert int(module.last_counts.sum()) == (7 if update_from == "correct" else 20)


def test_wins_count_the_nearest_own_sub_centroid_of_every_labelled_pixel():
    module = nn.SubCentroids(3, 2, 8, momentum=1.0)
    x, labels = unit(40, 8), torch.arange(40) % 3 - 1  # -1, 0 and 1; class 2 has none
    x[0, 0] = x[1, 0] = x[2, 0] = float("nan")
    own = own_similarity(module, x, labels)
    kept = torch.arange(40) > 2
    nearest = torch.where(kept & (labels >= 0), labels * 2 + own.argmax(1), 6)
    once = torch.bincount(nearest, minlength=7)[:6].view(3, 2).float()
    # neither what the transport says nor what is right decides a win
    cluster = torch.where(kept & (labels >= 0), labels * 2, -1)
    module.update_(x, cluster, correct=torch.zeros(40, dtype=torch.bool), own_similarity=own)
    assert torch.equal(module.wins, once) and once[:2].all()
    module.update_(x, torch.where(labels == 0, cluster, -1), own_similarity=own)
    assert_close(module.wins[0], once[0].double() * 1.99, "direction", terms=2)
    assert torch.equal(module.wins[1:], once[1:])  # a class that is not seen forgets nothing
    module.update_(x, cluster)  # similarities unknown
    assert torch.equal(module.wins[1:], once[1:])
    assert "wins" not in module.state_dict() and copy.deepcopy(module).half().wins.dtype == torch.float32
    module.initialize_from_(x[3:], labels[3:])
    assert not module.wins.any()


def test_absent_sub_centroids_keep_every_bit():
    module = nn.SubCentroids(3, 2, 8, momentum=0.5)
    before = module.prototypes.clone()
    module.update_(unit(4, 8), torch.tensor([0, 0, 3, -1]))
    changed = (module.prototypes != before).any(2).flatten()
    assert changed.tolist() == [True, False, False, True, False, False]


def test_non_finite_pixels_never_poison():
    module = nn.SubCentroids(2, 1, 4, momentum=0.5)
    x = unit(6, 4)
    expected = copy.deepcopy(module)
    expected.update_(x[2:], torch.tensor([0, 1, 0, 1]))
    x[0, 1], x[1, 0] = float("nan"), float("-inf")
    module.update_(x, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert torch.equal(module.prototypes, expected.prototypes)


def test_ramp_goes_from_start_to_end_along_a_cosine():
    module = nn.SubCentroids(1, 1, 4, momentum=(0.5, 0.9, 4))
    seen = []
    for _ in range(6):
        seen.append(float(module.momentum_now()))
        module.update_(unit(1, 4), torch.zeros(1, dtype=torch.int64))
    expected = [0.9 - 0.4 * (1 + math.cos(math.pi * min(t, 4) / 4)) / 2 for t in range(6)]
    assert seen == pytest.approx(expected, abs=1e-6)


def test_schedule_moves_as_the_same_numbers_would():
    values = [0.5, 0.7, 0.9]
    scheduled = nn.SubCentroids(2, 2, 8, momentum=lambda t: torch.tensor(values)[t.long()], generator=generator())
    numbers = nn.SubCentroids(2, 2, 8, generator=generator())
    for value in values:
        x, cluster = unit(12, 8), torch.arange(12) % 4
        numbers.momentum = value
        scheduled.update_(x, cluster)
        numbers.update_(x, cluster)
    assert_close(scheduled.prototypes, numbers.prototypes.double(), "direction", terms=12)


def test_warm_up_counts_but_moves_nothing():
    module = nn.SubCentroids(2, 2, 8, momentum=0.5, warmup_steps=2)
    before, moved = module.prototypes.clone(), []
    for _ in range(3):
        module.update_(unit(12, 8), torch.arange(12) % 4)
        moved.append(not torch.equal(module.prototypes, before))
    assert moved == [False, False, True]
    assert int(module.num_updates) == 3


def test_recent_momentum_reaches_back_over_a_fraction_of_the_updates_and_forgets_the_start():
    recent = nn.Recent(0.5, 0.9)
    assert float(recent(torch.tensor(0.0))) == pytest.approx(0.9) and float(recent(torch.tensor(80.0))) == pytest.approx(
        1 - 1 / 50
    )
    assert recent == nn.Recent(0.5, 0.9) and repr(recent) == "Recent(fraction=0.5, start=0.9)"
    assert pickle.loads(pickle.dumps(recent)) == recent
    module, away = nn.SubCentroids(1, 1, 8, momentum=recent), unit(8)
    left, start, x, labels = 1.0, module.prototypes.clone(), away[None], torch.zeros(1, dtype=torch.int64)
    for n in range(60):
        module.update_(x, labels)
        left *= 1 - 1 / (0.5 * n + 10)
    assert int(module.num_updates) == 60 and left < 0.08
    assert float(module.prototypes[0, 0] @ away) > 0.99 and float((module.prototypes * start).sum()) < 0.99
    for wrong, message in (
        ((0.0,), r"fraction must be in \(0,1\]; got 0.0"),
        ((0.5, 1.0), r"start must be in \[0,1\); got 1.0"),
    ):
        with pytest.raises(ValueError, match=rf"Recent: {message}"):
            nn.Recent(*wrong)


def test_sub_centroid_that_wins_nothing_is_revived_though_transport_gives_it_pixels():
    module = nn.SubCentroids(2, 2, 8, momentum=1.0, revive_after=2)
    labels = torch.zeros(10, dtype=torch.int64)
    module.prototypes[0, 1] = -module.prototypes[0, 0]
    x = F.normalize(module.prototypes[0, 0] + 0.1 * unit(10, 8), dim=1)
    own = own_similarity(module, x, labels)
    assert (own.argmax(1) == 0).all()
    for _ in range(2):
        assert int(module.idle_updates[0, 1]) < 2
        before = module.prototypes.clone()
        module.update_(x, torch.arange(10) % 2, own_similarity=own)  # balanced, as transport is
    worst = own.amax(1).argmin()
    assert_close(module.prototypes[0, 1], x[worst].double(), "direction", terms=8)
    assert torch.equal(module.prototypes[1], before[1])  # an absent class is not idle
    assert module.idle_updates.tolist() == [[0, 0], [0, 0]]
    assert module.wins[0, 1] == module.wins[0].sum() / 3  # not dead again before it could win


def test_sub_centroid_that_wins_its_share_is_left_alone_though_transport_gives_it_nothing():
    module = nn.SubCentroids(1, 2, 8, momentum=1.0, revive_after=1)
    x, labels = F.normalize(module.prototypes[0].repeat(3, 1) + 0.1 * unit(6, 8), dim=1), torch.zeros(6, dtype=torch.int64)
    before = module.prototypes.clone()
    module.update_(x, labels, own_similarity=own_similarity(module, x, labels))
    assert_close(module.prototypes, before.double(), "direction", terms=8)


def test_revival_reads_its_pixel_from_a_feature_map():
    maps, pixels = (nn.SubCentroids(1, 2, 8, momentum=1.0, revive_after=1, generator=generator()) for _ in range(2))
    for module in (maps, pixels):
        module.prototypes[0, 1] = -module.prototypes[0, 0]
    x = F.normalize(maps.prototypes[0, 0].view(8, 1, 1) + 0.1 * torch.randn(2, 8, 3, 5), dim=1)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 8)
    labels = torch.zeros(30, dtype=torch.int64)
    own = own_similarity(pixels, rows, labels)
    maps.update_(x, labels, own_similarity=own)
    pixels.update_(rows, labels, own_similarity=own)
    assert torch.equal(maps.prototypes, pixels.prototypes)
    assert (rows @ maps.prototypes[0, 1]).max() > 0.999


# what is kept, cast, copied


def test_half_leaves_sub_centroids_in_float32_and_double_makes_them_float64():
    module = nn.SubCentroids(2, 2, 8)
    before = module.prototypes.clone()
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16)):
        assert torch.equal(cast(module).prototypes, before)
        assert module.prototypes.dtype == torch.float32
    assert module.double().prototypes.dtype == torch.float64


def test_state_dict_holds_the_released_name_alone():
    assert list(nn.SubCentroids(2, 2, 8).state_dict()) == ["prototypes"]


@pytest.mark.parametrize(
    "options, extra",
    [
        ({"momentum": (0.9, 0.99, 5)}, ["num_updates"]),
        ({"momentum": nn.Recent(0.5, 0.9)}, ["num_updates"]),
        ({"warmup_steps": 3}, ["num_updates"]),
        ({"init": "data", "init_step": 1}, ["num_updates", "start_in"]),
        ({"revive_after": 2}, ["idle_updates", "wins"]),
    ],
)
def test_resuming_is_exact(options, extra):
    batches = [clustered(each=3)[:2] for _ in range(5)]
    whole = nn.SubCentroids(3, 4, 16, generator=generator(), **options)
    for x, labels in batches[:3]:
        step(whole, x, labels)
    resumed = nn.SubCentroids(3, 4, 16, generator=generator(9), **options)
    state = copy.deepcopy(whole.state_dict())
    assert sorted(state) == sorted(["prototypes", *extra])
    resumed.load_state_dict(state)
    for x, labels in batches[3:]:
        step(whole, x, labels)
        step(resumed, x, labels)
    assert torch.equal(resumed.prototypes, whole.prototypes)


def test_loaded_sub_centroids_are_not_started_over():
    donor, module = nn.SubCentroids(2, 2, 8), nn.SubCentroids(2, 2, 8, init="data", momentum=1.0)
    module.load_state_dict(donor.state_dict())
    x, labels = unit(20, 8), torch.arange(20) % 2
    step(module, x, labels)
    assert_close(module.prototypes, donor.prototypes.double(), "direction", terms=8)


def test_loading_normalises_and_keeps_unit_rows_bit_for_bit():
    module = nn.SubCentroids(2, 2, 8)
    rows = unit(2, 2, 8)
    rows[0, 0] *= 3
    module.load_state_dict({"subcentroids": rows})  # the older name
    assert_close(module.prototypes.norm(dim=2), torch.ones(2, 2, dtype=torch.float64), "direction", terms=8)
    assert torch.equal(module.prototypes[1], rows[1])


def test_loading_refuses_rows_without_a_direction():
    rows = unit(2, 2, 8)
    rows[1, 0] = 0
    with pytest.raises(RuntimeError, match=r"prototypes: every sub-centroid must be finite and not zero; got 1"):
        nn.SubCentroids(2, 2, 8).load_state_dict({"prototypes": rows})


def test_copies_and_pickles_draw_on_independently():
    module = nn.SubCentroids(3, 4, 16, assignment="gumbel", generator=generator())
    x, labels, _ = clustered()
    own = own_similarity(module, x, labels)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    expected = module.cluster(own, labels)
    for twin in twins:
        assert torch.equal(twin.cluster(own, labels), expected)


def test_reset_starts_over():
    module = nn.SubCentroids(3, 4, 16, generator=generator(), momentum=0.1)
    x, labels, _ = clustered(each=2)
    step(module, x, labels)
    before = module.prototypes.clone()
    module.reset_prototypes()
    assert int(module.num_updates) == 0
    assert not torch.equal(module.prototypes, before)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"momentum": 1.5}, r"SubCentroids: momentum must be in \[0,1\]"),
        ({"momentum": (0.9, 2.0, 5)}, "momentum's end must be in"),
        ({"momentum": (0.9, 1.0)}, r"momentum must be .* ramp \(start, end, steps\)"),
        ({"epsilon": 0.0}, "epsilon must be positive and finite; got 0.0"),
        ({"epsilon": float("nan")}, "epsilon must be positive and finite; got nan"),
        ({"iterations": -1}, "iterations must be a non-negative integer"),
        ({"assignment": "soft"}, "assignment must be one of argmax, gumbel; got 'soft'"),
        ({"update_from": "none"}, "update_from must be one of correct, all"),
        ({"sync": "mean"}, "sync must be one of auto, sums, average, none"),
        ({"init": "zeros"}, "init must be one of random, orthogonal, data"),
        ({"revive_after": -1}, "revive_after must be None or a non-negative integer"),
        ({"dtype": torch.int32}, "dtype must be a float dtype"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        nn.SubCentroids(2, 2, 8, **options)


@pytest.mark.parametrize("sizes, text", [((0, 2, 8), "num_classes"), ((2, 257, 8), "at most 256"), ((2, 2, -1), "channels")])
def test_sizes_are_checked(sizes, text):
    with pytest.raises(ValueError, match=text):
        nn.SubCentroids(*sizes)


def test_data_start_checks_its_features():
    module = nn.SubCentroids(2, 2, 8)
    with pytest.raises(ValueError, match=r"features must be \[N,D\] or \[B,D,H,W\] with D=8"):
        module.initialize_from_(unit(4, 7), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be \[N\]=\[4\] to match features"):
        module.initialize_from_(unit(4, 8), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("rows", (0, 3))
def test_a_pixel_without_a_direction_revives_nothing(rows):
    """The embedding of a constant feature is 0: least like its class, and no sub-centroid."""
    model = nn.DNCClassifier(4, 3, 2, revive_after=1, generator=torch.Generator().manual_seed(0))
    features = torch.cat([torch.ones(2, 4), torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))])
    for _ in range(4):
        model.loss(features, torch.zeros(len(features), dtype=torch.int64))
    assert_close(model.prototypes.norm(dim=2), torch.ones(3, 2).double(), "direction", terms=4)
