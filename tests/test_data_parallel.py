"""Two gloo processes do what one process does with all the data."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import assert_close, assert_golden
from torch.nn.parallel import DistributedDataParallel
from two_processes import WORLD, results_of_ranks

from dnc_kernels import nn

C, K, D, STEPS = 4, 3, 8, 3
FUSED = {"loss_size": "features", "scores": "scale", "update_from": "all"}


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(torch.nn.Module):
    """A backbone and a head behind one forward, as DistributedDataParallel wants it."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x, labels):
        return self.head.loss(self.backbone(x), labels)


def make_net(kind, **options):
    torch.manual_seed(0)
    options = {"recipe": "released", "momentum": 0.8, "ppc_weight": 0.1, "ppd_weight": 0.1, **options}
    options["generator"] = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    if kind == "head":
        net = Net(torch.nn.Conv2d(3, D, 1), nn.DNCHead(D, C, K, **options))
    else:
        net = Net(torch.nn.Linear(3, D), nn.DNCClassifier(D, C, K, memory_size=6, **options))
    start = torch.nn.functional.normalize(torch.randn(C, K, D), dim=2)
    net.head.prototypes.copy_(start)
    return net


def batches(kind, step):
    """One batch a rank: of different sizes, with class 3 on rank 1 only and in the first step alone, some labels ignored."""
    g = torch.Generator().manual_seed(step)
    parts = []
    for rank, size in enumerate((1, 3) if step % 2 else (2, 1)):
        shape = (size, 4, 5) if kind == "head" else (size * 7,)
        labels = torch.randint(0, C if rank == 1 and step == 0 else C - 1, shape, generator=g)
        labels.view(-1)[: 1 + rank] = 255 if kind == "head" else -100
        x = torch.randn(C, 3, generator=g)[labels.clamp(0, C - 1) % C] + 0.3 * torch.randn(*shape, 3, generator=g)
        parts.append((x.permute(0, 3, 1, 2).contiguous() if kind == "head" else x, labels))
    return parts


def train(net, optimizer, x, labels):
    optimizer.zero_grad()
    result = net(x, labels)
    result.loss.backward()
    optimizer.step()
    return result.loss.detach()


def run_one_process(kind, **options):
    net, history = make_net(kind, **options), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        x, labels = (torch.cat(parts) for parts in zip(*batches(kind, step), strict=True))
        history.append(train(net, optimizer, x, labels))
    return torch.stack(history), net.head


def run_rank(rank, kind, **options):
    net, history = make_net(kind, **options), []
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        loss = train(parallel, optimizer, *batches(kind, step)[rank]) / WORLD
        dist.all_reduce(loss)
        history.append(loss)
    return summary(torch.stack(history), net.head)


@dataclass(frozen=True)
class Case:
    """A training in float64 that the ranks and one process run alike."""

    sizes: tuple[int, int] = (2, 2)  # images a rank
    labelled: tuple[float, float] = (1.0, 1.0)  # share of each rank's pixels
    classes: tuple[int, int] = (C, C)  # rank r sees those below
    micro_batches: int = 1
    no_sync: bool = True  # gradients meet at the last micro-batch, as DistributedDataParallel's documentation advises
    options: dict[str, Any] = field(default_factory=dict)

    def batch(self, number: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images at feature size, labels at twice that."""
        g = torch.Generator().manual_seed(10 * number + rank)
        small = torch.randint(0, self.classes[rank], (self.sizes[rank], 4, 5), generator=g)
        x = torch.randn(C, 3, generator=torch.Generator().manual_seed(99))[small]
        x = x + 0.3 * torch.randn(x.shape, generator=g)
        labels = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
        labels[torch.rand(labels.shape, generator=g) >= self.labelled[rank]] = 255
        return x.permute(0, 3, 1, 2).double(), labels

    def batch_of_all(self, number: int) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.cat, zip(*(self.batch(number, rank) for rank in range(WORLD)), strict=True)))

    def net(self) -> Net:
        net = make_net("head", accumulation_steps=self.micro_batches, **self.options).double()
        net.head.prototypes.copy_(torch.nn.functional.normalize(net.head.prototypes, dim=2))
        return net


UNEVEN: dict[str, Any] = {"labelled": (0.1, 0.9)}
CASES = {
    "equal": Case(),
    "uneven_labels": Case(**UNEVEN),
    "uneven_labels_scores": Case(**UNEVEN, options={"checkpoint": "scores"}),
    "uneven_labels_none": Case(**UNEVEN, options={"checkpoint": "none"}),
    "uneven_labels_default": Case(**UNEVEN, options={"recipe": "default"}),
    "uneven_labels_features": Case(**UNEVEN, options={"loss_size": "features"}),
    "uneven_labels_weighted": Case(**UNEVEN, options={"class_weight": [0.2, 1.0, 3.0, 0.5], "label_smoothing": 0.1}),
    "uneven_batches": Case(sizes=(1, 3)),
    "class_on_one_rank": Case(classes=(2, C)),
    "rank_without_labels": Case(labelled=(0.0, 0.7)),
    "rank_without_labels_none": Case(labelled=(0.0, 0.7), options={"checkpoint": "none"}),
    "nobody_labelled": Case(labelled=(0.0, 0.0)),
    "accumulated": Case(micro_batches=2),
    "accumulated_synced": Case(micro_batches=2, no_sync=False),
    "accumulated_uneven": Case(sizes=(1, 3), labelled=(0.2, 0.9), classes=(2, C), micro_batches=2),
    "accumulated_rank_without_labels": Case(labelled=(0.0, 0.7), micro_batches=2),
}
AVERAGED = {
    "average": Case(sizes=(1, 3), labelled=(0.3, 0.9), classes=(2, C), options={"sync": "average"}),
    "average_none": Case(sizes=(1, 3), labelled=(0.3, 0.9), classes=(2, C), options={"sync": "average", "checkpoint": "none"}),
    "average_accumulated": Case(labelled=(0.3, 0.9), micro_batches=2, options={"sync": "average"}),
    "average_accumulated_synced": Case(labelled=(0.3, 0.9), micro_batches=2, no_sync=False, options={"sync": "average"}),
}


def run_case(case: Case, data: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Train on `data(number of the micro-batch)`; what came of it, losses averaged over the ranks there are."""
    net, losses, record = case.net(), [], {}
    parallel = DistributedDataParallel(net) if dist.is_initialized() else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(case.micro_batches):
            wait = case.no_sync and micro < case.micro_batches - 1 and net is not parallel
            with parallel.no_sync() if wait else contextlib.nullcontext():
                result = parallel(*data(case.micro_batches * step + micro))
                (result.loss / case.micro_batches).backward()
            losses.append(torch.stack([part.detach() for part in result[:4]]))
        record |= {f"grad {step} {name}": p.grad.clone() for name, p in net.named_parameters()}
        record[f"prototypes {step}"] = net.head.prototypes.clone()
        optimizer.step()
    means = torch.stack(losses)  # [losses, 4]: loss, cross-entropy, PPC, PPD
    if net is not parallel:
        dist.all_reduce(means)
        means /= WORLD
    record |= {f"after {name}": p.detach().clone() for name, p in net.named_parameters()}
    counts = {"counts": net.head.last_counts, "classes": net.head.class_counts, "updates": net.head.num_updates}
    counts["wins"] = net.head.wins
    return {"losses": means, **record, **{name: count.clone() for name, count in counts.items()}}


def run_averages_by_hand(case: Case) -> dict[str, torch.Tensor]:
    """What the released code's ranks do: each for itself, then gradients and sub-centroids are averaged."""
    nets, losses, record = [case.net() for _ in range(WORLD)], [], {}
    for step in range(STEPS):
        for micro in range(case.micro_batches):
            parts = []
            for rank, net in enumerate(nets):
                result = net(*case.batch(case.micro_batches * step + micro, rank))
                (result.loss / case.micro_batches).backward()
                parts.append(torch.stack([part.detach() for part in result[:4]]))
            losses.append(torch.stack(parts).mean(0))
        prototypes = torch.nn.functional.normalize(sum(net.head.prototypes for net in nets) / WORLD, dim=2)
        record[f"prototypes {step}"] = prototypes
        parameters = [dict(net.named_parameters()) for net in nets]
        grads = {name: sum(p[name].grad for p in parameters) / WORLD for name in parameters[0]}
        record |= {f"grad {step} {name}": grad for name, grad in grads.items()}
        for net in nets:
            net.head.prototypes.copy_(prototypes)
            with torch.no_grad():
                for name, p in net.named_parameters():
                    p -= 0.1 * grads[name]
            net.zero_grad()
    record |= {f"after {name}": p.detach() for name, p in nets[0].named_parameters()}
    return {"losses": torch.stack(losses), **record}


def summary(history, head):
    tensors = {"loss": history, "counts": head.last_counts, "classes": head.class_counts, "updates": head.num_updates}
    tensors["wins"] = head.wins
    tensors |= {name: value.detach().clone() for name, value in head.state_dict().items()}
    return {name: value.clone() for name, value in tensors.items()}


def data_start(rank):
    """Both ranks have class 0, rank 1 more of it; class 1 is on rank 0 only; nobody has the rest."""
    head = make_net("head").head
    labels = torch.tensor([0, 0, 0, 1, 1, 1] if rank == 0 else [0] * 6)
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(rank))
    module = nn.SubCentroids(C, K, D, generator=torch.Generator().manual_seed(rank))
    module.prototypes.copy_(head.prototypes)
    counts = module.initialize_from_(x, labels)
    return {"prototypes": module.prototypes.clone(), "counts": counts, "x": x, "before": head.prototypes.clone()}


def revival(rank):
    """Sub-centroids 1 and 2 of class 0 get nothing; the least similar pixel is on rank 1."""
    module = nn.SubCentroids(1, K, D, momentum=1.0, revive_after=1)
    module.prototypes.copy_(torch.eye(D)[:K][None])
    own = torch.full((4, K), 0.9 if rank == 0 else 0.1)
    module.update_(torch.eye(D)[4 + rank].expand(4, D), torch.zeros(4, dtype=torch.int64), own_similarity=own)
    return {"prototypes": module.prototypes.clone(), "idle": module.idle_updates.clone()}


def seen_by_one(rank):
    """Class 3 on rank 1 only, with both ways to agree."""
    results, x = {}, torch.eye(D)[5].expand(4, D)
    cluster = torch.full((4,), -1 if rank == 0 else 3 * K)
    for sync in ("sums", "average"):
        module = nn.SubCentroids(C, K, D, momentum=0.5, sync=sync)
        module.prototypes.copy_(torch.eye(D)[torch.arange(C * K) % 4].view(C, K, D))
        module.update_(x, cluster)
        results[sync] = module.prototypes[3, 0].clone()
    return results


def alone(rank):
    """Evaluation on one rank waits for nobody; so does sync="none"."""
    if rank == 1:
        return {}
    x, labels = batches("head", 0)[0]
    net = make_net("head").eval()
    loss = net(x, labels).loss.detach()
    lonely = make_net("head", sync="none")
    lonely(x, labels)
    return {"loss": loss, "prototypes": lonely.head.prototypes.clone()}


def ignored(rank):
    """Rank 0 has nothing labelled."""
    x, labels = batches("head", 0)[1]
    if rank == 0:
        labels = torch.full_like(labels, 255)
    net = make_net("head")
    loss = net(x, labels).loss
    loss.backward()
    return {"loss": loss.detach(), "prototypes": net.head.prototypes.clone()}


def case_of_rank(name):
    case = (CASES | AVERAGED)[name]
    return lambda rank: run_case(case, lambda number: case.batch(number, rank))


SCENARIOS = {
    **{f"case {name}": case_of_rank(name) for name in CASES | AVERAGED},
    "head": lambda rank: run_rank(rank, "head"),
    "fused": lambda rank: run_rank(rank, "head", **FUSED),
    "classifier": lambda rank: run_rank(rank, "classifier"),
    "average": lambda rank: run_rank(rank, "head", sync="average"),
    "gumbel": lambda rank: run_rank(rank, "head", assignment="gumbel"),
    "gumbel_classifier": lambda rank: run_rank(rank, "classifier", assignment="gumbel"),
    "ramp": lambda rank: run_rank(rank, "head", momentum=(0.5, 0.9, 3), warmup_steps=1, init="data", init_step=2),
    "data_start": data_start,
    "revival": revival,
    "seen_by_one": seen_by_one,
    "alone": alone,
    "ignored": ignored,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n not in ("alone", "ignored")])
def test_ranks_agree_bit_for_bit(ranks, name):
    a, b = (r[name] for r in ranks)
    # averaged sub-centroids were counted and normalised by each rank for itself
    own = {"x", "loss"} | ({"counts", "classes", "wins"} if "average" in name else set())
    assert all(torch.equal(a[key], b[key]) for key in a if key not in own)


@pytest.mark.parametrize(
    "name, kind, options",
    [
        ("head", "head", {}),
        ("fused", "head", FUSED),
        ("classifier", "classifier", {}),
    ],
)
def test_two_processes_equal_one_with_all_the_data(ranks, name, kind, options):
    history, head = run_one_process(kind, **options)
    expected, actual = summary(history, head), ranks[0][name]
    assert actual.keys() == expected.keys()
    assert_golden(actual["loss"], expected["loss"], "loss")
    for key in ("counts", "classes", "updates"):
        assert torch.equal(actual[key], expected[key])
    for key in ("prototypes", "wins", "feat_norm.weight", "feat_norm.bias"):
        assert_golden(actual[key], expected[key], "value")


def assert_same_run(actual, expected):
    for key, value in expected.items():
        if value.dtype == torch.int64:
            assert torch.equal(actual[key], value), key
        elif value.abs().max() < 1e-12:
            assert actual[key].abs().max() < 1e-12, key
        else:
            rule = "loss" if key == "losses" else "gradient" if key.startswith("grad") else "value"
            assert_golden(actual[key], value, rule)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_updates_are_those_of_one_process(ranks, name):
    case = CASES[name]
    expected = run_case(case, case.batch_of_all)
    assert_same_run(ranks[0][f"case {name}"], expected)
    start = case.net().head.prototypes
    assert torch.equal(expected["prototypes 0"], start) == (name == "nobody_labelled")
    assert int(expected["updates"]) == STEPS


@pytest.mark.parametrize("name", AVERAGED)
def test_averaging_is_that_of_the_released_code(ranks, name):
    assert_same_run(ranks[0][f"case {name}"], run_averages_by_hand(AVERAGED[name]))


def test_class_that_one_rank_saw_is_updated_undiluted(ranks):
    # start [1,0], pixels [0,1], momentum 0.5: half way; the average of that and of [1,0] lags behind
    angle = {sync: torch.atan2(row[5], row[1]) for sync, row in ranks[0]["seen_by_one"].items()}
    assert float(angle["sums"]) == pytest.approx(torch.pi / 4, abs=1e-6)
    assert float(angle["average"]) == pytest.approx(torch.pi / 8, abs=1e-6)


def test_memory_is_that_of_one_process(ranks):
    _, head = run_one_process("classifier")
    assert torch.equal(ranks[1]["classifier"]["memory.pushed"], head.memory.pushed)
    assert_golden(ranks[1]["classifier"]["memory.storage"], head.memory.storage, "value")


def test_each_class_starts_from_the_rank_that_sees_most_of_it(ranks):
    result = ranks[0]["data_start"]
    assert result["counts"].tolist() == [6, 3, 0, 0]
    for c, rank in ((0, 1), (1, 0)):
        pixels = torch.nn.functional.normalize(ranks[rank]["data_start"]["x"], dim=1)
        # three sub-centroids from three or six pixels: each lies close to one
        assert (result["prototypes"][c] @ pixels.T).amax(1).min() > 0.7
    assert torch.equal(result["prototypes"][2:], result["before"][2:])


def test_revival_takes_the_least_similar_pixel_of_all_ranks(ranks):
    result = ranks[0]["revival"]
    assert torch.equal(result["prototypes"][0, 1], torch.eye(D)[5])
    assert result["idle"].tolist() == [[0, 0, 1]]


def test_evaluation_and_unsynchronised_ranks_wait_for_nobody(ranks):
    x, labels = batches("head", 0)[0]
    net = make_net("head")
    assert_close(ranks[0]["alone"]["loss"], net(x, labels).loss.detach().double(), "head", terms=D)
    assert_close(ranks[0]["alone"]["prototypes"], net.head.prototypes.double(), "direction", terms=D)


def test_rank_without_labels_contributes_nothing(ranks):
    x, labels = batches("head", 0)[1]
    net = copy.deepcopy(make_net("head"))
    net(x, labels)
    assert ranks[0]["ignored"]["loss"] == 0
    assert torch.equal(ranks[0]["ignored"]["prototypes"], ranks[1]["ignored"]["prototypes"])
    assert_close(ranks[0]["ignored"]["prototypes"], net.head.prototypes.double(), "direction", terms=D * 10)
