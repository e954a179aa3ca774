"""What every op owes a GPU, on each of its backends there: no wait for the host, capture in a CUDA graph, the same bits each time,
its caller's stream and device; and the same of the head's training step.

Without a GPU the same calls run on the host, as far as they can show anything there.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from gpu_check import captured, needs_gpu, no_wait
from tolerances import assert_close

from dnc_kernels import _selftest, backends, ops, use_backend
from dnc_kernels.nn import DNCHead

pytest.importorskip("triton")
pytestmark = [pytest.mark.cuda, pytest.mark.triton, pytest.mark.usefixtures("cuda")]
GPU = torch.cuda.is_available()
RERUNS = 50 if GPU else 1
CLASSES, K = 5, 3  # the doctor's
PIXELS, CHANNELS = (20_000, 256) if GPU else (96, 16)
#: Of scores and labels; the interpreter takes a second for each few pixels.
MAPS = ((2, CLASSES, 5, 4), (2, 13, 10)) if GPU else ((2, CLASSES, 3, 2), (2, 7, 5))


def deterministic(d):
    ops.momentum_update_(d.centroids, d.x, d.cluster, momentum=0.9, deterministic=True)
    return (d.centroids,)


def class_scores(d):
    return tuple(t.detach() for t in ops.class_scores(d.x, d.centroids, d.labels))


#: The doctor's calls of all ops. What has no CUDA C++ kernel there is left out: the gradient of class scores.
CALLS = {**_selftest.CASES, "momentum_update_ deterministic": deterministic, "class_scores forward": class_scores}
WITHOUT_CUDA = {"class_scores"}
#: Adds floats in the order in which blocks come by.
UNORDERED = {"momentum_update_"}
#: Its gradient is a product of torch: cuBLAS gives the same bits again on one stream, and not where two are busy.
LIBRARY_PRODUCTS = {"centroid_distance"}
CASES = [
    (name, backend)
    for name in CALLS
    for backend in ("triton", "cuda")
    if backend in backends.KERNELS[name.partition(" ")[0]] and not (backend == "cuda" and name in WITHOUT_CUDA)
]
every_op = pytest.mark.parametrize(("name", "backend"), CASES, ids=lambda value: value.replace(" ", "-"))


def problem(seed, device=DEVICE):
    """A problem of bfloat16 pixels, its sub-centroids in float32 as the head keeps them; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, dtype=torch.bfloat16):
        return torch.randn(size, generator=generator).to(dtype)

    label = torch.randint(-1, CLASSES, (PIXELS,), generator=generator)
    cluster = torch.where(label < 0, -1, label * K + torch.randint(K, (PIXELS,), generator=generator))
    maps = torch.randint(-1, CLASSES, MAPS[1], generator=generator)
    d = _selftest.Data(
        x=F.normalize(normal(PIXELS, CHANNELS, dtype=torch.float32), dim=1).bfloat16(),
        centroids=F.normalize(normal(CLASSES, K, CHANNELS, dtype=torch.float32), dim=2),
        labels=torch.where(label < 0, -100, label), cluster=cluster, group=label, similarity=(normal(PIXELS, K) / 4),
        weight=normal(PIXELS, K), maps=normal(*MAPS[0]), map_labels=torch.where(maps < 0, -100, maps),
    )  # fmt: skip
    return _selftest.Data(**{name: tensor.to(device) for name, tensor in vars(d).items()})


def fresh(d):
    """Leaves of their own: a call asks for gradients, and moves sub-centroids."""
    return _selftest.Data(**{name: tensor.detach().clone() for name, tensor in vars(d).items()})


def run(name, backend, d):
    with use_backend(backend):
        return tuple(t.detach() for t in CALLS[name](fresh(d)) if t is not None)


def same(name, results, expected):
    for actual, right in zip(results, expected, strict=True):
        if name in UNORDERED:
            assert_close(actual.cpu(), right.double().cpu(), "direction", terms=PIXELS // CLASSES)
        else:
            assert torch.equal(actual, right)


@every_op
def test_reruns_are_bit_equal(name, backend):
    d = problem(0)
    expected = run(name, backend, d)
    for _ in range(RERUNS):
        same(name, run(name, backend, d), expected)


@needs_gpu
@every_op
def test_a_call_does_not_wait(name, backend):
    d = problem(0)
    run(name, backend, d)
    with no_wait():
        run(name, backend, d)


@needs_gpu
@every_op
def test_a_captured_call_replays_on_other_numbers(name, backend):
    d, other = problem(0), problem(1)
    graph, results = captured(lambda: run(name, backend, d))
    for source in (other, problem(0)):
        for field, tensor in vars(source).items():
            getattr(d, field).copy_(tensor)
        graph.replay()
        same(name, results, run(name, backend, source))


@needs_gpu
@every_op
def test_two_streams_do_not_meet(name, backend):
    data = [problem(seed) for seed in range(2)]
    expected = [run(name, backend, d) for d in data]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in data], [[], []]
    for _ in range(10):
        for stream, d, into in zip(streams, data, results, strict=True):
            with torch.cuda.stream(stream):
                into.append(run(name, backend, d))
    torch.cuda.synchronize()
    for runs, right in zip(results, expected, strict=True):
        for one in runs:
            if name in LIBRARY_PRODUCTS:
                for actual, wanted in zip(one, right, strict=True):
                    assert_close(
                        actual.cpu(), wanted.double().cpu(), "similarity", terms=CLASSES * K, scale=float(wanted.abs().max())
                    )
            else:
                same(name, one, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_op
def test_tensors_of_another_device_than_the_current_one(name, backend):
    expected = run(name, backend, problem(0, "cuda:0"))
    with torch.cuda.device(0):
        results = run(name, backend, problem(0, "cuda:1"))
        assert torch.cuda.current_device() == 0
    same(name, [r.to("cuda:0") for r in results], expected)


LOSSES = {
    "centroid_cross_entropy": lambda d: (d.x, lambda x: ops.centroid_cross_entropy(x, d.centroids, d.labels).loss),
    "subcentroid_cross_entropy": lambda d: (
        d.x, lambda x: ops.subcentroid_cross_entropy(x, d.centroids, d.cluster, temperature=0.5)
    ),
    "upsample_cross_entropy": lambda d: (d.maps, lambda maps: ops.upsample_cross_entropy(maps, d.map_labels)),
}  # fmt: skip


@needs_gpu  # a CPU multiplies otherwise
@pytest.mark.parametrize("loss_scale", [1 / 3, 65536.0], ids=["third", "GradScaler"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "backend"), [case for case in CASES if case[0] in LOSSES], ids=str)
def test_a_loss_scale_reaches_the_gradient_in_full_precision(name, backend, dtype, loss_scale):
    """65536 is infinite in float16, and 1/3 in 8 bits is 0.3 % too large: as a share of the whole gradient that would show."""
    x, loss = LOSSES[name](problem(0))
    leaf, wide = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
    with use_backend(backend):
        (made,) = torch.autograd.grad(loss(leaf) * loss_scale, leaf)
    with use_backend("reference"):
        (expected,) = torch.autograd.grad(loss(wide) * loss_scale, wide)
    assert made.isfinite().all()
    assert abs(float((made.double() * expected).sum() / expected.square().sum()) - 1) < 1e-3


# the head's step


@pytest.fixture(params=("triton", "cuda"))
def preferred(request, cuda, monkeypatch):
    """`auto` takes this backend wherever it has a kernel, proven or not."""
    monkeypatch.setattr(backends, "DISPATCH", {})
    for op, known in backends.KERNELS.items():
        order = sorted(known, key=lambda name: name != request.param)
        monkeypatch.setitem(backends.KERNELS, op, {name: replace(known[name], proven=True) for name in order})
    return request.param


def step_of_the_head(compiled=False, **options):
    """A training step on fixed numbers: a function that makes it, from the same sub-centroids each time."""
    torch.manual_seed(0)
    head = DNCHead(CHANNELS, 19, 10, momentum=0.9, **options).to(DEVICE).train()
    x = torch.randn(2, CHANNELS, 32, 32).to(DEVICE, torch.bfloat16)
    labels = torch.randint(0, 19, (2, 8, 8)).repeat_interleave(16, 1).repeat_interleave(16, 2).to(DEVICE)
    labels[:, :5] = 255
    start = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    loss_of = torch.compile(head.loss, fullgraph=True) if compiled else head.loss

    def step():
        with torch.no_grad():
            for name, tensor in head.state_dict().items():
                tensor.copy_(start[name])
        leaf = x.detach().requires_grad_()
        loss = loss_of(leaf, labels).loss
        grads = torch.autograd.grad(loss, (leaf, *head.parameters()), allow_unused=True)
        return (loss.detach(), head.prototypes.clone(), *(g for g in grads if g is not None))

    return step


RECIPES = pytest.mark.parametrize("recipe", ["default", "released"])


@needs_gpu
@RECIPES
def test_a_step_of_the_head_repeats_waits_for_nothing_and_replays(recipe, preferred):
    step = step_of_the_head(recipe=recipe)
    expected = step()
    with no_wait():
        again = step()
    graph, results = captured(step)
    for tensor in results:
        tensor.zero_()
    graph.replay()
    for made in (again, results):
        for actual, right in zip(made, expected, strict=True):
            assert_close(actual.float().cpu(), right.double().cpu(), "head", terms=CHANNELS, scale=float(right.abs().max()))


@needs_gpu
@RECIPES
def test_a_compiled_step_of_the_head_does_what_eager_does(recipe, preferred):
    compiled, eager = (step_of_the_head(compiled=c, recipe=recipe)() for c in (True, False))
    for actual, right in zip(compiled, eager, strict=True):
        scale = max(1.0, float(right.abs().max()))
        assert_close(actual.float().cpu(), right.double().cpu(), "head", terms=CHANNELS, scale=scale)
