"""What a layer of sub-centroids keeps, and what becomes of it when it is moved, cast, loaded, saved, copied or sharded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import _graph, _sync
from ._sync import Group, Peers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

    from ._choices import Sync
    from .monitor import Monitor

HALF = (torch.float16, torch.bfloat16)
#: Names in a state dict of what an unfinished accumulation has added up: [M,D], [M], and of how many updates.
_ACCUMULATED = ("accumulated_sums", "accumulated_counts", "accumulated_updates")


class SubCentroidState(nn.Module):
    """The buffers of `SubCentroids`, which makes them and says what they are."""

    prototypes: Tensor
    num_updates: Tensor
    start_in: Tensor | None
    last_counts: Tensor
    idle_updates: Tensor
    wins: Tensor
    sync: Sync
    init_step: int
    accumulation_steps: int
    # methods apart from `forward` that compute with parameters
    _uses_parameters: ClassVar[tuple[str, ...]] = ()
    # buffers that are zero at first
    _counters: ClassVar[tuple[str, ...]] = ("num_updates", "last_counts", "idle_updates", "wins")
    # not of an instance, so that copies and files of it have none
    _observers: tuple[Monitor, ...] = ()

    def __init__(self, process_group: ProcessGroup | None) -> None:
        super().__init__()
        self._group = Group(process_group)
        # sums and counts of the updates since the last move, and how many: no buffers, which DistributedDataParallel would
        # overwrite with rank 0's; counted on the host, where the decision to move is made, apart from graphs (0-d int64)
        self._pending: tuple[Tensor, Tensor] | None = None
        self._pending_updates: int | Tensor = 0
        # whether `start_in` is worth a look, and the tensors of when it was set
        self._start_pending = False
        self._drawn: tuple[Tensor | None, Tensor | None] = None, None
        self._number = _graph.number_of(self)
        self._agreed = False  # whether all ranks have taken the buffers of the first

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that `sync` is about; None: all."""
        return self._group.held

    @property
    def peers(self) -> Peers:
        """`sync` and `process_group`."""
        return Peers(self.sync, self._group.held)

    # attributes, as every name in a state dict is one: torch.distributed.checkpoint looks them up

    @property
    def accumulated_sums(self) -> Tensor | None:
        """[M,D], sums of the pixels of an unfinished accumulation; None without one."""
        return None if self._pending is None or not self._pending_updates else self._pending[0]

    @property
    def accumulated_counts(self) -> Tensor | None:
        """[M] int64, pixels of an unfinished accumulation; None without one."""
        return None if self._pending is None or not self._pending_updates else self._pending[1]

    @property
    def accumulated_updates(self) -> Tensor | None:
        """[] int64, updates of an unfinished accumulation; None without one."""
        counts = self.accumulated_counts
        return None if counts is None else torch.tensor(int(self._pending_updates), device=counts.device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start over, as the constructor left it: parameters, also those of the modules within, sub-centroids and counters.

        On the meta device there is nothing to draw; after ``to_empty(device=...)`` this, or a state dict, sets every tensor. As
        part of `from_pretrained` of transformers (``_init_weights``) it leaves what was loaded.
        """
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        self.reset_prototypes()

    def reset_prototypes(self) -> None:
        """As of `SubCentroids`."""
        raise NotImplementedError

    def _reset_counters(self, names: Iterable[str]) -> None:
        """Counters at zero, on the device of the sub-centroids."""
        for name in names:
            counter = self._buffers.get(name)
            if counter is not None and counter.is_meta and not self.prototypes.is_meta:
                self._buffers[name] = torch.zeros_like(counter, device=self.prototypes.device)
            elif counter is not None:
                nn.init.zeros_(counter)

    def _forget_pending(self, *, start: bool = False) -> None:
        """Drop the sums of an unfinished accumulation, and with `start` a start from data that is to come."""
        self._pending, self._pending_updates = None, 0
        if start:
            self._no_start(self.start_in)

    def _no_start(self, start_in: Tensor | None) -> None:
        self._start_pending, self._drawn = False, (None, None)
        if start_in is not None:
            start_in.zero_()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_observers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = _graph.number_of(self)

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get("_buffers", {}).get(name)
        super().__setattr__(name, value)
        if name == "__class__":
            self._register_with_fsdp()
        elif before is not None and isinstance(value, Tensor):
            # as `from_pretrained` loads: tensor by tensor, and with whatever lies in memory for what the checkpoint lacks
            lacks = name in self._non_persistent_buffers_set or (is_marked(self.prototypes) and not is_marked(value))
            if name in ("prototypes", "wins") and value.dtype in HALF:
                self._buffers[name] = _widened(value, unit=name == "prototypes")
            elif before.is_meta and not value.is_meta and lacks:
                value.zero_()

    def _register_with_fsdp(self) -> None:
        """`fully_shard` makes its own class of a module's, and gathers the parameters for `forward` alone unless told."""
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and isinstance(self, fsdp.FSDPModule):
            for method in self._uses_parameters:
                fsdp.register_fsdp_forward_method(self, method)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in ("prototypes", "wins"):
            if (moved := getattr(self, name)).dtype in HALF:
                self._buffers[name] = before[name].to(moved.device)  # type: ignore[union-attr]
        self._reset_counters(name for name, old in before.items() if name in self._counters and _materialised(old, self, name))
        drawn = zip(("prototypes", "start_in"), self._drawn, strict=True)
        self._drawn = tuple(self._buffers[name] if old is before[name] else old for name, old in drawn)  # type: ignore[assignment]
        return self

    def _in_full_precision(self) -> None:
        """Undo a cast from outside, such as that of ``MixedPrecision(buffer_dtype=...)`` of FullyShardedDataParallel."""
        for name in ("prototypes", "wins"):
            if (buffer := getattr(self, name)).dtype in HALF:
                buffer.data = _widened(buffer, unit=name == "prototypes")

    def _agree(self) -> None:
        """All ranks take the buffers of the first, once: without DistributedDataParallel nobody else sees to that."""
        if not self._agreed and _sync.ranks(self.peers) > 1:
            _sync.take_from_first_rank_(self.peers, *self.buffers())
            self._agreed = True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name in _ACCUMULATED if (value := getattr(self, name)) is not None})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name, older = f"{prefix}prototypes", f"{prefix}subcentroids"
        if older in state_dict and name not in state_dict:
            state_dict[name] = state_dict.pop(older)
        accumulated = [state_dict.pop(prefix + part, None) for part in _ACCUMULATED]
        start_in = state_dict.pop(f"{prefix}start_in", None)
        rows = state_dict.get(name)
        loads = False
        if isinstance(rows, Tensor) and rows.shape == self.prototypes.shape:
            loads = True
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            length = rows.norm(dim=2, keepdim=True)
            if not rows.is_meta and not (length.isfinite() & (length > 0)).all():
                error_msgs.append(
                    f"{name}: every sub-centroid must be finite and not zero; got {int((~(length > 0)).sum())} zero or NaN"
                )
            state_dict[name] = unit_rows(rows, length)
            self._forget_pending()
            if self.accumulation_steps > 1 and accumulated[0] is not None:
                self._pending, self._pending_updates = (accumulated[0], accumulated[1]), int(accumulated[2])
            if self.start_in is not None:
                if start_in is None:  # the updates done say it too, unless `initialize_from_` came first
                    done = state_dict.get(f"{prefix}num_updates")
                    done = int(done) if isinstance(done, Tensor) and not done.is_meta else None
                    left = 0 if done is None else max(0, self.init_step + 1 - done)
                    start_in = torch.tensor(left, device=rows.device)
                state_dict[f"{prefix}start_in"] = start_in
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for counter in ("num_updates", "idle_updates", "wins", "start_in"):  # a released checkpoint has none
            if f"{prefix}{counter}" in missing_keys:
                missing_keys.remove(f"{prefix}{counter}")
        if loads:
            self._reset_counters(counter for counter in self._counters if f"{prefix}{counter}" not in state_dict)
            if self.start_in is not None:
                self._start_pending = self.start_in.is_meta or int(self.start_in) > 0
                self._drawn = self.prototypes, self.start_in


def _materialised(before: Tensor | None, module: nn.Module, name: str) -> bool:
    """Whether a buffer that was on the meta device is on another now, where it has no value."""
    now = module._buffers[name]
    return before is not None and before.is_meta and now is not None and not now.is_meta


def _widened(t: Tensor, *, unit: bool) -> Tensor:
    """Half precision in float32, rows of unit length again."""
    wide = t.detach().to(torch.float32)
    if unit and not t.is_meta:
        wide = unit_rows(wide, wide.norm(dim=2, keepdim=True))
    if is_marked(t):
        wide._is_hf_initialized = True  # type: ignore[attr-defined]
    return wide


def is_marked(t: Tensor) -> bool:
    """Whether `from_pretrained` of transformers has loaded it: its functions in the place of `torch.nn.init` leave it alone."""
    return getattr(t, "_is_hf_initialized", False)


def unit_rows(rows: Tensor, length: Tensor) -> Tensor:
    """Rows over their length; a row that is of unit length already keeps every bit, so that resuming is exact."""
    return torch.where((length - 1).abs() <= 1e-6, rows, rows / length)
