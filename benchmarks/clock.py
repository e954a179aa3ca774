"""How long a call takes: on the CPU by the host's clock, on a GPU by events of its stream (docs/benchmarks.md)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

#: A device is kept busy for at most this long before a call: what launches for longer waits for the device itself anyway.
_LONGEST_SLEEP_US = 20_000.0


class Timing(NamedTuple):
    """One call."""

    ms: float
    #: Time until the call returned to the host, in microseconds; None on the CPU, where it is `ms`.
    host_us: float | None = None
    #: Whether all of it had been launched before the device began with it, so that `ms` holds no gap between launches.
    queued: bool | None = None


def cpu_clock(call: Call) -> Timing:
    """Time of one call on the CPU."""
    time.sleep(0.005)  # idle threads of another OpenMP runtime (faiss) spin for a few ms after its call: let them fall asleep
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result  # freeing it is not timed
    return Timing(elapsed * 1e3)


class CudaClock:
    """Times calls between two events of the stream, which sleeps before the first one until the host has launched the call.

    A call of ten launches takes the host about 100 us, and the device perhaps 20: without the sleep the gaps would be timed.
    """

    def __init__(self, device: str | torch.device = "cuda", cold: bool = True) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # 256 MB: five times the 50 MB L2 of an H100
        self._junk = torch.empty(2**26 if cold else 0, dtype=torch.int32, device=device)
        self._cycles_per_us = self._measured_rate()
        self._sleep_cycles: dict[Call, int] = {}

    def _measured_rate(self) -> float:
        """Clock cycles of `torch.cuda._sleep` a microsecond, from about a millisecond of them."""
        cycles = 2_000_000
        for _ in range(2):  # the first time loads the kernel
            self._start.record()
            torch.cuda._sleep(cycles)
            self._end.record()
            torch.cuda.synchronize()
        return cycles / max(1e3 * self._start.elapsed_time(self._end), 1e-3)

    def warm_up(self, call: Call) -> None:
        """Call it (this may compile), then learn from three calls for how long the host launches."""
        call()
        longest = 0.0
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            longest = max(longest, 1e6 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
        # half as much again and 50 us: the host is slower at times, and launches the events too
        self._sleep_cycles[call] = round(min(1.5 * longest + 50, _LONGEST_SLEEP_US) * self._cycles_per_us)

    def __call__(self, call: Call) -> Timing:
        """Time of one call."""
        if call not in self._sleep_cycles:
            self.warm_up(call)
        self._junk.zero_()
        torch.cuda._sleep(self._sleep_cycles[call])
        self._start.record()
        begin = time.perf_counter()
        result = call()
        host = time.perf_counter() - begin
        queued = not self._start.query()
        self._end.record()
        torch.cuda.synchronize()
        del result
        return Timing(float(self._start.elapsed_time(self._end)), 1e6 * host, queued)
