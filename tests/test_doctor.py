"""The doctor: healthy here, and able to find what is wrong."""

import json
import subprocess
import sys
import types

import pytest
import torch

from dnc_kernels import __main__, _selftest, _source, _threads, backends, doctor
from dnc_kernels._evidence import Proof


@pytest.fixture(scope="module")
def report():
    return doctor.check()


def test_this_installation_is_healthy(report):
    assert report.healthy, doctor.text(report)


def test_versions_are_those_of_this_process(report):
    assert report.versions["torch"] == torch.__version__
    assert report.versions["dnc_kernels"] == backends.native().__version__
    assert report.versions["python"] == sys.version.split()[0]
    assert report.versions["compiler"] == backends.native().compiler


def test_processor_and_threads(report):
    assert report.processor["instruction_sets"].split() == list(backends.usable_isas())
    assert report.processor["instruction_set_in_use"] == backends.cpu_isa()
    assert report.threads["threads"] == str(torch.get_num_threads())
    assert report.threads["cores"] == str(_threads.cores())
    assert report.threads["waiting_threads"].startswith(("spin (", "sleep ("))


def test_the_file_of_the_extension_and_its_source_are_named(report):
    native = backends.native()
    assert report.build["file"] == native.__file__
    assert (report.build["source"], report.build["commit"]) == (native.source, native.commit)
    assert native.source[:12] in doctor.text(report) and native.__file__ in doctor.text(report)


def test_a_binary_of_other_source_is_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(_source, "source", lambda root: "f" * 64)
    monkeypatch.setattr(_source, "commit", lambda root: "0123456789ab+")
    found = doctor.check(self_test=False)
    (problem,) = (p for p in found.problems if "was built from other source" in p.what)
    assert problem.serious and backends.native().__file__ in problem.what
    assert f"({backends.native().commit}) than this checkout's csrc (0123456789ab+)" in problem.what
    assert "`make install`" in problem.fix and "build_ext --inplace" in problem.fix
    assert doctor.main(["--no-self-test", "--json"]) == 1
    build = json.loads(capsys.readouterr().out)["build"]
    assert build["checkout_source"] == "f" * 64 and len(build["source"]) == 64


def test_a_binary_that_knows_no_source_is_a_problem_in_a_checkout(monkeypatch):
    monkeypatch.setattr(backends, "_native", types.SimpleNamespace(__file__="/old/_C.so", cuda_archs=None, compiler="GNU"))
    monkeypatch.setattr(_source, "source", lambda root: "f" * 64)
    report = doctor.Report()
    doctor._look_at_build(report)
    assert ["/old/_C.so was built from other source (unknown)" in p.what for p in report.problems] == [True]


def test_an_installed_package_has_no_checkout_to_differ_from(monkeypatch, tmp_path):
    monkeypatch.setattr(_source, "ROOT", tmp_path)
    found = doctor.check(self_test=False)
    assert set(found.build) == {"file", "source", "commit"}
    assert not [p for p in found.problems if "built from" in p.what]


def planted_threads(monkeypatch, *, threads, cores, quota, load, **environment):
    """What the doctor finds with these threads on this machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name, value in (("cores", cores), ("quota", quota), ("load", load), ("maps", "/torch/lib/libgomp.so.1\n")):
        monkeypatch.setattr(_threads, name, lambda value=value: value)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = doctor.check(self_test=False)
    return found, [p for p in found.problems if "threads that wait spin" in p.what]


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"threads": 8, "cores": 8, "quota": 2.0, "load": 0.1}, "the control group allows 2 cores"),
        ({"threads": 2, "cores": 2, "quota": None, "load": 3.2}, "a load of 3.2 on 2 cores leaves 0 free"),
    ],
)
def test_threads_that_spin_without_a_core_are_a_note(monkeypatch, machine, words):
    found, (note,) = planted_threads(monkeypatch, **machine)
    assert words in note.what and not note.serious and found.healthy
    assert note.fix == "set OMP_WAIT_POLICY=passive before Python starts"
    assert found.threads["openmp"] == "/torch/lib/libgomp.so.1" and found.threads["waiting_threads"] == "spin (by default)"
    found, notes = planted_threads(monkeypatch, **machine, OMP_WAIT_POLICY="passive")
    assert not notes and found.threads["waiting_threads"] == "sleep (OMP_WAIT_POLICY=passive)"


def test_threads_that_have_cores_of_their_own_may_spin(monkeypatch):
    found, notes = planted_threads(monkeypatch, threads=4, cores=8, quota=None, load=0.4)
    assert not notes
    assert found.threads == {
        "threads": "4", "cores": "8", "quota_cores": "none", "load_1min": "0.40", "openmp": "/torch/lib/libgomp.so.1",
        "waiting_threads": "spin (by default)",
    }  # fmt: skip


def test_every_backend_is_usable_or_says_why(report):
    assert set(report.backends) == set(backends.BACKENDS) - {"auto"}
    assert report.backends["reference"] == report.backends["cpu"] == ""
    assert (report.backends["cuda"] == "") == (torch.cuda.is_available() and backends.native().cuda_archs is not None)


def test_every_op_is_resolved_on_both_devices_with_a_reason(report):
    assert {(c.op, c.device) for c in report.choices} == {(op, device) for op in backends.KERNELS for device in ("cpu", "cuda")}
    assert all(choice.reason for choice in report.choices)


def test_the_self_test_covers_every_op_and_instruction_set(report):
    found = {(t.op, t.backend, t.isa) for t in report.self_tests if t.backend != "cuda"}
    expected = {(op, "reference", None) for op in backends.KERNELS}
    expected |= {
        (op, "cpu", isa) for op, kernels in backends.KERNELS.items() if "cpu" in kernels for isa in backends.usable_isas()
    }
    assert found == expected
    assert all(0 <= t.error <= doctor.BOUND for t in report.self_tests if t.proven)


def test_a_kernel_that_does_not_take_float32_has_no_self_test(monkeypatch):
    for limit in ({"dtypes": (torch.bfloat16,)}, {"channel_multiple": 8}):
        kernel = backends.Kernel("cpu", **limit)
        monkeypatch.setitem(backends.KERNELS, "cluster_sums", {"cpu": kernel})
        found = doctor.check()
        assert found.healthy
        assert {t.backend for t in found.self_tests if t.op == "cluster_sums"} == {"reference"}


def test_the_self_test_leaves_the_random_state_and_the_choices_alone():
    torch.manual_seed(3)
    state, choice, isa = torch.get_rng_state(), backends.chosen(), backends.cpu_isa()
    doctor.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert (backends.chosen(), backends.cpu_isa()) == (choice, isa)


def test_without_self_test_no_kernel_runs(monkeypatch):
    monkeypatch.setattr(doctor, "CASES", {})
    assert doctor.check(self_test=False).self_tests == []


def fails_on_cpu(case):
    def run(data):
        results = case(data)
        return tuple(
            r + 1e-3 * r.abs().max() if r.dtype == torch.float32 and backends.chosen() == "cpu" else r for r in results
        )

    return run


def test_a_wrong_kernel_is_found_and_named(monkeypatch):
    monkeypatch.setitem(doctor.CASES, "cluster_sums", fails_on_cpu(doctor.CASES["cluster_sums"]))
    found = doctor.check()
    assert not found.healthy
    (problem,) = (p for p in found.problems if "cluster_sums" in p.what)
    assert f"cpu {backends.usable_isas()[0]}" in problem.what and "error 0.001 >" in problem.what
    assert "reference " not in problem.what and "DNC_KERNELS_BACKEND=reference" in problem.fix
    assert "WRONG" in doctor.text(found)


def test_a_kernel_that_raises_is_found_and_the_doctor_goes_on(monkeypatch):
    def broken(data):
        raise ValueError("not today")

    monkeypatch.setitem(doctor.CASES, "cluster_sums", broken)
    found = doctor.check()
    assert not found.healthy
    assert any("cluster_sums fails" in p.what and "ValueError: not today" in p.what for p in found.problems)
    assert {t.op for t in found.self_tests} == set(backends.KERNELS)


def test_a_missing_extension_is_a_problem_with_a_remedy(monkeypatch):
    monkeypatch.setattr(backends, "_native", None)
    monkeypatch.setattr(backends, "NATIVE_ERROR", "the extension dnc_kernels._C cannot be imported: gone")
    monkeypatch.setattr(backends, "UNUSABLE", backends._probe())
    found = doctor.check()
    assert not found.healthy
    assert any("cannot be imported: gone" in p.what and "pip install" in p.fix for p in found.problems)
    assert {t.backend for t in found.self_tests} == {"reference"}


def test_a_chosen_backend_that_cannot_run_is_a_problem(monkeypatch):
    monkeypatch.setattr(backends, "unusable", lambda backend: "no such device" if backend == "cuda" else "")
    with backends.use_backend("cuda"):
        found = doctor.check(self_test=False)
    assert any("backend 'cuda' is chosen but cannot run: no such device" in p.what for p in found.problems)
    assert not found.healthy


def test_an_old_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    found = doctor.check(self_test=False)
    assert any("older than 2.11" in p.what and "torch>=2.11" in p.fix for p in found.problems)


@pytest.mark.skipif(len(backends.usable_isas()) == 1, reason="this processor runs the portable kernels only")
def test_a_slower_instruction_set_is_a_note_and_no_illness():
    with backends.use_isa("portable"):
        found = doctor.check(self_test=False)
    assert found.healthy
    assert any("use portable" in p.what and "DNC_KERNELS_CPU_ISA" in p.fix and not p.serious for p in found.problems)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80-real 90a-real 100", (9, 0), True),
        ("80-real 90a-real 100", (8, 0), True),
        ("80-real 90a-real 100", (8, 6), True),  # SASS of an earlier minor version
        ("80-real 90a-real 100", (7, 5), False),
        ("80-real 90a-real 100", (12, 0), True),  # PTX
        ("80-real 90a-real", (12, 0), False),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),  # PTX of 90a runs on 9.0 alone
        ("86-real", (8, 0), False),
        ("80-virtual", (9, 0), True),
        ("120f-real", (12, 1), True),
        ("100f", (12, 0), False),  # of a family
        ("native", (9, 0), False),  # a build knows what it was made for
    ],
)
def test_which_gpus_a_binary_serves(archs, capability, runs):
    assert backends.runs_on(archs, *capability) == runs


def test_the_text_shows_every_part(report):
    text = doctor.text(report)
    for part in ("versions", "processor", "backends", "what `auto` picks", "self-test", "problems: "):
        assert part in text
    assert all(op in text for op in backends.KERNELS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_why_a_backend_cannot_run_is_said_once(monkeypatch):
    why = "torch sees no CUDA device"
    monkeypatch.setattr(backends, "UNUSABLE", {**backends.UNUSABLE, "triton": why, "cuda": why})
    report = doctor.check(self_test=False)
    lines = doctor.text(report).splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines if why in line] == ["triton", "cuda"]
    assert not any("runs on cpu tensors" in line for line in lines)
    (scores,) = (line for line in lines if line.split()[:2] == ["class_scores", "cuda"])
    assert "triton and cuda cannot run; the cuda kernel does not take float32" in scores
    (choice,) = (c for c in report.choices if (c.op, c.device) == ("class_scores", "cuda"))
    assert why in choice.reason  # whole for machines


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("first usable kernel for cuda", "first usable kernel for cuda"),
        ("the cpu backend runs on cpu tensors, not cuda", "the cpu backend runs on cpu tensors, not cuda"),
        ("the cpu backend runs on cpu tensors, not cuda; gone; K is 99", "triton cannot run; K is 99"),
    ],
)
def test_no_reason_is_lost(reason, shown):
    choice = doctor.Choice("centroid_distance", "cuda", "reference", reason, ())
    assert doctor._because(choice, {"reference": "", "triton": "gone", "cuda": "gone"}) == shown


def test_unproven_kernels_are_called_unproven(report):
    text = doctor.text(report)
    for op, kernels in backends.KERNELS.items():
        for name, kernel in kernels.items():
            if not kernel.proven and not backends.PROOFS:
                assert any(op in line and f"unproven: {name}" in line for line in text.splitlines())


def test_a_proven_kernel_is_called_proven_with_its_gpu(monkeypatch):
    proof = Proof("momentum", "0" * 64, "NVIDIA H100", (9, 0), 40, "abc", "2026-01-01")
    monkeypatch.setattr(backends, "PROOFS", {("momentum", (9, 0)): proof})
    found = doctor.check(self_test=False)
    lines = [line for line in doctor.text(found).splitlines() if "proven on NVIDIA H100 (9.0)" in line]
    assert [line.split()[0] for line in lines] == [
        op for op, kernels in backends.KERNELS.items() if backends.FAMILY[op] == "momentum" and "cuda" in kernels
    ]
    if not torch.cuda.is_available():  # a proof holds for its own kind of GPU alone, and there is none here
        assert all("unproven: cuda" in line for line in lines)


@pytest.mark.parametrize(("serious", "status"), [(True, 1), (False, 0)])
def test_exit_status_follows_health(monkeypatch, capsys, serious, status):
    sick = doctor.Report(problems=[doctor.Problem("it squeaks", "oil it", serious)])
    monkeypatch.setattr(doctor, "check", lambda self_test: sick)
    assert doctor.main([]) == status
    out = capsys.readouterr().out
    assert "it squeaks" in out and "what to do: oil it" in out
    assert ("PROBLEM" in out) == serious


def test_json_for_machines(capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert all(test["ok"] and test["error"] <= doctor.BOUND for test in found["self_tests"] if test["proven"])


def test_the_worst_error_counts_indices_shapes_and_nan():
    one, index = torch.ones(3, dtype=torch.float64), torch.tensor([1, 2])
    assert _selftest.worst_error((one.float(), index), (one, index)) == 0
    assert _selftest.worst_error((one.float() * 1.5,), (one,)) == 0.5
    for got, want in ((index + 1, index), (one[:2], one), (one * torch.nan, one)):
        assert _selftest.worst_error((got,), (want,)) == float("inf")


def test_command_line():
    result = subprocess.run(
        [sys.executable, "-m", "dnc_kernels", "doctor", "--no-self-test"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "problems: " in result.stdout


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["nonsense"], 2), (["--help"], 0)])
def test_usage(capsys, arguments, status):
    assert __main__.main(arguments) == status
    captured = capsys.readouterr()
    assert "usage: python -m dnc_kernels" in (captured.out if status == 0 else captured.err)


def test_the_demo_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "dnc_kernels.demo", None)

    def missing(name, *args, **kwargs):
        if name == "demo":
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return real(name, *args, **kwargs)

    real = __import__
    monkeypatch.setattr("builtins.__import__", missing)
    assert __main__.main(["demo"]) == 1
    assert 'the demo needs sklearn: run `pip install "dnc_kernels[demo]"`' in capsys.readouterr().err
