"""What the GPU tests of normalize_embedding share: features in every layout, and a comparison with torch in float64."""

import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from tolerances import assert_close

from dnc_kernels import ops

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


#: layout -> (dtype, D) -> features of a few dozen pixels
LAYOUTS = {
    "rows": lambda dtype, d: normal(23, d, dtype=dtype),
    "row slice": lambda dtype, d: normal(20, d + 5, dtype=dtype)[::2, 3 : 3 + d],
    "transposed": lambda dtype, d: normal(d, 35, dtype=dtype).T,
    "one pixel repeated": lambda dtype, d: normal(1, d, dtype=dtype).expand(9, d),
    "nchw": lambda dtype, d: normal(2, d, 4, 8, dtype=dtype),
    "odd nchw": lambda dtype, d: normal(2, d, 3, 5, dtype=dtype),
    "channels_last": lambda dtype, d: channels_last(normal(2, d, 3, 5, dtype=dtype)),
    "nchw crop": lambda dtype, d: normal(2, d, 5, 9, dtype=dtype)[:, :, 1:4, 2:8],
    "channels_last crop": lambda dtype, d: channels_last(normal(2, d, 5, 9, dtype=dtype))[:, :, 1:4, 2:8],
}


def features(layout, n, d, dtype=torch.float32):
    """n pixels of the layout: rows, or planes of n / 2 pixels in a row."""
    return normal(n, d, dtype=dtype) if layout == "rows" else normal(2, d, 1, n // 2, dtype=dtype)


def affine(d):
    return normal(d) * 0.5 + 1, normal(d) * 0.3


def check(backend, x, weight, bias, grad, to_length=None):
    """Forward and backward against torch in float64. to_length: gradient of the length [N] or [B,H,W]."""
    x, weight, bias = (t if t is None else t.detach().requires_grad_() for t in (x, weight, bias))
    y, length = ops.normalize_embedding(x, weight, bias, eps=EPS, return_length=True, backend=backend)
    assert y.dtype == x.dtype and y.shape == x.shape and y.stride() == torch.empty_like(x).stride()
    leaves = [t for t in (x, weight, bias) if t is not None]
    outputs, grads = ((y,), (grad,)) if to_length is None else ((y, length), (grad, to_length))
    actual = torch.autograd.grad(outputs, leaves, grads)

    d = x.shape[1]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    rows = wide[0] if x.ndim == 2 else wide[0].movedim(1, -1)
    expected_length = (rows.var(-1, correction=0) + EPS).sqrt()
    z = F.layer_norm(rows, (d,), wide[1], wide[2], EPS)
    expected_y = F.normalize(z, dim=-1) if x.ndim == 2 else F.normalize(z, dim=-1).movedim(-1, 1)
    total = (expected_y * grad.double()).sum()
    if to_length is not None:
        total = total + (expected_length * to_length.double()).sum()
    expected = torch.autograd.grad(total, [t for t in wide if t is not None])

    # magnitudes in each pixel: of what is added up to z, relative to |z|, and of what is added up to its gradients
    wide, rows, z = [t if t is None else t.detach() for t in wide], rows.detach(), z.detach()
    rstd, norm = expected_length.detach().reciprocal().unsqueeze(-1), z.norm(dim=-1, keepdim=True)
    w, b = (1 if wide[1] is None else wide[1].abs()), (0 if wide[2] is None else wide[2].abs())
    mean = rows.mean(-1, keepdim=True)
    xhat = ((rows - mean) * rstd).abs() + mean.abs() * rstd
    spread = (xhat * w + b).amax(-1, keepdim=True) / norm
    to_z = grad.double().abs().max() / norm * (1 + spread)
    to_x = to_z * rstd * torch.as_tensor(w).max() * (1 + mean.abs() * rstd)
    if to_length is not None:
        to_x = to_x + to_length.abs().double().max() / d**0.5
    shaped = (lambda t: t) if x.ndim == 2 else (lambda t: t.movedim(-1, 1))
    assert_close(length.detach(), expected_length.detach(), "embedding", terms=d)
    assert_close(y.detach(), expected_y.detach(), "embedding", terms=d, scale=shaped(spread))
    assert_close(actual[0], expected[0], "embedding_grad", terms=d, scale=shaped(to_x))
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_close(a, e, "embedding_param_grad", terms=x.numel() // d, scale=float((to_z * xhat.clamp_min(1)).max()))
