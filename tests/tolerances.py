"""One table of error bounds. Tests compare with float64 and take their bound from here, never from themselves.

The bound for an element is ``(factor * eps(compute) * sqrt(terms) + eps(output)) * (scale + |expected|)``:
rounding of `terms` accumulated products in the compute type (float64 for float64 input, else float32), then one rounding to the output
type. `factor` is a property of the op (how many such sums feed each other, and how much a step amplifies an error); `scale` is the
magnitude of what is summed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: rule -> factor. One row per op and quantity, with the reason for anything above 4.
FACTORS = {
    "sum": 4.0,  # sums of pixels, fp32 accumulation in any order
    "direction": 8.0,  # sums, then two normalisations
    "similarity": 4.0,  # one dot product of D terms; scale is |x||p| (or |x|^2 + |p|^2)
    # scores go through rstd (about 10 for unit vectors) and 1/temperature before exp; the gradient goes through them twice
    "loss": 16.0,
    "loss_gradient": 64.0,
    # softmax over C*K, then a sum of its C*K products; scale: a similarity's error grows by 1/temperature before exp
    "contrast_gradient": 4.0,
    # Sinkhorn: terms = R^2 + N. R is the range of similarity/epsilon: an exponent near R is rounded by R * eps, which exp turns into a
    # relative error; N pixels are summed for u. Gradient: scale is max|grad_plan|/epsilon.
    "plan": 2.0,
    "plan_gradient": 0.1,  # most of the similarity's gradient cancels, and the scale is its upper bound
    "embedding": 4.0,  # two statistics of D terms, then element-wise; scale: the length 1 spread over D channels
    "embedding_grad": 8.0,  # five sums of D terms combined; scale: |grad_y * weight| * inverse_norm * rstd of the worst pixel
    "embedding_param_grad": 4.0,  # sums of N products of a gradient (8 of them rounded alike) and xhat
    # interpolation, power of 2 and log-sum-exp of C terms; scale: largest score. Gradient: sums of all target pixels between two source
    # pixels; scale: the largest gradient times the largest score, whose rounding the power amplifies
    "upsampled_loss": 1.0,
    "upsampled_gradient": 0.2,
    "interpolated_loss": 8.0,  # four products, log-sum-exp of C terms, then a sum over pixels
    # a whole training: terms = steps * channels. Errors of a step are unlike each other and a stable training amplifies them little:
    # tests/test_fidelity.py holds a float64 run whose weights are rounded to float32 after every step to the same bound
    "training": 1.0,
    "head": 16.0,  # embedding, similarity, softmax and mean: four sums in a row
}


def bound(rule: str, actual: Tensor, expected: Tensor, *, terms: int, scale: float = 1.0) -> Tensor:
    """Allowed absolute error of every element of `actual`."""
    compute = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    output = torch.finfo(actual.dtype).eps
    return (FACTORS[rule] * compute * math.sqrt(max(terms, 1)) + output) * (scale + expected.abs())


def assert_close(actual: Tensor, expected: Tensor, rule: str, *, terms: int, scale: float = 1.0) -> None:
    """Assert that `actual` lies within the table's bound of the float64 `expected`; report the worst element."""
    assert expected.dtype == torch.float64, "compare with a float64 reference"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan), "NaN in different places"
    error = torch.where(nan | (actual == expected), 0.0, (actual.double() - expected).abs())
    allowed = bound(rule, actual, expected.nan_to_num(), terms=terms, scale=scale)
    ratio = error / allowed
    worst = int(ratio.argmax())
    assert ratio.flatten()[worst] <= 1, (
        f"{rule}: element {worst} is {actual.flatten()[worst].item():.9g}, expected {expected.flatten()[worst].item():.9g}; "
        f"error {error.flatten()[worst].item():.3g} > {allowed.flatten()[worst].item():.3g}"
    )


#: Against the released code's outputs (tests/data/golden_*.npz), relative to the largest element: in float64 what two orders of summation
#: may differ by; in float32 what the released code's own float32 rounding amounts to.
GOLDEN = {
    "value": {torch.float32: 2e-5, torch.float64: 1e-10},
    "loss": {torch.float32: 1e-5, torch.float64: 1e-10},
    "gradient": {torch.float32: 5e-4, torch.float64: 1e-8},
    "prototypes": {torch.float32: 1e-6, torch.float64: 1e-12},
}


def assert_golden(actual: Tensor, expected: Tensor, rule: str) -> None:
    """Assert that `actual` is what the released code computed, within the table's bound for the dtype of `expected`."""
    worst = float((actual.detach().double() - expected.double()).abs().max() / expected.double().abs().max())
    allowed = GOLDEN[rule][expected.dtype]
    assert worst <= allowed, f"{rule}: relative error {worst:.3g} > {allowed:.3g}"
