"""The harness of the CUDA tests: its twins of GPU instructions against plain loops, and that it notices mistakes.

The expected layouts are those of the PTX ISA: tables of mma.m16n8k16, ldmatrix and wgmma fragments, the 128-byte swizzle.
"""

import numpy as np
import pytest
from cuda_on_cpu import ORDERS, load

LANES = np.arange(32)


@pytest.fixture(params=ORDERS)
def checks(request):
    module = load("_checks")
    module.configure(request.param)
    return module


def bf16(*shape):
    """Random values that 16 bits hold exactly, and their bits."""
    value = np.random.default_rng(shape[0]).integers(-8, 9, shape).astype(np.float32) / 4
    return value, (value.view(np.uint32) >> 16).astype(np.uint16)


def words(*shape):
    return np.random.default_rng(1).integers(0, 2**16, shape).astype(np.uint16)


@pytest.mark.parametrize("width", [4, 8, 32])
def test_shuffles_and_votes(checks, width):
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
    for row, (actual, wanted) in enumerate(zip(checks.shuffles(width), expected, strict=True)):
        assert np.array_equal(actual.view(np.uint32), np.asarray(wanted, dtype=np.int64).astype(np.uint32)), row


def test_ldmatrix(checks):
    matrices = words(4, 8, 8)
    plain, transposed = checks.ldmatrix(matrices.reshape(32, 8))
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for j, m in enumerate(matrices.astype(int)):
            assert plain[lane, j] == m[row, column] | m[row, column + 1] << 16
            assert transposed[lane, j] == m[column, row] | m[column + 1, row] << 16


def test_mma(checks):
    (a, a_bits), (b, b_bits) = bf16(16, 16), bf16(16, 8)
    c = np.random.default_rng(2).integers(-9, 9, (16, 8)).astype(np.float32)
    assert np.array_equal(checks.mma_bf16(a_bits, b_bits, c.copy()), a @ b + c)
    halves = a.astype(np.float16).view(np.uint16), b.astype(np.float16).view(np.uint16)
    assert np.array_equal(checks.mma_f16(*halves, c.copy()), a @ b + c)


def test_cp_async_groups_arrive_when_waited_for(checks):
    source = np.arange(1, 13, dtype=np.uint32).reshape(3, 4)
    nothing = np.full(4, 0xCBCBCBCB)  # what the harness fills shared memory with
    wanted = [source[0], source[1], np.zeros(4)]
    for arrived, stage in enumerate(checks.copies(source)):
        for group in range(3):
            assert np.array_equal(stage[group], wanted[group] if group < arrived else nothing)


def test_named_barriers(checks):
    expected = []
    for pair in range(3):
        v = 64 * pair + np.arange(64)
        for _ in range(pair + 1):
            v = v[(np.arange(64) + 33) % 64] + 1
        expected.append(v)
    assert np.array_equal(checks.named_barriers().reshape(3, 64), expected)


def test_phases_of_a_ring(checks):
    assert np.array_equal(checks.ring(9), np.repeat(1000 + np.arange(9), 64).reshape(9, 64))


def padded_box(array, column, row, rows=16):
    """[rows, 64] from (column, row), zeros outside."""
    box = np.zeros((rows, 64), np.uint16)
    for r in range(rows):
        for c in range(64):
            if 0 <= row + r < array.shape[0] and 0 <= column + c < array.shape[1]:
                box[r, c] = array[row + r, column + c]
    return box


def swizzled(box):
    """As the 128-byte swizzle lays out rows of 128 bytes: 16-byte chunk c of row r at c ^ r % 8."""
    memory = np.empty_like(box)
    for r in range(len(box)):
        for chunk in range(8):
            at = chunk ^ (r % 8)
            memory[r, 8 * at : 8 * at + 8] = box[r, 8 * chunk : 8 * chunk + 8]
    return memory


@pytest.mark.parametrize(("column", "row"), [(0, 0), (64, 16), (40, 20), (-8, -3)])
def test_box_of_a_tensor_map(checks, column, row):
    array = words(30, 80)
    assert np.array_equal(checks.box(array, column, row, 0), swizzled(padded_box(array, column, row)))
    planes = words(3, 30, 80)
    for plane in range(4):  # the last one is not there
        box = padded_box(planes[plane], column, row) if plane < 3 else np.zeros((16, 64), np.uint16)
        assert np.array_equal(checks.box(planes, column, row, plane), swizzled(box))


def test_multicast_within_each_cluster(checks):
    array = words(16, 64)
    expected = np.concatenate([swizzled(array[:8]), swizzled(array[8:])])
    for block in checks.multicast(array):
        assert np.array_equal(block, expected)


@pytest.mark.parametrize("accumulate", [False, True])
def test_wgmma_of_two_tiles(checks, accumulate):
    (a, a_bits), (b, b_bits) = bf16(64, 64), bf16(80, 64)
    d = np.random.default_rng(3).integers(-9, 9, (64, 80)).astype(np.float32)
    expected = a @ b.T + (d if accumulate else 0)
    assert np.array_equal(checks.wgmma_80(a_bits, b_bits, accumulate, d.copy()), expected)
    assert np.array_equal(checks.wgmma_columns_80(a_bits.T.copy(), b_bits, accumulate, d.copy()), expected)


def test_wgmma_from_registers(checks):
    (a, a_bits), (b, b_bits) = bf16(64, 64), bf16(65, 64)
    assert np.array_equal(checks.wgmma_transposed_64(a_bits, b_bits[1:].copy()), a @ b[1:])


# mistakes; those that only AddressSanitizer sees are in test_cuda_sanitized.py


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("divergent_barrier", "is waiting (at __syncthreads|in a warp exchange) while 32 threads"),
        ("missing_arrival", "is spinning while 32 threads"),
        ("missing_block", "of block [02] is (spinning|waiting at __syncthreads) while 64 threads"),
        ("missing_warp", "is waiting at a named barrier while 32 threads"),
        ("mixed_barrier", "is waiting at a named barrier while (32|64) threads"),
    ],
)
def test_a_wait_that_never_ends_is_reported(checks, fault, text):
    with pytest.raises(RuntimeError, match=f"deadlock: thread [0-9]+ .*{text}"):
        getattr(checks, fault)()


def test_a_missing_barrier_changes_the_result_in_some_order():
    module = load("_checks")
    results = []
    for order in ORDERS:
        module.configure(order)
        results.append(np.array_equal(module.missing_barrier(), 31 - np.arange(32)))
    assert not any(results)


def test_a_copy_that_was_not_waited_for_has_not_arrived(checks):
    assert checks.early_read() != 7
