"""LayerNorm over the classes of score maps, forward and backward (DNC's mask norm): no op of its own, the head's step calls it.

    y[c] = (s[c] - mean) rstd gain[c] + shift[c];   dx = gain dy;   ds = rstd (dx - mean_c dx - xhat mean_c (dx xhat))

torch's kernels take rows [N,C] and copy maps to them and back. On a GPU that is most of a step: 2.6 of 6.3 ms at 8x128x128
pixels and 150 classes on an H100. Triton's kernels (triton_class_norm.py) take maps as they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._common import triton_serves

#: Most classes of a tile of Triton's kernels.
MAX_CLASSES = 1024


def _fused(scores: Tensor) -> bool:
    """Whether Triton's kernels run: float32 maps on a GPU, or under the interpreter where it was chosen by name."""
    if scores.dtype != torch.float32 or scores.shape[1] > MAX_CLASSES:
        return False
    by_name = backends.INTERPRETED and backends.chosen() == "triton" and not backends.unusable("triton")
    return by_name if scores.device.type == "cpu" else triton_serves(scores)


def class_norm(scores: Tensor, gain: Tensor, shift: Tensor, eps: float, out: Tensor) -> Tensor:
    """LayerNorm of scores [B,C,h,w] over C; in `out` (another tensor of that shape) where that saves a copy."""
    if _fused(scores):
        from . import triton_class_norm

        return triton_class_norm.class_norm(scores, gain, shift, eps, out)
    return torch.native_layer_norm(scores.movedim(1, -1), [scores.shape[1]], gain, shift, eps)[0].movedim(-1, 1)


def class_norm_backward_(grad: Tensor, scores: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the scores and of gain and shift [2,C], for the gradient `grad` of the result, which may be overwritten."""
    if _fused(scores):
        from . import triton_class_norm

        return triton_class_norm.class_norm_backward_(grad, scores, gain, eps)
    rows, shape = scores.movedim(1, -1).contiguous(), [scores.shape[1]]
    _, mean, rstd = torch.native_layer_norm(rows, shape, gain, shift, eps)
    to_rows, to_gain, to_shift = torch.ops.aten.native_layer_norm_backward(
        grad.movedim(1, -1).contiguous(), rows, shape, mean, rstd, gain, shift, [True, True, True]
    )
    return to_rows.movedim(-1, 1), torch.stack([to_gain, to_shift])
