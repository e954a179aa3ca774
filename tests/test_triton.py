"""Triton beside the ops: configurations, choice of backend, the head's step, and every shipped kernel compiled for three GPUs."""

import itertools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import assert_close

from dnc_kernels import backends, ops, use_backend
from dnc_kernels.nn import DNCHead

pytest.importorskip("triton")
from benchmarks import aot, aot_triton, machine_code
from benchmarks.families import FAMILIES
from dnc_kernels.ops import _triton
from dnc_kernels.ops._common import scale_saved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


# choice


@pytest.mark.parametrize("op", backends.KERNELS)
def test_auto_takes_triton_on_a_gpu(op, monkeypatch):
    monkeypatch.setitem(backends.UNUSABLE, "triton", "")
    monkeypatch.setattr(backends, "DISPATCH", {})
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = backends.resolve(op, "cuda", dtype, capability=(9, 0), K=10)
        assert found.backend == "triton" and found.reason
    assert backends.resolve(op, "cpu", torch.float32).backend == "cpu"


def test_what_triton_cannot_do_runs_the_reference_with_the_reason(monkeypatch):
    monkeypatch.setitem(backends.UNUSABLE, "triton", "")
    resolve = backends.resolve
    old = resolve("class_scores", "cuda", torch.float32, capability=(7, 5))
    assert old.backend == "reference" and "needs compute capability 8.0, this GPU has 7.5" in old.reason
    wide = resolve("class_scores", "cuda", torch.float64, capability=(9, 0))
    assert wide.backend == "reference" and "does not take float64" in wide.reason
    many = resolve("sinkhorn_assign", "cuda", torch.float32, capability=(9, 0), K=65)
    assert many.backend == "reference" and "at most 64 sub-centroids a class, not 65" in many.reason
    for options in ({"capability": (7, 5)}, {"capability": (9, 0), "K": 65}):
        with pytest.raises(RuntimeError, match="'triton' was asked for but cannot run"):
            resolve("sinkhorn_plan", "cuda", torch.float32, "triton", **options)


def test_without_triton_or_a_gpu_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends._probe()["triton"] == "torch sees no CUDA device"
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert "pip install triton" in backends._probe()["triton"]


def test_float64_centroids_choose_as_float64_pixels():
    x, p = torch.randn(4, 8, device=DEVICE), torch.randn(2, 2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="does not take float64"):
        ops.class_scores(x, p, backend="triton")


def test_float64_sums_are_not_rounded_by_the_kernel():
    p, sums = torch.randn(2, 8, device=DEVICE), torch.randn(2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="does not take float64"):
        ops.apply_momentum_(p, sums, torch.ones(2, dtype=torch.int64, device=DEVICE), backend="triton")


def test_capability_is_a_constant_while_tracing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    backends._capability.cache_clear()

    def step(x):
        return x + backends.capability(3)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.compile(step, backend="eager", fullgraph=True)(torch.zeros(2)).eq(9).all()
    backends._capability.cache_clear()


# configurations


def files():
    return sorted((ROOT / "dnc_kernels" / "ops").glob("*/configs/*.json"))


@pytest.mark.parametrize("path", files(), ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_configuration_files_are_whole(path):
    stored, cases = json.loads(path.read_text()), aot.cases(path.parts[-3])
    assert stored.keys() == cases.keys(), "every kernel that is tuned has configurations, and no other"
    for entries in stored.values():
        assert entries
        assert len({json.dumps(e["when"], sort_keys=True) for e in entries}) == len(entries), "a shape class twice"
        for entry in entries:
            assert entry.keys() - {"p50_ms"} == {"when", "use"}
            assert entry["use"]["num_warps"] in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("kind", ["sm_80", "sm_90", "sm_100", "interpreter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_launcher_finds_its_own_configuration(family, kind, monkeypatch):
    """The sizes a launcher looks up with are those its entries are kept by: for an entry's shape it takes that entry, uncut."""
    taken = []
    choose = _triton._chosen.__wrapped__

    def look_up(family, kernel, *arguments):
        taken.append((kernel, choose(family, kernel, *arguments)))
        return taken[-1][1]

    monkeypatch.setattr(_triton, "_chosen", look_up)
    if kind != "interpreter":
        monkeypatch.setattr(_triton, "_kind_shared", machine_code.SHARED_LIMIT[int(kind.removeprefix("sm_"))])
    monkeypatch.setattr(_triton, "_recorder", lambda *arguments: None)
    monkeypatch.setattr(_triton, "_kind", kind)
    shapes = _triton.stored(family, kind if kind != "interpreter" else "sm_90")
    for kernel, entries in shapes.items():
        for entry in entries:
            taken.clear()
            with aot_triton.product_precision(entry["when"]):
                aot.cases(family)[kernel].prepare(torch.device("meta"), entry["when"])()
            uses = [use for name, use in taken if name == kernel]
            assert uses, f"{kernel} is launched without a configuration"
            if kind != "interpreter":
                assert entry["use"] in uses, f"{kernel} {entry['when']}"


def test_every_family_has_every_kind():
    kinds = {"sm_80", "sm_90", "sm_100", "interpreter"}
    for family in FAMILIES:
        assert kinds <= {path.stem for path in files() if path.parts[-3] == family}


def test_the_nearest_shape_class_is_taken(monkeypatch):
    entries = [
        {"when": {"C": 19, "D": 256, "bits": 16, "even": 1}, "use": {"a": 1}},
        {"when": {"C": 150, "D": 256, "bits": 16, "even": 1}, "use": {"a": 2}},
        {"when": {"C": 150, "D": 256, "bits": 32}, "use": {"a": 3}},
        {"when": {"C": 150, "D": 256, "bits": 16, "even": 0}, "use": {"a": 4}},
    ]
    monkeypatch.setattr(_triton, "stored", lambda family, kind: {"some_kernel": entries} if kind == "interpreter" else {})
    monkeypatch.setattr(_triton, "_kind", "interpreter")
    _triton._chosen.cache_clear()

    def chosen(**shape):
        return _triton.configuration("x", "some_kernel", CPU, **shape)["a"]

    assert chosen(C=21, D=256, bits=16) == 1
    assert chosen(C=171, D=512, bits=16) == 2
    assert chosen(C=19, D=256, bits=32) == 3
    assert chosen(C=19, D=256, bits=16, even=1) == 1 and chosen(C=19, D=256, bits=16, even=0) == 4
    assert chosen(C=150, D=256, bits=32, even=0) == 3, "a class that says nothing about it is for both"
    with _triton.configured("some_kernel", a=7):
        assert chosen(C=21, D=256, bits=16) == 7
    assert chosen(C=21, D=256, bits=16) == 1
    with pytest.raises(RuntimeError, match="other_kernel: no configuration for interpreter"):
        _triton.configuration("x", "other_kernel", CPU)
    _triton._chosen.cache_clear()


def test_a_plan_is_made_once_for_a_layout_and_anew_under_other_configurations():
    made = []

    @_triton.planned
    def plan(x, width):
        made.append((x, width))
        return len(made)

    x = torch.empty(4, 8)
    assert [plan(t, w) for t, w in ((x, 1), (torch.empty(4, 8), 1), (x, 2), (x[:2], 1), (torch.empty(8, 4).T, 1), (x.double(), 1))] == [
        1, 1, 2, 3, 4, 5,
    ]  # fmt: skip
    with _triton.configured("some_kernel", a=1):
        assert plan(x, 1) == 6
    assert plan(x, 1) == 1


TILE = {"BLOCK_N": 128, "BLOCK_D": 64, "KEEP_D": 256, "num_warps": 8, "num_stages": 3}


def kept_or_read(use, shape):
    """Bytes of a product like those of similarity: x kept while its channels fit, else read with 64 rows of the other side."""
    if shape["D"] <= use["KEEP_D"]:
        return 2 * shape["D"] * (use["BLOCK_N"] + 64 * use["num_stages"])
    return 2 * use["BLOCK_D"] * (use["BLOCK_N"] + 64) * use["num_stages"]


@pytest.mark.parametrize(
    ("limit", "changed"),
    [
        (232_448, {}),
        (163_840, {}),
        (131_072, {"num_stages": 2}),
        (101_376, {"KEEP_D": 0}),
        (49_152, {"KEEP_D": 0, "num_stages": 2}),
        (45_000, {"KEEP_D": 0, "num_stages": 2, "BLOCK_N": 64}),
        (25_000, {"KEEP_D": 0, "num_stages": 2, "BLOCK_N": 32}),
        (1, {"KEEP_D": 0, "num_stages": 2, "BLOCK_N": 32, "BLOCK_D": 32}),
    ],
)  # fmt: skip
def test_a_configuration_is_cut_to_the_shared_memory_of_the_device(limit, changed):
    assert _triton.fitted(TILE, {"D": 256}, kept_or_read, limit) == TILE | changed


def test_what_fits_is_taken_as_it_is_and_looked_up_once(monkeypatch):
    asked = []

    def need(use, shape):
        asked.append(shape)
        return kept_or_read(use, shape)

    monkeypatch.setattr(_triton, "stored", lambda family, kind: {"some_kernel": [{"when": {"D": 256}, "use": TILE}]})
    monkeypatch.setattr(_triton, "_kind", "sm_80")
    _triton._chosen.cache_clear()
    for limit, keep in ((166_912, 256), (101_376, 0), (166_912, 256)):
        monkeypatch.setattr(_triton, "_kind_shared", limit)
        assert _triton.configuration("x", "some_kernel", CPU, need, D=256)["KEEP_D"] == keep
    calls = len(asked)
    assert _triton.configuration("x", "some_kernel", CPU, need, D=256) == TILE and len(asked) == calls
    _triton._chosen.cache_clear()


@pytest.mark.parametrize(
    ("capability", "kind"),
    [((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"),
     ((12, 0), "sm_80"), ((12, 1), "sm_80")],
)  # fmt: skip
def test_the_architecture_is_that_of_the_tensor_cores(capability, kind):
    """A GPU of 12.0 multiplies by mma.sync and has 99 KB a block: nothing of 10.0's configurations holds there."""
    assert _triton.architecture(capability) == kind


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.empty(64, 32), 1), (torch.empty(64, 17), 0), (torch.empty(64, 48)[:, :40], 0), (torch.empty(32, 64).T, 1),
        (torch.empty(2, 8, 16, 16), 1), (torch.empty(2, 8, 13, 16), 1), (torch.empty(2, 8, 13, 13), 0),
        (torch.empty(2, 8, 16, 32)[..., :16], 1), (torch.empty(2, 8, 16, 32)[..., :15], 0), (torch.empty(1, 8, 16, 17), 1),
        (torch.empty(2, 32, 5, 5).to(memory_format=torch.channels_last), 1), (torch.empty(64, 32)[:, ::2], 0),
    ],
)  # fmt: skip
def test_side_by_side_numbers_are_told_from_single_ones(x, expected):
    assert _triton.vectors(x, _triton.pixels_of(x)) == expected


def test_a_gpu_of_its_own_name_comes_before_its_architecture():
    assert _triton.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_tuner_says_that_it_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from benchmarks import tune

    assert tune.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_the_tuner_keeps_the_fastest_that_fits(monkeypatch):
    from benchmarks import tune

    times = {1: 3.0, 2: 1.5, 3: RuntimeError("out of resource: shared memory"), 4: 2.0}

    def time(call):
        made = times[_triton.configuration("x", "some_kernel", CPU)["a"]]
        if isinstance(made, Exception):
            raise made
        return made

    case = aot_triton.Launch(lambda device, when: lambda: None, lambda when: [{"a": a} for a in (2, 3, 4)])
    monkeypatch.setattr(tune, "cases", lambda family: {"some_kernel": case})
    monkeypatch.setattr(_triton, "stored", lambda family, kind: {"some_kernel": [{"when": {"C": 19}, "use": {"a": 1}}]})
    _triton._chosen.cache_clear()
    assert tune.tune("x", "some_kernel", [{"C": 19}], CPU, time) == [{"when": {"C": 19}, "use": {"a": 2}, "p50_ms": 1.5}]
    _triton._chosen.cache_clear()


# addresses of pixels


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((7, 5), (5, 1)), ((7, 5), (0, 1)), ((2, 3, 4, 5), (60, 20, 5, 1)), ((2, 3, 4, 5), (60, 1, 15, 3)),
        ((2, 3, 4, 5), (200, 60, 9, 1)), ((1, 3, 4, 5), (7, 20, 5, 1)), ((2, 3, 1, 5), (15, 5, 99, 1)), ((2, 3, 4, 1), (12, 4, 1, 99)),
        ((2, 3, 4, 5), (0, 0, 0, 0)), ((2, 3, 1, 1), (3, 1, 7, 9)),
    ],
)  # fmt: skip
def test_addresses_of_pixels_in_any_layout(shape, strides):
    x = torch.empty(100).as_strided(shape, strides) if 0 in strides else torch.empty_strided(shape, strides)
    at = _triton.pixels_of(x)
    rank = _triton.map_rank(at)
    positions = (
        [(n, 0, 0) for n in range(shape[0])]
        if len(shape) == 2
        else [(b, h, w) for b in range(shape[0]) for h in range(shape[2]) for w in range(shape[3])]
    )
    for n, (b, h, w) in enumerate(positions):
        expected = b * strides[0] if len(shape) == 2 else b * strides[0] + h * strides[2] + w * strides[3]
        inside, found = n, 0
        if rank > 0:
            inside, found = n % at.hw, n // at.hw * at.stride_b
        if rank == 2:
            inside, found = inside % at.width, found + inside // at.width * at.stride_h
        assert found + inside * at.stride_w == expected
    assert at.stride_d == strides[1]


# a saved gradient times the incoming one


@pytest.mark.triton
@pytest.mark.parametrize(
    ("dtype", "to"), list(itertools.product((torch.float32, torch.float16, torch.bfloat16), repeat=2)), ids=str
)
@pytest.mark.parametrize("factor", [1.0, 65536.0, 1 / 3])
def test_a_factor_is_not_rounded_to_16_bits(dtype, to, factor):
    x = (torch.randn(7, 1001) / 65536).to(DEVICE, dtype)
    by = torch.tensor(factor, device=DEVICE)
    expected = (x.double() * by.double()).to(torch.float32).to(to)
    assert torch.equal(_triton.scale(x, by, torch.empty_like(x, dtype=to)), expected)
    if to == dtype:
        assert _triton.scale(x, by, x) is x and torch.equal(x, expected)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (300, 400), (2, 64, 40, 50)], ids=str)
@pytest.mark.parametrize("loss_scale", [1.0, 65536.0, 1 / 3])
def test_a_saved_gradient_is_scaled_in_the_precision_of_the_incoming_one(shape, dtype, loss_scale):
    """0-d factors: torch rounds them to the dtype of a tensor on a GPU, where the first scale of GradScaler is infinite in float16."""
    saved = (torch.randn(shape) / 65536).to(DEVICE, dtype)

    class Saved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(saved.clone())
            return x.float().sum()

        @staticmethod
        def backward(ctx, grad):
            return scale_saved(*ctx.saved_tensors, grad)

    for again in (False, True):
        for layout in (torch.contiguous_format, torch.channels_last)[: len(shape) // 2]:
            saved = saved.contiguous(memory_format=layout)
            x = torch.zeros_like(saved, requires_grad=True)
            loss = Saved.apply(x) * torch.tensor(loss_scale, device=DEVICE)
            (made,) = torch.autograd.grad(loss, x, retain_graph=again)
            expected = (saved.double() * torch.tensor(loss_scale).double()).float().to(dtype)
            assert torch.equal(made, expected)


# the head


@pytest.mark.triton
@pytest.mark.parametrize("checkpoint", ["all", "none"])
@pytest.mark.parametrize("size", [(6, 5), (12, 10)], ids=["equal", "upsampled"])
@pytest.mark.parametrize("scores", ["scale", "norm"])
def test_a_step_of_the_head_equals_float64(scores, size, checkpoint):
    def step(backend, dtype):
        torch.manual_seed(0)
        head = DNCHead(24, 5, 3, scores=scores, checkpoint=checkpoint, momentum=0.9).to(DEVICE, dtype)
        head.train()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 24, 6, 5, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
        labels = torch.randint(0, 5, (2, *size), generator=generator).to(DEVICE)
        labels[:, 0] = 255
        with use_backend(backend):
            result = head.loss(x, labels)
            result.loss.backward()
        parameters = [p.grad for p in head.parameters() if p.grad is not None]
        return result.loss.detach(), head.prototypes, x.grad, *parameters

    for actual, expected in zip(step("triton", torch.float32), step("reference", torch.float64), strict=True):
        assert_close(actual.detach().cpu(), expected.detach().cpu(), "head", terms=120)


# large tensors


@pytest.mark.triton
@pytest.mark.large
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device with 16 GB free")
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_more_elements_than_an_int32_counts(layout):
    """[N,D] of 2^31 + 2^20 elements: the last pixels are those of the same pixels alone."""
    d, tail = 512, 4096
    n = 2**22 + tail
    x = torch.empty(n, d, dtype=torch.bfloat16, device=DEVICE).normal_()
    p = torch.nn.functional.normalize(torch.randn(5, 2, d, device=DEVICE), dim=2)
    labels = torch.randint(0, 5, (n,), device=DEVICE)
    last = x[-tail:].clone()
    whole, alone = x, last
    if layout == "planes":
        whole = x.view(1, n // tail, tail, d).permute(0, 3, 1, 2)
        alone = last.view(1, 1, tail, d).permute(0, 3, 1, 2)
        whole, alone = whole.contiguous(), alone.contiguous()

    def flat(t):
        return t if t.ndim == 1 or t.ndim == 2 else t.movedim(1, -1).reshape(-1, t.shape[1])

    shaped = labels if layout == "rows" else labels.view(1, -1, tail)
    shaped_last = labels[-tail:] if layout == "rows" else labels[-tail:].view(1, 1, tail)
    with use_backend("triton"):
        assert torch.equal(flat(ops.class_scores(whole, p).scores)[-tail:], flat(ops.class_scores(alone, p).scores))
        assert torch.equal(ops.nearest_centroid(whole, p).sub.flatten()[-tail:], ops.nearest_centroid(alone, p).sub.flatten())
        assert torch.equal(flat(ops.normalize_embedding(whole))[-tail:], flat(ops.normalize_embedding(alone)))
        cluster = torch.where(torch.arange(n, device=DEVICE) < n - tail, -1, 0).view(shaped.shape)
        sums = [ops.cluster_sums(t, c, 3).sums for t, c in ((whole, cluster), (alone, torch.zeros_like(shaped_last)))]
        torch.testing.assert_close(*sums)
        grads = []
        for t, y in ((whole, shaped), (alone, shaped_last)):
            t = t.detach().requires_grad_()
            loss = ops.centroid_cross_entropy(t, p, y, reduction="sum").loss
            grads.append(flat(torch.autograd.grad(loss, t)[0])[-tail:])
        assert torch.equal(*grads)


# ahead of time


@pytest.fixture(scope="module")
def rows():
    """Two in five, every kernel on every architecture among it; whoever changes one compiles all by `python -m benchmarks.aot`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--json", "--backend", "triton", "--every", str(len(machine_code.ARCHS))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_shipped_configuration_compiles_without_a_spill(rows):
    assert [(r["kernel"], r["arch"], r["when"], r["config"], r["faults"]) for r in rows if r["faults"]] == []
    assert len(rows) >= 20 and {r["arch"] for r in rows} == {"sm_80", "sm_90", "sm_100"}
    assert all(0 < r["registers"] <= 255 and r["spills"] == 0 for r in rows)
    compiled = {(r["op"], r["arch"]) for r in rows}
    expected = {(f"{f}.{k}", f"sm_{a}") for f in FAMILIES for a in machine_code.ARCHS for k in aot.cases(f)}
    assert compiled == expected


@pytest.mark.slow
def test_products_use_the_tensor_cores(rows):
    products = [r for r in rows if machine_code.PRODUCTS.search(r["kernel"]) and r["when"].get("bits") == 16]
    assert {r["arch"] for r in products if "wgmma" in r["ptx_features"]} == {"sm_90"}
    assert {r["kernel"].strip("_") for r in products} >= {
        "class_scores_kernel",
        "centroid_loss_kernel",
        "nearest_centroid_kernel",
    }


@pytest.mark.slow
@pytest.mark.parametrize("every", [24])
def test_shapes_between_the_shape_classes_fit_and_do_not_spill(every):
    """A part of `python -m benchmarks.aot --sweep`, on GPUs with 99, 163 and 227 KB of shared memory a block."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--json", "--sweep", "--every", str(every)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["kernel"], r["arch"], r["when"], r["config"], r["faults"]) for r in rows if r["faults"]] == []
    assert done.returncode == 0, done.stderr
    assert {r["arch"] for r in rows} == {f"sm_{arch}" for arch in machine_code.SHARED_LIMIT}
    assert {r["op"].partition(".")[0] for r in rows} == set(FAMILIES)
    parts = ("labels", "prepare", "logits", "gradient", "pull", "cluster", "finish")
    assert {r["kernel"] for r in rows if r["op"] == "head.head_step"} == {f"head_{part}_kernel" for part in parts}


@pytest.mark.parametrize("width", [128, 129])
def test_partial_sums_have_a_row_for_each_program_of_the_gradient(width, monkeypatch):
    """Also where the pixels of x, here a crop, are further apart than those of its gradient."""
    from benchmarks import triton_head
    from dnc_kernels.ops.head import head_first_pass
    from dnc_kernels.ops.head import triton as head

    choose = _triton._chosen.__wrapped__

    def fewer_pixels_where_uneven(family, kernel, kinds, shape, *need):
        use = choose(family, kernel, kinds, shape, *need)
        return {**use, "BLOCK_N": 64 if dict(shape)["even"] else 32} if kernel == "head_gradient" else use

    grids = []
    monkeypatch.setattr(_triton, "_chosen", fewer_pixels_where_uneven)
    monkeypatch.setattr(_triton, "_kind", "sm_90")
    monkeypatch.setattr(_triton, "_recorder", lambda kernel, grid, *_: grids.append((kernel.fn.__name__, grid)))
    monkeypatch.setattr(head, "part", lambda *_, **__: "triton")
    call, _, sampled = triton_head.first_pass(torch.device("meta"), {"C": 19, "K": 10, "D": 256})
    x = torch.empty(2, 256, 128, width, dtype=torch.bfloat16, device="meta")[..., :128]
    call, sampled = call._replace(x=x, band_pixels=2**15, whole=True), sampled[: 2**15]
    call = call._replace(labels=sampled.view(2, 128, 128))
    arguments = (call, sampled, None, torch.empty(2, device="meta"), None, True, False)
    out = head_first_pass.allocate(*arguments)
    head.head_first_pass(call, out, *arguments[1:])
    ((programs, _),) = (grid for name, grid in grids if name == "head_gradient_kernel")
    assert len(out.grad_norm) == programs


def test_a_covering_set_covers():
    from benchmarks import triton_sweep

    axes = {"a": (1, 2, 3), "b": (False, True), "c": ("x", "y", "z", "w")}
    points = triton_sweep.covering(axes)
    for first, second in itertools.combinations(axes, 2):
        met = {(point[first], point[second]) for point in points}
        assert met == set(itertools.product(axes[first], axes[second]))
    assert len(points) < 3 * 2 * 4 and points == triton_sweep.covering(axes)


def test_a_need_taken_for_too_small_is_a_fault():
    from benchmarks import triton_sweep

    row = machine_code.Row("x", "x_kernel", {"need": 1000}, {}, "sm_86", 255, 0, 2000, 128, [])
    assert triton_sweep.faults(row) == ["needs 2000 bytes of shared memory, not at most 1000"]


def test_a_few_spilled_bytes_with_registers_left_are_ptxas_own_choice():
    from benchmarks import triton_sweep

    row = machine_code.Row("x", "x_kernel", {}, {}, "sm_90", 128, 24, 0, 256, [])
    assert triton_sweep.faults(row) == [] and machine_code.faults(row) == ["spills 24 bytes"]
    assert triton_sweep.faults(replace(row, spills=32)) == ["spills 32 bytes"]
    assert triton_sweep.faults(replace(row, registers=255)) == ["spills 24 bytes"]
    assert triton_sweep.faults(replace(row, threads=512)) == ["spills 24 bytes"]


def test_accepted_spills_are_few_and_exact():
    from benchmarks import triton_sweep

    assert len(triton_sweep.ACCEPTED) <= 1, "look for a configuration that does not spill first"
    kernel, point, spilled = triton_sweep.ACCEPTED[0]
    row = machine_code.Row("x", kernel, {}, point, f"sm_{point['arch']}", 255, spilled, 0, 256, [])
    assert triton_sweep.faults(row) == []
    assert triton_sweep.faults(replace(row, spills=spilled + 8)) == [f"spills {spilled + 8} bytes"]
    assert triton_sweep.faults(replace(row, when={**point, "D": 321})) == [f"spills {spilled} bytes"]


def test_faults_are_named():
    row = machine_code.Row("x", "class_scores_kernel", {}, {"bits": 16}, "sm_90", 255, 8, 300_000, 128, ["mma.sync"])
    spill, shared, cores = machine_code.faults(row)
    assert "spills 8 bytes" in spill and "300000 bytes of shared memory" in shared and "has no wgmma" in cores


def test_instructions_are_found_at_the_start_of_a_line():
    ptx = "  wgmma.mma_async.sync x;\n  @%p1 red.global.add y;\n ld.shared.b32 z;\n"
    assert aot_triton.features(ptx) == ["wgmma", "red"]


def test_configurations_in_force_may_be_closed_in_any_order():
    """As those of two threads are."""
    before = list(_triton._overrides)
    first, second = _triton.configured("kernel", BLOCK=1), _triton.configured("kernel", BLOCK=2)
    first.__enter__(), second.__enter__()
    assert _triton.configuration("similarity", "kernel", torch.device("cpu")) == {"BLOCK": 2}
    first.__exit__(None, None, None)
    assert _triton.configuration("similarity", "kernel", torch.device("cpu")) == {"BLOCK": 2}
    second.__exit__(None, None, None)
    assert _triton._overrides == before
