"""torch.compile of training steps: one graph for which options, none per step, and the numbers of eager mode for all of them."""

import copy
import pickle

import pytest
import torch
from tolerances import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from dnc_kernels import nn

pytestmark = pytest.mark.usefixtures("one_thread")

C, K, D = 3, 2, 8
STATE = ("prototypes", "num_updates", "last_counts", "idle_updates", "wins")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def twins(make, **options):
    """Two modules that are alike, each with a generator of its own."""
    return [make(generator=torch.Generator().manual_seed(3), **options) for _ in range(2)]


def updates(count):
    """Inputs of `SubCentroids.update_`."""
    random = torch.Generator().manual_seed(5)
    for _ in range(count):
        x = torch.nn.functional.normalize(torch.randn(24, D, generator=random), dim=1)
        labels = torch.randint(-1, C * K, (24,), generator=random)
        yield x, labels, torch.rand(24, K, generator=random)


def assert_same_state(module, twin):
    for name in STATE:
        torch.testing.assert_close(getattr(module, name), getattr(twin, name), rtol=0, atol=0, msg=name)


MOMENTA = {"ramp": (0.5, 0.99, 4), "recent": nn.Recent(), "function of no tensor": lambda updates: 0.5}


@pytest.mark.parametrize("momentum", MOMENTA.values(), ids=MOMENTA)
def test_every_update_of_a_schedule_is_the_same_graph(momentum):
    eager, twin = twins(lambda **o: nn.SubCentroids(C, K, D, **o), momentum=momentum, warmup_steps=1)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(twin.update_, fullgraph=True, backend=counter)
    for x, labels, own in updates(6):
        eager.update_(x, labels, own_similarity=own)
        compiled(x, labels, own_similarity=own)
        assert_same_state(eager, twin)
    assert counter.frame_count == 1


def test_accumulated_updates_share_two_graphs_however_many_there_are():
    """The count of the updates so far was a constant of the graph: twelve updates made twelve graphs, and torch stops at eight."""
    options = {"accumulation_steps": 12, "warmup_steps": 1, "revive_after": 1, "momentum": (0.5, 0.9, 2)}
    eager, twin = twins(lambda **o: nn.SubCentroids(C, K, D, **o), **options)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(twin.update_, fullgraph=True, backend=counter)
    for x, labels, own in updates(40):
        eager.update_(x, labels, own_similarity=own)
        compiled(x, labels, own_similarity=own)
        assert_same_state(eager, twin)
    assert int(twin.num_updates) == 3 and counter.frame_count == 2


def test_compiled_and_eager_updates_accumulate_together():
    eager, twin = twins(lambda **o: nn.SubCentroids(C, K, D, **o), accumulation_steps=3)
    compiled = torch.compile(twin.update_, backend="eager")
    with nn.Monitor(twin) as monitor:
        for n, (x, labels, own) in enumerate(updates(9)):
            eager.update_(x, labels, own_similarity=own)
            (compiled if n % 2 else twin.update_)(x, labels, own_similarity=own)
            assert_same_state(eager, twin)
    assert len(monitor.history) == 3


def steps(head, loss_of, count=3):
    losses, random = [], torch.Generator().manual_seed(5)
    for _ in range(count):
        x, labels = torch.randn(2, D, 3, 4, generator=random), torch.randint(0, C, (2, 6, 8), generator=random)
        losses.append(loss_of(x.requires_grad_(), labels).loss)
        losses[-1].backward()
        losses.append(x.grad)
    return [t.detach() for t in losses]


SAMPLED = {"pixels_per_class": 3}


def test_a_step_that_draws_from_torch_is_one_graph():
    head = nn.DNCHead(D, C, K, assignment="gumbel", **SAMPLED)
    counter = CompileCounterWithBackend("eager")
    steps(head, torch.compile(head.loss, fullgraph=True, backend=counter))
    assert counter.frame_count == 1


#: Options, and how many graphs their steps make: a start from data is in the graph for as long as it is to come.
DRAWN = {
    "gumbel": ({"assignment": "gumbel", **SAMPLED}, 1),
    "data": ({"init": "data", "init_step": 1}, 2),
    "data, sampled, in parts": ({"init": "data", "checkpoint": "none", **SAMPLED}, 2),
    "data, accumulated": ({"init": "data", "init_step": 1, "accumulation_steps": 3, "revive_after": 1}, 3),
}


@pytest.mark.parametrize(("options", "graphs"), DRAWN.values(), ids=DRAWN)
def test_draws_of_a_generator_and_starts_from_data_are_in_the_graph(options, graphs):
    eager, twin = twins(lambda **o: nn.DNCHead(D, C, K, **o), **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin.loss, fullgraph=True, backend=counter)
    for actual, expected in zip(steps(twin, compiled, 5), steps(eager, eager.loss, 5), strict=True):
        assert_close(actual, expected.double(), "training", terms=3 * D, scale=1)
    assert_close(twin.prototypes, eager.prototypes.double(), "training", terms=3 * D)
    for name in STATE[1:]:
        assert torch.equal(getattr(twin, name), getattr(eager, name)), name
    assert counter.frame_count == graphs
    assert torch.equal(twin.generator.get_state(), eager.generator.get_state())


def test_a_start_from_data_and_the_memory_of_a_classifier_are_in_the_graph():
    eager, twin = twins(lambda **o: nn.DNCClassifier(D, C, K, memory_size=2, **o), init="data", init_step=2)
    compiled = torch.compile(twin.loss, fullgraph=True, backend="aot_eager")
    random = torch.Generator().manual_seed(5)
    for _ in range(4):
        x, labels = torch.randn(24, D, generator=random), torch.randint(0, C, (24,), generator=random)
        assert_close(compiled(x, labels).loss, eager.loss(x, labels).loss.double(), "training", terms=3 * D, scale=1)
        assert_close(twin.prototypes, eager.prototypes.double(), "training", terms=3 * D)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))], ids=["copy", "pickle"])
def test_a_compiled_copy_draws_from_its_own_generator(copied):
    head = nn.DNCHead(D, C, K, generator=torch.Generator().manual_seed(3), **SAMPLED)
    steps(head, torch.compile(head.loss, fullgraph=True, backend="eager"), 1)
    twin, before = copied(head), head.generator.get_state()
    actual = steps(twin, torch.compile(twin.loss, fullgraph=True, backend="eager"))
    assert torch.equal(head.generator.get_state(), before)
    for a, b in zip(actual, steps(head, head.loss), strict=True):
        assert_close(a, b.double(), "training", terms=3 * D, scale=1)


def test_weights_that_arrive_by_assignment_are_not_replaced_by_a_start_in_a_graph():
    """`_start_if_due` knows them, from within the graph."""
    head = nn.DNCHead(D, C, K, init="data")
    head.prototypes = torch.nn.functional.normalize(torch.ones(C, K, D), dim=2)
    steps(head, torch.compile(head.loss, fullgraph=True, backend="aot_eager"), 1)
    assert (head.prototypes * D**-0.5).sum(2).min() > 0.99


def test_a_graph_whose_layer_is_gone_says_so():
    drawn = torch.ops.dnc_kernels.draw
    with pytest.raises(RuntimeError, match=r"whose layer is gone.*compile it again"):
        drawn([2], 10**9, torch.device("cpu"), torch.zeros((), dtype=torch.int64))
