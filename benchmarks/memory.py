"""Extra peak memory of a call, beside what was there: on the CPU in a fresh process, on a GPU by torch's allocator."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import ROOT
from .case import Case, Row, Settings, Variant


def on_cuda(call: Callable[[], Any]) -> Row:
    """Of a call that has run before; what a CUDA graph holds is not in it."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    call()
    return {"peak_delta_mb": (torch.cuda.max_memory_allocated() - allocated) / 1e6}


def in_fresh_process(case: Case, variant: Variant, settings: Settings) -> Row:
    """`on_cpu` in a process of its own."""
    request = {"op": case.op, "case": case.name, "dtype": case.dtype, "variant": variant.name, "settings": asdict(settings)}
    command = [sys.executable, "-m", "benchmarks", "peak", json.dumps(request)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if child.returncode:
        return {"reason": "peak memory: " + (child.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    row: Row = json.loads(child.stdout.splitlines()[-1])
    return row


def on_cpu(case: Case, tiny: Case, variant_name: str, settings: Settings) -> Row:
    """Rise of this process' peak RSS by one call with `case`'s inputs in place.

    A call on `tiny` shapes goes first, so that library code is loaded. Compilers keep hundreds of MB, so of a compiled
    variant the second call is measured; of all others the first.
    """
    torch.set_num_threads(settings.threads)

    def call_of(a_case: Case) -> Callable[[], Any]:
        inputs = a_case.inputs()
        return next(v for v in a_case.variants if v.name == variant_name).prepare(inputs)

    call_of(tiny)()
    torch._dynamo.reset()
    call = call_of(case)
    if variant_name in [v.name for v in case.variants if v.compiled]:
        call()
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc keeps freed blocks resident, and a call that reuses them would look free
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # refused: a peak made along with the inputs counts as inputs
        Path("/proc/self/clear_refs").write_text("5")  # the recorded peak becomes what is resident now
    before = _peak_rss()
    call()
    return {"peak_delta_mb": (_peak_rss() - before) / 1e6}


def _peak_rss() -> float:
    """VmHWM in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])
