"""The benchmarks' modules keep to the map in benchmarks/__init__.py: parts, no circle, nothing private of each other."""

import ast
import re
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import benchmarks
from benchmarks import gpu_steps, triton_sweep
from benchmarks.families import FAMILIES
from dnc_kernels import backends

MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(Path(benchmarks.__file__).parent.glob("*.py"))}
del MODULES["__init__"]
#: Part -> the patterns of its modules, in the order of the map.
PARTS = {part: names.split() for part, names in re.findall(r"^    (\S.*?)  +(\S.*)$", benchmarks.__doc__, re.MULTILINE)}


def part_of(module):
    (part,) = (p for p, names in PARTS.items() if any(fnmatchcase(module, name) for name in names))
    return part


def imported(tree):
    """(module, name in it or None, what it is called here) of what is imported from this folder, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            within = "." * node.level + (node.module or "")
            module = re.sub(r"^(benchmarks)?\.?", "", within) if within.startswith((".", "benchmarks")) else None
            for name in node.names if module is not None else ():
                if module:
                    yield module, name.name, name.asname or name.name
                elif name.name in MODULES:
                    yield name.name, None, name.asname or name.name
        elif isinstance(node, ast.Import):
            yield from ((n.name.partition(".")[2], None, n.name) for n in node.names if n.name.startswith("benchmarks."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            pattern = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.args[0].values)
            yield from ((module, None, module) for module in MODULES if fnmatchcase(module, pattern.removeprefix(".")))


IMPORTS = {module: list(imported(tree)) for module, tree in MODULES.items()}


def test_the_map_names_every_module_once():
    assert len(PARTS) == 4 and {part_of(module) for module in MODULES} == set(PARTS)
    assert all(any(fnmatchcase(module, name) for module in MODULES) for names in PARTS.values() for name in names)


def test_no_part_imports_one_below_it():
    order = list(PARTS)
    up = [
        (module, other)
        for module, found in IMPORTS.items()
        for other, _, _ in found
        if order.index(part_of(other)) > order.index(part_of(module))
    ]
    assert not up


def test_no_module_imports_what_imports_it():
    graph = {module: {other for other, _, _ in found} for module, found in IMPORTS.items()}
    assert {"triton_momentum", "triton_sweep", "aot_cuda"} <= graph["aot"], "imports inside functions and by name count"
    assert list(TopologicalSorter(graph).static_order())


def test_modules_use_nothing_private_of_each_other():
    used = [
        (module, f"{other}.{name}") for module, found in IMPORTS.items() for other, name, _ in found if name and name[0] == "_"
    ]
    for module, tree in MODULES.items():
        called = {here: other for other, name, here in IMPORTS[module] if name is None}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and ast.unparse(node.value) in called:
                used.append((module, ast.unparse(node)))
    assert not used


def test_one_table_of_families_is_that_of_the_package():
    assert tuple(sorted(set(backends.FAMILY.values()))) == FAMILIES
    assert triton_sweep.CALLS.keys() == set(FAMILIES)
    assert all(backends.FAMILY[op] == family for op, (family, _) in gpu_steps.KERNELS.items())
