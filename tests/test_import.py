"""Importing the package costs little more than importing torch, and the compiler is imported by whom it serves."""

import ast
import subprocess
import sys
from pathlib import Path

import torch

from dnc_kernels import backends, nn

FRESH = """
import sys, torch
before = set(sys.modules)
import dnc_kernels
print(*(name for name in set(sys.modules) - before if name.split(".")[0] != "dnc_kernels"))

from dnc_kernels.nn import DNCClassifier, DNCHead
for checkpoint in ("none", "scores", "all"):
    head = DNCHead(8, 3, 2, checkpoint=checkpoint)
    head.loss(torch.randn(1, 8, 4, 4).requires_grad_(), torch.zeros(1, 8, 8, dtype=torch.int64)).loss.backward()
DNCClassifier(8, 3, 2).loss(torch.randn(5, 8).requires_grad_(), torch.zeros(5, dtype=torch.int64)).loss.backward()
print("torch._dynamo" in sys.modules)
"""


def test_the_package_loads_no_module_that_torch_had_not_loaded_and_a_step_no_compiler():
    # another process: this one has loaded nearly everything
    loaded = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120, check=True)
    assert loaded.stdout.splitlines() == ["", "False"]


def test_layers_import_ops_and_nothing_behind_them():
    """`ops`, and the parts of a head's step, which are in no list of public functions."""
    found = {
        (node.module, name.name)
        for path in Path(nn.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 2
        for name in node.names
    }
    of_ops = {(module, name) for module, name in found if (module or name).split(".")[0] == "ops"}
    assert {module for module, _ in of_ops} == {None, "ops", "ops.head"}
    assert not any(name.startswith("_") for _, name in of_ops)


def test_a_gpus_capability_is_a_constant_to_the_compiler(monkeypatch):
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0) if index == 0 else (8, 0))
    compiled = torch.compile(lambda x: x + backends.capability(0)[0], fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 9
    assert vars(torch.compiler.assume_constant_result(lambda: 0)).items() <= vars(backends.capability).items()
