"""What only Triton's Sinkhorn kernels owe, against the float64 reference: on a GPU, or under the interpreter."""

import pytest
from sinkhorn_check import exact, problem, terms
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured

pytestmark = pytest.mark.triton


def test_tiles_of_any_size_agree():
    s, group = problem(100, 6, 4)
    want = exact(s, group, 4).plan
    for block in (16, 128):
        with configured("sinkhorn", BLOCK_N=block, CELLS=4096, num_warps=2, num_stages=1):
            plan = ops.sinkhorn_plan(s, group, 4, backend="triton")
        assert_close(plan, want, "plan", terms=terms(s, 0.05), scale=1e-30)
