"""Past features of every class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._tensors import full_precision
from ..errors import FLOATS, check_device, check_dtype, check_float, check_integer, check_value, label_fix, whole_number
from ._labels import left_out_below_zero


class Memory(NamedTuple):
    """Content of a `FeatureMemory`."""

    features: Tensor
    labels: Tensor


class FeatureMemory(nn.Module):
    """Ring buffer of the last features of each class, without gradient: it feeds the clustering of small batches and nothing
    else.

    The released memory bank is filled, used once and cleared, and its loss on stale features gives the network no gradient;
    this one is always as full as it gets and no loss sees it.

    Args:
        num_classes: C.
        size: features kept of each class.
        channels: D.
        device, dtype: of the stored features; float32 by default. Memory: C * size * D elements.

    Attributes:
        storage: [C*size+1, D] buffer, in the state dict so that resuming is exact; class c has the rows from c*size, the last
            row takes what is thrown away.
        pushed: [C] int64 buffer, features ever pushed of each class.
    """

    storage: Tensor
    pushed: Tensor

    def __init__(
        self,
        num_classes: int,
        size: int,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        num_classes, size, channels = (
            whole_number(op, name, value)
            for name, value in (("num_classes", num_classes), ("size", size), ("channels", channels))
        )
        self.num_classes, self.size, self.channels = num_classes, size, channels
        dtype = torch.float32 if dtype is None else dtype
        check_dtype(dtype in FLOATS, op, "dtype", "a float dtype", dtype)
        self.register_buffer("storage", torch.zeros(num_classes * size + 1, channels, device=device, dtype=dtype))
        self.register_buffer("pushed", torch.zeros(num_classes, dtype=torch.int64, device=device))

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor) -> None:
        """Add features in order; each takes the place of the oldest of its class. No loop over classes, no host sync.

        Args:
            features: [N,D] float. One that is not finite is left out.
            labels: [N], any integer dtype, in [0,C); any negative id leaves a feature out.

        Raises:
            ValueError, TypeError: wrong shape or dtype; on CPU a label at or beyond C, which is left out on a GPU and under
                torch.compile.
        """
        op = f"{type(self).__name__}.push"
        check_float(op, "features", features)
        check_value(features.ndim == 2 and features.shape[1] == self.channels, op, "features", f"[N,{self.channels}]", features)
        check_device(op, "features", features, self.storage, "memory.storage")
        check_integer(op, "labels", labels)
        if list(labels.shape) != [len(features)]:
            check_value(False, op, "labels", f"[{len(features)}] to match features", labels, label_fix(labels, features))
        check_device(op, "labels", labels, features, "features")
        self._push(features.detach(), left_out_below_zero(op, "labels", labels, self.num_classes, "C"))

    def _push(self, features: Tensor, labels: Tensor) -> None:
        """`push` of labels that are int64 in [0,C), or -1."""
        classes = self.num_classes
        group = torch.where((labels >= 0) & features.isfinite().all(1), labels, classes)
        counts = torch.zeros(classes + 1, dtype=torch.int64, device=group.device).index_add_(0, group, torch.ones_like(group))
        order = group.argsort(stable=True)
        sorted_group = group[order]
        rank = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[sorted_group]
        # of more than `size` at once only the last stay: no two rows write the same slot, so the result does not depend on
        # order
        stays = (sorted_group < classes) & (rank >= counts[sorted_group] - self.size)
        index = sorted_group.clamp(max=classes - 1)
        slot = index * self.size + (self.pushed[index] + rank) % self.size
        trash = classes * self.size
        self.storage.index_copy_(0, torch.where(stays, slot, trash), features[order].to(self.storage.dtype))
        self.storage[trash].zero_()
        self.pushed.add_(counts[:classes])

    def filled(self) -> Tensor:
        """[C] int64: features held of each class."""
        return self.pushed.clamp(max=self.size)

    def read(self) -> Memory:
        """Features [C*size, D] (a view of the buffer) and labels [C*size] int64, -1 for a slot still empty."""
        slots = torch.arange(self.num_classes * self.size, device=self.pushed.device)
        labels = slots // self.size
        return Memory(self.storage[:-1], torch.where(slots % self.size < self.filled()[labels], labels, -1))

    def own_similarity(self, centroids: Tensor) -> Tensor:
        """[C*size, K]: similarity of each feature held to the sub-centroids of its class; one small product a class."""
        held = self.storage[:-1].view(self.num_classes, self.size, self.channels).to(centroids.dtype)
        with full_precision(centroids):
            return torch.bmm(held, centroids.transpose(1, 2)).flatten(0, 1)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget everything."""
        nn.init.zeros_(self.storage)
        nn.init.zeros_(self.pushed)

    def reset_parameters(self) -> None:
        """`clear`, by the name that modules have for it."""
        self.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureMemory:
        empty = self.pushed.is_meta
        super()._apply(fn, recurse)
        if empty:  # moved from the meta device, where there are no values
            self.clear()
        return self

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_classes={self.num_classes}, size={self.size}, channels={self.channels}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        names = [f"{prefix}storage", f"{prefix}pushed"]
        if all(name in missing_keys for name in names):  # a checkpoint without memory: the memory fills again
            self.clear()
            for name in names:
                missing_keys.remove(name)
