"""A whole training step of the segmentation head, forward and backward, against the eager composition and its compiled form.

The composition is the released step: embedding, similarities to all sub-centroids, amax over K, LayerNorm over the classes,
interpolation to the labels, cross-entropy, contrast and distance losses, then Sinkhorn and momentum class by class in a loop
(linear domain, without the released Gumbel noise). Features at a quarter of the labels' size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels import use_backend
from dnc_kernels.backends import Backend
from dnc_kernels.nn import DNCHead

from . import bench_momentum as momentum
from . import bench_sinkhorn as sinkhorn
from .case import Case, Settings, Variant, dtype_of, error_ratio, kernels, norm_ratio
from .clock import Call

K, CHANNELS, STRIDE = 10, 256, 4
PPC, PPD = 0.01, 0.001
_DATA = "blocks of 16 x 16 label pixels, Zipf class sizes, one class absent, 10% ignored"
# batch, height, width, classes
CASES = {
    "512x1024 C=19": (1, 512, 1024, 19),
    "1024x1024 C=19": (1, 1024, 1024, 19),
    "512x1024 C=150": (1, 512, 1024, 150),
    "1024x1024 C=150": (1, 1024, 1024, 150),
}
#: On a GPU whole batches, 262144 and 131072 pixels of features, so that bands can be long.
GPU_CASES = {"8x512x1024 C=19": (8, 512, 1024, 19), "8x512x512 C=150": (8, 512, 512, 150)}
_NEEDED = (
    "normalize_embedding", "subcentroid_cross_entropy", "class_scores", "upsample_cross_entropy", "sinkhorn_assign",
    "cluster_sums",
)  # fmt: skip
GPU_BANDS = (32768, 65536, 131072, 262144)


def cases(settings: Settings) -> list[Case]:
    """Every case at these settings."""
    sizes = GPU_CASES if settings.cuda else CASES
    if settings.quick:
        sizes = dict.fromkeys(sizes, (2, 64, 64, 5))
    return [_case(name, *size, dtype, settings) for dtype in settings.dtypes for name, size in sizes.items()]


def _case(name: str, batch: int, height: int, width: int, classes: int, dtype: str, settings: Settings) -> Case:
    h, w = height // STRIDE, width // STRIDE

    def head(checkpoint: Any, band_pixels: int | None = None) -> DNCHead:
        return DNCHead(
            CHANNELS, classes, K, recipe="released", ppc_weight=PPC, ppd_weight=PPD, checkpoint=checkpoint,
            band_pixels=band_pixels, generator=torch.Generator().manual_seed(0),
        ).to(settings.device)  # fmt: skip

    def inputs() -> Any:
        seed = settings.generator()
        start = head("none").prototypes
        # labels in blocks of 16 x 16 pixels, sizes by Zipf's law, one block in ten ignored
        blocks = sinkhorn.zipf_labels(batch * height * width // 16, classes, seed)[::16].view(batch, height // 16, width // 16)
        labels = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
        small = labels[:, ::STRIDE, ::STRIDE]
        likeness = start[small.clamp(min=0), torch.randint(K, small.shape, generator=seed, device=seed.device)]
        x = likeness + torch.randn(likeness.shape, generator=seed, device=seed.device) / CHANNELS**0.5
        x = x.permute(0, 3, 1, 2).contiguous().to(dtype_of(dtype))
        return SimpleNamespace(x=x, labels=torch.where(labels < 0, 255, labels), start=start)

    def step(checkpoint: str, band_pixels: int | None) -> Callable[[Any], Call]:
        def prepare(i: Any) -> Call:
            model = head(checkpoint, band_pixels)

            def call() -> tuple[Tensor, Tensor, Tensor]:
                model.prototypes.copy_(i.start)
                x = i.x.detach().requires_grad_()
                loss = model.loss(x, i.labels).loss
                to_x, *_ = torch.autograd.grad(loss, (x, *model.parameters()), allow_unused=True)
                return loss.detach(), to_x, model.prototypes

            return call

        return prepare

    def composition(make_loss: Callable[..., Tensor]) -> Callable[[Any], Call]:
        def prepare(i: Any) -> Call:
            norms = [torch.ones(n, device=settings.device, requires_grad=True) for n in (CHANNELS, classes)]
            biases = [torch.zeros(n, device=settings.device, requires_grad=True) for n in (CHANNELS, classes)]
            parameters = [norms[0], biases[0], norms[1], biases[1]]

            def call() -> tuple[Tensor, Tensor, Tensor]:
                x, p = i.x.detach().requires_grad_(), i.start.clone()
                loss = make_loss(x, i.labels, p, *parameters)
                loss.backward()
                assert x.grad is not None
                return loss.detach(), x.grad, p

            return call

        return prepare

    def reference(i: Any) -> tuple[Tensor, ...]:
        wide = SimpleNamespace(x=i.x.double(), labels=i.labels, start=i.start.double())
        model = head("all").double()
        x = wide.x.requires_grad_()
        model.prototypes.copy_(wide.start)
        with use_backend("reference"):
            loss = model.loss(x, wide.labels).loss
            loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad, model.prototypes

    def ours(backend: Backend, checkpoint: str = "all", band_pixels: int | None = None, graph: bool = False) -> Variant:
        def prepare(i: Any) -> Call:
            call = step(checkpoint, band_pixels)(i)

            def run() -> Any:
                with use_backend(backend):
                    return call()

            return graphed(run) if graph else run

        name = f"dnc_{backend} checkpoint={checkpoint}" + f" band_pixels={band_pixels}" * bool(band_pixels) + " graph" * graph
        return Variant(name, prepare, baseline=False, backend=backend)

    # `auto` takes what is best for each op; a backend by name is measured where it has all of them
    variants = [ours("auto", checkpoint) for checkpoint in ("all", "scores", "none")]
    if settings.cuda:
        known = {"C": classes, "K": K, "D": CHANNELS}
        named = kernels(settings, dtype, _NEEDED, lambda backend: ours(backend).prepare, known, layout="planes")
        variants += [ours(cast(Backend, v.backend)) for v in named if v.backend != "reference"]
        variants += [ours("auto", band_pixels=pixels, graph=graph) for graph in (False, True) for pixels in GPU_BANDS]
    return Case(
        op="head_step", name=name, dtype=dtype, data=_DATA,
        shape={"B": batch, "H": height, "W": width, "h": h, "w": w, "C": classes, "K": K, "D": CHANNELS},
        inputs=inputs, reference=reference, check=check_step,
        variants=[
            *variants,
            Variant("eager", composition(eager)),
            Variant("compiled_loss", composition(_compiled), compiled=True),
        ],
        flops=(4.0 * K + 2.0) * batch * h * w * classes * CHANNELS,
        goals=settings.goals(dtype, {"best": 5}),
    )  # fmt: skip


def graphed(call: Call) -> Call:
    """Replay of the call as a CUDA graph: the same tensors each time, one launch for the host.

    The replay holds on to the call: the graph works on the addresses of the call's own tensors, and keeps none of them alive.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and workspaces made before the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(_: Call = call) -> Any:
        graph.replay()
        return result

    return replay


def check_step(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Loss and moved sub-centroids to rounding; of the gradient at most one pixel in a thousand may be another one.

    Such a pixel's sub-centroids were a near-tie. With 16-bit features there are many, so only the gradient's size is held then.
    """
    loss, grad, p = result
    if half := grad.dtype in (torch.bfloat16, torch.float16):
        wrong = norm_ratio(grad, expected[1], 0.2)
    else:
        others = ~((grad.double() - expected[1]).abs().amax(1) <= 1e-4 * expected[1].abs().max())  # a NaN too
        wrong = float(others.double().mean()) / 1e-3
    # a step is about 1e-3 of a sub-centroid's length
    return max(
        error_ratio(loss, expected[0], (1e-2 if half else 1e-5) * expected[0].abs()), wrong,
        error_ratio(p, expected[2], 5e-4 if half else 2e-5),
    )  # fmt: skip


def _embed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return F.normalize(F.layer_norm(rows, (x.shape[1],), weight.to(x.dtype), bias.to(x.dtype)), dim=1)


def _embed_written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same without layer_norm, whose gradient torch 2.13's compiler gets wrong before a normalisation of permuted rows."""
    centred = x - x.mean(1, keepdim=True)
    weight, bias = (t.to(x.dtype).view(1, -1, 1, 1) for t in (weight, bias))
    z = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-5) * weight + bias
    z = z * torch.rsqrt(z.square().sum(1, keepdim=True))
    return z.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _losses(
    x: Tensor, labels: Tensor, p: Tensor, feat_weight: Tensor, feat_bias: Tensor, mask_weight: Tensor, mask_bias: Tensor,
    embed: Any = _embed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Cross-entropy at label size, similarities [N,C,K], embedding [N,D], predictions [N]."""
    batch, _, h, w = x.shape
    e = embed(x, feat_weight, feat_bias)
    similarity = (e @ p.flatten(0, 1).T.to(e.dtype)).view(-1, *p.shape[:2])
    logits = F.layer_norm(similarity.amax(2).float(), (p.shape[0],), mask_weight, mask_bias)
    maps = logits.view(batch, h, w, -1).permute(0, 3, 1, 2)
    large = F.interpolate(maps, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(large, labels, ignore_index=255), similarity, e, logits.argmax(1)


def _contrast(similarity: Tensor, target: Tensor) -> Tensor:
    flat = similarity.flatten(1).float()
    kept = target >= 0
    towards = flat.gather(1, target.clamp(min=0)[:, None])[:, 0]
    ppd = torch.where(kept, (1 - towards).square(), 0).sum() / kept.sum()
    return PPC * F.cross_entropy(flat, target, ignore_index=-1) + PPD * ppd


def eager(
    x: Tensor, labels: Tensor, p: Tensor, *parameters: Tensor, losses: Any = _losses, contrast: Any = _contrast
) -> Tensor:
    """Loss of the composition; moves `p` [C,K,D] in place, class by class."""
    cross_entropy, similarity, e, prediction = losses(x, labels, p.clone(), *parameters)
    step = labels.shape[1] // x.shape[2]
    group = labels[:, ::step, ::step].reshape(-1)
    target = torch.full_like(group, -1)
    with torch.no_grad():
        for c in range(p.shape[0]):
            mask = group == c
            if mask.any():
                sub = sinkhorn.loop_sinkhorn(similarity[mask, c])
                target[mask] = c * K + sub
                momentum.class_step_(p[c], e[mask], sub, prediction[mask] == c)
    return cross_entropy + contrast(similarity, target)


def _compiled(x: Tensor, labels: Tensor, p: Tensor, *parameters: Tensor) -> Tensor:
    """The same with both differentiable parts compiled; the loop over classes cannot be."""
    return eager(x, labels, p, *parameters, losses=_compiled_losses, contrast=_compiled_contrast)


_compiled_losses = torch.compile(partial(_losses, embed=_embed_written_out), dynamic=False)
_compiled_contrast = torch.compile(_contrast, dynamic=False)
