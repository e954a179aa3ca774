"""What a graph of torch.compile takes as one node: a copy that stays, draws from a generator, and a start from data.

A graph has tensors and numbers and no objects, so it names a layer by a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import message
from ..ops import NAMESPACE
from . import _starts

if TYPE_CHECKING:
    from .subcentroids import SubCentroids

_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()  # SubCentroids
_numbers = itertools.count()
#: Changed by every draw, so that a compiler keeps all of them, in their order.
_turn = torch.zeros((), dtype=torch.int64)


def number_of(layer: Any) -> int:
    """A number by which a graph finds the layer. A copy needs one of its own."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _layer(number: int) -> Any:
    layer = _layers.get(number)
    if layer is None:
        fix = "compile it again in this process; a program for another takes a head in eval mode, with generator=None"
        raise RuntimeError(message("DNC head", "graph", "one of a layer of this process", "one whose layer is gone", fix))
    return layer


@torch.library.custom_op(f"{NAMESPACE}::copy_of_subcentroids", mutates_args=())
def copy_of_subcentroids(rows: Tensor) -> Tensor:
    """A clone that no compiler makes again in the backward pass, when the rows have moved."""
    return rows.clone()


@copy_of_subcentroids.register_fake
def _(rows: Tensor) -> Tensor:
    return torch.empty_like(rows)


def uniform(layer: SubCentroids, shape: Sequence[int], device: torch.device) -> Tensor:
    """`_starts.uniform` numbers of the layer's generator, also in a graph."""
    if layer.generator is None or not torch.compiler.is_compiling():
        return _starts.uniform(tuple(shape), device, layer.generator)
    return _draw(list(shape), layer._number, device, _turn)


@torch.library.custom_op(f"{NAMESPACE}::draw", mutates_args=("turn",))
def _draw(shape: Sequence[int], layer: int, device: torch.device, turn: Tensor) -> Tensor:
    turn.add_(1)
    return _starts.uniform(tuple(shape), device, _layer(layer).generator)


@_draw.register_fake
def _(shape: Sequence[int], layer: int, device: torch.device, turn: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def start_when_due(layer: SubCentroids, x: Tensor, group: Tensor) -> Tensor:
    """[] bool: whether the layer has started, in this update of a graph, from features x [N,D] or [B,D,H,W] of classes [N].

    The graph has it for as long as a start is to come; after that torch.compile makes one without.
    """
    assert layer.start_in is not None
    buffers = layer.prototypes, layer.wins, layer.start_in, layer.num_updates
    return _start_when_due(x, group, *buffers, layer._number, _turn)


@torch.library.custom_op(f"{NAMESPACE}::start_when_due", mutates_args=("prototypes", "wins", "start_in", "turn"))
def _start_when_due(
    x: Tensor, group: Tensor, prototypes: Tensor, wins: Tensor, start_in: Tensor, num_updates: Tensor, layer: int, turn: Tensor
) -> Tensor:
    turn.add_(1)
    return torch.tensor(_layer(layer)._start_if_due(x, group, prototypes, wins, start_in, num_updates), device=x.device)


@_start_when_due.register_fake
def _(
    x: Tensor, group: Tensor, prototypes: Tensor, wins: Tensor, start_in: Tensor, num_updates: Tensor, layer: int, turn: Tensor
) -> Tensor:
    return x.new_empty((), dtype=torch.bool)
