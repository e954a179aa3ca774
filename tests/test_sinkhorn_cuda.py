"""What only the CUDA C++ kernels of Sinkhorn owe, against the float64 reference: on a GPU, or as host C++."""

import pytest
import sinkhorn_check
import torch
from cuda_on_cpu import DEVICE, configure
from gpu_check import needs_gpu, replays
from sinkhorn_check import WIDTHS, problem

from dnc_kernels import ops
from dnc_kernels.ops.sinkhorn import op
from dnc_kernels.ops.sinkhorn.calls import SinkhornCall

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]
CUDA = {"backend": "cuda"}


def check(*args, **options):
    sinkhorn_check.check("cuda", *args, **options)


def check_gradient(*args, **options):
    sinkhorn_check.check_gradient("cuda", *args, **options)


@pytest.mark.parametrize("width", [10, 33])
def test_in_any_order_of_threads(order, width):
    s, group = problem(300, width, 5)
    check(s, group, 5, tolerance=1e-2)
    check_gradient(s, group, 5)


# one multiprocessor has all tiles: of 1024 rows, which stay; of 512, which do not all stay in the backward pass; of 256, where
# none stays in the backward pass; the same where a tile of 1024 threads does not fit
@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("pixels", "width", "groups", "capability"), [(2100, 10, 40, 90), (1700, 20, 600, 90), (1100, 48, 3, 90), (500, 48, 3, 86)]
)
def test_several_tiles_a_block(pixels, width, groups, capability):
    if DEVICE == "cpu":
        configure(processors=1, capability=capability)
    s, group = problem(pixels, width, groups)
    check(s, group, groups, iterations=2)
    check_gradient(s, group, groups, iterations=2)


@pytest.mark.sanitize
@pytest.mark.parametrize("width", WIDTHS)
def test_more_processors_than_tiles(width):
    """Tiles are as small as they get: of 16 rows, half a warp, where K is 49 or more."""
    if DEVICE == "cpu":
        configure(processors=132)
    check(*problem(150, width, 5), 5)
    check_gradient(*problem(90, width, 3), 3)


def test_opcheck():
    s, group = problem(40, 5, 3)
    plan, history, steps = op.sinkhorn_plan(SinkhornCall(s, group, 3, 0.05, 2, -1.0, "cuda"))
    opcheck = torch.library.opcheck
    opcheck(op.sinkhorn_assign.overload, (s, group, 3, 0.05, 2, -1.0, "cuda"))
    opcheck(op.sinkhorn_plan.overload, (s.clone().requires_grad_(), group, 3, 0.05, 2, -1.0, "cuda"))
    opcheck(op.sinkhorn_plan_backward.overload, (s, group, 3, 0.05, history, steps, plan.sin(), "cuda"))


def test_what_the_kernels_do_not_take_is_refused_by_name():
    group = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match="the cuda kernel does not take float64"):
        ops.sinkhorn_assign(torch.rand(4, 3, dtype=torch.float64, device=DEVICE), group, 1, **CUDA)
    with pytest.raises(RuntimeError, match="the cuda kernel takes at most 64 sub-centroids a class, not 65"):
        ops.sinkhorn_assign(torch.rand(4, 65, device=DEVICE), group, 1, **CUDA)


@needs_gpu
def test_no_wait_and_capture():
    s, group = problem(3000, 10, 19)
    grad = torch.randn(3000, 10, device=DEVICE)

    def step():
        x = s.detach().clone().requires_grad_()
        plan = ops.sinkhorn_plan(x, group, 19, **CUDA)
        return plan.detach(), torch.autograd.grad(plan, x, grad)[0], ops.sinkhorn_assign(s, group, 19, **CUDA)

    replays(step)


# tiles of the ADE20K shape, one a multiprocessor; then many, some of which do not stay
@needs_gpu
@pytest.mark.parametrize("pixels", [131_072, pytest.param(3_000_000, marks=pytest.mark.large)])
def test_large_problems(pixels):
    s, group = problem(pixels, 10, 150)
    check(s, group, 150)
    check_gradient(s, group, 150)


@pytest.mark.large
@needs_gpu
def test_more_than_2_to_the_31_elements_apart():
    wide = torch.zeros(40_000, 65_536, dtype=torch.float16, device=DEVICE)
    s, group = problem(40_000, 10, 3, dtype=torch.float16)
    wide[:, ::7000] = s
    plan = ops.sinkhorn_plan(wide[:, ::7000], group, 3, **CUDA)
    assert torch.equal(plan, ops.sinkhorn_plan(s, group, 3, **CUDA))
