"""`make gpu-run`, without a GPU: nothing is lost, nothing blocks, and only what belongs to this source is taken."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import gpu_run, gpu_steps, gpu_take, processes, prove, pytest_record, sanitize, suite
from benchmarks.case import Settings
from benchmarks.families import CUDA_FAMILIES, source
from benchmarks.harness import COLUMNS
from benchmarks.processes import Ended, Step
from benchmarks.record import append, read
from dnc_kernels import _evidence
from dnc_kernels._evidence import Proof

ROOT = Path(__file__).resolve().parent.parent
GPU = "NVIDIA H100 80GB HBM3"


# lines


def test_lines_are_whole_whatever_happened_before(tmp_path):
    file = tmp_path / "results.jsonl"
    assert list(read(file)) == []
    assert append(file, {"event": "a"})
    with file.open("a") as torn:
        torn.write('{"event": "b", "te')  # a process was killed within its line
    assert append(file, {"event": "c"})
    with file.open("ab") as torn:
        torn.write(b'\xff\n[1]\nnull\n{"event": "d')
    assert [line["event"] for line in read(file)] == ["a", "c"]


def test_a_full_disk_loses_no_line(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    file.symlink_to("/dev/full")
    assert not append(file, {"event": "test", "test": "x"})
    assert '{"event": "test", "test": "x"}' in capsys.readouterr().err


# processes


def python(name, code, seconds=30.0, **env):
    return Step(name, [sys.executable, "-c", code], seconds, env)


def ended(*steps, tmp_path, seconds=30.0):
    start = time.monotonic()
    found = {e.step.name: e for e in processes.run(steps, start + seconds, tmp_path, ROOT)}
    return found, time.monotonic() - start


def test_a_crash_or_a_hang_stops_no_other_step(tmp_path):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
    found, seconds = ended(
        python("right", "import os; print(os.environ['WHO'])", WHO="me"), python("wrong", "raise SystemExit(3)"),
        python("crash", "import os; os.abort()"), python("hang", "import time; time.sleep(60)", seconds=1.0),
        python("stubborn", stubborn, seconds=1.0), Step("absent", ["/no/such/program"], 5.0), tmp_path=tmp_path,
    )  # fmt: skip
    assert {name: (e.status, e.returncode) for name, e in found.items()} == {
        "right": ("ok", 0), "wrong": ("failed", 3), "crash": ("failed", -signal.SIGABRT), "hang": ("stopped", -signal.SIGTERM),
        "stubborn": ("stopped", -signal.SIGKILL), "absent": ("failed", None),
    }  # fmt: skip
    assert found["right"].output == "me\n" and found["stubborn"].output == "here\n" and "No such file" in found["absent"].output
    assert seconds < 1 + 3 * processes.GRACE


def test_all_ends_by_the_deadline_with_what_it_started(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(mark)!r}, 'w').write('x'); time.sleep(0.05)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    found, _ = ended(python("parent", parent), tmp_path=tmp_path, seconds=2.0)
    assert found["parent"].status == "stopped"
    time.sleep(0.2)
    mark.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not mark.exists(), "the child of a stopped step still runs"


def test_a_reader_that_stops_ends_the_steps(tmp_path):
    mark = tmp_path / "alive"
    writes = f"import time\nwhile True:\n    open({str(mark)!r}, 'w').close(); time.sleep(0.05)"
    steps = processes.run([python("a", "pass"), python("b", writes)], time.monotonic() + 60, tmp_path, ROOT)
    first = next(steps)
    steps.close()
    assert first.step.name == "a"
    time.sleep(0.5)
    mark.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not mark.exists()


# tests that record themselves


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    step = pytest_record.step("planted", [gpu_run.PLANTED], folder / "results.jsonl", seconds=120, each=10)
    (one,) = processes.run([step], time.monotonic() + 120, folder, ROOT)
    return one, list(read(folder / "results.jsonl"))


@pytest.mark.slow
def test_every_fault_is_named_and_the_tests_after_it_run(planted):
    step, lines = planted
    assert step.status == "failed" and step.returncode == 1
    outcomes = {line["test"].partition("::")[2]: line for line in gpu_take.events(lines, "test")}
    assert {name: line["outcome"] for name, line in outcomes.items()} == {
        "test_right": "passed", "test_wrong": "failed", "test_skipped": "skipped", "test_hanging": "hung",
        "test_crashing": "crashed", "test_spoiling_its_process": "crashed", "test_out_of_a_broken_fixture": "failed",
        **{f"test_after_the_faults[{n}]": "passed" for n in range(3)},
    }  # fmt: skip
    assert "element (3, 1) is off by 7 times the bound" in outcomes["test_wrong"]["detail"]
    (note,) = gpu_take.events(lines, "note")
    assert note["test"].endswith("test_spoiling_its_process") and "illegal memory access" in note["detail"]


@pytest.mark.slow
def test_a_test_that_runs_when_its_step_is_stopped_is_named(tmp_path):
    step = pytest_record.step("slow", [f"{gpu_run.PLANTED}::test_hanging"], tmp_path / "results.jsonl", seconds=25, each=600)
    (one,) = processes.run([step], time.monotonic() + 25, tmp_path, ROOT)
    (line,) = read(tmp_path / "results.jsonl")
    assert one.status == "stopped" and line["outcome"] == "hung" and line["test"].endswith("::test_hanging")


# a whole run


def rehearse(out, minutes, *more, **options):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_run",
        "works",
        "--dry",
        "--out",
        str(out),
        "--minutes",
        str(minutes),
        *more,
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.mark.slow
def test_a_dry_run_ends_in_time_and_tells_every_fault(tmp_path):
    start = time.monotonic()
    run = rehearse(tmp_path, 1.2, "--plant")
    printed = run.communicate()[0]
    assert time.monotonic() - start < 72 + 20
    assert run.returncode == 1
    lines = list(read(tmp_path / gpu_take.RESULTS))
    assert [line["dry"] for line in gpu_take.events(lines, "run")] == [True] and gpu_take.events(lines, "end")
    told = {line["step"] for kind in ("step", "dropped") for line in gpu_take.events(lines, kind)}
    assert told >= {"environment", "primitives", "triton", "planted", *(f"cuda {f}" for f in CUDA_FAMILIES)}
    assert not any(line["proven"] for line in gpu_take.events(lines, "proof")), "a rehearsal proves nothing"
    assert "dry: nothing here comes from a GPU" in printed and "ended after" in printed
    assert len(list(tmp_path.iterdir())) <= 6 and all(file.stat().st_size < 16e6 for file in tmp_path.iterdir())
    with pytest.raises(ValueError, match="nothing is taken"):
        gpu_take.take(tmp_path)


@pytest.mark.slow
def test_what_came_before_a_cut_can_be_read(tmp_path):
    run = rehearse(tmp_path, 5, start_new_session=True)
    end = time.monotonic() + 60
    while time.monotonic() < end and not any(line["event"] == "step" for line in read(tmp_path / gpu_take.RESULTS)):
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    lines = list(read(tmp_path / gpu_take.RESULTS))
    assert lines and not gpu_take.events(lines, "end")
    assert "cut off: no end was recorded" in gpu_take.summary(lines)
    assert gpu_run.main(["take", str(tmp_path)]) == 1


@pytest.mark.slow
def test_a_full_disk_does_not_stop_a_run(tmp_path):
    def full():  # no file grows beyond 600 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))

    start = time.monotonic()
    run = rehearse(tmp_path, 0.6, preexec_fn=full)
    printed = run.communicate()[0]
    assert time.monotonic() - start < 36 + 20, "a busy machine starts slowly, too"
    assert "could not be written" in printed and '"event": "end"' in printed
    assert gpu_take.events(list(read(tmp_path / gpu_take.RESULTS)), "run")


def test_a_run_that_is_late_drops_from_the_end(tmp_path):
    run = gpu_run.Run(tmp_path, "works", 60, dry=True)
    run.deadline = time.monotonic() + 2
    assert run.steps(python("quick", "pass", seconds=10)), "a sixth of 10 s: it fits"
    assert run.steps(python("large", "pass", seconds=60), python("other", "pass", seconds=5)) == []
    dropped = gpu_take.events(run.lines(), "dropped")
    assert [line["step"] for line in dropped] == ["large", "other"] and "s were left" in dropped[0]["reason"]


@pytest.mark.parametrize(
    ("phase", "names"),
    [
        (
            "works",
            [
                "primitives",
                "cuda embedding",
                "triton",
                "failures again",
                "memcheck 1 of f",
                "times",
                "kernels",
                "large",
                "memcheck momentum",
            ],
        ),
        (
            "numbers",
            ["rows", "head", "kernels", "trace", "profile centroid_cross_entropy cuda", "other dtypes", "memcheck momentum"],
        ),
        ("tune", ["tune nearest_centroid", "similarity as tuned", "nearest_centroid as tuned"]),
    ],
)
def test_the_steps_of_a_phase_are_whole_commands_in_the_order_of_their_worth(tmp_path, monkeypatch, phase, names):
    run = gpu_run.Run(tmp_path, phase, gpu_run.PLANNED[phase], dry=False)
    planned = []
    monkeypatch.setattr(run, "steps", lambda *steps, then=None: planned.extend(steps) or [])
    monkeypatch.setattr(run, "take", lambda: None)
    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "_help", lambda sanitizer: "--kernel-name arg")
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: name)
    run.tell("test", step="cuda momentum", test="tests/a_cuda.py::f", outcome="failed", seconds=1.0, detail="")
    run.tell("test", step="cuda momentum", test="tests/a_cuda.py::g", outcome="passed", seconds=1.0, detail="")
    append(run.record, row("triton", 2.0, pct_gemm_probe=20.0))
    for part in gpu_run.PHASES[phase]:
        part(run)
    found = [step.name for step in planned]
    assert [name for name in found if name in names] == names
    assert all(isinstance(word, str) for step in planned for word in step.command)
    for step in planned:
        if "benchmarks.gpu_steps" in step.command:
            request = json.loads(step.command[-1])
            assert request["record"] == str(run.record) and not request["dry"]
        if "memcheck" in step.name:
            assert (
                step.command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
                and step.env.items() >= sanitize.ENVIRONMENT.items()
            )
    if phase == "numbers":
        profile = next(step for step in planned if step.name.startswith("profile"))
        assert list(profile.command[:3]) == ["ncu", "--clock-control", "none"]


def test_parts_families_and_tests_can_be_chosen(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu_run, "prepare", lambda run: True)
    monkeypatch.setattr(gpu_run.Run, "steps", lambda self, *steps, then=None: ran.extend(steps) or [])
    monkeypatch.setattr(gpu_run.Run, "take", lambda self: None)
    monkeypatch.setattr(gpu_run.faulthandler, "dump_traceback_later", lambda *arguments, **options: None)
    monkeypatch.setattr(gpu_run.signal, "signal", lambda *arguments: None)
    chosen = ["--parts", "trace", "tests", "--families", "momentum", "--tests", "tests/test_gpu.py"]
    gpu_run.main(["works", "--out", str(tmp_path), *chosen])
    assert [step.name for step in ran] == ["trace", "cuda momentum", "triton"]
    assert [word for word in ran[2].command if word.startswith("tests")] == ["tests/test_gpu.py"]
    ran.clear()
    gpu_run.main(["works", "--out", str(tmp_path), "--parts", "tests", "--families", "none"])
    assert [step.name for step in ran] == ["triton"]


def test_the_run_itself_imports_nothing_that_a_gpu_could_break():
    code = "import sys, benchmarks.gpu_run; assert not {'torch', 'triton', 'dnc_kernels', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("what", ["rows", "call", "trace"])
def test_what_the_children_measure_exists(what, tmp_path):
    """Every op and case that is asked for on a GPU is one of the benchmarks' there."""
    cases = suite.select(Settings(device="cuda", dtypes=("bfloat16", "float16", "float32"), baselines="none"))
    known = {(case.op, case.name) for case in cases}
    asked = {
        "rows": [*gpu_steps.TIMES, *gpu_steps.ROWS, *gpu_steps.HEAD, *gpu_steps.OTHER_DTYPES],
        "call": [profile[:2] for profile in gpu_steps.PROFILES],
        "trace": [gpu_steps.TRACED],
    }[what]
    for op, name in asked:
        assert any(op == known_op and name in ("*", known_name) for known_op, known_name in known), (op, name)
    if what == "rows":
        assert {op for op, _ in (*gpu_steps.ROWS, *gpu_steps.HEAD)} == {case.op for case in cases}, "every op is measured"


def test_what_no_time_is_left_for_is_said(tmp_path, monkeypatch):
    run = gpu_run.Run(tmp_path, "works", 60, dry=True)
    monkeypatch.setattr(gpu_run, "prepare", lambda run: setattr(run, "deadline", time.monotonic()) or True)
    assert gpu_run.execute(run) == 1
    dropped = {line["step"]: line["reason"] for line in gpu_take.events(list(read(run.record)), "dropped")}
    assert list(dropped) == ["primitives", "tests", "again", "times", "kernels", "large", "memcheck of small tests"]
    assert set(dropped.values()) == {"no time was left"}


def test_without_a_gpu_nothing_runs_and_the_reason_is_given(tmp_path, monkeypatch, capsys):
    run = gpu_run.Run(tmp_path, "numbers", 60, dry=False)
    monkeypatch.setattr(gpu_run, "prepare", lambda run: False)
    assert gpu_run.execute(run) == 1
    assert "dropped all rows: torch sees no CUDA device; DRY=1 goes the same way" in capsys.readouterr().out


def test_failures_run_again_one_of_every_function_first(tmp_path, monkeypatch):
    run = gpu_run.Run(tmp_path, "works", 360, dry=False)
    steps = []
    monkeypatch.setattr(run, "steps", lambda *given, then=None: steps.append(given) or [])
    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "_help", lambda sanitizer: "--kernel-name arg")
    for name, outcome in (
        ("tests/a_cuda.py::f[1]", "failed"), ("tests/a_cuda.py::f[2]", "failed"), ("tests/a_cuda.py::g", "passed"),
        ("tests/b_triton.py::h", "hung"), ("tests/b_triton.py", "failed"), ("tests/c_gpu.py::i[triton]", "failed"),
        ("tests/c_gpu.py::i[cuda]", "failed"),
    ):  # fmt: skip
        run.tell("test", step="cuda a", test=name, outcome=outcome, seconds=1.0, detail="")
    gpu_run._again(run)
    (again,), memcheck = steps
    first = ["tests/a_cuda.py::f[1]", "tests/b_triton.py::h", "tests/c_gpu.py::i[triton]", "tests/c_gpu.py::i[cuda]"]
    assert list(again.command[-5:]) == [*first, "tests/a_cuda.py::f[2]"]
    assert again.env["CUDA_LAUNCH_BLOCKING"] == "1"
    assert [step.command[-1] for step in memcheck] == first
    assert ["kns=dnc" in step.command for step in memcheck] == [True, False, False, True] and memcheck[0].command[
        0
    ] == "compute-sanitizer"


# what comes back


@pytest.fixture
def tree(tmp_path):
    """A copy of what a run's results touch."""
    root = tmp_path / "tree"
    for folder in ("csrc", "dnc_kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "dispatch"))
    (root / "dnc_kernels" / "proofs.json").write_text("[]\n")
    return root


def row(backend, ms, **changes):
    return dict.fromkeys(COLUMNS) | {
        "op": "nearest_centroid", "case": "ade20k", "variant": f"dnc_{backend}", "kind": "kernel", "backend": backend,
        "status": "ok", "shape": {"N": 131072, "C": 150, "K": 10, "D": 256}, "dtype": "bfloat16", "device": GPU,
        "capability": "9.0", "cache": "cold", "shape_class": {"N": 131072, "C": 150, "bits": 16}, "p50_ms": ms, **changes,
    }  # fmt: skip


KERNELS = {
    "event": "kernels", "op": "nearest_centroid", "case": "ade20k", "dtype": "bfloat16", "variant": "dnc_cuda", "launches": 4.0,
    "us": 244.0, "kernels": [{"kernel": "class_scores_sm90_kernel", "launches": 1.0, "us": 234.0}],
}  # fmt: skip


def results(out, root, *lines, **changes):
    out.mkdir(exist_ok=True)
    run = {"event": "run", "phase": "works", "minutes": 8, "dry": False, "commit": "abc", "source": gpu_take.source(root),
           "date": "2026-11-27T101112"}  # fmt: skip
    for line in (run | changes, *lines):
        append(out / gpu_take.RESULTS, line)


def proof(root, **changes):
    made = Proof("momentum", source("momentum", root), GPU, (9, 0), 84, "abc", "2026-11-27")
    return {"event": "proof", "proven": True, **asdict(made), **changes}


def test_results_are_taken_into_the_tree_once(tree, tmp_path):
    entries = [{"when": {"C": 19, "K": 10, "D": 256, "bits": 16}, "use": {"BLOCK_N": 64}, "p50_ms": 0.1}]
    configuration = {
        "event": "configuration",
        "family": "similarity",
        "kernel": "centroid_loss",
        "kind": "nvidia-h100",
        "entries": entries,
    }
    results(
        tmp_path / "out", tree, proof(tree), proof(tree, family="sinkhorn", source="0" * 64),
        {"event": "proof", "proven": False, "family": "upsample", "reason": "2 of its 9 tests failed"},
        row("triton", 2.0), row("cuda", 1.0), configuration, {"event": "environment", "gpu": GPU, "folder": "nvidia-h100-80gb-hbm3"},
        KERNELS,
    )  # fmt: skip
    for _ in range(2):
        written = gpu_take.take(tmp_path / "out", tree)
        assert [p.family for p in _evidence.read_proofs(tree / "dnc_kernels" / "proofs.json")] == ["momentum"]
        file = "benchmarks/results/nvidia-h100-80gb-hbm3/2026-11-27T101112.jsonl"
        assert [json.loads(text)["backend"] for text in (tree / file).read_text().splitlines()] == ["triton", "cuda"]
        (choice,) = _evidence.read_dispatch(tree / "dnc_kernels" / "dispatch")["nearest_centroid", (9, 0)]
        assert choice.backend == "cuda" and choice.rows == f"{file}:1 {file}:2"
        path = tree / "dnc_kernels" / "ops" / "similarity" / "configs" / "nvidia-h100.json"
        assert json.loads(path.read_text()) == {"centroid_loss": entries}
        assert len(written) == 6 and f"2 rows in {file}" in written
        page, kernels = (tree / file.replace("jsonl", end) for end in ("txt", "kernels.json"))
        assert "proof of upsample: none: 2 of its 9 tests failed" in page.read_text() and json.loads(kernels.read_text()) == [
            KERNELS
        ]


def test_results_of_other_source_are_refused(tree, tmp_path):
    results(tmp_path / "out", tree, proof(tree))
    (tree / "csrc" / "cuda" / "momentum.cu").open("a").write("// changed\n")
    with pytest.raises(ValueError, match="belong to commit abc, whose source is not this tree's"):
        gpu_take.take(tmp_path / "out", tree)
    with pytest.raises(ValueError, match="has no run in it"):
        gpu_take.take(tmp_path / "elsewhere", tree)


def test_the_source_is_what_runs(tree):
    before = gpu_take.source(tree)
    assert before == gpu_take.source()
    (tree / "dnc_kernels" / "proofs.json").write_text("[]")
    (tree / "dnc_kernels" / "ops" / "similarity" / "configs" / "nvidia-h100.json").write_text("{}")
    assert gpu_take.source(tree) == before, "what a run writes is not its source"
    for name in ("dnc_kernels/ops/_triton.py", "csrc/cpu/simd.h"):
        text = (tree / name).read_bytes()
        (tree / name).write_bytes(text + b"\n")
        assert gpu_take.source(tree) != before, name
        (tree / name).write_bytes(text)


def test_the_summary_names_every_fault():
    lines = [
        {"event": "run", "phase": "works", "commit": "abc", "date": "2026-11-27", "dry": False},
        {"event": "environment", "python": "3.12.3", "gpu": GPU},
        {"event": "primitive", "primitive": "multicast", "status": "hang"}, {"event": "primitive", "primitive": "mma", "status": "ok"},
        {"event": "test", "step": "cuda momentum", "test": "a.py::x", "outcome": "passed", "seconds": 1, "detail": ""},
        {"event": "test", "step": "cuda momentum", "test": "a.py::y[1]", "outcome": "crashed", "seconds": 1, "detail": "gone"},
        {"event": "note", "step": "cuda momentum", "test": "a.py::y[1]", "detail": "an illegal memory access"},
        {"event": "proof", "proven": False, "family": "momentum", "reason": "1 of its 2 tests failed"},
        row("cuda", 0.25, pct_gemm_probe=60.0, host_us=41.0, ratio_to_best_baseline=3.0),
        row("triton", None, status="wrong", reason="error is 3 times what is allowed"), KERNELS,
        {"event": "step", "step": "cuda momentum", "status": "stopped", "returncode": 1, "seconds": 60.0, "detail": "it hung"},
        {"event": "dropped", "step": "large", "reason": "3 s were left"},
    ]  # fmt: skip
    text = gpu_take.summary(lines)
    for part in (
        "primitives: 1 of 2 right; multicast hang", "tests of cuda momentum: 1 passed, 1 crashed",
        "crashed a.py::y[1]: an illegal memory access; gone", "proof of momentum: none: 1 of its 2 tests failed",
        "nearest_centroid ade20k dnc_cuda: 4 launches, 244 us: 1 class_scores_sm90_kernel 234",
        "dnc_cuda: 250.0 us, host 41 us, 60% of mm, 3.00x the best baseline", "dnc_triton: wrong: error is 3 times",
        "step cuda momentum: stopped after 60 s: it hung", "dropped large: 3 s were left", "cut off: no end",
    ):  # fmt: skip
        assert part in text, part
    assert text.index("dnc_cuda: 250.0 us") < text.index("primitives: 1 of 2"), (
        "faults last, where a cut output still shows them"
    )


# verdicts and what follows from rows


def lines_of(*outcomes, step="cuda momentum"):
    return [{"event": "test", "step": step, "outcome": outcome} for outcome in outcomes]


@pytest.mark.parametrize(
    ("outcomes", "status", "reason"),
    [
        (["passed", "skipped", "passed"], "ok", None),
        (["passed", "failed"], "failed", "1 of its 2 tests failed"),
        (["passed", "hung", "crashed"], "failed", "2 of its 3 tests failed"),
        (["passed"], "stopped", "its tests did not end: stopped after 1"),
        (["skipped"], "ok", "no test ran"),
        ([], "ok", "no test ran"),
    ],
)
def test_only_a_whole_green_run_proves(outcomes, status, reason, monkeypatch):
    monkeypatch.setattr(prove, "commit", lambda: "abc")
    one = Ended(Step("cuda momentum", [], 1), status, 0, 1.0, "")
    sources = {"momentum": source("momentum")}
    others = lines_of("failed", step="cuda sinkhorn")
    found = prove.verdict("momentum", one, [*lines_of(*outcomes), *others], sources, GPU, (9, 0))
    if reason is None:
        assert isinstance(found, Proof) and found.tests == 2 and found.commit == "abc" and found.capability == (9, 0)
    else:
        assert found == reason
    assert "built from other source" in prove.verdict("momentum", one, lines_of("passed"), {"momentum": "stale"}, GPU, (9, 0))


def test_the_worst_kernels_are_those_that_lose_most_time():
    rows = [
        row("triton", 2.0, pct_gemm_probe=90.0), row("triton", 1.0, op="class_scores", pct_gemm_probe=30.0, pct_copy_probe=50.0),
        row("triton", 0.9, op="upsample_argmax", pct_copy_probe=20.0), row("cuda", 9.0, op="centroid_cross_entropy"),
        row("triton", None, op="centroid_cross_entropy", status="failed"),
    ]  # fmt: skip
    assert [op for _, _, op in gpu_steps.worst(rows)] == ["upsample_argmax", "class_scores"]
    assert [op for _, _, op in gpu_steps.worst([])] == ["centroid_cross_entropy", "class_scores"]


def test_what_the_tuner_is_asked_for_exists():
    from benchmarks.aot import cases

    for op, (family, kernel) in gpu_steps.KERNELS.items():
        assert kernel in cases(family), op


def test_metrics_of_ncu_are_read_after_the_programs_own_output():
    text = "\n".join([
        "loading", '==PROF== Connected', '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"',
        '"0","loss_kernel(int)","GPU Speed Of Light Throughput","Duration","us","412.3"',
        '"0","loss_kernel(int)","GPU Speed Of Light Throughput","Memory Throughput","%","41.2"',
        '"0","loss_kernel(int)","Occupancy","","",""',
    ])  # fmt: skip
    assert gpu_steps.metrics(text) == {"loss_kernel": {"Duration": "412.3 us", "Memory Throughput": "41.2 %"}}
    assert gpu_steps.metrics("==ERROR== no permission\n") == {}
