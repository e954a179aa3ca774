"""A slice of what ``python -m tests.fuzz`` does by the thousand, the same calls in every run; and that it finds what is wrong."""

import pytest

pytest.importorskip("hypothesis")

import torch
from fuzz import calls, judge, runner, values

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


def plant(monkeypatch, fault):
    """Give cluster_sums a fault, of its features and results."""
    right = ops.cluster_sums
    monkeypatch.setattr(ops, "cluster_sums", lambda x, *args, **kwargs: fault(x, right(x, *args, **kwargs)))


def test_a_wrong_number_is_found_and_made_small(monkeypatch, capsys):
    plant(monkeypatch, lambda x, r: r._replace(sums=r.sums + 1e-3))
    report = runner.Report()
    runner.one_round("cluster_sums", 1, 8, report)
    found = report.findings["cluster_sums on reference: sums"]
    assert "cluster_sums on reference: sums" in capsys.readouterr().err
    assert found.code.count("\n") < 9
    exec(found.code, {})  # runs as it is printed
    assert "faults" in str(report)


@pytest.mark.parametrize(
    "kind, fault",
    [
        ("sums", lambda x, r: r._replace(sums=r.sums + 1e-3)),
        ("second call differs", lambda x, r: r._replace(sums=r.sums + torch.rand(()))),
        ("input changed", lambda x, r: x.add_(1) is None or r),
        ("counts", lambda x, r: r._replace(counts=r.counts + 1)),
        ("legal call refused", lambda x, r: r.nothing),
        ("dtype", lambda x, r: r._replace(sums=r.sums.half())),
    ],
)
def test_every_kind_of_fault_is_found(monkeypatch, kind, fault):
    x = values.Spec("normal", (3, 2), torch.float32, "slice", 0)
    labels = values.Spec("ids", (3,), torch.int64, "contiguous", 0, (0, 1))
    call = calls.Call("cluster_sums", "cpu", None, {"x": x, "labels": labels, "num_clusters": 2, "ignore_index": -100})
    judge.run(call)
    plant(monkeypatch, fault)
    with pytest.raises(judge.Fault) as found:
        judge.run(call)
    assert found.value.kind == kind


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
