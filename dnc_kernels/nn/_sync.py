"""What data-parallel processes exchange. Nothing here runs, and nothing is sent, unless torch.distributed has more than one
rank.

All processes end with the same bits: each computes from the same gathered or reduced tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..errors import message


class Group:
    """Holds a process group, or None for the default one. A copy has the same; a file has none, as it is of this process."""

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return Group(self.held)

    def __reduce__(self) -> tuple[type[Group], tuple[()]]:
        return Group, ()


class Peers(NamedTuple):
    """The processes that a head agrees with: the option `sync`, and their group (None: the default one)."""

    sync: str
    group: Any = None


def ranks(peers: Peers) -> int:
    """How many processes agree: 1 without torch.distributed or with ``sync="none"``."""
    if peers.sync == "none" or not (dist.is_available() and dist.is_initialized()):
        return 1
    world = dist.get_world_size(peers.group)
    if world < 1:
        fix = "use the head on the ranks of its group alone"
        raise RuntimeError(message("DNC head", "process_group", "a group that this rank is in", "one that it is not in", fix))
    return world


# `torch._disable_dynamo` is `torch.compiler.disable` that imports the compiler at the first call, not with this file
@torch._disable_dynamo
def sum_over_ranks(peers: Peers, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Every tensor summed over the ranks."""
    tensors = tuple(t.contiguous().clone() for t in tensors)
    for tensor in tensors:
        dist.all_reduce(tensor, group=peers.group)
    return tensors


@torch._disable_dynamo
def take_from_first_rank_(peers: Peers, *tensors: Tensor) -> None:
    """Overwrite contiguous tensors with those of the first rank."""
    for tensor in tensors:
        dist.broadcast(tensor, group=peers.group, group_src=0)


@torch._disable_dynamo
def rows_of_lowest_key(peers: Peers, key: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For each index the smallest key over the ranks, and the rows of the (lowest) rank that has it.

    Args:
        peers: the ranks.
        key: [M] float; Inf where this rank has nothing to offer.
        rows: [M, ...] float.
    """
    group, rank = peers.group, dist.get_rank(peers.group)
    least = key.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group)
    owner = torch.where(key == least, rank, dist.get_world_size(group))
    dist.all_reduce(owner, dist.ReduceOp.MIN, group)
    mine = (owner == rank).view(-1, *[1] * (rows.ndim - 1))
    rows = torch.where(mine, rows, 0).contiguous()
    dist.all_reduce(rows, group=group)
    return least, rows


@torch._disable_dynamo
def gather_rows(peers: Peers, *tensors: Tensor) -> tuple[int, tuple[Tensor, ...]]:
    """Tensors of N rows, N its own on every rank, concatenated over the ranks in rank order; and where this rank's rows begin.

    One host sync (the sizes).
    """
    group, world = peers.group, dist.get_world_size(peers.group)
    count = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count, group)
    sizes = [int(c) for c in counts]
    gathered = []
    for tensor in tensors:
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded, group)
        gathered.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return sum(sizes[: dist.get_rank(group)]), tuple(gathered)


@torch._disable_dynamo
def sinkhorn_over_ranks(
    peers: Peers, similarity: Tensor, group: Tensor, groups: int, epsilon: float, iterations: int
) -> Tensor:
    """Log of the plan that `ops.sinkhorn_plan` finds for the pixels of all ranks together, this rank's rows; [N,K] up to a
    constant a row.

    The pixel marginal is local; the sub-centroid marginal sums over all pixels, so each step exchanges one [C,K] tensor
    (ProtoSeg's "distributed" Sinkhorn exchanges nothing). The constants -log K and -log n move a whole group: the plan is the
    same.

    Args:
        peers: the ranks.
        similarity: [N,K] float, finite where group >= 0.
        group: [N] int64, negative: left out (rows without meaning).
        groups: C.
        epsilon: entropy, as in the op.
        iterations: as in the op.
    """
    k = similarity.shape[1]
    kept = (group >= 0)[:, None]
    index = group.clamp(min=0)
    s = torch.where(kept, similarity.to(torch.promote_types(similarity.dtype, torch.float32)), 0) / epsilon
    u, v = s.new_zeros(groups, k), s.new_zeros(len(s), 1)
    sizes = torch.zeros(groups, dtype=torch.int64, device=s.device).index_add_(0, index, kept[:, 0].to(torch.int64))
    dist.all_reduce(sizes, group=peers.group)
    world = dist.get_world_size(peers.group)
    for _ in range(iterations):
        t = s + v
        top = s.new_full((groups, k), -torch.inf)
        top.scatter_reduce_(0, index[:, None].expand(-1, k), torch.where(kept, t, -torch.inf), "amax")
        top = torch.where(top.isfinite(), top, 0)  # groups without a pixel here
        sums = ops.cluster_sums(torch.where(kept, (t - top[index]).exp(), 0), group, groups).sums
        column = (sums.log() + top).contiguous()
        parts = [torch.empty_like(column) for _ in range(world)]
        dist.all_gather(parts, column, peers.group)
        column = torch.stack(parts).logsumexp(0)
        u = torch.where(column.isfinite(), -column, 0)  # groups without a pixel anywhere
        v = -(s + u[index]).logsumexp(1, keepdim=True)
    # the plan of a single pixel is uniform, a tie that rounding would break: its nearest sub-centroid instead, as in the op
    return s + torch.where((sizes > 1)[:, None], u, 0)[index]
