"""`DNCHead.graphed`: its static tensors, gradients and errors with a stand-in for a CUDA graph, and on a GPU the graph itself."""

import copy

import pytest
import torch
from gpu_check import needs_gpu

from dnc_kernels.nn import DNCHead, Monitor, _graphed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUFFERS = ("prototypes", "wins", "last_counts", "idle_updates", "num_updates", "class_counts")


@pytest.fixture
def stand_in(monkeypatch):
    """Replays a call by making it again, into the tensors of the first time."""

    def capture(call):
        call()  # as a warm-up does
        results = call()

        def replay():
            for own, new in zip(results, call(), strict=True):
                own.copy_(new)

        return replay, results

    monkeypatch.setattr(_graphed, "_stand_in", True)
    monkeypatch.setattr(_graphed, "capture", capture)


def make_head(**options):
    torch.manual_seed(1)
    return DNCHead(16, 5, 3, momentum=0.9, **options).to(DEVICE)


def batches(count=3, dtype=torch.float32):
    torch.manual_seed(2)
    return [
        (torch.randn(2, 16, 6, 8).to(DEVICE, dtype), torch.randint(0, 5, (2, 12, 16)).to(DEVICE)) for _ in range(count)
    ]  # fmt: skip


def check_trains_as_eager(head, dtype=torch.float32):
    eager = copy.deepcopy(head)
    first, *_ = steps = batches(dtype=dtype)
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    graphed = head.graphed(*first)
    assert all(torch.equal(before[name], buffer) for name, buffer in head.named_buffers()), "making it moves nothing"
    for features, labels in steps:
        results = []
        for function, one in ((graphed, head), (eager.loss, eager)):
            x = features.clone().requires_grad_()
            one.zero_grad()
            result = function(x, labels)
            (2 * result.loss).backward()
            results.append([*result, x.grad, *(p.grad for p in one.parameters()), *(getattr(one, name) for name in BUFFERS)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        for one in (head, eager):
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter -= 0.1 * parameter.grad


OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"recipe": "released"}, {"embed_channels": 8}, {"ppc_weight": 0, "ppd_weight": 0}], ids=str
)


@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_trains_as_eager_mode(options, dtype, stand_in):
    head = make_head(**options)
    check_trains_as_eager(head.to(dtype) if "embed_channels" in options else head, dtype)


@needs_gpu
@OPTIONS
def test_a_graph_of_a_gpu_trains_as_eager_mode(options):
    check_trains_as_eager(make_head(**options))


def test_numbers_of_a_call_stay(stand_in):
    head, ((x, labels), (other, _), _) = make_head(), batches()
    graphed = head.graphed(x, labels)
    first = graphed(x, labels)
    kept = [value.clone() for value in first]
    graphed(other, labels)
    assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True))


def test_a_backward_pass_after_the_next_call_is_an_error(stand_in):
    head, ((x, labels), *_) = make_head(), batches()
    graphed = head.graphed(x, labels)
    loss = graphed(x.requires_grad_(), labels).loss
    graphed(x, labels)
    with pytest.raises(RuntimeError, match=r"a later call has overwritten the gradients of this one; call backward before"):
        loss.backward()


def test_without_gradients_and_updates(stand_in):
    head, ((x, labels), *_) = make_head().eval(), batches()
    graphed, before = head.graphed(x, labels), head.prototypes.clone()
    with torch.no_grad():
        result = graphed(x, labels)
    assert not result.loss.requires_grad and torch.equal(head.prototypes, before)
    assert torch.equal(result.loss, head.loss(x, labels).loss.detach())


def test_other_shapes_are_errors_that_say_what_to_do(stand_in):
    head, ((x, labels), *_) = make_head(), batches()
    graphed = head.graphed(x, labels)
    with pytest.raises(ValueError, match=r"graphed: features must be like the example, .*; got .* \(make another graph"):
        graphed(x[:1], labels[:1])
    with pytest.raises(ValueError, match=r"graphed: labels must be like the example"):
        graphed(x, labels.int())


@pytest.mark.parametrize(
    "options,match",
    [
        ({"checkpoint": "none"}, "checkpoint must be all or scores"), ({"init": "data"}, "init must be without a start to come"),
        ({"accumulation_steps": 2}, "accumulation_steps must be 1"),
        ({"generator": torch.Generator()}, "generator must be None"),
    ],
)  # fmt: skip
def test_what_no_graph_holds_is_an_error(options, match, stand_in):
    x, labels = batches()[0]
    with pytest.raises(ValueError, match=match):
        make_head(**options).graphed(x, labels)


def test_a_monitor_is_an_error(stand_in):
    head, (x, labels) = make_head(), batches()[0]
    with Monitor(head), pytest.raises(ValueError, match="Monitor must be none"):
        head.graphed(x, labels)


@pytest.mark.skipif(DEVICE == "cuda", reason="about a CPU")
def test_a_cpu_has_no_graphs():
    x, labels = batches()[0]
    with pytest.raises(ValueError, match=r"features must be on a CUDA device; got cpu \(use loss"):
        make_head().graphed(x, labels)
