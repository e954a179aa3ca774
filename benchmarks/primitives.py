"""What the CUDA C++ kernels rest on, one primitive after the other on this GPU: which one fails, in seconds.

Each check is a small kernel of csrc/tests/cuda_on_cpu/checks_*.cu, whose result is compared with plain numpy here: layouts are
those of the PTX ISA. A check runs in a process of its own with a time limit, a few at a time: one that hangs or crashes
stops no other. ``--host`` runs the same kernels as host C++. The GPU's module is made by `make gpu-wheel`, for sm_90a.

One JSON object a line, as it comes: {"primitive", "status": "ok" | "wrong" | "failed" | "hang", "seconds", "detail"}. Exit
status 1 if any is not ok.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from . import ROOT

#: Folder of the module for a GPU, and of the one for the host.
FOLDERS = {False: ROOT / "build" / "gpu", True: ROOT / "build" / f"cuda-on-cpu-{sys.implementation.cache_tag}"}
LANES = np.arange(32)

#: A check gets the module, and whether it runs on the host; it raises AssertionError where a result is wrong.
Check = Callable[[Any, bool], None]
CHECKS: dict[str, Check] = {}


def check(run: Check) -> Check:
    """Add to `CHECKS` under its name, without the underscore."""
    CHECKS[run.__name__.removeprefix("_")] = run
    return run


def same(actual: Any, expected: Any, what: str = "") -> None:
    """Raise AssertionError with the first difference."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape == expected.shape and np.array_equal(actual, expected):
        return
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} has shape {actual.shape}, not {expected.shape}")
    wrong = np.argwhere(actual != expected)
    first = tuple(map(int, wrong[0]))
    raise AssertionError(f"{what}{list(first)} is {actual[first]}, not {expected[first]}; {len(wrong)} of {actual.size} wrong")


def bf16(*shape: int, most: int = 8, step: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Random multiples of `step` that 16 bits hold exactly, and their bits as bfloat16."""
    value = np.random.default_rng(shape[0]).integers(-most, most + 1, shape).astype(np.float32) * np.float32(step)
    return value, (value.view(np.uint32) >> 16).astype(np.uint16)


def f16(value: np.ndarray) -> np.ndarray:
    """Bits as float16."""
    return value.astype(np.float16).view(np.uint16)


def words(*shape: int) -> np.ndarray:
    """Random bits."""
    return np.random.default_rng(1).integers(0, 2**16, shape).astype(np.uint16)


@check
def _shuffles_and_votes(module: Any, host: bool) -> None:
    for width in (4, 8, 32):
        value, segment = 100 + LANES, LANES // width * width
        xor, up, down = LANES ^ width, LANES - 3, LANES + 3
        expected = [
            value[(LANES * 7 + 3) % 32],
            value[segment + LANES % 3 % width],
            value[LANES ^ 5],
            value[np.where(xor < segment + width, xor, LANES) % 32],
            value[np.where(up >= segment, up, LANES)],
            value[np.where(down < segment + width, down, LANES) % 32],
            np.full(32, sum(1 << lane for lane in range(0, 32, 3))),
            np.ones(32),
            np.zeros(32),
            [sum(1 << other for other in range(32) if other // 5 == lane // 5) for lane in range(32)],
            np.full(32, 496),
            np.full(32, (LANES * 5 % 31).max()),
            np.where(LANES < 16, LANES[:16].sum(), LANES[16:].sum()),
        ]
        for row, (actual, wanted) in enumerate(zip(module.shuffles(width), expected, strict=True)):
            unsigned = np.asarray(wanted, dtype=np.int64).astype(np.uint32)
            same(actual.view(np.uint32), unsigned, f"operation {row} of width {width}, lane ")


@check
def _ldmatrix(module: Any, host: bool) -> None:
    matrices = words(4, 8, 8)
    m, row, column = matrices.astype(np.uint32), LANES // 4, LANES % 4 * 2
    plain = m[:, row, column] | m[:, row, column + 1] << 16
    transposed = m[:, column, row] | m[:, column + 1, row] << 16
    same(module.ldmatrix(matrices.reshape(32, 8)), np.stack([plain.T, transposed.T]), "[transposed, lane, matrix] ")


def _mma(run: Callable[..., Any], bits: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    (a, a_bits), (b, b_bits) = bf16(16, 16), bf16(16, 8)
    c = np.random.default_rng(2).integers(-9, 9, (16, 8)).astype(np.float32)
    same(run(bits(a, a_bits), bits(b, b_bits), c.copy()), a @ b + c)


@check
def _mma_bf16(module: Any, host: bool) -> None:
    _mma(module.mma_bf16, lambda value, bits: bits)


@check
def _mma_f16(module: Any, host: bool) -> None:
    _mma(module.mma_f16, lambda value, bits: f16(value))


@check
def _cp_async_groups(module: Any, host: bool) -> None:
    """Groups arrive in order, at the latest when waited for; on the host not before. The last one brings zeros."""
    source = np.arange(1, 13, dtype=np.uint32).reshape(3, 4)
    nothing = np.full(4, 0xCBCBCBCB)  # what the host fills shared memory with
    wanted = [source[0], source[1], np.zeros(4)]
    for arrived, stage in enumerate(module.copies(source)):
        for group in range(3):
            if group < arrived or host:
                same(stage[group], wanted[group] if group < arrived else nothing, f"group {group} with {arrived} waited for ")


@check
def _named_barriers(module: Any, host: bool) -> None:
    expected = []
    for pair in range(3):
        v = 64 * pair + np.arange(64)
        for _ in range(pair + 1):
            v = v[(np.arange(64) + 33) % 64] + 1
        expected.append(v)
    same(module.named_barriers().reshape(3, 64), expected, "[pair, thread] ")


@check
def _grid_barrier(module: Any, host: bool) -> None:
    """All blocks of a cooperative launch, again and again."""
    blocks, rounds = 24, 5 if host else 2000
    same(module.grid_barrier(blocks, rounds), (np.arange(blocks) + rounds) % blocks + rounds, "block ")


@check
def _last_block(module: Any, host: bool) -> None:
    """The last of many blocks sees what all others have written."""
    blocks = 7 if host else 500
    sums = np.append(blocks * (blocks + 1) // 2 * np.arange(1, 65), blocks - 1)
    for _ in range(1 if host else 20):
        same(module.last_block(blocks), sums, "column ")


@check
def _vector_red(module: Any, host: bool) -> None:
    blocks, threads = (3, 64) if host else (50, 256)
    t, b = np.meshgrid(np.arange(threads), np.arange(blocks))
    expected = [[s.sum() for s in (np.ones_like(t[:, p::4]), t[:, p::4], b[:, p::4], (t + b)[:, p::4])] for p in range(4)]
    same(module.add_vector(blocks, threads), expected, "[place, component] ")


@check
def _mbarrier_ring(module: Any, host: bool) -> None:
    rounds = 9 if host else 5000
    same(module.ring(rounds), np.repeat(1000 + np.arange(rounds), 64).reshape(rounds, 64), "[round, thread] ")


def padded_box(array: np.ndarray, column: int, row: int, rows: int = 16) -> np.ndarray:
    """[rows, 64] from (column, row), zeros outside."""
    box = np.zeros((rows, 64), np.uint16)
    for r in range(rows):
        for c in range(64):
            if 0 <= row + r < array.shape[0] and 0 <= column + c < array.shape[1]:
                box[r, c] = array[row + r, column + c]
    return box


def swizzled(box: np.ndarray) -> np.ndarray:
    """As the 128-byte swizzle lays out rows of 128 bytes: 16-byte chunk c of row r at c ^ r % 8."""
    memory = np.empty_like(box)
    for r in range(len(box)):
        for chunk in range(8):
            at = chunk ^ (r % 8)
            memory[r, 8 * at : 8 * at + 8] = box[r, 8 * chunk : 8 * chunk + 8]
    return memory


PLACES = ((0, 0), (64, 16), (40, 20), (-8, -3))


@check
def _tma_box_2d(module: Any, host: bool) -> None:
    array = words(30, 80)
    for column, row in PLACES:
        expected = swizzled(padded_box(array, column, row))
        same(module.box(array, [80, 30], [80], column, row, 0), expected, f"box at {(column, row)} ")


@check
def _tma_box_3d(module: Any, host: bool) -> None:
    """Planes, the last of which is not there; then planes whose distance is no multiple of a row's."""
    flat = words(4, 5000).reshape(-1)
    for stride, plane_stride in ((80, 2400), (96, 2984)):
        planes = np.lib.stride_tricks.as_strided(flat, (3, 30, 80), (2 * plane_stride, 2 * stride, 2))
        for column, row in PLACES:
            for plane in range(4):
                box = padded_box(planes[plane], column, row) if plane < 3 else np.zeros((16, 64), np.uint16)
                actual = module.box(flat, [80, 30, 3], [stride, plane_stride], column, row, plane)
                same(actual, swizzled(box), f"box at {(column, row, plane)} with strides {(stride, plane_stride)} ")


@check
def _tma_box_padded_rows(module: Any, host: bool) -> None:
    """Rows [N,D] of a wider array as the similarity kernels describe them: one plane, as far on as N D elements without gaps.

    That is no multiple of a row's stride, and less than the rows take. A driver that refuses it refuses padded pixels.
    """
    flat = words(1, 30 * 88).reshape(-1)
    for n, d, stride in ((30, 72, 88), (1, 72, 72), (30, 8, 88)):
        far = -(-n * d // 8) * 8
        rows = np.lib.stride_tricks.as_strided(flat, (n, d), (2 * stride, 2))
        for column, row in PLACES:
            actual = module.box(flat, [d, n, 1], [stride if n > 1 else far, far], column, row, 0)
            same(actual, swizzled(padded_box(rows, column, row)), f"box at {(column, row)} of {n} rows of {d}, {stride} apart ")


@check
def _tma_multicast(module: Any, host: bool) -> None:
    array = words(16, 64)
    expected = np.concatenate([swizzled(array[:8]), swizzled(array[8:])])
    for block, actual in enumerate(module.multicast(array)):
        same(actual, expected, f"block {block} ")


def _wgmma(columns: bool, half: bool) -> Check:
    """Products of two tiles in shared memory, the first of which may lie as its transpose."""

    def run(module: Any, host: bool) -> None:
        (a, a_bits), (b, b_bits) = bf16(64, 64), bf16(80, 64)
        if half:
            a_bits, b_bits = f16(a), f16(b)
        d = np.random.default_rng(3).integers(-9, 9, (64, 80)).astype(np.float32)
        kernel = getattr(module, f"wgmma{'_columns' if columns else ''}_80_{'f16' if half else 'bf16'}")
        for accumulate in (False, True):
            expected = a @ b.T + (d if accumulate else 0)
            actual = kernel(a_bits.T.copy() if columns else a_bits, b_bits, accumulate, d.copy())
            same(actual, expected, f"accumulate={accumulate} ")

    return run


def _wgmma_from_registers(half: bool) -> Check:
    """Products of a tile in registers and one in shared memory."""

    def run(module: Any, host: bool) -> None:
        (a, a_bits), (b, b_bits) = bf16(64, 64), bf16(65, 64)
        b, b_bits = b[1:], b_bits[1:].copy()
        actual = module.wgmma_transposed_64_f16(f16(a), f16(b)) if half else module.wgmma_transposed_64_bf16(a_bits, b_bits)
        same(actual, a @ b)

    return run


for _half, _type in ((False, "bf16"), (True, "f16")):
    CHECKS[f"wgmma_two_tiles_{_type}"] = _wgmma(False, _half)
    CHECKS[f"wgmma_columns_{_type}"] = _wgmma(True, _half)
    CHECKS[f"wgmma_from_registers_{_type}"] = _wgmma_from_registers(_half)


@check
def _proxy_fence_before_products(module: Any, host: bool) -> None:
    """Operands that threads store, round by round in the same place."""
    rounds = 3 if host else 200
    (a, a_bits), (b, b_bits) = bf16(rounds, 64, 64, most=2, step=1.0), bf16(rounds, 80, 64, most=2, step=1.0)
    same(module.stored_80(a_bits, b_bits), np.einsum("rmk,rnk->mn", a, b))


@check
def _proxy_fence_before_copies(module: Any, host: bool) -> None:
    """Boxes that are copied over what threads have stored there."""
    array = words(16 * (5 if host else 1000), 64)
    expected = [swizzled(box) for box in array.reshape(-1, 16, 64)]
    same(module.overwritten(array), expected, "[round, row, column] ")


@check
def _setmaxnreg(module: Any, host: bool) -> None:
    """Many registers keep their values in the warpgroups that took them from another."""
    rounds = 3 if host else 1000
    v = np.arange(256 * 192, dtype=np.uint32).reshape(256, 192)
    for _ in range(rounds):
        first = v[:, :1].copy()
        # in place as the kernel goes: element i still sees the old element i + 1
        v = (3 * v + np.concatenate([v[:, 1:], first], 1)).astype(np.uint32)
    same(module.registers(rounds), v, "[thread, register] ")


@check
def _pipeline(module: Any, host: bool) -> None:
    """Ring, registers and both products as in centroid_cross_entropy: accumulators of two batches of products in flight."""
    tiles = 2 if host else 40
    (x, x_bits), (p, p_bits) = (bf16(n, 256, most=1, step=1.0) for n in (128, 80 * tiles))
    s = np.einsum("nd,tmd->tnm", x, p.reshape(tiles, 80, 256))
    assert np.abs(s).max() <= 256, "the check's own numbers must be exact in bfloat16"
    u = np.einsum("tnm,tmd->nd", s, p.reshape(tiles, 80, 256))
    for _ in range(1 if host else 10):
        actual_s, actual_u = module.pipeline(x_bits, p_bits)
        same(actual_s, s, "first product [tile, pixel, column] ")
        same(actual_u, u, "second product [pixel, channel] ")


def load(host: bool) -> Any:
    """The module of the checks.

    Raises:
        RuntimeError: it has not been built.
    """
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    paths = [path for suffix in suffixes if (path := FOLDERS[host] / f"_checks{suffix}").exists()]
    if not paths:
        how = "`python -m pytest tests/test_cuda_on_cpu.py`" if host else "`make gpu-wheel` with this version of Python"
        raise RuntimeError(f"the checks are not built: there is no {FOLDERS[host] / '_checks'}{suffixes[0]}; {how} makes it")
    spec = importlib.util.spec_from_file_location("_checks", paths[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(name: str, host: bool) -> tuple[str, str]:
    """Status and detail of one check, in this process."""
    try:
        CHECKS[name](load(host), host)
    except AssertionError as error:
        return "wrong", str(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    return "ok", ""


def run_apart(name: str, command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """The same in a process of its own, whose last line of output says it in JSON."""
    start, status, detail = time.monotonic(), "failed", ""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, error = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status, detail = "hang", f"stopped after {timeout_s:g} s"
        else:
            try:
                status, detail = json.loads(out.splitlines()[-1])
            except (ValueError, IndexError):
                code = process.returncode
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                detail = " ".join([how, *error.strip().splitlines()[-1:]])
    return {"primitive": name, "status": status, "seconds": round(time.monotonic() - start, 2), "detail": detail}


def run(commands: dict[str, Sequence[str]], timeout_s: float, jobs: int) -> Iterator[dict[str, Any]]:
    """A line for every command, as each ends."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run_apart, name, command, timeout_s) for name, command in commands.items()]
        for future in as_completed(waiting):
            yield future.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Check primitives of this GPU, one process each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.primitives", description=main.__doc__)
    parser.add_argument("--list", action="store_true", help="print the names alone")
    parser.add_argument("--only", action="append", choices=list(CHECKS), metavar="NAME", help="all; may be repeated")
    parser.add_argument("--host", action="store_true", help="the same kernels as host C++, without a GPU")
    parser.add_argument("--timeout", type=float, default=20, metavar="S", help="seconds a check may take (20)")
    parser.add_argument("--jobs", type=int, default=4, help="checks at a time (4)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one check, in this process
    options = parser.parse_args(arguments)
    names = options.only or list(CHECKS)
    if options.list:
        print("\n".join(names))
        return 0
    if options.here:
        print(json.dumps(run_here(names[0], options.host)))
        return 0
    this = [sys.executable, "-m", "benchmarks.primitives", "--here", *(["--host"] if options.host else [])]
    good = True
    for line in run({name: [*this, "--only", name] for name in names}, options.timeout, options.jobs):
        print(json.dumps(line), flush=True)
        good &= line["status"] == "ok"
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
