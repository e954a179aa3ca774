"""What only the CUDA C++ kernels of upsampling owe, against float64: on a GPU, else their own source on the host."""

import pytest
import torch
import upsample_check
from cuda_on_cpu import DEVICE, ORDERS, configure
from gpu_check import captured, needs_gpu, no_wait
from tolerances import assert_close
from upsample_check import DTYPES, IGNORE, loss_call, normal, random_labels, upsampled, whole_and_bands

from dnc_kernels import ops
from dnc_kernels.ops.upsample import cuda as kernels
from dnc_kernels.ops.upsample import op
from dnc_kernels.ops.upsample.calls import ArgmaxCall, UpsampleOut

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]


def check(*args, **options):
    upsample_check.check("cuda", *args, **options)


def test_the_order_of_threads_does_not_matter(order):
    """Blocks side by side and of several rows, a last block of few cells, several warps and class chunks of a block."""
    check(normal(2, 170, 5, 33), random_labels(2, 170, (9, 68)), weight=torch.rand(170).to(DEVICE) + 0.1)
    check(normal(1, 40, 4, 3), random_labels(1, 40, (15, 11)), align_corners=True, label_smoothing=0.1, reduction="sum")


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", (3, 8, 37))
@pytest.mark.parametrize("target", ((3, 35), (5, 70), (9, 140)), ids=str)
def test_channels_last(dtype, classes, target):
    """Whole and partial runs of classes; several warps; 1, 2 and 4 pixels of a cell along each dimension."""
    scores = normal(2, classes, 3, 35, dtype=dtype).contiguous(memory_format=torch.channels_last)
    labels = random_labels(2, classes, target)
    labels[:, 1] = IGNORE
    check(scores, labels, label_smoothing=0.1)
    label = ops.upsample_argmax(scores, target, backend="cuda")
    assert torch.equal(label, ops.upsample_argmax(scores.contiguous(), target, backend="cuda"))


def test_channels_last_of_several_blocks_of_classes(order):
    scores = normal(1, 170, 4, 5).contiguous(memory_format=torch.channels_last)
    labels = random_labels(1, 170, (15, 19))
    labels[:, :8] = IGNORE
    check(scores, labels)
    grads = [torch.full_like(s, 7.0) for s in (scores, scores.contiguous(), scores.transpose(2, 3))]
    grads[2] = grads[2].transpose(2, 3)
    for grad in grads:
        kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(grad_scores=grad))
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    (expected,) = torch.autograd.grad(
        ops.upsample_cross_entropy(leaf := scores.contiguous().requires_grad_(), labels, reduction="sum", backend="cuda"), leaf
    )
    assert torch.equal(grads[0], expected)


@pytest.mark.parametrize("classes", (1, 2, 31, 40, 65, 161))
def test_numbers_of_classes(classes):
    check(normal(1, classes, 3, 2), random_labels(1, classes, (7, 6)), reduction="none")


def test_a_bad_gradient_of_the_loss_reaches_only_what_its_pixel_has_a_share_of():
    scores, labels, grad = normal(1, 3, 3, 3), torch.ones(1, 5, 5, dtype=torch.int64, device=DEVICE), torch.empty(1, 3, 3, 3)
    grad_loss = torch.zeros(1, 5, 5, device=DEVICE)
    grad_loss[0, 2, 2] = float("nan")  # on the source pixel in the middle
    grad = grad.to(DEVICE)
    kernels.upsample_cross_entropy(
        loss_call(scores, labels, align_corners=True, label_smoothing=0.1, grad_loss=grad_loss), UpsampleOut(grad_scores=grad)
    )
    assert grad[0, :, 1, 1].isnan().all()
    grad[0, :, 1, 1] = 0
    assert not grad.any()


@pytest.mark.parametrize("distance", (3, 11, 13, 46, 58))
@pytest.mark.parametrize("turned", (False, True))
def test_classes_that_are_steep_along_both_axes(distance, turned):
    """Beside a flat class that keeps every sum alive."""
    scores = normal(1, 3, 2, 2)
    scores[0, 0] += torch.tensor([[0, distance], [distance, 3 * distance]], device=DEVICE)
    scores[0, 1] += 1.6 * distance
    scores = scores.flip(2, 3) if turned else scores
    for size in ((4, 4), (7, 8)):
        check(scores, random_labels(1, 3, size), align_corners=True, reduction="none")


def test_infinities_in_cells_without_pixels_reach_nothing():
    scores = normal(1, 2, 9, 9)
    scores[0, 0, 1:3, 3], scores[0, 0, 1:3, 4] = -torch.inf, torch.inf
    scores = scores.requires_grad_()
    labels = torch.zeros(1, 2, 2, dtype=torch.int64, device=DEVICE)  # in cells 1 and 6 of each axis
    loss = ops.upsample_cross_entropy(scores, labels, backend="cuda")
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all() and not scores.grad[0, :, :, 3:6].any()


@pytest.mark.parametrize("distance", (11, 80))
def test_later_classes_may_be_far_above(distance):
    scores = normal(1, 12, 3, 3) + distance * torch.arange(12, device=DEVICE).view(-1, 1, 1)
    check(scores, random_labels(1, 12, (12, 12)), reduction="none")
    check(scores.flip(1), random_labels(1, 12, (12, 12)), reduction="none")


def test_large_gradients_of_the_loss():
    scores, labels = normal(1, 3, 3, 3), random_labels(1, 3, (12, 12))
    grads = []
    for factor in (1.0, 2.0**40):
        grad = torch.empty_like(scores)
        kernels.upsample_cross_entropy(
            loss_call(scores, labels, grad_loss=torch.full((1, 12, 12), factor, device=DEVICE)), UpsampleOut(grad_scores=grad)
        )
        grads.append(grad / factor)
    assert torch.equal(*grads)


def test_a_band_without_labels_has_no_loss_and_no_gradient():
    whole_and_bands(kernels, normal(1, 2, 8, 3), random_labels(1, 2, (2, 3)), True, ((0, 3), (3, 5), (5, 8)))


@pytest.mark.parametrize(
    ("window", "message"),
    (((4, 1, 8, 0), "outside the map"), ((8, 0, 8, 4), "outside the map"), ((8, 4, 16, 0), "lacks source rows")),
)
def test_windows_that_cannot_be(window, message):
    scores, labels = normal(1, 2, 4, 3), random_labels(1, 2, (8, 6))
    with pytest.raises(ValueError, match=message):
        kernels.upsample_cross_entropy(
            loss_call(scores, labels, window=window), UpsampleOut(grad_scores=torch.empty_like(scores))
        )


def test_only_what_is_asked_for():
    scores, labels = normal(1, 3, 3, 4), random_labels(1, 3, (5, 6))
    sums, loss, grad = (torch.empty(2, dtype=torch.float64), torch.empty(1, 5, 6), torch.empty(1, 3, 3, 4))
    both = [t.to(DEVICE) for t in (sums, loss, grad)]
    kernels.upsample_cross_entropy(loss_call(scores, labels, label_smoothing=0.1), UpsampleOut(*both))
    for k in range(3):
        alone = [torch.full_like(t, 7.0) if i == k else None for i, t in enumerate(both)]
        kernels.upsample_cross_entropy(loss_call(scores, labels, label_smoothing=0.1), UpsampleOut(*alone))
        assert torch.equal(alone[k], both[k])
    kernels.upsample_cross_entropy(loss_call(scores, labels, label_smoothing=0.1), UpsampleOut())


def test_samples_that_lie_far_apart_are_launched_apart(tmp_path, cuda):
    """Offsets within a launch fit 32 bits: three samples, 2 GB apart in a sparse file."""
    if cuda == "cuda":
        pytest.skip("test_more_than_4_gb is for GPUs")
    apart = 2**30
    storage = torch.from_file(str(tmp_path / "scores"), shared=True, size=2 * apart + 12, dtype=torch.float16)
    scores = storage.as_strided((3, 2, 2, 3), (apart, 6, 3, 1))
    scores.copy_(normal(3, 2, 2, 3))
    weight = torch.rand(2) + 0.1
    check(scores, random_labels(3, 2, (5, 7)), weight=weight, reduction="none")
    check(scores, random_labels(3, 2, (5, 7)), weight=weight, reduction="mean")
    assert torch.equal(*(ops.upsample_argmax(s, (5, 7), backend="cuda") for s in (scores, scores.contiguous())))


def test_a_class_of_more_than_4_gb_is_refused(tmp_path, cuda):
    if cuda == "cuda":
        pytest.skip("takes a sparse file")
    storage = torch.from_file(str(tmp_path / "scores"), shared=True, size=2**31 + 6, dtype=torch.float16)
    scores = storage.as_strided((1, 2, 2, 3), (0, 3, 2**31, 1))
    labels = random_labels(1, 2, (4, 6))
    with pytest.raises(ValueError, match="less than 4 GB"):
        kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(grad_scores=torch.empty(1, 2, 2, 3)))
    with pytest.raises(ValueError, match="less than 4 GB"):
        kernels.upsample_argmax(ArgmaxCall(scores, False, "cuda"), labels)


@pytest.mark.sanitize
def test_argmax_of_several_blocks(order):
    scores = normal(2, 7, 6, 35)
    label = ops.upsample_argmax(scores, (23, 140), backend="cuda")
    logits = upsampled(scores, (23, 140), False)
    assert_close(logits.gather(1, label[:, None])[:, 0].float(), logits.amax(1), "interpolated_loss", terms=4, scale=4.0)


def test_the_order_of_threads_changes_no_bit(cuda):
    if cuda == "cuda":
        pytest.skip("a GPU chooses its own order")
    scores, labels = normal(2, 5, 3, 20), random_labels(2, 5, (12, 80))
    results = []
    for order in ORDERS:
        configure(order)
        sums, grad = torch.empty(2, dtype=torch.float64), torch.empty_like(scores)
        kernels.upsample_cross_entropy(loss_call(scores, labels, label_smoothing=0.1), UpsampleOut(sums=sums, grad_scores=grad))
        results.append(torch.cat((sums, grad.double().flatten())))
    assert all(torch.equal(r, results[0]) for r in results)


def test_how_rows_are_cut_changes_no_bit(cuda):
    if cuda == "cuda":
        pytest.skip("a GPU has the processors that it has")
    scores, labels = normal(1, 3, 9, 4), random_labels(1, 3, (17, 13))
    grads = []
    for processors in (1, 3, 40, 132):
        configure(processors=processors)
        grads.append(torch.empty_like(scores))
        kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(grad_scores=grads[-1]))
    assert all(torch.equal(g, grads[0]) for g in grads)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_opcheck(reduction):
    scores, labels = normal(1, 3, 2, 3).requires_grad_(), random_labels(1, 3, (4, 5))
    early = reduction == "mean"
    arguments = (*loss_call(scores, labels, label_smoothing=0.1, backend="cuda"), reduction, early)
    # the gradient of "mean", an output, is multiplied in place by the backward pass, which the other utilities call a difference
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op._loss.overload, arguments, test_utils=utilities)
    torch.library.opcheck(op.upsample_argmax.overload, (scores.detach(), False, "cuda", 5, 7))
    grad_loss = torch.rand(1, 4, 5, device=DEVICE)
    call = loss_call(scores.detach(), labels, label_smoothing=0.1, grad_loss=grad_loss, backend="cuda")
    torch.library.opcheck(op._loss_backward.overload, tuple(call))


@needs_gpu
def test_a_captured_call_replays():
    scores, labels = normal(2, 19, 16, 16), random_labels(2, 19, (64, 64))
    sums, grad = torch.empty(2, dtype=torch.float64, device=DEVICE), torch.empty_like(scores)
    call, out = loss_call(scores, labels), UpsampleOut(sums=sums, grad_scores=grad)
    graph, _ = captured(lambda: kernels.upsample_cross_entropy(call, out))
    expected = sums.clone(), grad.clone()
    sums.zero_(), grad.zero_()
    graph.replay()
    assert torch.equal(sums, expected[0]) and torch.equal(grad, expected[1])


@needs_gpu
def test_the_call_does_not_synchronise():
    scores, labels = normal(2, 19, 8, 8), random_labels(2, 19, (32, 32))
    outputs = torch.empty(2, dtype=torch.float64, device=DEVICE), None, torch.empty_like(scores)
    kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(*outputs))
    with no_wait():
        kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(*outputs))
        kernels.upsample_argmax(ArgmaxCall(scores, False, "cuda"), labels)


@pytest.mark.large
@needs_gpu
def test_more_than_4_gb():
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GB")
    scores = torch.zeros(4, 600, 1024, 1024, dtype=torch.bfloat16, device=DEVICE)
    scores[3, 599, 1023, 1023] = 1
    label = ops.upsample_argmax(scores, 1024, backend="cuda")
    assert label[3, 1023, 1023] == 599 and int((label != 0).sum()) == 1
