"""A slice of what ``python -m tests.fuzz`` does by the thousand, the same calls in every run; and that it finds what is wrong."""

import pytest

pytest.importorskip("hypothesis")

import torch
from fuzz import calls, judge, runner

from dnc_kernels import ops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_triton(monkeypatch):
    """Whose import and interpreter take seconds."""
    monkeypatch.setattr(calls, "TRITON", False)


@pytest.mark.parametrize("op", runner.targets())
def test_random_calls(op):
    report = runner.Report()
    runner.one_round(op, 34, 10, report, spoil=False)
    assert sum(report.calls.values()) == 10
    assert not report.findings, report


def planted(monkeypatch, fault):
    """The report of a round of calls of an op with a fault."""
    right = ops.cluster_sums
    monkeypatch.setattr(ops, "cluster_sums", lambda x, *args, **kwargs: fault(x, right(x, *args, **kwargs)))
    report = runner.Report()
    runner.one_round("cluster_sums", 1, 20, report)
    return report


def test_a_wrong_number_is_found_and_made_small(monkeypatch, capsys):
    report = planted(monkeypatch, lambda x, r: r._replace(sums=r.sums + 1e-3))
    found = report.findings["cluster_sums on reference: sums"]
    assert found.count > 1 and "cluster_sums on reference: sums" in capsys.readouterr().err
    assert "1e-3" not in found.code and found.code.count("\n") < 9
    exec(found.code, {})  # runs as it is printed
    assert "faults" in str(report)


@pytest.mark.parametrize(
    "kind, fault",
    [
        ("second call differs", lambda x, r: r._replace(sums=r.sums + torch.rand(()))),
        ("input changed", lambda x, r: x.add_(1) is None or r),
        ("counts", lambda x, r: r._replace(counts=r.counts + 1)),
        ("legal call refused", lambda x, r: r.nothing),
        ("dtype", lambda x, r: r._replace(sums=r.sums.half())),
    ],
)
def test_other_faults_are_found(monkeypatch, kind, fault):
    assert any(kind in name for name in planted(monkeypatch, fault).findings)


def test_what_is_accepted_or_refused_without_a_reason_is_found(monkeypatch):
    call = calls.Call("cluster_sums", "cpu", None, {"x": 3, "labels": 3, "num_clusters": 3}, illegal="x")
    monkeypatch.setattr(ops, "cluster_sums", lambda **_: None)
    with pytest.raises(judge.Fault, match="accepted x"):
        judge.run(call)
    for text in ("x must be a tensor", "cluster_sums: it must be a tensor"):

        def refuse(text=text, **_):
            raise TypeError(text)

        monkeypatch.setattr(ops, "cluster_sums", refuse)
        with pytest.raises(judge.Fault, match="unclear error for x"):
            judge.run(call)


def test_a_process_that_dies_is_a_finding(tmp_path):
    call = calls.Call("cluster_sums", "cpu", "portable", {"num_clusters": 3})
    text = f"{call.op}\ncpu-portable\n{call!r}"
    found = runner._crashed("signal SIGSEGV", f"{len(text)}\n{text} and what was longer before")
    assert found.name == "cluster_sums on cpu-portable: crash" and "num_clusters=3, backend='cpu'" in found.code
