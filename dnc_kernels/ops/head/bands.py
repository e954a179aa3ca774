"""Bands of rows, logits of a band and their gradients, and the memory that bands share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..similarity.class_norm import class_norm, class_norm_backward_
from ..upsample.reference import target_rows_of

#: Pixels of a band by default, about, on a CPU, where a thread takes a band at a time: embedding and scores stay in its cache,
#: 16384 pixels are bands for 16 threads, and a step is as fast as with 256 or with 4096 to a few hundredths.
BAND_PIXELS = 1024
#: Bytes of a band by default, at most, on other devices: there bands are for memory alone, and the fewer the better.
DEVICE_BAND_BYTES = 2**30


class Band(NamedTuple):
    """Rows [top, bottom) of samples [begin, end): pixels [first, last) of all. More than one sample: all of their rows."""

    begin: int
    end: int
    top: int
    bottom: int
    first: int
    last: int

    def of(self, maps: Tensor) -> Tensor:
        """[samples,D,rows,w] of maps [B,D,h,w], a view."""
        return maps[self.begin : self.end, :, self.top : self.bottom]

    @property
    def pixels(self) -> slice:
        """Of all pixels."""
        return slice(self.first, self.last)


def pixel_bytes(channels: int, classes: int, itemsize: int, norm: bool) -> int:
    """Bytes of a band's workspace per pixel on a GPU: embedding, winners, logits, their gradient, scores."""
    return channels * itemsize + classes * (1 + 4 * (2 + norm))


def device_band(channels: int, classes: int, itemsize: int, norm: bool) -> int:
    """Pixels of a band that `DEVICE_BAND_BYTES` have room for."""
    return max(1, DEVICE_BAND_BYTES // pixel_bytes(channels, classes, itemsize, norm))


def default_band(x: Tensor, classes: int, norm: bool) -> int:
    """Pixels of a band where nobody chose: by what features [B,D,h,w] lie on, and what their channels and C classes take."""
    return BAND_PIXELS if x.device.type == "cpu" else device_band(x.shape[1], classes, x.element_size(), norm)


def bands(x: Tensor, pixels: int) -> Iterator[Band]:
    """The bands of features [B,D,h,w], in order, of about so many pixels."""
    batch, _, height, width = x.shape
    rows = min(height, max(1, pixels // max(width, 1)))
    samples = max(1, pixels // max(height * width, 1)) if rows == height else 1
    for begin in range(0, batch, samples):
        end = min(begin + samples, batch)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            first = (begin * height + top) * width
            yield Band(begin, end, top, bottom, first, first + (end - begin) * (bottom - top) * width)


class LabelRows(NamedTuple):
    """The label rows that become complete with a band: those between the last row of the band above and its own last row."""

    band: Band
    carried: bool  # the last row of the band above is needed too
    last: bool  # nothing below adds to the last row's gradient
    above: int
    below: int
    window: tuple[int, int, int, int]  # `UpsampleCall.source_row0` and so on

    def of(self, labels: Tensor) -> Tensor:
        """Of labels [B,H,W], a view."""
        return labels[self.band.begin : self.band.end, self.above : self.below]


def label_rows(call: Any, every: Iterable[Band]) -> Iterator[tuple[LabelRows, Band]]:
    """Of each band of a step, with the pixels whose gradient is complete then."""
    (_, _, height, width), (_, rows, columns) = call.x.shape, call.labels.shape
    # at equal sizes nothing is interpolated, and bands do not touch each other
    apart = (rows, columns) == (height, width)
    lower = target_rows_of(height, rows, call.align_corners)
    for band in every:
        first, last = apart or band.top == 0, apart or band.bottom == height
        top, bottom = band.top - (not first), band.bottom - (not last)
        # label rows whose lower feature row is in [top, bottom - 1), or to the end
        above, below = bisect_left(lower, top), bisect_left(lower, bottom)
        if apart:
            above, below = band.top, band.bottom
        window = (0, 0, 0, 0) if apart else (height, top, rows, above)
        begin = band.first - (band.top - top) * width
        done = Band(band.begin, band.end, top, bottom, begin, begin + (band.end - band.begin) * (bottom - top) * width)
        yield LabelRows(band, not first, last, above, below, window), done


class BandMaps:
    """Tensors of one band, used by all: memory that is given back and taken again costs a page fault each time.

    Maps have `above` rows more than the band: where bands touch, row 0 is the last row of the band above, whose logits are
    upsampled together with it.
    """

    carried: tuple[Tensor, ...]  # maps whose last row becomes the row above

    def __init__(self, x: Tensor, band_pixels: int, above: int, keep_embedding: bool) -> None:
        largest = next(bands(x, band_pixels), Band(0, 0, 0, 0, 0, 0))
        self.above, self._device = above, x.device
        self._sizes = largest.end - largest.begin, largest.bottom - largest.top, x.shape[3]
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self._layout: Any = {"memory_format": torch.channels_last} if last else {}
        self.embedding = None if keep_embedding else self.empty(x.shape[1], x.dtype, 0)
        self.pending: Tensor | None = None

    def empty(self, channels: int, dtype: torch.dtype, above: int | None = None) -> Tensor:
        """A map of the largest band and `above` rows more."""
        samples, rows, width = self._sizes
        size = samples, channels, rows + (self.above if above is None else above), width
        return torch.empty(size, dtype=dtype, device=self._device, **self._layout)

    def embedding_of(self, band: Band, kept: Tensor | None) -> Tensor:
        """Where the embedding of a band goes: into all of it where that is kept."""
        if self.embedding is None:
            assert kept is not None
            return band.of(kept)
        return self.embedding[: band.end - band.begin, :, : band.bottom - band.top]

    def own(self, maps: Tensor, band: Band) -> Tensor:
        """The rows of a band in one of the maps."""
        return self.window(maps, band, False)

    def window(self, maps: Tensor, band: Band, carried: bool) -> Tensor:
        """The rows of a band, and where it is carried the row above it."""
        return maps[: band.end - band.begin, :, self.above - carried : self.above + band.bottom - band.top]

    def add_pending(self, rows: LabelRows, to_logits: Tensor) -> None:
        """What the row above has received from the band above."""
        if rows.carried and self.pending is not None:
            to_logits[:, :, :1] += self.pending

    def carry(self, band: Band, to_logits: Tensor | None) -> None:
        """The band's last row becomes the row above; `to_logits` is what its logits have received so far."""
        row = self.above - 1 + band.bottom - band.top
        for maps in self.carried:
            maps[:, :, 0] = maps[:, :, row]
        self.pending = None if to_logits is None else to_logits[:, :, -1:].clone()


class Windows(BandMaps):
    """Those of the Triton kernels, whose logits take the place of the scores where there is no norm: a multiple of them."""

    def __init__(self, call: Any, keep_embedding: bool) -> None:
        x, classes, norm = call.x, call.centroids.shape[0], call.norm_weight is not None
        touch = any(rows.carried for rows, _ in label_rows(call, bands(x, call.band_pixels)))
        super().__init__(x, call.band_pixels, int(touch), keep_embedding)
        self.scores, self.to_logits = (self.empty(classes, torch.float32) for _ in range(2))
        self.logits = self.empty(classes, torch.float32) if norm else self.scores
        self.winner = self.empty(classes, torch.uint8)
        self.carried = (self.scores, self.winner, *([self.logits] if norm else []))


# Logits of a band and their gradients. A logit is LayerNorm over the classes of the scores, or the score times the pixel's
# length (optional), times `scale` (optional), over `temperature`.


class Logits(NamedTuple):
    """How scores become logits."""

    temperature: float
    scale: Tensor | None  # 0-d
    norm_weight: Tensor | None  # [C]
    norm_bias: Tensor | None
    norm_eps: float

    def factor(self, length: Tensor | None) -> Tensor | float:
        """What a score is multiplied by without a norm."""
        factor: Tensor | float = 1 / self.temperature
        for part in (self.scale, length):
            factor = factor if part is None else part * factor
        return factor

    def forward(self, scores: Tensor, length: Tensor | None, out: Tensor) -> Tensor:
        """Logits [B,C,rows,w]; in `out` where that saves a copy."""
        if self.norm_weight is None:
            return torch.mul(scores, self.factor(length), out=out)
        assert self.norm_bias is not None
        return class_norm(scores, self.norm_weight, self.norm_bias, self.norm_eps, out)

    def backward_(
        self, grad: Tensor, scores: Tensor, length: Tensor | None, scratch: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of the scores, the length, the scale [] and the norm's weight and bias [2,C]; overwrites the first and last
        argument.
        """
        to_scale, to_norm = grad.new_zeros(()), grad.new_zeros(2, grad.shape[1])
        if self.norm_weight is None:
            along = torch.mul(grad, scores, out=scratch).sum(1, keepdim=True)
            if self.scale is not None:
                to_scale = (along if length is None else along * length).sum() / self.temperature
            to_length = None if length is None else along * self.factor(None)
            return grad.mul_(self.factor(length)), to_length, to_scale, to_norm
        assert self.norm_bias is not None
        to_scores, to_norm = class_norm_backward_(grad, scores, self.norm_weight, self.norm_bias, self.norm_eps)
        return to_scores, None, to_scale, to_norm


class Workspace(BandMaps):
    """Those of plain torch, in `dtype`."""

    def __init__(self, x: Tensor, classes: int, dtype: torch.dtype, keep_embedding: bool, band_pixels: int) -> None:
        super().__init__(x, band_pixels, 1, keep_embedding)
        self.scores, self.logits, self.to_logits = (self.empty(classes, dtype) for _ in range(3))
        self.winner, self.length = self.empty(classes, torch.uint8), self.empty(1, dtype)
        self.carried = self.scores, self.winner, self.length
