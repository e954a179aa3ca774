"""The CPU passes of a head's step: bit-equal for any number of threads, equal to the bands in Python, few parallel regions."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch

from dnc_kernels import backends, use_isa
from dnc_kernels.nn import DNCHead
from dnc_kernels.ops.head import cpu, reference
from dnc_kernels.ops.head.calls import ClusterCall, Clusters, Labels, LabelsCall

CHANNELS, CLASSES, K = 20, 21, 3  # classes and channels past a vector, and not a multiple of one
THREADS = (1, 2, 3, 5)
#: The parts of a step that C++ does.
PARTS = ("head_labels", "head_first_pass", "head_cluster", "head_second_pass")
pytestmark = pytest.mark.skipif(bool(backends.unusable("cpu")), reason=backends.unusable("cpu"))


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_head(**options):
    torch.manual_seed(1)
    defaults = {"ppc_weight": 0.3, "ppd_weight": 0.2, "momentum": 0.9, "band_pixels": 100}
    head = DNCHead(CHANNELS, CLASSES, K, **{**defaults, **options})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return head


def problem(size=(37, 29), labels=(74, 58), batch=2, dtype=torch.float32, channels_last=False):
    """Features and labels of odd sizes; more than 2^14 numbers, below which one thread does everything."""
    torch.manual_seed(2)
    x = torch.randn(batch, CHANNELS, *size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y = torch.randint(0, CLASSES, (batch, *labels))
    y[0, :3] = 255
    return x, y


def step(head, x, labels, part="loss", **options):
    """Everything a step gives, of a copy of the head."""
    head, x = copy.deepcopy(head), x.detach().requires_grad_()
    result = head.loss(x, labels, **options)
    total = result.loss if part == "loss" else result.cross_entropy + 2 * result.ppc + 0.5 * result.ppd
    total.backward()
    gradients = {"x": x.grad} | {name: p.grad for name, p in head.named_parameters()}
    state = {"prototypes": head.prototypes, "last_counts": head.last_counts, "class_counts": head.class_counts}
    return {k: v.detach() for k, v in result._asdict().items()} | gradients | state


def in_python(monkeypatch, *arguments, **options):
    """The same in plain torch and the ops of other families."""
    with monkeypatch.context() as patch:
        for name in PARTS:
            patch.setattr(cpu, name, getattr(reference, name))
        return step(*arguments, **options)


def same_bits(a, b):
    """Equal, NaN included."""
    return a.dtype == b.dtype and torch.equal(torch.where(a == a, a, 0), torch.where(b == b, b, 0))


def assert_half_close(actual, expected, dtype):
    assert actual["x"].dtype == dtype
    for name, value in actual.items():
        # the embedding is not rounded to half precision where it is added to its cluster
        tolerance = 4 * torch.finfo(dtype).eps if name in ("x", "prototypes") else 1e-4
        scale = float(expected[name].double().abs().max())
        error = float((value.double() - expected[name].double()).abs().max())
        assert error <= tolerance * scale, (name, error, scale)


OPTIONS = (
    {}, {"scores": "norm"}, {"scores": "temperature", "confidence": "none"}, {"loss_size": "features"},
    {"ppc_weight": 0.0}, {"ppc_weight": 0.0, "ppd_weight": 0.0}, {"checkpoint": "scores"}, {"align_corners": True},
    {"label_smoothing": 0.1, "class_weight": [1.0] * 20 + [3.0]}, {"update_from": "all", "pixels_per_class": 9},
    {"band_pixels": 1}, {"band_pixels": 10**6}, {"revive_after": 1},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_the_same_for_any_number_of_threads(options):
    head, (x, labels) = make_head(**options), problem()
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        head.generator = torch.Generator().manual_seed(3)
        found.append(step(head, x, labels))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other), options


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("channels_last", (False, True))
def test_bits_of_other_dtypes_and_layouts(dtype, channels_last):
    head, (x, labels) = make_head(scores="norm").to(dtype), problem(dtype=dtype, channels_last=channels_last)
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(step(head, x, labels))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_passes_equal_the_bands_in_python(options, monkeypatch):
    head, (x, labels) = make_head(**options).double(), problem(dtype=torch.float64)
    head.generator = torch.Generator().manual_seed(3)
    expected = in_python(monkeypatch, head, x, labels)
    head.generator = torch.Generator().manual_seed(3)
    for name, value in step(head, x, labels).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("isa", () if backends.unusable("cpu") else backends.usable_isas())
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_every_instruction_set(isa, dtype, monkeypatch):
    head, (x, labels) = make_head(scores="norm", label_smoothing=0.1).to(dtype), problem(dtype=dtype)
    with use_isa(isa):
        expected, actual = in_python(monkeypatch, head, x, labels), step(head, x, labels)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("labels", ((37, 29), (148, 116), (5, 7), (36, 29), (37, 58), (1, 1)), ids=str)
@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("band_pixels", (1, 100))
def test_label_sizes(labels, align_corners, band_pixels, monkeypatch):
    head = make_head(align_corners=align_corners, band_pixels=band_pixels).double()
    x, labels = problem(labels=labels, dtype=torch.float64)
    expected, actual = in_python(monkeypatch, head, x, labels), step(head, x, labels)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("size", ((1, 1), (1, 40), (40, 1), (2, 3), (3, 2)), ids=str)
@pytest.mark.parametrize("batch", (1, 9))
def test_small_maps(size, batch, monkeypatch):
    head = make_head(band_pixels=5).double()
    x, labels = problem(size, tuple(2 * n for n in size), batch, torch.float64)
    expected, actual = in_python(monkeypatch, head, x, labels), step(head, x, labels)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("part", ("loss", "parts"))
def test_half_precision(dtype, channels_last, part, monkeypatch):
    head, (x, labels) = make_head(), problem(dtype=dtype, channels_last=channels_last)
    expected, actual = in_python(monkeypatch, head, x, labels, part=part), step(head, x, labels, part=part)
    assert_half_close(actual, expected, dtype)


@pytest.mark.parametrize("isa", backends.usable_isas() if backends.NATIVE_ERROR == "" else ())
@pytest.mark.parametrize("options", ({"scores": "norm"}, {"ppc_weight": 0.0}, {"checkpoint": "scores"}), ids=str)
def test_bfloat16_on_every_instruction_set(isa, options, monkeypatch):
    """AMX has a first pass of its own, which configures the tile registers anew for each product of a band."""
    head, (x, labels) = make_head(**options), problem(dtype=torch.bfloat16)
    with use_isa(isa):
        expected = in_python(monkeypatch, head, x, labels)
        for threads in THREADS:
            torch.set_num_threads(threads)
            actual = step(head, x, labels)
            assert_half_close(actual, expected, torch.bfloat16)


def test_features_narrower_than_the_sub_centroids(monkeypatch):
    head, (x, labels) = make_head(scores="norm").double(), problem()
    expected, actual = in_python(monkeypatch, head, x, labels), step(head, x, labels)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_strided_features_and_labels():
    head, (x, labels) = make_head().double(), problem(dtype=torch.float64)
    crop = torch.empty(2, CHANNELS, 40, 64, dtype=torch.float64)[:, :, 2:39, 5:63:2].copy_(x)
    wide = torch.full((2, 74, 120), 255, dtype=torch.int32)[:, :, 1:117:2].copy_(labels)
    expected, actual = step(head, x, labels), step(head, crop, wide)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


def test_features_of_one_sample_that_is_expanded():
    head, (x, labels) = make_head(), problem(batch=1)
    one = x.expand(3, -1, -1, -1)
    expected, actual = step(head, one.contiguous(), labels.expand(3, -1, -1)), step(head, one, labels.expand(3, -1, -1))
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), 3e38))
@pytest.mark.parametrize("row", (0, 2, 3, 18, 36))
def test_a_planted_pixel_that_is_not_finite(bad, row, monkeypatch):
    """NaN where the bands in Python have it, the same numbers elsewhere; bit-equal for any number of threads."""
    head, (x, labels) = make_head(band_pixels=87), problem()  # 3 rows a band
    x[1, 4, row, 7] = bad
    expected, found = in_python(monkeypatch, head, x, labels), []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(step(head, x, labels))
    for name, value in found[0].items():
        assert all(same_bits(value, other[name]) for other in found[1:]), name
        torch.testing.assert_close(value, expected[name], equal_nan=True, rtol=1e-3, atol=1e-5)
    assert found[0]["prototypes"].isfinite().all()
    assert found[0]["x"][0].isfinite().all(), "another sample"


@pytest.mark.parametrize("update", (False, True))
def test_without_gradient(update, monkeypatch):
    head, (x, labels) = make_head(), problem()
    with torch.no_grad():
        actual = copy.deepcopy(head).loss(x, labels, update=update)
        for name in PARTS:
            monkeypatch.setattr(cpu, name, getattr(reference, name))
        expected = copy.deepcopy(head).loss(x, labels, update=update)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_bad_label_raises_and_says_where(monkeypatch):
    """Labels are sorted out before; the op itself sees what it is given."""
    (x, labels), calls, first_pass = problem(), [], cpu.head_first_pass
    monkeypatch.setattr(cpu, "head_first_pass", lambda *given: calls.append(given) or first_pass(*given))
    make_head().loss(x, labels)
    ((call, *rest),) = calls
    wrong = labels.clone()
    wrong[1, 40, 11] = CLASSES
    with pytest.raises(ValueError, match=rf"labels must be in \[0,C\).*got {CLASSES} at pixel {(74 + 40) * 58 + 11}"):
        first_pass(call._replace(labels=wrong), *rest)


def labels_out(call):
    n = len(call.labels) * call.height * call.width
    small, counts = torch.full((n,), -7), torch.full((1, 2 * call.classes + 1), -7, dtype=torch.int32)
    return Labels(small, counts, torch.full((3,), -7), torch.full((2,), -7))


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.uint8), ids=str)
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize(
    ("size", "features"),
    (((2, 300, 401), (75, 101)), ((2, 800, 801), (2, 801)), ((3, 5, 7), (82, 7)), ((1, 2, 3), (82, 29)), ((0, 4, 4), (1, 1))),
    ids=str,
)
def test_labels_are_counted(dtype, weighted, size, features):
    """Labels 21 to 23 are no classes, 255 is ignored, 20 and negative ones are left out too."""
    labels = torch.randint(0, CLASSES + 3, size).masked_fill_(torch.rand(size) < 0.2, 255).to(dtype)
    labels = labels if dtype == torch.uint8 else labels.masked_fill(torch.rand(size) < 0.1, -5)
    for given, ignored, middle in ((labels, 255, True), (labels, 20, False), (labels.flip(0).transpose(1, 2), 255, False)):
        call = LabelsCall(given, CLASSES, ignored, *features, middle, weighted, 3, 2, "cpu")
        expected = labels_out(call)
        reference.head_labels(call, expected)
        for threads in THREADS:
            torch.set_num_threads(threads)
            actual = labels_out(call)
            cpu.head_labels(call, actual)
            assert all(map(torch.equal, actual, expected))
        if given.numel():
            wrong = int(((given >= CLASSES) & (given != ignored)).sum())
            assert cpu.label_range(given, CLASSES, ignored) == (int(given.min()), wrong)
            assert cpu.label_range(given.to(torch.int16), CLASSES, ignored) == (int(given.min()), wrong)


def cluster_call(n, k, dtype, contrast, correct_only):
    generator = torch.Generator().manual_seed(7)

    def ids(bound, share):
        return torch.randint(bound, (n,), generator=generator).masked_fill(torch.rand(n, generator=generator) < share, -1)

    own, lse = (torch.randn(*size, generator=generator, dtype=dtype) for size in ((n, k), (n,)))
    own[1 % max(n, 1) :: 5] = own[1 % max(n, 1) :: 5, :1]  # similarities that are equal: the first wins
    small, prediction = ids(CLASSES, 0.1), ids(CLASSES, 0.05)
    prediction = torch.where(torch.rand(n, generator=generator) < 0.5, small, prediction)
    factors = torch.rand(7, generator=generator, dtype=dtype)
    return ClusterCall(
        own, torch.where(prediction < 0, -1, small), prediction, small, lse if contrast else None, ids(k, 0.02), None, None,
        factors, CLASSES, 0.05, 3, 0.3, True, correct_only, 0, None, 0, "constant", 0.9, 0, 0, False, "cpu", "cpu",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("correct_only", (False, True))
@pytest.mark.parametrize(
    ("n", "k", "contrast"), ((0, 3, True), (1, 1, False), (9000, 1, True), (30011, 7, False), (30011, 20, True))
)
def test_targets(dtype, correct_only, n, k, contrast):
    call, found = cluster_call(n, k, dtype, contrast, correct_only), []
    for head_cluster in (reference.head_cluster, *[cpu.head_cluster] * len(THREADS)):
        torch.set_num_threads(THREADS[len(found) - 1])
        target, moving = (torch.full((n,), -7) for _ in range(2))
        sums, counters = torch.full((1, 2), 7.0, dtype=torch.float64), torch.full((CLASSES * k + 3,), -7)
        out = Clusters(target, torch.full((n,), 7.0, dtype=dtype), moving, sums, None, None, counters, None)
        head_cluster(call, out)
        found.append(out)
    expected, one, *others = found
    for name in ("target", "moving", "counters"):
        assert torch.equal(getattr(one, name), getattr(expected, name)), name
    for name in ("pull", "sums"):
        torch.testing.assert_close(getattr(one, name).to(dtype), getattr(expected, name).to(dtype))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)


@pytest.mark.parametrize(("field", "value"), (("group", CLASSES), ("assignment", 4)))
def test_a_target_beyond_the_subcentroids_raises(field, value):
    call = cluster_call(100, 4, torch.float32, True, False)
    call = call._replace(group=call.group.clamp(max=3), assignment=call.assignment.clamp(max=3))
    getattr(call, field)[41:60] = value
    out = [torch.empty(100, dtype=torch.int64), torch.empty(100), torch.empty(100, dtype=torch.int64)]
    counters = torch.empty(CLASSES * 4 + 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"groups must be in \[0,C\).*got {value} at pixel 41"):
        cpu.head_cluster(call, Clusters(*out, torch.empty(1, 2, dtype=torch.float64), None, None, counters, None))


# parallel regions

_COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
static long entered;
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  static Parallel real;
  if (!real) real = (Parallel)dlsym(RTLD_NEXT, "GOMP_parallel");
  if (threads != 1) __sync_fetch_and_add(&entered, 1);
  real(body, data, threads, flags);
}
long regions(void) { return entered; }
"""

_STEP = """
import ctypes, sys, torch
from dnc_kernels import backends, use_isa
from dnc_kernels.nn import DNCHead
counter = ctypes.CDLL(sys.argv[1])
torch.set_num_threads(2)
x, labels = torch.randn(1, 64, 128, 256).requires_grad_(), torch.randint(0, 19, (1, 512, 1024))
head = DNCHead(64, 19, 10)
for _ in range(2):
    before = counter.regions()
    head.loss(x, labels).loss.backward()
print(counter.regions() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="counts calls of libgomp")
def test_a_step_enters_few_parallel_regions(tmp_path):
    """Each ends in a barrier, at which threads stall where other processes hold the cores: one per pass, and the labels' own."""
    (tmp_path / "count.c").write_text(_COUNTER)
    library = tmp_path / "count.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "count.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    child = subprocess.run(
        [sys.executable, "-c", _STEP, str(library)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert 1 <= int(child.stdout) <= 5
