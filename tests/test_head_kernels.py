"""The head's step on a GPU's kernels, by Triton's interpreter and as host fibers: float64 ops, launches, bands, memory."""

import copy

import pytest
import torch
from gpu_check import BACKENDS
from launches import counted
from tolerances import assert_close

from dnc_kernels import nn, use_backend
from dnc_kernels.nn import _labels
from dnc_kernels.ops.head import default_band
from dnc_kernels.ops.head.bands import DEVICE_BAND_BYTES, pixel_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

# channels in groups of 8, as CUDA C++ takes them
CHANNELS, CLASSES, K = 16, 5, 3
BUFFERS = (
    "prototypes", "last_counts", "class_counts", "wins", "idle_updates", "num_updates", "nonfinite_pixels", "bad_labels"
)  # fmt: skip
OPTIONS = {
    "default": {},
    "released": {"recipe": "released"},
    "temperature": {"scores": "temperature", "confidence": "none"},
    "no contrast": {"ppc_weight": 0.0, "ppd_weight": 0.0},
    "distance alone": {"ppc_weight": 0.0, "ppd_weight": 0.3},
    "weights": {"class_weight": [1.0, 2.0, 0.5, 0.0, 3.0], "label_smoothing": 0.1, "loss_size": "features"},
    "ramp": {"momentum": (0.9, 0.99, 10), "warmup_steps": 1, "update_from": "all"},
    "function": {"momentum": lambda updates: 0.9 + 0 * updates},
    "gumbel": {"assignment": "gumbel"},
    "balanced": {"pixels_per_class": 4},
    "revival": {"revive_after": 1},
    "accumulation": {"accumulation_steps": 2},
    "start": {"init": "data"},
}


def make_head(**options):
    head = nn.DNCHead(CHANNELS, CLASSES, K, **{"generator": torch.Generator().manual_seed(3), **options})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return head


HEIGHT, WIDTH = 4, 6  # small: the interpreter takes a second for a few rows of labels


def problem(dtype=torch.float32, size=(7, 10)):
    torch.manual_seed(2)
    x, labels = torch.randn(2, CHANNELS, HEIGHT, WIDTH).to(dtype), torch.randint(0, CLASSES, (2, *size))
    labels[0, :2] = 255
    return x, labels


def step(head, x, labels, backend):
    """Everything a step gives: losses, gradients, and the state afterwards."""
    x = x.detach().requires_grad_()
    for parameter in head.parameters():
        parameter.grad = None
    with use_backend(backend):
        result = head.loss(x, labels)
        result.loss.backward()
    gradients = {"x": x.grad} | {name: p.grad for name, p in head.named_parameters()}
    return {k: v.detach() for k, v in result._asdict().items()} | gradients | {n: getattr(head, n).clone() for n in BUFFERS}


def check(head, x, labels, backend, steps=1):
    """Compare a head's steps with those of a float64 copy made of reference ops."""
    wide = copy.deepcopy(head).double()
    wide.checkpoint = "none"
    for _ in range(steps):
        actual, expected = step(head, x, labels, backend), step(wide, x.double(), labels, "reference")
        for name, want in expected.items():
            if not want.is_floating_point() or name == "accuracy":
                assert torch.equal(actual[name], want.to(actual[name].dtype)), name
                continue
            assert_close(actual[name], want, "head", terms=x.numel(), scale=float(want.abs().max()) or 1.0)


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_step_equals_float64_ops(backend, options):
    if backend == "cuda" and options in ("gumbel", "balanced", "revival", "function"):
        pytest.skip("alike on both")
    x, labels = problem()
    check(make_head(**OPTIONS[options]), x, labels, backend, steps=2 if options in ("ramp", "accumulation", "revival") else 1)


@pytest.mark.triton
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "rows"])
@pytest.mark.parametrize("band_pixels", [12, None])
@pytest.mark.parametrize("recipe", ["default", "released"])
def test_bands_do_not_change_a_step(recipe, band_pixels, layout):
    x, labels = problem()
    check(make_head(recipe=recipe, band_pixels=band_pixels), x.contiguous(memory_format=layout), labels, "triton", 1)


@pytest.mark.triton
@pytest.mark.parametrize("size", [(4, 6), (2, 5), (1, 1), (9, 6)], ids=str)
def test_labels_of_any_size(size):
    x, labels = problem(size=size)
    check(make_head(label_mode="nearest"), x, labels, "triton")


@pytest.mark.triton
def test_a_pixel_that_is_not_finite_moves_nothing():
    x, labels = problem()
    x[1, :, 2, 3] = torch.nan
    labels[:] = labels[0, 5, 5]
    head = make_head()
    before = head.prototypes.clone()
    found = step(head, x, labels, "triton")
    assert found["loss"].isnan() and found["nonfinite_pixels"] == 1
    assert head.prototypes.isfinite().all() and not torch.equal(head.prototypes, before)
    assert found["last_counts"].sum() <= 2 * HEIGHT * WIDTH - 1


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16], ids=str)
def test_labels_that_are_no_class_are_left_out_and_counted(dtype, monkeypatch):
    """As on a GPU, where nobody looks at them."""
    monkeypatch.setattr(_labels, "sort_out_labels", lambda op, labels, *_: (labels, 255, 0))
    x, labels = problem()
    labels[0, 4, :3] = 7
    head, clean = make_head(), make_head()
    found = step(head, x, labels.to(dtype), "triton")
    expected = step(clean, x, torch.where(labels == 7, 255, labels), "triton")
    assert found.pop("bad_labels") == 3 and expected.pop("bad_labels") == 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# launches


def launched(head, x, labels, backend, monkeypatch):
    """Names of what a loss launches, and a backward pass through it; without a CPU's look at the labels."""
    monkeypatch.setattr(_labels, "sort_out_labels", lambda op, labels, *_: (labels, 255, 0))
    x = x.detach().requires_grad_()
    with use_backend(backend):
        head.loss(x, labels).loss.backward()  # what is made once is made
        x.grad = None
        for parameter in head.parameters():
            parameter.grad = None
        with counted() as forward:
            loss = head.loss(x, labels).loss
        with counted() as backward:
            loss.backward()
    return forward, backward


@pytest.mark.parametrize(
    "options",
    [
        {}, {"recipe": "released"}, {"ppc_weight": 0, "ppd_weight": 0}, {"loss_size": "features"}, {"momentum": 0.9},
        {"class_weight": [1.0] * CLASSES, "label_smoothing": 0.1}, {"checkpoint": "scores"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_launches_of_a_step_in_one_band(backend, options, monkeypatch):
    """docs/layer.md has these numbers."""
    x, labels = problem(torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    forward, backward = launched(make_head(**options), x, labels, backend, monkeypatch)
    assert len(forward) == 18, forward
    assert len(backward) == 4, backward


@pytest.mark.triton
def test_channels_that_do_not_lie_side_by_side_take_a_launch_more(monkeypatch):
    x, labels = problem(torch.bfloat16)
    forward, _ = launched(make_head(), x, labels, "triton", monkeypatch)
    assert len(forward) == 19 and "triton head_pull_kernel" in forward


# memory


def test_a_band_takes_what_it_may():
    x = torch.empty(8, 256, 128, 128, dtype=torch.bfloat16, device="meta")
    for classes, norm in ((150, False), (1000, True)):
        per_pixel = pixel_bytes(256, classes, 2, norm)
        assert (
            default_band(x, classes, norm) * per_pixel <= DEVICE_BAND_BYTES < (default_band(x, classes, norm) + 1) * per_pixel
        )
    assert default_band(x, 150, False) > 8 * 128 * 128  # all pixels of a large step
