"""compute-sanitizer, without a GPU: which tool looks at what, and what is said where it cannot run."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import sanitize
from benchmarks.families import CUDA_FAMILIES


@pytest.mark.parametrize("option", ["--kernel-name ", "--kernel-regex ", ""])
def test_the_sanitizer_looks_at_our_kernels(option, monkeypatch):
    monkeypatch.setattr(sanitize, "_help", lambda sanitizer: f"  {option} arg")
    command = sanitize.under("compute-sanitizer", "racecheck")
    assert command[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert ("kns=dnc" in command) == bool(option) and (not option or option.strip() in command)
    assert "kns=dnc" not in sanitize.under("compute-sanitizer", "memcheck", ours=False), "Triton's kernels have other names"


def test_memory_that_torch_wrote_is_not_called_unwritten(monkeypatch):
    """initcheck follows the writes of the kernels that it looks at alone."""
    monkeypatch.setattr(sanitize, "_help", lambda sanitizer: " --kernel-name arg")
    assert "kns=dnc" not in sanitize.under("compute-sanitizer", "initcheck")
    assert "kns=dnc" in sanitize.under("compute-sanitizer", "memcheck")


def test_races_are_looked_for_where_the_tool_knows_the_barriers():
    assert [f for f in CUDA_FAMILIES if sanitize.applies("racecheck", f)] == ["embedding", "momentum", "sinkhorn"]
    assert all(sanitize.applies(tool, f) for tool in sanitize.TOOLS[:3] for f in CUDA_FAMILIES)


def test_the_sanitizer_is_found_in_a_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    tool = tmp_path / "extras" / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert sanitize.find() == str(tool)


@pytest.mark.parametrize(("gpu", "message"), [(False, "torch sees no CUDA device"), (True, "compute-sanitizer was not found")])
def test_without_gpu_or_sanitizer_the_reason_is_given(gpu, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sanitize, "find", lambda: None)
    assert sanitize.main([]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("status", "result"), [(0, 0), (9, 1)])
def test_a_complaint_is_a_failure_and_the_rest_runs(status, result, monkeypatch, capsys):
    ran = []

    def run(command, **options):
        ran.append((command, options["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"]))
        return SimpleNamespace(stdout="", returncode=status)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "_help", lambda sanitizer: "")
    monkeypatch.setattr(sanitize.subprocess, "run", run)
    assert sanitize.main(["--family", "momentum", "--tool", "memcheck", "--tool", "racecheck"]) == result
    assert [command[2] for command, _ in ran] == ["memcheck", "racecheck"] and {c for _, c in ran} == {"1"}
    assert all("cuda and not gpu and not large" in command for command, _ in ran)
    assert ("complains about momentum memcheck, momentum racecheck" in capsys.readouterr().out) == bool(status)
    ran.clear()
    assert sanitize.main(["--family", "similarity", "--tool", "racecheck"]) == 0 and not ran
