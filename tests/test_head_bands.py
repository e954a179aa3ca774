"""DNCHead's step in bands of rows against the same step made of ops, in float64; its options and its memory formula."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from small_network import CHECKPOINTS
from tolerances import assert_close

from dnc_kernels import use_backend
from dnc_kernels.nn import DNCHead
from dnc_kernels.nn._labels import sample_of_each_class
from dnc_kernels.nn._starts import uniform
from dnc_kernels.ops.head import bands, reference

CHANNELS, CLASSES, K = 12, 5, 3


@pytest.fixture(autouse=True)
def small_bands(monkeypatch):
    """Several bands a sample, the last one shorter."""
    monkeypatch.setattr(bands, "BAND_PIXELS", 40)


def make_head(**options):
    torch.manual_seed(1)
    defaults = {"ppc_weight": 0.3, "ppd_weight": 0.2, "momentum": 0.9, "scores": "scale"}
    head = DNCHead(CHANNELS, CLASSES, K, **{**defaults, **options})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return head


def problem(size=(18, 26), dtype=torch.float32, channels_last=False):
    x = torch.randn(2, CHANNELS, 9, 13).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    labels = torch.randint(0, CLASSES, (2, *size))
    labels[0, :2] = 255
    return x, labels


def step(head, x, labels, **options):
    """Everything a step gives: losses, gradients, and the state afterwards."""
    x = x.detach().requires_grad_()
    result = head.loss(x, labels, **options)
    result.loss.backward()
    gradients = {"x": x.grad} | {name: p.grad for name, p in head.named_parameters()}
    state = {"prototypes": head.prototypes, "last_counts": head.last_counts, "class_counts": head.class_counts}
    return {k: v.detach() for k, v in result._asdict().items()} | gradients | state


def check(head, x, labels, **options):
    """Compare a head's step with that of a float64 copy made of reference ops."""
    wide = copy.deepcopy(head).double()
    wide.checkpoint = "none"
    actual = step(head, x, labels, **options)
    with use_backend("reference"):
        expected = step(wide, x.double(), labels, **options)
    for name, want in expected.items():
        if not want.is_floating_point() or name == "accuracy":  # counts, and a ratio of counts
            assert torch.equal(actual[name], want), name
            continue
        assert actual[name].dtype == (x.dtype if name == "x" else head.prototypes.dtype), name
        size = float(want.abs().max()) or 1.0  # a part that is switched off is exactly 0
        assert_close(actual[name], want, "head", terms=x.numel(), scale=size)


@pytest.mark.parametrize("scores", ("scale", "norm", "temperature"))
@pytest.mark.parametrize("confidence", ("none", "length"))
@pytest.mark.parametrize("loss_size", ("labels", "features"))
@pytest.mark.parametrize("checkpoint", ("scores", "all"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_bands_equal_ops(scores, confidence, loss_size, checkpoint, dtype):
    head = make_head(scores=scores, confidence=confidence, loss_size=loss_size, checkpoint=checkpoint).to(dtype)
    check(head, *problem(dtype=dtype))


@pytest.mark.parametrize("size", ((9, 13), (36, 52), (10, 12), (4, 6), (9, 26), (1, 1), (5, 100)), ids=str)
@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("channels_last", (False, True))
def test_label_sizes_and_layouts(size, align_corners, channels_last):
    head = make_head(align_corners=align_corners).double()
    check(head, *problem(size, torch.float64, channels_last))


@pytest.mark.parametrize("band", (1, 13, 26, 10**6))
def test_any_band(band, monkeypatch):
    monkeypatch.setattr(bands, "BAND_PIXELS", band)
    check(make_head().double(), *problem(dtype=torch.float64))


def test_the_length_of_bands_is_an_option(monkeypatch):
    seen = []
    monkeypatch.setattr(reference, "bands", lambda x, pixels: seen.append(list(bands.bands(x, pixels))) or iter(seen[-1]))
    with use_backend("reference"):  # the C++ passes have bands of their own
        check(make_head(band_pixels=26).double(), *problem(dtype=torch.float64))
    assert seen and all(band.last - band.first <= 26 for found in seen for band in found)
    shorter, longer = (make_head(band_pixels=pixels).step_bytes((2, CHANNELS, 9, 13), (2, 18, 26)) for pixels in (26, 234))
    assert shorter < longer
    on_gpu = [
        bands.default_band(torch.empty(1, d, 1, 1, device="meta"), c, norm)
        for d, c, norm in ((256, 150, False), (256, 1000, True), (2048, 10**8, False))
    ]
    assert on_gpu == [2**30 // (4 * 256 + 9 * 150), 2**30 // (4 * 256 + 13 * 1000), 1]
    with pytest.raises(ValueError, match=r"DNCHead: band_pixels must be None or a positive integer; got 0"):
        make_head(band_pixels=0)


@pytest.mark.parametrize(
    "options",
    [
        {"ppc_weight": 0.0}, {"ppd_weight": 0.0}, {"ppc_weight": 0.0, "ppd_weight": 0.0}, {"update_from": "all"},
        {"class_weight": [0.5, 1.0, 2.0, 0.0, 3.0]}, {"label_smoothing": 0.1}, {"embed_channels": 7}, {"warmup_steps": 2},
        {"revive_after": 1}, {"ppc_temperature": 0.1}, {"momentum": (0.5, 0.99, 10)}, {"confidence": "none"},
        {"scores": "temperature", "temperature": 0.07},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("checkpoint", ("scores", "all"))
def test_options(options, checkpoint):
    check(make_head(checkpoint=checkpoint, **options).double(), *problem(dtype=torch.float64))


def test_reference_backend_runs_in_bands_too():
    head = make_head().double()
    with use_backend("reference"):
        check(head, *problem(dtype=torch.float64))


@pytest.mark.parametrize("update", (False, True))
def test_evaluation_and_no_gradient(update):
    head, (x, labels) = make_head(), problem()
    other = copy.deepcopy(head)
    other.checkpoint = "none"
    with torch.no_grad():
        a, b = (h.loss(x, labels, update=update) for h in (head, other))
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(head.prototypes, other.prototypes)
    assert not a.loss.requires_grad


def test_only_parameters_need_gradients():
    head, (x, labels) = make_head(), problem()
    head.loss(x, labels).loss.backward()
    assert x.grad is None and all(p.grad is not None for p in head.parameters())


def test_frozen_head_trains_the_features_alone():
    head, (x, labels) = make_head().requires_grad_(False), problem()
    x.requires_grad_()
    head.loss(x, labels).loss.backward()
    assert x.grad is not None and all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_bad_pixel_poisons_nothing(checkpoint):
    head, (x, labels) = make_head(checkpoint=checkpoint), problem()
    before = head.prototypes.clone()
    x[1, 3, 4, 5] = float("inf")
    result = head.loss(x.requires_grad_(), labels)
    assert result.loss.isnan() and head.nonfinite_pixels == 1
    assert head.prototypes.isfinite().all() and not torch.equal(head.prototypes, before)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_nothing_labelled_gives_zeros(checkpoint):
    head, (x, labels) = make_head(checkpoint=checkpoint), problem()
    before = head.prototypes.clone()
    x.requires_grad_()
    result = head.loss(x, torch.full_like(labels, 255))
    result.loss.backward()
    assert result.loss == 0 and not x.grad.any() and torch.equal(head.prototypes, before)


def test_second_derivatives_are_refused():
    head, (x, labels) = make_head(), problem()
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="made its gradient in the forward pass"):
        torch.autograd.grad(head.loss(x, labels).loss, x, create_graph=True)


def test_activation_checkpointing_around_the_head_is_refused():
    head, (x, labels) = make_head(), problem()
    loss = torch.utils.checkpoint.checkpoint(lambda v: head.loss(v, labels).loss, x.requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"run again inside a backward pass.*around the backbone alone"):
        loss.backward()


def test_gradient_may_be_asked_for_twice():
    head, (x, labels) = make_head(), problem()
    x.requires_grad_()
    loss = head.loss(x, labels).loss
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, x)
    torch.testing.assert_close(2 * once, twice)


# a cap on the pixels of a class


@pytest.mark.parametrize("most", (1, 4, 1000))
def test_sample_keeps_at_most_so_many_of_each_class(most):
    labels = torch.randint(-1, 6, (500,))
    kept = sample_of_each_class(labels, 7, most, torch.rand(len(labels)))
    assert torch.equal(kept[kept >= 0], labels[kept >= 0])
    for c in range(7):
        assert (kept == c).sum() == min(most, int((labels == c).sum()))


def test_sample_is_even_and_seeded():
    labels = torch.zeros(40, dtype=torch.int64)

    def sample(seed=None):
        drawn = uniform((40,), labels.device, None if seed is None else torch.Generator().manual_seed(seed))
        return sample_of_each_class(labels, 1, 10, drawn)

    drawn = torch.stack([sample() >= 0 for _ in range(400)]).double().mean(0)
    assert (drawn - 0.25).abs().max() < 0.1  # 4.6 standard deviations of 400 draws
    assert torch.equal(sample(3), sample(3))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_capped_pixels_cluster_and_move(checkpoint):
    head = make_head(checkpoint=checkpoint, pixels_per_class=4, update_from="all", generator=torch.Generator().manual_seed(5))
    check(head.double(), *problem(dtype=torch.float64))
    assert head.last_counts.sum(1).max() <= 4 and head.class_counts.max() > 4


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"DNCHead: checkpoint must be one of none, scores, all; got 'some'"):
        make_head(checkpoint="some")
    with pytest.raises(ValueError, match=r"DNCHead: pixels_per_class must be None or a positive integer; got 0"):
        make_head(pixels_per_class=0)
    with pytest.raises(ValueError, match=r"DNCHead: accumulation_steps must be a positive integer; got 0"):
        make_head(accumulation_steps=0)


# memory

_MEASURE = """
import ctypes, gc, os, sys, torch
from pathlib import Path
from dnc_kernels.nn import DNCHead

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

def prepared(size, labels):
    return torch.randn(1, D, *size).requires_grad_(), torch.randint(0, C, (1, *labels))

def measure(checkpoint, loss_size, what, k, assignment):
    global D, C
    D, C = (128, 64) if k == "4" else (32, 8)
    torch.set_num_threads(2)
    head = DNCHead(D, C, int(k), checkpoint=checkpoint, loss_size=loss_size, assignment=assignment)
    x, y = prepared((8, 8), (16, 16))
    head.loss(x, y).loss.backward()
    x, y = prepared((128, 256), (512, 1024)) if k == "4" else prepared((96, 160), (192, 320))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    result = head.loss(x, y)
    (result.loss if what == "loss" else result.cross_entropy + 2 * result.ppc + result.ppd).backward()
    again = x.numel() * x.itemsize if what == "parts" and head.checkpoint == "all" else 0
    print(checkpoint, loss_size, what, k, assignment, peak() - before, head.step_bytes(x.shape, y.shape) + again, flush=True)

for line in sys.stdin:  # a process for each, of one that has imported everything and started no threads
    if os.fork() == 0:
        measure(*line.split())
        os._exit(0)
    assert os.wait()[1] == 0
"""

_SIZES, _WHAT = ("labels", "features"), ("loss", "parts")


@pytest.fixture(scope="module")
def memory_of_steps():
    """Bytes measured and of the formula, by checkpoint, loss_size, what backward goes through, K and assignment."""
    few = itertools.product(CHECKPOINTS, _SIZES, _WHAT, ["4"], ["argmax"])
    many = itertools.product(CHECKPOINTS, ["labels"], ["loss"], ["256"], ["argmax", "gumbel"])
    cases = "\n".join(map(" ".join, (*few, *many)))
    child = subprocess.run([sys.executable, "-c", _MEASURE], input=cases, capture_output=True, text=True, timeout=600)
    if "clear_refs" in child.stderr:
        pytest.skip("the recorded peak cannot be reset here")
    assert child.returncode == 0, child.stderr
    return {tuple(line.split()[:5]): tuple(map(int, line.split()[5:])) for line in child.stdout.splitlines()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("loss_size", _SIZES)
@pytest.mark.parametrize("what", _WHAT)
def test_memory_formula(memory_of_steps, checkpoint, loss_size, what):
    """A mixture of the parts takes both passes again, in backward, which make a second gradient of the features."""
    _check_memory(*memory_of_steps[checkpoint, loss_size, what, "4", "argmax"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("assignment", ["argmax", "gumbel"])
def test_memory_formula_holds_where_the_clustering_takes_most(memory_of_steps, checkpoint, assignment):
    _check_memory(*memory_of_steps[checkpoint, "labels", "loss", "256", assignment])


def _check_memory(measured, formula):
    assert measured <= formula <= 2 * measured, f"measured {measured / 1e6:.1f} MB, formula {formula / 1e6:.1f} MB"
