"""How much of the old sub-centroid an update keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import check_number, check_value

#: A number; or (start, end, steps), a cosine ramp over the updates; or a function of the number of updates done (a 0-d float
#: tensor on the sub-centroids' device: stay in torch ops there and CUDA needs no sync).
Momentum = float | tuple[float, float, int] | Callable[[Tensor], Tensor | float]


@dataclass(frozen=True)
class Recent:
    """Momentum that averages over the recent part of the updates so far, however many there will be.

    After n updates it is ``1 - 1 / (fraction * n + 1 / (1 - start))``: the average reaches back over `fraction` of them and
    1 / (1 - start) more. It needs no length of the training, forgets where the sub-centroids started, and steadies them as the
    network settles: for SGD such averages are known as polynomial-decay averaging (Shamir and Zhang, ICML 2013).

    Args:
        fraction: of the updates so far, in (0,1].
        start: momentum of the first update, in [0,1).
    """

    fraction: float = 0.25
    start: float = 0.99

    def __post_init__(self) -> None:
        check_number("Recent", "fraction", self.fraction, "in (0,1]", lambda v: 0 < v <= 1)
        check_number("Recent", "start", self.start, "in [0,1)", lambda v: 0 <= v < 1)

    def __call__(self, updates: Tensor) -> Tensor:
        """Momentum after so many updates, a 0-d float tensor as `updates` is."""
        return 1 - 1 / (self.fraction * updates + 1 / (1 - self.start))


def check_momentum(op: str, momentum: Momentum) -> Momentum:
    """A momentum as the layer keeps it; a ramp may be a list, as files of options have it."""
    if isinstance(momentum, list):
        momentum = tuple(momentum)
    if isinstance(momentum, tuple):
        check_value(len(momentum) == 3, op, "momentum", "a number, a function or a ramp (start, end, steps)", momentum)
        for name, value in (("start", momentum[0]), ("end", momentum[1])):
            check_number(op, f"momentum's {name}", value, "in [0,1]", lambda v: 0 <= v <= 1)
        check_number(op, "momentum's steps", momentum[2], "positive", lambda v: v > 0)
    elif not callable(momentum):
        check_number(op, "momentum", momentum, "in [0,1], or a ramp (start, end, steps) or a function", lambda v: 0 <= v <= 1)
    return momentum if isinstance(momentum, tuple) or callable(momentum) else float(momentum)
