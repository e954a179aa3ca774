"""The doctor: healthy here, and able to find what is wrong."""

import json
import subprocess
import sys

import pytest
import torch

from dnc_kernels import __main__, _selftest, backends, doctor
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
    assert report.processor["threads"] == str(torch.get_num_threads())


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
