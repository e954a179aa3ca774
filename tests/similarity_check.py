"""What the GPU tests of similarity share: problems, and the loss with every gradient."""

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE, configure

from dnc_kernels import ops

METRICS = ("dot", "cosine", "sqeuclidean")
#: The kernels of either kind of GPU.
ENGINES = (90, 80)
#: What most tests give a backend: CUDA C++ takes 16 bits alone.
DTYPE = {"triton": torch.float32, "cuda": torch.bfloat16}


def set_engine(cuda, capability):
    """Choose the kernels of a kind of GPU; on a GPU its own."""
    if cuda == "cpu":
        configure(capability=capability)
    elif (torch.cuda.get_device_capability()[0] == 9) != (capability == 90):
        pytest.skip("kernels of another GPU")


def flat(t):
    """[N,C] of a map [B,C,H,W]."""
    return t if t.ndim == 2 else t.permute(0, 2, 3, 1).flatten(0, 2)


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1).to(dtype)


def problem(n=42, c=19, k=3, d=40, dtype=torch.float32):
    """Pixels, sub-centroids, labels: some ignored, one beyond the classes."""
    labels = torch.randint(0, c, (n,), device=DEVICE)
    labels[::5] = -100
    labels[1::17] = c + 3
    return unit(n, d, dtype=dtype), unit(c, k, d, dtype=dtype), labels


def options_of(c, norm, weighted, smoothing):
    made = {"temperature": torch.tensor(0.7, device=DEVICE), "label_smoothing": smoothing}
    if norm:
        made |= {"norm_weight": torch.rand(c, device=DEVICE) + 0.5, "norm_bias": torch.randn(c, device=DEVICE)}
    if weighted:
        made["weight"] = torch.rand(c, device=DEVICE) + 0.1
    return made


def loss_and_grads(backend, x, p, labels, to_centroids=False, *, unit_pixels=False, **options):
    """Loss, prediction, own similarities and every gradient. unit_pixels: of the pixels' directions."""
    x, p = x.detach().requires_grad_(), p.detach().requires_grad_(to_centroids)
    learnable = {
        name: options[name].detach().requires_grad_()
        for name in ("norm_weight", "norm_bias", "temperature")
        if isinstance(options.get(name), torch.Tensor)
    }
    pixels = F.normalize(x, dim=1) if unit_pixels else x
    shaped = labels if x.ndim == 2 else labels.view(x.shape[0], *x.shape[2:])
    out = ops.centroid_cross_entropy(pixels, p, shaped, backend=backend, **{**options, **learnable})
    total = (out.loss * torch.linspace(0.5, 2, out.loss.numel(), device=DEVICE).view_as(out.loss)).sum() * 1.7
    leaves = [x, *learnable.values(), *([p] if to_centroids else [])]
    return out.loss, out.prediction, out.own_similarity, *torch.autograd.grad(total, leaves)
