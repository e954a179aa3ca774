"""The benchmarks must not lie: wrong results get no time, ratios are taken within rounds, rows say where they come from."""

import gc
import json
import math
import re
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bench_head, bench_similarity, built, clock, harness, memory, record, tune
from benchmarks.bench_sinkhorn import loop, vectorized, zipf_labels
from benchmarks.case import Case, Settings, Variant, choice_ratio, error_ratio
from benchmarks.harness import COLUMNS, summarize
from dnc_kernels import _source, backends, ops, use_backend

QUICK = Settings(threads=1, rounds=3, quick=True, baselines="eager", memory=False)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_case(*arguments):
    return list(harness.run_case(*arguments))


def case(*variants, **options):
    return Case(
        op="double", name="toy", shape={"N": 3}, dtype="float32", inputs=lambda: torch.tensor([1.0, 2.0, 3.0]),
        reference=lambda x: 2 * x.double(), check=lambda got, want: error_ratio(got, want, 1e-6), variants=variants, **options,
    )  # fmt: skip


def good(name="good", **options):
    return Variant(name, lambda x: lambda: x + x, **options)


def row_of(rows, variant):
    return next(row for row in rows if row["variant"] == variant)


@pytest.mark.parametrize("wrong", [lambda x: 2.00001 * x, lambda x: x * math.nan, lambda x: (2 * x)[:2]])
def test_a_wrong_result_gets_no_time(wrong):
    rows = run_case(case(good(), Variant("wrong", lambda x: lambda: wrong(x), baseline=False)), QUICK)
    row = row_of(rows, "wrong")
    assert row["status"] == "wrong" and "float64" in row["reason"]
    assert row["p50_ms"] is None and row["ratio_to_best_baseline"] is None and row["gflops"] is None
    assert row_of(rows, "good")["p50_ms"] > 0


def test_a_result_that_goes_wrong_during_the_rounds_gets_no_time():
    def prepare(x):
        state = SimpleNamespace(calls=0)

        def call():
            state.calls += 1
            return 2 * x if state.calls < 3 else 3 * x

        return call

    row = row_of(run_case(case(good(), Variant("drifts", prepare)), QUICK), "drifts")
    assert row["status"] == "wrong" and row["p50_ms"] is None


def test_a_wrong_baseline_is_not_the_best_baseline():
    rows = run_case(case(good("ours", baseline=False), good("slow"), Variant("wrong", lambda x: lambda: x)), QUICK)
    assert row_of(rows, "ours")["best_baseline"] == "slow"
    assert set(row_of(rows, "ours")["ratio_to_baselines"]) == {"slow"}


def test_a_variant_that_raises_keeps_its_row_with_the_reason():
    def prepare(_):
        raise RuntimeError("no compiler here")

    row = row_of(run_case(case(good(), Variant("broken", prepare)), QUICK), "broken")
    assert row["status"] == "failed" and row["reason"] == "RuntimeError: no compiler here" and row["p50_ms"] is None


def test_compiled_baselines_can_be_left_out():
    row = row_of(run_case(case(good(), good("compiled", compiled=True)), QUICK), "compiled")
    assert row["status"] == "skipped" and row["p50_ms"] is None


def test_ratio_is_the_median_over_rounds_and_survives_a_slow_second():
    # rounds 2 and 3 were ten times slower for everybody; the ratio of medians would be 4 / 10
    rows = summarize({"ours": [1, 1, 10, 10, 1], "slow": [9, 9, 90, 90, 9], "fast": [4, 4, 40, 40, 4]}, ["slow", "fast"])
    assert rows["ours"]["best_baseline"] == "fast"
    assert rows["ours"]["ratio_to_best_baseline"] == rows["ours"]["ratio_p20"] == rows["ours"]["ratio_p80"] == 4
    assert rows["ours"]["ratio_to_baselines"] == {"slow": 9, "fast": 4}
    assert rows["slow"]["ratio_to_best_baseline"] == pytest.approx(4 / 9)
    assert rows["ours"]["p50_ms"] == 1 and rows["ours"]["p80_ms"] == 10 and rows["ours"]["rounds"] == 5


def test_no_baseline_gives_times_without_ratio():
    rows = summarize({"ours": [3.0, 1.0, 2.0]}, [])
    assert (
        rows["ours"]["p50_ms"] == 2 and rows["ours"]["best_baseline"] is None and "ratio_to_best_baseline" not in rows["ours"]
    )


def test_every_variant_runs_once_a_round():
    calls = []
    variants = [Variant(n, lambda x, n=n: lambda: (calls.append(n), 2 * x)[1]) for n in "abc"]
    run_case(case(*variants), QUICK)
    timed = calls[3:-3]  # a check before and after the rounds
    assert len(timed) == 9 and all(set(timed[i : i + 3]) == set("abc") for i in (0, 3, 6))


def test_inputs_are_reset_before_every_call():
    def double_(x):
        return lambda: x.mul_(2)

    rows = run_case(case(Variant("in_place", double_), reset=lambda x: x.copy_(torch.tensor([1.0, 2.0, 3.0]))), QUICK)
    assert row_of(rows, "in_place")["status"] == "ok"


def test_goals_are_judged_by_the_named_baseline():
    slow = Variant("slow", lambda x: lambda: (sum(torch.sin(x).sum() for _ in range(200)), 2 * x)[1])
    ours = good("ours", baseline=False)
    assert row_of(run_case(case(ours, slow, goals={"slow": 2.0}), QUICK), "ours")["goals_met"] is True
    assert row_of(run_case(case(ours, slow, goals={"slow": 1e9}), QUICK), "ours")["goals_met"] is False
    assert row_of(run_case(case(ours, slow, goals={"absent": 2.0}), QUICK), "ours")["goals_met"] is None


def test_rates_are_shares_of_probes_in_the_same_rounds():
    row = row_of(run_case(case(good(), flops=3e6, bytes=24e6), QUICK), "good")
    assert row["gflops"] == pytest.approx(3e6 / row["p50_ms"] / 1e6)
    assert row["gb_per_s"] == pytest.approx(24e6 / row["p50_ms"] / 1e6)
    assert row["gemm_probe_gflops"] > 0 and row["copy_probe_gb_per_s"] > 0 and row["pct_gemm_probe"] > 0 < row["pct_copy_probe"]


def test_row_schema():
    rows = run_case(case(good(), good("ours", baseline=False), flops=1.0), QUICK)
    for row in rows:
        assert tuple(row) == COLUMNS
        assert json.loads(json.dumps(row)) == row
        for column in (
            "device",
            "torch_version",
            "package_version",
            "python_version",
            "git_commit",
            "shape",
            "dtype",
            "threads",
        ):
            assert row[column], column
    assert [row["kind"] for row in rows] == ["baseline", "kernel"]


def test_rows_name_the_device_and_no_host():
    import platform

    assert platform.node() not in json.dumps(run_case(case(good()), QUICK))


def test_choice_may_flip_inside_the_margin_only():
    scores = torch.tensor([[1.0, 1.0 - 1e-7, 0.5]], dtype=torch.float64)
    assert choice_ratio(torch.tensor([0]), scores, 1e-6) == 0
    assert choice_ratio(torch.tensor([1]), scores, 1e-6) < 1
    assert choice_ratio(torch.tensor([2]), scores, 1e-6) > 1
    assert choice_ratio(torch.tensor([3]), scores, 1e-6) == math.inf
    assert choice_ratio(torch.tensor([-1]), scores, 1e-6) == math.inf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bench", command.BENCHES)
def test_quick_run(bench, dtype, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert command.main(["run", "--quick", "--threads", "1", "--op", bench, "--dtype", dtype, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(tuple(row) == COLUMNS for row in rows)
    assert {row["status"] for row in rows if "compiled" not in row["variant"]} == {"ok"}
    assert all(row["p50_ms"] > 0 for row in rows if row["status"] == "ok")
    assert all(row["error_over_allowed"] <= 1 for row in rows if row["status"] == "ok")
    capsys.readouterr()
    assert command.main(["report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(row["variant"] in printed for row in rows), "rows we lose, and rows without a time, stay"


def test_quick_run_without_kernels(monkeypatch):
    monkeypatch.setattr(harness.backends, "resolve", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel")))
    for quick in command.select(QUICK):
        backend = "auto" if quick.op in ("head_step", "segmentation_step") else "reference"
        assert {v.backend for v in quick.variants if not v.baseline} == {backend}


@pytest.mark.parametrize("bench", command.BENCHES)
def test_checks_catch_a_small_fault(bench):
    """A result that is off in one place by a little more than rounding must not pass: all checks of all cases."""
    for quick in command.select(QUICK, [bench]):
        inputs = quick.inputs()
        reference, baseline = quick.reference(inputs), next(v for v in quick.variants if v.baseline and not v.compiled)
        result = baseline.prepare(inputs)()
        assert quick.check(result, reference) <= 1
        if quick.op == "head_step":
            result[2][1, 1, 3] += 1e-4
        elif quick.op == "segmentation_step":
            result[1][1][0, 2, 0, 0] += 2e-4 * result[1][1].abs().max()
        elif quick.op in ("sinkhorn_plan", "cluster_sums"):
            some = result[-1 if quick.op == "sinkhorn_plan" else 0]
            some.view(-1)[5] += 1e-3 * max(1, some.abs().max())
        elif quick.op == "class_scores":
            dx = result[-1] if quick.name.endswith("_train") else result[0]
            dx[(1, 2, 0, 0)[: dx.ndim]] += 1e-3 * dx.abs().max()
        elif quick.op in (
            "centroid_cross_entropy", "subcentroid_cross_entropy", "normalize_embedding", "upsample_cross_entropy",
        ):  # fmt: skip
            dx = result[1]
            dx[(1, 2, 0, 0)[: dx.ndim]] += 2e-4 * dx.abs().max()
        elif isinstance(result, torch.Tensor):
            flat = result.view(-1)
            first = int((flat >= 0).nonzero()[0])
            flat[first] = (flat[first] + 1) % quick.shape.get("K", quick.shape.get("C"))
        else:
            inputs.centroids[1, 1, 3] += 2e-6
        assert quick.check(result, reference) > 1, quick.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_head_of_a_segmentation_step_is_held_to_its_own_reference(dtype):
    """Loss, gradients of features and parameters and, where there are any, moved sub-centroids."""
    quick = command.select(replace(QUICK, dtypes=(dtype,)), ["segmentation"])[0]
    inputs = quick.inputs()
    reference = quick.reference(inputs)
    heads = set()
    for variant in quick.variants:
        if variant.compiled:
            continue
        name, parts = variant.prepare(inputs)()
        heads.add(name)
        assert quick.check((name, parts), reference) <= 1
        for place in range(len(parts)):
            wrong = [part.clone() for part in parts]
            wrong[place] += 0.3 * wrong[place].abs().max()
            assert quick.check((name, tuple(wrong)), reference) > 1, (name, place)
    assert heads == {"linear", "head", "head without contrast"} == set(reference)


def test_cases_are_chosen_by_patterns():
    def chosen(*patterns):
        return {(c.op, c.name) for c in command.select(QUICK, None, patterns)}

    everything = chosen("*")
    assert chosen("hard_*") == {(op, name) for op, name in everything if name.startswith("hard_")}
    assert {op for op, _ in chosen("hard_*")} == {
        "centroid_cross_entropy", "nearest_centroid", "upsample_cross_entropy", "segmentation_step",
    }  # fmt: skip
    assert chosen("hard_tiny", "c19_*") == {(op, n) for op, n in everything if n == "hard_tiny" or n.startswith("c19_")}
    assert chosen("hard") == set()


def test_baselines_agree_with_the_reference_on_groups_of_all_sizes():
    labels = zipf_labels(400, 6, torch.Generator().manual_seed(1))
    similarity = torch.randn(400, 4, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    with use_backend("reference"):
        plan = ops.sinkhorn_assign(similarity.double(), labels, 6)
    assert (labels == -1).any() and not (labels == 5).any(), "ignored pixels and an absent class"
    assert torch.equal(vectorized(similarity, labels, 6), plan) and torch.equal(loop(similarity, labels, 6), plan)


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_fresh_process():
    """mm + amax holds [N,C,K] more than once; the whole of it fits neither into the result nor into the noise."""
    settings = Settings(threads=1)
    big = next(case for case in command.select(settings, ["nearest_centroid"]) if case.name == "ade20k")
    row = memory.in_fresh_process(big, next(v for v in big.variants if v.name == "mm_argmax"), settings)
    scores_mb = 4e-6 * big.shape["N"] * big.shape["C"] * big.shape["K"]
    assert scores_mb <= row["peak_delta_mb"] < 1.5 * scores_mb


def test_every_column_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    assert [column for column in COLUMNS if f"`{column}`" not in page] == []


def test_tables_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    command.print_rows(run_case(case(good(), good("ours", baseline=False)), QUICK))
    lines = capsys.readouterr().out.splitlines()
    assert "double toy: N=3 float32" in lines[1]
    assert lines[2].split()[:2] == ["variant", "p50_ms"] and len({len(line) for line in lines[2:5]}) == 1, "aligned columns"


# what a GPU run asks for


class FakeCuda:
    """`torch.cuda` of a device on which a call of the host takes `host_ms`, and whose times are those of its log."""

    def __init__(self, monkeypatch, host_ms=0.2, slept_ms=lambda cycles: cycles / 2e6):
        self.log, self.slept_ms, self.now, self.busy_until = [], slept_ms, 0.0, 0.0
        self.host_ms = host_ms
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                fake.log.append("start" if self is fake.events[0] else "end")
                self.at = fake.busy_until = max(fake.busy_until, fake.now)

            def query(self):
                return fake.now >= self.at

            def elapsed_time(self, end):
                return end.at - self.at

        self.events = []
        monkeypatch.setattr(torch.cuda, "Event", lambda **options: self.events.append(Event(**options)) or self.events[-1])
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now / 1e3)

    def sleep(self, cycles):
        self.log.append("sleep")
        self.busy_until = max(self.busy_until, self.now) + self.slept_ms(cycles)

    def synchronize(self):
        self.log.append("synchronize")
        self.now = max(self.now, self.busy_until)

    def call(self, device_ms=0.01):
        self.log.append("call")
        self.now += self.host_ms
        self.busy_until = max(self.busy_until, self.now) + device_ms

    def clock(self):
        made = clock.CudaClock("cpu")
        made._junk = SimpleNamespace(zero_=lambda: self.log.append("flush"))
        self.log.clear()
        return made


def test_the_device_sleeps_until_the_call_is_launched(monkeypatch):
    fake = FakeCuda(monkeypatch)
    timer = fake.clock()
    timer.warm_up(fake.call)
    fake.log.clear()
    timing = timer(fake.call)
    assert fake.log == ["flush", "sleep", "start", "call", "end", "synchronize"]
    assert timing.queued and timing.host_us == pytest.approx(200)
    assert timing.ms == pytest.approx(0.01), "the device's part alone, not the 0.2 ms of its launch"


def test_a_call_that_outlives_the_sleep_says_so(monkeypatch):
    fake = FakeCuda(monkeypatch, host_ms=60)
    timer = fake.clock()
    timing = timer(fake.call)
    assert not timing.queued and timing.ms > 30
    row = harness._launches([timing, clock.Timing(1.0, 50.0, True), clock.Timing(1.0, 70.0, True)])
    assert row == {"host_us": 60.0, "pct_queued": pytest.approx(200 / 3)}
    assert harness._launches([timing]) == {"host_us": None, "pct_queued": 0}
    assert harness._launches([clock.cpu_clock(lambda: None)]) == {}


def test_a_row_of_a_gpu(monkeypatch):
    """The way of a GPU through `run_case`: its clock, its memory, and a call that waits for the device."""
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(Settings, "cuda", True)
    monkeypatch.setattr(harness, "surroundings", lambda device: {"capability": "9.0"})
    for name, value in (("reset_peak_memory_stats", None), ("memory_allocated", 10), ("max_memory_allocated", 2_000_010)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)

    def ours(x):
        return lambda: (fake.call(0.5), 2 * x)[1]

    def waits(x):
        return lambda: (fake.call(0.5), fake.synchronize(), 2 * x)[2]

    settings = replace(QUICK, memory=True, cold=False)
    rows = run_case(case(Variant("ours", ours, baseline=False), Variant("waits", waits)), settings)
    row, other = row_of(rows, "ours"), row_of(rows, "waits")
    assert row["status"] == "ok" and row["p50_ms"] == pytest.approx(0.5) and row["cache"] == "warm"
    assert row["host_us"] == pytest.approx(200) and row["pct_queued"] == 100 and row["peak_delta_mb"] == 2
    assert other["host_us"] is None and other["pct_queued"] == 0
    assert row["best_baseline"] == "waits" and row["ratio_to_best_baseline"] == pytest.approx(1)


def test_the_tuner_has_the_same_clock(monkeypatch):
    fake = FakeCuda(monkeypatch)
    timer = fake.clock()
    assert tune.milliseconds(fake.call, timer, rounds=3) == pytest.approx(0.01)
    fake.host_ms = 1.0  # another configuration of the same launch
    assert tune.milliseconds(fake.call, timer, rounds=3) == pytest.approx(0.01)


def test_rows_are_on_disk_as_soon_as_they_are_known(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "folder" / "rows.jsonl"
    seen = []

    def interrupted(x):
        assert out.parent.is_dir(), "made before anything is measured"
        seen.append([json.loads(line)["variant"] for line in out.read_text().splitlines()])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return lambda: 2 * x

    broken = Variant("broken", lambda x: 1 / 0)
    cases = [case(broken, Variant("last", interrupted)), case(Variant("last", interrupted))]
    monkeypatch.setattr(command, "select", lambda *_: cases)
    command.main(["run", "--quick", "--out", str(out), "--case", "toy"])
    assert seen == [["broken"], ["broken", "last"]]
    with pytest.raises(KeyboardInterrupt):
        command.main(["run", "--quick", "--out", str(out)])
    assert seen[2] == ["broken", "last", "last", "broken"], "rows of an earlier run stay"
    assert capsys.readouterr().out.count("ZeroDivisionError") == 2, "the tables so far are printed"


def test_a_case_that_cannot_be_set_up_is_a_row_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    def no_memory():
        raise MemoryError("too large")

    good_case = case(good("ours", baseline=False))
    monkeypatch.setattr(command, "select", lambda *_: [replace(good_case, inputs=no_memory), good_case])
    out = tmp_path / "rows.jsonl"
    assert command.main(["run", "--quick", "--out", str(out)]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["status"], r["reason"]) for r in rows] == [("failed", "MemoryError: too large"), ("ok", None)]
    assert all(tuple(row) == COLUMNS for row in rows)


def test_a_lost_gpu_ends_the_run_after_the_row_that_lost_it(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(harness, "surroundings", lambda device: {})
    monkeypatch.setattr(Settings, "cuda", True)
    broken = Variant("broken", lambda x: lost, baseline=False)
    rows = harness.run_case(case(broken, good()), QUICK)
    assert next(rows)["variant"] == "broken"
    with pytest.raises(harness.GpuLost, match="after double toy broken: RuntimeError: CUDA error: an illegal memory access"):
        next(rows)


GPU = Settings(device="cuda", dtypes=("bfloat16",))
HEADLINE = {
    ("centroid_cross_entropy", "ade20k", "bfloat16"), ("nearest_centroid", "ade20k", "bfloat16"),
    ("sinkhorn_assign", "ade20k", "float32"), ("momentum_update_", "ade20k", "bfloat16"),
    ("upsample_cross_entropy", "ade20k_large_x4", "float32"),
}  # fmt: skip


def names(settings, **kinds):
    return {
        (c.op, c.name, c.dtype, v.name)
        for c in command.select(settings)
        for v, skipped in harness.chosen(c, settings)
        if not skipped and all(getattr(v, kind) == is_it for kind, is_it in kinds.items())
    }


def test_which_baselines_run():
    everything = names(GPU, baseline=True)
    assert names(replace(GPU, baselines="none"), baseline=True) == set()
    assert names(replace(GPU, baselines="none")) == names(GPU, baseline=False)
    assert names(replace(GPU, baselines="eager")) == names(GPU, compiled=False)
    headline = names(replace(GPU, baselines="headline"), compiled=True)
    assert {n[:3] for n in headline} == HEADLINE and headline < everything
    assert not any("autotuned" in n[3] for n in everything)
    assert any("autotuned" in n[3] for n in names(replace(GPU, autotuned=True)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_what_a_gpu_would_measure_can_be_listed_without_one(capsys):
    assert command.main(["run", "--list", "--device", "cuda", "--dtype", "bfloat16", "--baselines", "none"]) == 0
    printed = capsys.readouterr().out
    assert "class_scores ade20k bfloat16: N=131072 C=150 K=10 D=256: dnc_cuda, dnc_triton" in printed
    assert "coco" not in printed and printed.splitlines()[-1].endswith("variants")
    assert command.main(["run", "--list", "--device", "cuda", "--large", "--case", "coco"]) == 0
    assert "N=4194304 C=171 K=10 D=512" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["run", "--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_help_explains_every_option_and_a_case_that_is_unknown_is_answered_with_the_names(capsys):
    for command_line in ([], ["run"], ["report"]):
        with pytest.raises(SystemExit, match="0"):
            command.main([*command_line, "--help"])
        text = capsys.readouterr().out
        if not command_line:
            assert "peak" not in text  # `run` starts it for itself
            assert all(f"benchmarks.{name} " in text for name in ("tune", "dispatch", "aot", "prove", "sanitize", "gpu_run"))
        assert not re.search(r"^  -\S+( \S+)?\n(?=  -|\n|$)", text, re.M), "an option without help"
    with pytest.raises(SystemExit, match="2"):
        command.main(["run", "--op", "upsample", "--case", "ade"])
    assert "cases: 'ade20k_x4'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main(["run", "--op", "upsampling"])
    assert "upsample_argmax" in capsys.readouterr().err


def test_every_op_with_two_kernels_on_gpus_is_measured():
    measured = {c.op: {v.backend for v in c.variants if not v.baseline} for c in command.select(GPU)}
    for op, written in harness.backends.KERNELS.items():
        both = {name for name, kernel in written.items() if kernel.device == "cuda"}
        assert len(both) < 2 or measured[op] >= both, op


@pytest.mark.parametrize("part", range(3), ids=["loss", "gradient", "sub-centroids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_in_any_part_of_a_step_is_wrong(part, dtype):
    right = torch.tensor(2.0), torch.randn(2, 8, 4, 4).to(dtype), torch.randn(3, 2, 8)
    expected = tuple(t.double() for t in right)
    assert bench_head.check_step(right, expected) == 0
    wrong = list(right)
    wrong[part] = torch.full_like(right[part], torch.nan)
    assert bench_head.check_step(tuple(wrong), expected) > 1


def test_a_replayed_graph_holds_on_to_the_tensors_that_it_works_on(monkeypatch):
    """It knows their addresses alone: once, a head that nobody held was overwritten while its step was replayed."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))

    def step():
        state = torch.zeros(3)
        return (lambda: state.sum()), weakref.ref(state)

    call, state = step()
    replay = bench_head.graphed(call)
    del call
    gc.collect()
    assert state() is not None and float(replay()) == 0


def test_memory_on_a_gpu_is_what_its_allocator_counted(monkeypatch):
    counts = {"allocated": 100, "peak": 900}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: counts.update(peak=counts["allocated"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: counts["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: counts["peak"])
    assert memory.on_cuda(lambda: counts.update(peak=5_000_100)) == {"peak_delta_mb": 5.0}


def test_commit_of_a_copy_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("DNC_COMMIT", "abc123")
    assert record.commit() == "abc123"
    monkeypatch.delenv("DNC_COMMIT")
    assert record.commit() == "unknown"


def test_evidence_makes_no_other_source(monkeypatch, tmp_path):
    def git(*arguments):
        return subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(record, "ROOT", tmp_path)
    configs = tmp_path / "dnc_kernels" / "ops" / "sinkhorn" / "configs"
    configs.mkdir(parents=True)
    for path in (tmp_path / "dnc_kernels" / "proofs.json", configs / "sm_90.json", tmp_path / "README.md"):
        path.write_text("{}")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "x")
    clean = record.commit()
    (tmp_path / "dnc_kernels" / "proofs.json").write_text("[]")
    (configs / "sm_90.json").write_text("[]")
    assert record.commit() == clean and len(clean) == 12
    (tmp_path / "README.md").write_text("")
    assert record.commit() == clean + "-dirty"


def test_nothing_is_measured_with_a_binary_of_other_source(monkeypatch, tmp_path, capsys):
    """It happened: the rows named the commit of the folder, and another commit's binary was timed."""
    recipes = pytest.importorskip("benchmarks.recipes")
    assert built.other() == ""
    out = tmp_path / "rows.jsonl"
    run = ["run", "--quick", "--op", "cluster_sums", "--baselines", "none", "--out", str(out)]
    for change in ("binary", "csrc", "package"):
        with monkeypatch.context() as changed:
            if change == "binary":
                changed.setattr(backends, "_native", SimpleNamespace(__file__="/old/_C.so"))
            elif change == "csrc":
                changed.setattr(_source, "source", lambda root: "f" * 64)
            else:
                changed.setattr(built, "ROOT", tmp_path)
            with pytest.raises(SystemExit, match="imported from" if change == "package" else "built from other source") as end:
                command.main(run)
            assert end.value.code and ("PYTHONPATH" if change == "package" else "`make install`") in end.value.code
            with pytest.raises(SystemExit, match="benchmarks: "):
                recipes.main(["--task", "digits", "--head", "softmax", "--out", str(out)])
        assert not out.read_text()
    assert command.main(run) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and all(row["binary_source"] == backends.native().source[:12] for row in rows)


@pytest.mark.parametrize("held", [96, 10**6])
def test_of_large_gradients_some_rows_are_held_against_float64(monkeypatch, held):
    """With fewer elements than dX has, only every so many-th row is; a NaN is seen anywhere."""
    monkeypatch.setattr(bench_similarity, "HELD", held)
    loss = next(c for c in command.select(QUICK) if c.op == "centroid_cross_entropy")
    inputs = loss.inputs()
    want = loss.reference(inputs)
    n = loss.shape["N"]
    assert len(want.rows) == (n if held > 96 else math.ceil(n / 11))
    result = next(v for v in loss.variants if v.name == "mm_amax").prepare(inputs)()
    assert loss.check(result, want) <= 1
    result[1][want.rows[1]] += 1e-3 * result[1].abs().max()
    assert loss.check(result, want) > 1
    result[1][1] = math.nan
    assert loss.check(result, want) == math.inf
