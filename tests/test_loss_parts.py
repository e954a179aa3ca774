"""The parts of a loss and what is done with them: gradients of any mixture, and what a loss says that is taken for a tensor."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from tolerances import assert_close

from dnc_kernels import use_backend
from dnc_kernels.nn import DNCClassifier, DNCHead, DNCLoss, _step

CHANNELS, CLASSES, K = 12, 5, 3
PARTS = ("cross_entropy", "ppc", "ppd")
MIXTURES = {
    **{part: {part: 1.0} for part in PARTS},
    "all": {"cross_entropy": 0.7, "ppc": 2.0, "ppd": 0.05},
    "with the loss": {"loss": 0.5, "ppc": 1.3},
    "against the loss": {"loss": 1.0, "cross_entropy": -1.0},
    "negative": {"cross_entropy": 1.0, "ppd": -0.4},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_bands(monkeypatch):
    monkeypatch.setattr(_step, "BAND_PIXELS", 40)


def make_head(**options):
    torch.manual_seed(1)
    head = DNCHead(CHANNELS, CLASSES, K, **{"ppc_weight": 0.3, "ppd_weight": 0.2, "momentum": 0.9, **options})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return head


def problem(dtype=torch.float32, layout=torch.contiguous_format):
    torch.manual_seed(2)
    x = torch.randn(2, CHANNELS, 9, 13).to(dtype).contiguous(memory_format=layout)
    labels = torch.randint(0, CLASSES, (2, 18, 26))
    labels[0, :2] = 255
    return x, labels


def mix(result, mixture, scale=1.0):
    return scale * sum(weight * getattr(result, part) for part, weight in mixture.items())


def gradients(head, x, labels, mixture, scale=1.0, **options):
    head, x = copy.deepcopy(head), x.detach().requires_grad_()
    mix(head.loss(x, labels, **options), mixture, scale).backward()
    # a part that says nothing about a parameter leaves it a zero, or nothing
    tensors = {"x": x} | dict(head.named_parameters())
    return {name: torch.zeros_like(t) if t.grad is None else t.grad / scale for name, t in tensors.items()}


def exact_gradients(head, x, labels, mixture, **options):
    """Of a float64 copy whose step is made of reference ops, with autograd between them."""
    wide = copy.deepcopy(head).double()
    wide.checkpoint = "none"
    with use_backend("reference"):
        return gradients(wide, x.double(), labels, mixture, **options)


def assert_same(actual, expected, terms):
    for name, want in expected.items():
        assert_close(actual[name], want.double(), "head", terms=terms, scale=float(want.abs().max()) or 1.0)


# gradients


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("checkpoint", ("none", "scores", "all"))
@pytest.mark.parametrize("update", (False, True))
def test_gradients_of_parts_are_those_of_plain_torch(mixture, checkpoint, update):
    head, (x, labels) = make_head(checkpoint=checkpoint), problem()
    # with update=True the sub-centroids have moved when backward comes
    actual = gradients(head, x, labels, mixture, update=update)
    assert_same(actual, exact_gradients(head, x, labels, mixture, update=update), x.numel())


@pytest.mark.parametrize(
    "options",
    [
        {"scores": "norm"}, {"scores": "temperature", "temperature": 0.07}, {"confidence": "none"}, {"loss_size": "features"},
        {"class_weight": [0.5, 1.0, 2.0, 0.0, 3.0], "label_smoothing": 0.1}, {"ppc_temperature": 0.1}, {"embed_channels": 7},
        {"align_corners": True}, {"revive_after": 1}, {"update_from": "all"},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_counts_in_the_parts(options):
    head, (x, labels) = make_head(**options).double(), problem(torch.float64)
    assert_same(gradients(head, x, labels, MIXTURES["all"]), exact_gradients(head, x, labels, MIXTURES["all"]), x.numel())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_the_weights_of_the_loss_give_its_gradient(dtype, layout):
    head, (x, labels) = make_head(), problem(dtype, layout)
    mixture = {"cross_entropy": 1.0, "ppc": 0.3, "ppd": 0.2}
    assert_same(gradients(head, x, labels, mixture), gradients(head, x, labels, {"loss": 1.0}), x.numel())


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 65536.0)], ids=str)
def test_half_precision_neither_under_nor_overflows(dtype, scale, mixture, layout):
    # one sub-centroid of each class: with more, rounding decides which of two equally near ones gets a gradient
    torch.manual_seed(1)
    head, (x, labels) = DNCHead(CHANNELS, CLASSES, 1, ppc_weight=0.3, ppd_weight=0.2), problem(dtype, layout)
    expected = exact_gradients(head, x, labels, mixture)["x"]
    y = x.detach().requires_grad_()
    mix(head.loss(y, labels), mixture, scale).backward()
    assert y.grad.dtype == dtype and y.grad.isfinite().all()
    norm = expected.norm(dim=1, keepdim=True)  # every pixel by itself: the smallest gradients are the first to vanish
    norm = norm.clamp(min=float(norm.max()) / 100)  # where the parts nearly cancel nothing is left to compare
    assert_close((y.grad.double() / scale / norm).to(dtype), expected / norm, "loss_gradient", terms=CHANNELS)
