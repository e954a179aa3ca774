"""The parts of a step on a GPU: this family's Triton kernels around those of the others, whose backend `parts` chooses.

In one band a step is 18 launches (docs/layer.md, "On a GPU"): what lies between the kernels of the other families is part of
the kernel before or behind it.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._tensors import pixel_count
from ...backends import pick
from .._common import kernels
from .._triton import (
    Pixels,
    Plan,
    cdiv,
    configuration,
    dot_precision,
    launch,
    map_kind,
    pixels_of,
    planned,
    processors,
    tile_of,
)
from ..embedding import triton as embedding
from ..embedding.calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut
from ..momentum import triton as momentum
from ..momentum.calls import SumsCall, SumsOut
from ..similarity import triton as similarity
from ..similarity import triton_contrast as contrast
from ..similarity.calls import ScoresCall, ScoresOut, SweepCall, SweepOut
from ..similarity.triton_blocks import Packing, blocks_of, packing_of
from ..similarity.triton_pack import ROWS, slot_count
from ..sinkhorn import triton as sinkhorn
from ..sinkhorn.calls import SinkhornCall, SinkhornOut
from ..upsample import triton as upsample
from ..upsample.calls import UpsampleCall, UpsampleOut
from .bands import Band, Windows, bands, label_rows
from .calls import (
    ClusterCall,
    Clusters,
    FinishCall,
    Finished,
    FirstPass,
    Labels,
    LabelsCall,
    Second,
    SecondPass,
    Step,
)
from .triton_cluster import head_cluster_kernel
from .triton_finish import head_finish_kernel
from .triton_labels import head_labels_kernel, head_prepare_kernel
from .triton_logits import head_gradient_kernel, head_logits_kernel, head_pull_kernel

# pixels that a program of the labels works on at a time
_LABELS = 1024
# gradients, or rows of partial sums, that a program of the end adds up at a time
_COLUMNS, _ROWS = 32, 64


def part(op: str, x: Tensor, parts: str, *others: Tensor, **sizes: int) -> str:
    """Backend of an op of another family. "cuda" is Triton where no CUDA C++ kernel takes the call: the head has no other."""
    if parts == "cuda":
        try:
            return pick(op, x, parts, *others, **sizes)
        except RuntimeError:
            return pick(op, x, "triton", *others, **sizes)
    return pick(op, x, parts, *others, **sizes)


def label_programs(labels: Tensor) -> int:
    """Rows of `Labels.counts`."""
    return max(1, min(cdiv(labels.numel(), _LABELS), 4 * processors(labels.device)))


def head_labels(call: LabelsCall, out: Labels) -> None:
    """Labels at feature size, counts and zeros. One launch."""
    labels, (_, height, width) = call.labels, call.labels.shape
    launch(
        head_labels_kernel, (label_programs(labels),), labels, *out, labels.stride(), labels.numel(), height, width,
        len(out.small), call.height, call.width, _ratio(height, call.height), _ratio(width, call.width), call.classes,
        call.ignore_index, call.zeros, call.counters, MIDDLE=call.middle, BLOCK=_LABELS,
        BLOCK_C=tile_of(call.classes), num_warps=8,
    )  # fmt: skip


def _ratio(source: int, target: int) -> float:
    """source / target as float32 divides: float64 rounds the quotient of two such integers to the same number."""
    return _float32(_float32(source) / _float32(max(target, 1)))


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


class Rows(NamedTuple):
    """Sub-centroids as packed rows, and how they were packed; rows None: whoever needs them packs them."""

    packing: tuple[Any, ...] | None
    rows: Tensor | None

    def of(self, packing: tuple[Any, ...] | None) -> Tensor | None:
        """The rows, where they are packed like this."""
        return self.rows if packing == self.packing else None


def _prepare(
    call: Step, counts: Tensor | None, amounts: Tensor | None, factors: Tensor | None, packings: list[tuple[Any, ...] | None]
) -> list[Rows]:
    """Pack the sub-centroids, and fill `factors` where they are given. One launch."""
    x, centroids, (classes, k, channels) = call.x, call.centroids, call.centroids.shape
    found, packs, programs = [], [], int(factors is not None)
    for packing in packings:
        rows = None
        if packing is not None:
            count, padded = slot_count(centroids, *packing)
            rows = torch.empty((count, padded), dtype=x.dtype, device=x.device)
            packs.append((rows, packing[2], padded, count // ROWS))
            programs += count // ROWS
        found.append(Rows(packing, rows))
    launch(
        head_prepare_kernel, (programs,), centroids, centroids.stride(), tuple(packs), counts, amounts, call.class_weight,
        call.log_scale, factors, 0 if counts is None else len(counts), classes, k, channels, call.temperature,
        call.ppc_weight, call.ppd_weight, AT_FEATURES=call.at_features, HALF=x.element_size() == 2, ROWS=ROWS,
        BLOCK_P=max(1, min(_ROWS, 8192 // tile_of(classes))), BLOCK_C=tile_of(classes), num_warps=4,
    )  # fmt: skip
    return found


@planned
def _gradient_plan(grad: Tensor, centroids: Tensor) -> tuple[Packing, dict[str, int], dict[str, int], int]:
    blocks, options = blocks_of("head_gradient", grad, centroids, "head")
    packing, depth = packing_of(blocks, centroids)
    return packing, blocks, options, depth


def gradient_programs(grad: Tensor, centroids: Tensor) -> int:
    """Rows of the partial sums of a band whose gradient is `grad`."""
    return cdiv(pixel_count(grad), _gradient_plan(grad, centroids)[1]["BLOCK_N"])


def loss_programs(call: Step) -> int:
    """Rows of the losses in one band."""
    backend = part("upsample_cross_entropy", call.x, call.parts, N=call.labels.numel(), C=call.centroids.shape[0])
    return upsample.loss_programs(call.labels) if backend == "triton" else 1


class _Partial:
    """Rows of partial sums: those of a result, or of each band new ones, which the result receives before the next band's."""

    def __init__(self, out: Tensor, whole: bool) -> None:
        self.out, self.whole = out if whole else out.zero_(), whole
        self.rows: Tensor | None = None

    def of(self, count: int) -> Tensor:
        """[count,...] for a band."""
        if self.whole or not len(self.out):
            return self.out
        self.finish()
        self.rows = self.out.new_empty((count, *self.out.shape[1:]))
        return self.rows

    def finish(self) -> None:
        if self.rows is not None:
            self.out += self.rows.sum(0, keepdim=True)
        self.rows = None


def head_first_pass(
    call: Step, out: FirstPass, sampled: Tensor, counts: Tensor | None, amounts: Tensor | None, factors: Tensor | None,
    gradient: bool, keep_embedding: bool,
) -> None:  # fmt: skip
    """Up to the gradient of the embedding, band by band. In one band nine launches with Triton's kernels."""
    x, labels, centroids, (classes, k, _) = call.x, call.labels, call.centroids, call.centroids.shape
    work = Windows(call, keep_embedding)
    embedded = out.embedding if work.embedding is None else work.embedding
    assert embedded is not None
    n, contrasted = pixel_count(x), out.lse is not None
    op = "subcentroid_cross_entropy" if contrasted else "class_scores"
    scoring = part(op, embedded, call.parts, centroids, N=n, C=classes, K=k)
    embedding_by = part("normalize_embedding", x, call.parts)
    upsampling = part("upsample_cross_entropy", work.scores, call.parts, N=labels.numel(), C=classes)
    whole = next(iter(bands(x, call.band_pixels)), None)
    packings: list[tuple[Any, ...] | None] = [None, None]
    if whole is not None and scoring == "triton":
        e, scores = work.embedding_of(whole, out.embedding), work.own(work.scores, whole)
        if contrasted:
            to_e = None if out.grad is None else whole.of(out.grad)
            packings[0] = contrast.sweep_packing(e, centroids, to_e, scores, work.own(work.winner, whole))
        else:
            packings[0] = tuple(similarity.scores_packing(e, centroids, scores))
    if whole is not None and out.grad is not None:
        packings[1] = tuple(_gradient_plan(whole.of(out.grad), centroids)[0])
    if factors is not None:
        out.factors.copy_(factors)
    own_rows, gradient_rows = _prepare(call, counts, amounts, out.factors if factors is None else None, packings)
    tables = sinkhorn.tables_of(call.zeros, classes, k) if call.zeros is not None else None
    moments = out.statistics.new_empty((2, n)) if call.norm_weight is not None else (None, None)
    losses, to_scales, to_norms = partials = [_Partial(t, call.whole) for t in (out.losses, out.grad_scale, out.grad_norm)]
    for rows, done in label_rows(call, bands(x, call.band_pixels)):
        band, pixels = rows.band, rows.band.pixels
        e = work.embedding_of(band, out.embedding)
        normal = NormalizeCall(band.of(x), call.weight, call.bias, call.eps, embedding_by)
        kernels("embedding", embedding_by).normalize_embedding(normal, NormalizeOut(e, *out.statistics[:, pixels]))
        to_e = None if out.grad is None else band.of(out.grad)
        scores, winner = work.own(work.scores, band), work.own(work.winner, band)
        results, labelled = (scores, winner, out.own_similarity[pixels]), sampled[pixels]
        if out.lse is not None:
            sweep = SweepCall(e, centroids, labelled, call.contrast_temperature, out.factors[2], scoring)
            ready = own_rows.of(contrast.sweep_packing(e, centroids, to_e, scores, winner))
            contrast.scores_and_contrast(sweep, SweepOut(*results, out.lse[pixels], to_e), ready)
        elif scoring == "triton":
            ready = own_rows.of(tuple(similarity.scores_packing(e, centroids, scores)))
            similarity.class_scores(ScoresCall(e, centroids, labelled, "dot", scoring), ScoresOut(*results), ready)
        else:
            kernels("similarity", scoring).class_scores(ScoresCall(e, centroids, labelled, "dot", scoring), ScoresOut(*results))
        band_logits(call, out, scores, work.own(work.logits, band), pixels, labelled, moments, tables)
        maps = work.window(work.logits, band, rows.carried)
        window = UpsampleCall(
            maps, rows.of(labels), *rows.window, call.align_corners, call.class_weight, call.ignored, call.label_smoothing,
            None, upsampling,
        )  # fmt: skip
        to_logits = work.window(work.to_logits, band, rows.carried) if out.grad is not None else None
        if upsampling == "triton":
            partial = losses.of(upsample.loss_programs(window.labels))
            upsample.upsample_cross_entropy(window, UpsampleOut(None, None, to_logits), partial)
        else:
            kernels("upsample", upsampling).upsample_cross_entropy(window, UpsampleOut(losses.of(1)[0], None, to_logits))
        if to_logits is not None and out.grad is not None:
            work.add_pending(rows, to_logits)
            given = work.scores if call.norm_weight is not None else work.logits
            windows = [work.window(t, band, rows.carried) for t in (work.to_logits, given, work.winner)]
            windows = [t[:, :, : done.bottom - done.top] for t in windows]  # the next band adds to the last row
            partial_rows = (t.of(gradient_programs(done.of(out.grad), centroids)) for t in (to_scales, to_norms))
            band_gradient(call, out, done, windows, moments, gradient_rows, *partial_rows)
        if not rows.last:
            work.carry(band, to_logits)
    for partial_sums in partials:
        partial_sums.finish()


@planned
def _logits_plan(scores: Tensor, logits: Tensor, k: int, norm: bool) -> Plan:
    n, classes, at, to = pixel_count(scores), scores.shape[1], pixels_of(scores), pixels_of(logits)
    use = configuration("head", "head_logits", scores.device, C=classes, K=k, norm=norm)
    block_c, block_k = tile_of(classes), max(tile_of(k, None, 1), 2)
    # all classes of a pixel are in one tile, which has as many cells as its warps have registers for
    block_n = max(16, min(use.pop("BLOCK_N"), use.pop("CELLS") // max(block_c, block_k)))
    constants = {"K": k, "SCORES_MAP": map_kind(scores, at), "LOGITS_MAP": map_kind(logits, to)}
    blocks = {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_K": block_k}
    return Plan((cdiv(n, block_n),), (at, to, n, classes), {**constants, **blocks, **use})


def band_logits(
    call: Step, out: FirstPass, scores: Tensor, logits: Tensor, pixels: slice, sampled: Tensor, moments: Any,
    tables: sinkhorn.Tables | None,
) -> None:  # fmt: skip
    """Logits of the scores of some pixels, which may be in their place, and what follows for a pixel."""
    plan = _logits_plan(scores, logits, call.centroids.shape[1], call.norm_weight is not None)
    mean, deviation = (None if m is None else m[pixels] for m in moments)
    launch(
        head_logits_kernel, plan.grid, scores, logits, out.statistics[1, pixels] if call.confidence else None,
        out.factors, call.norm_weight, call.norm_bias, mean, deviation, sampled, out.prediction[pixels], out.group[pixels],
        out.own_similarity[pixels], None if tables is None else tables.largest, None if tables is None else tables.members,
        *plan.arguments, 1 / call.temperature, call.norm_eps, **plan.options,
    )  # fmt: skip


def band_gradient(
    call: Step, out: FirstPass, done: Band, maps: list[Tensor], moments: Any, packed: Rows, to_scale: Tensor, to_norm: Tensor
) -> None:
    """Gradient of the embedding of the pixels `done`. maps: gradient of their logits, logits (or scores) and winners.

    to_scale, to_norm: partial sums, `gradient_programs` rows, where they are wanted.
    """
    assert out.grad is not None
    grad, centroids, (classes, k, channels) = done.of(out.grad), call.centroids, call.centroids.shape
    packing, blocks, options, depth = _gradient_plan(grad, centroids)
    rows = packed.of(tuple(packing))
    if rows is None:
        rows, _ = similarity.pack_rows(centroids, "dot", grad.dtype, *packing)
    pixels, n = done.pixels, done.last - done.first
    tensors = (*maps, grad)
    places = tuple(map(pixels_of, tensors))
    names = dict(zip(("G_MAP", "LOGITS_MAP", "WINNER_MAP", "GRAD_MAP"), map(map_kind, tensors, places), strict=True))
    mean, deviation = (None if m is None else m[pixels] for m in moments)
    launch(
        head_gradient_kernel, (gradient_programs(grad, centroids), cdiv(channels, blocks["BLOCK_D"])), *maps, rows, grad,
        out.statistics[1, pixels] if call.confidence else None, out.factors, call.norm_weight, mean, deviation,
        None if out.grad_rstd is None else out.grad_rstd[pixels], to_scale, to_norm, *places, n, classes, k, channels,
        packing.slots.k_tiles * blocks["BLOCK_K"], depth, packing.slots.class_tiles, 1 / call.temperature,
        ACCUMULATE=out.lse is not None, **names, PRECISION=dot_precision(call.x), BLOCK_N=blocks["BLOCK_N"],
        BLOCK_C=blocks["BLOCK_C"], BLOCK_D=blocks["BLOCK_D"], **options,
    )  # fmt: skip


def cluster_tile(own_similarity: Tensor, group: Tensor, classes: int) -> int:
    """Pixels of a program of `head_cluster`."""
    return int(sinkhorn.shape_of("sinkhorn", own_similarity, group, classes)[1]["BLOCK_N"])


def head_cluster(call: ClusterCall, out: Clusters) -> None:
    """The transport and what follows from it. Launches: iterations + 1, or one where the assignment is known."""
    own, group, (n, k) = call.own_similarity, call.group, call.own_similarity.shape
    assignment, tables = call.assignment, None
    if assignment is None and call.zeros is not None:
        tables = sinkhorn.tables_of(call.zeros, call.classes, k)
    elif assignment is None:
        assignment = torch.empty_like(group)
        backend = part("sinkhorn_assign", own, call.parts, N=n, K=k)
        kernels("sinkhorn", backend).sinkhorn(
            SinkhornCall(own, group, call.classes, call.epsilon, call.iterations, -1.0, backend),
            SinkhornOut(assignment, None, None, None),
        )
    numbers = sinkhorn.scale_of(n, call.epsilon)
    if tables is not None:
        sinkhorn.column_sums(own, group, call.classes, call.iterations, -1.0, numbers, tables)
    (_, shared) = sinkhorn.shape_of("sinkhorn", own, group, call.classes)
    shared = {key: shared[key] for key in shared if key not in ("HAS_GROUP", "K")}
    schedule = tuple(f for value in (call.first, call.second, call.third) for f in momentum.two_floats(value))
    buckets = 0 if out.histogram is None else out.histogram.shape[1]
    programs, sums = max(1, cdiv(n, shared["BLOCK_N"])), _Partial(out.sums, call.whole)
    launch(
        head_cluster_kernel, (programs,), own, group, call.prediction, call.small, call.lse, assignment, tables,
        call.counters if out.counters is None else out.counters.zero_(), call.factors, out.target, out.pull, out.moving,
        sums.of(programs), out.histogram, out.cursor, call.num_updates, out.state, call.iterations, n, call.classes, buckets,
        numbers.inverse, numbers.unit, 1 / call.contrast_temperature, call.warmup, schedule,
        K=k, CORRECT_ONLY=call.correct_only, SCHEDULE=call.schedule, BINS=_bins(buckets), **shared,
    )  # fmt: skip
    sums.finish()


def _bins(buckets: int) -> int:
    return tile_of(max(buckets, 1), 256)


def units_of(call: Second) -> momentum.Units:
    """Units of the clusters of a second pass, without values."""
    assert call.embedding is not None
    sorting = momentum.sorting_of(call.embedding, call.centroids.shape[0] * call.centroids.shape[1], call.tile)
    return momentum.empty_units(call.embedding, sorting)


def affine_programs(call: Second) -> int:
    """Rows of the partial sums of the gradients of weight and bias in one band."""
    return embedding.backward_programs(call.x) if part("normalize_embedding", call.x, call.parts) == "triton" else 1


def head_second_pass(call: Second, out: SecondPass) -> None:
    """What the cluster of a pixel decides, and the gradient of x in place, band by band. In one band four launches."""
    x, rows = call.x, call.centroids.flatten(0, 1)
    backend = part("normalize_embedding", x, call.parts)
    normalize, every = kernels("embedding", backend), list(bands(x, call.band_pixels))
    sums = [_Partial(t[None], len(every) == 1) for t in (out.sums, out.counts)] if call.histogram is None else []
    to_affine = _Partial(out.grad_affine, call.whole)
    scratch: Tensor | None = None
    for band in every:
        part_of, pixels = band.of(x), band.pixels
        mean, rstd, inverse_norm = statistics = call.statistics[:, pixels]
        if call.cluster is not None:
            if call.embedding is not None:
                e = band.of(call.embedding)
            else:
                if scratch is None:
                    scratch = torch.empty_like(part_of)
                e = scratch[: band.end - band.begin, :, : band.bottom - band.top]
                again = NormalizeCall(part_of, call.weight, call.bias, call.eps, backend)
                normalize.normalize_embedding(again, NormalizeOut(e, *torch.empty_like(statistics)))
            _add_up(call, out, e, pixels, sums)
        if call.grad is None:
            continue
        to_e, pull = band.of(call.grad), None
        if call.pull is not None and call.target is not None:
            pull = embedding.Pull(call.pull[pixels], call.target[pixels], rows)
        to_rstd = None if call.grad_rstd is None else call.grad_rstd[pixels]
        backward = NormalizeBackwardCall(part_of, call.weight, call.bias, mean, rstd, inverse_norm, to_e, to_rstd, backend)
        if pull is not None and not (backend == "triton" and embedding.takes_pull(part_of)):
            _add_pull(to_e, pull)
            pull = None
        if backend == "triton":
            partial = to_affine.of(embedding.backward_programs(part_of))
            embedding.normalize_embedding_backward(backward, NormalizeBackwardOut(to_e, None, None), pull, partial)
        else:
            normalize.normalize_embedding_backward(backward, NormalizeBackwardOut(to_e, *to_affine.of(1)[0]))
    for partial_sums in (*sums, to_affine):
        partial_sums.finish()


def _add_up(call: Second, out: SecondPass, e: Tensor, pixels: slice, sums: list[_Partial]) -> None:
    """Sums of the pixels of a band, whose embedding is e."""
    assert call.cluster is not None
    classes, k, _ = call.centroids.shape
    if call.histogram is not None:
        assert call.cursor is not None
        sorting = momentum.sorting_of(e, classes * k, call.tile)
        units = momentum.Units(out.bucket, out.sums, out.counts)
        momentum.cluster_units(e, call.cluster, classes * k, sorting, call.histogram, call.cursor, units)
        return
    backend = part("cluster_sums", e, call.parts, C=classes, K=k)
    some = SumsOut(*(t.of(1)[0] for t in sums))
    kernels("momentum", backend).cluster_sums(SumsCall(e, call.cluster[pixels], backend), some)


@planned
def _pull_plan(grad: Tensor) -> tuple[Pixels, dict[str, int]]:
    at = pixels_of(grad)
    return at, {"GRAD_MAP": map_kind(grad, at), **similarity.strip(at)}


def _add_pull(grad: Tensor, pull: embedding.Pull) -> None:
    (at, options), channels = _pull_plan(grad), grad.shape[1]
    n = len(pull.factor)
    grid = (cdiv(n, options["BLOCK_N"]), cdiv(channels, options["BLOCK_D"]))
    launch(head_pull_kernel, grid, grad, *pull, at, n, channels, **options, num_warps=4)


class _Results(NamedTuple):
    loss: Tensor
    cross_entropy: Tensor
    ppc: Tensor
    ppd: Tensor
    accuracy: Tensor


class _Buffers(NamedTuple):
    prototypes: Tensor
    previous: Tensor | None
    num_updates: Tensor
    last_counts: Tensor
    idle_updates: Tensor
    wins: Tensor
    class_counts: Tensor
    nonfinite_pixels: Tensor
    bad_labels: Tensor


def head_finish(call: FinishCall, out: Finished, decay: float, dead: float) -> None:
    """Numbers, gradients and the update. One launch."""
    classes, width = call.grad_norm.shape[2], call.grad_affine.shape[2]
    buffers = None
    k, channels = (len(call.counters) - 3) // classes, call.channels  # k = 0: nothing is clustered
    if call.prototypes is not None:
        buffers = _Buffers(*(getattr(call, name) for name in _Buffers._fields))
    tables = (call.losses, call.parts, call.counts, call.grad_scale, call.grad_norm, call.grad_affine)
    block_d = triton.next_power_of_2(channels)
    blocks = cdiv(2 * width, _COLUMNS) + cdiv(2 * classes, _COLUMNS)
    launch(
        head_finish_kernel, ((0 if buffers is None else classes) + 1 + blocks,), call.losses, call.parts, call.factors,
        call.counts, call.counters, call.grad_scale, call.grad_norm, call.grad_affine, _Results(*out[:5]), out.grads, call.sums,
        call.pixels, call.bucket, call.state, buffers, tuple(0 if t is None else len(t) for t in tables), classes, channels,
        0 if call.bucket is None else call.bucket.shape[1], call.ppc_weight, call.ppd_weight, decay, dead,
        PPC=call.ppc, K=k, UNIT=call.unit, BLOCK_U=max(min(4096 // block_d, 32), 1), BLOCK_P=_ROWS, BLOCK=_COLUMNS,
        BLOCK_K=tile_of(max(k, 1), None, 1), BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
