"""`make gpu-sanitize`, without a GPU: what would run, and what is said where it cannot."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import sanitize


@pytest.mark.parametrize("option", ["--kernel-name ", "--kernel-regex ", ""])
def test_the_sanitizer_looks_at_small_tests_and_our_kernels(option):
    made = sanitize.command("compute-sanitizer", f"  {option} arg", "racecheck", [Path("a.py")], ["-k", "x"])
    assert made[:3] == ["compute-sanitizer", "--tool", "racecheck"] and made[-1] == "a.py"
    assert made[made.index("pytest") + 1 :][:2] == ["-m", "cuda and not gpu"]
    assert ("kns=dnc" in made) == bool(option) and (not option or option.strip() in made)


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
        ran.append((command, options.get("env", {}).get("PYTORCH_NO_CUDA_MEMORY_CACHING")))
        return SimpleNamespace(stdout="", returncode=status)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize.subprocess, "run", run)
    assert sanitize.main(["--family", "momentum", "--tool", "memcheck", "--tool", "racecheck"]) == result
    assert [command[2] for command, _ in ran[1:]] == ["memcheck", "racecheck"] and {c for _, c in ran[1:]} == {"1"}
    assert ("complains about momentum memcheck, momentum racecheck" in capsys.readouterr().out) == bool(status)
