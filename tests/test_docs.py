"""What the pages say can be run, called and followed: code blocks, commands, links and file names."""

import doctest
import io
import json
import re
import subprocess
import sys
import textwrap
import warnings
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
#: Their blocks use each other: tests/test_deployment.py and tests/test_tutorial.py run them in order.
IN_ORDER = {ROOT / "docs" / "deployment.md", ROOT / "docs" / "tutorial.md"}
#: Pages whose links, commands and file names are looked up.
FOLLOWED = (*PAGES, ROOT / "CONTRIBUTING.md")
FOLDERS = ("benchmarks", "cmake", "csrc", "dnc_kernels", "docs", "examples", "tests")
#: Modules that no block may count on: without them it is skipped.
EXTRAS = {
    "PIL", "faiss", "jinja2", "matplotlib", "onnx", "onnxruntime", "onnxscript", "rich", "safetensors", "scipy", "sklearn", "timm",
    "torchvision", "transformers", "triton",
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block, and the line of the page that its code starts on."""

    place: str
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.place}:{self.line}"


def place(page):
    return page.relative_to(ROOT).as_posix()


FENCE = re.compile(r"^( *)```([\w+-]*)[^\n]*\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)


def blocks(page):
    text = page.read_text()
    for found in FENCE.finditer(text):
        yield Block(place(page), text.count("\n", 0, found.start(3)) + 1, found[2], textwrap.dedent(found[3]))


def run(block):
    """Run a block as a program of its own, and hold it to the shapes in its comments."""
    names = {"__name__": "__main__"}
    with warnings.catch_warnings():
        # what we ourselves have deprecated; torch may warn of its own
        warnings.filterwarnings("error", category=FutureWarning, module=r"(__main__|dnc_kernels)\b")
        if block.code.lstrip().startswith(">>> "):
            report = io.StringIO()
            session = doctest.DocTestParser().get_doctest(block.code, names, str(block), block.place, block.line - 1)
            failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(session, out=report.write)
            assert not failed, report.getvalue()
            return
        # as if at its place in the page, which is what a traceback then shows
        exec(compile("\n" * (block.line - 1) + block.code, ROOT / block.place, "exec"), names)
    # `name = ...  # [2,3] int64`
    for name, shape in dict(re.findall(r"^(\w+) = .*# .*?\[(\d+(?:,\d+)*)\]", block.code, re.MULTILINE)).items():
        assert list(names[name].shape) == json.loads(f"[{shape}]"), f"{block}: the shape of {name}"


@pytest.mark.parametrize(
    "block", [b for page in PAGES if page not in IN_ORDER for b in blocks(page) if b.language in ("python", "pycon")], ids=str
)
def test_python_block_runs_by_itself(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        run(block)
    except ModuleNotFoundError as missing:
        if str(missing.name).partition(".")[0] not in EXTRAS:
            raise
        pytest.skip(str(missing))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("x = torch.ones(2)", NameError),
        ("import torch\nx = torch.ones(2)  # [3]", AssertionError),
        (">>> 1 + 1\n3\n", AssertionError),
        ("import warnings\nwarnings.warn('old name', FutureWarning)", FutureWarning),
    ],
)
def test_a_block_that_is_wrong_fails(code, error):
    with pytest.raises(error):
        run(Block("a page", 3, "python", code))


# commands


@cache
def code_of(page):
    """Everything set as code: lines of blocks, fenced or indented, and spans of the text, with their line numbers."""
    text = page.read_text()
    found = [
        (number, line)
        for block in blocks(page)
        for number, line in enumerate(block.code.splitlines(), block.line)
    ]  # fmt: skip
    text = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    found += [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.startswith("    ")]
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    found += [
        (text.count("\n", 0, span.start()) + 1, " ".join(span[1].split()))
        for span in re.finditer(r"`([^`]+)`", text)
        if "\n\n" not in span[1]
    ]
    return found


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = [
        f"{place(page)}:{line}: make {target}"
        for page in FOLLOWED
        for line, text in code_of(page)
        for target in re.findall(r"(?:^|&& |; )(?:\w+=\S+ )*make (?:\w+=\S+ )*([a-z][\w-]*)", text)
        if target not in targets
    ]
    assert not unknown


def commands():
    """(module, subcommand or "") -> options -> where, of every `python -m` of ours."""
    found = {}
    for page in FOLLOWED:
        for line, text in code_of(page):
            for module, rest in re.findall(r"python3? -m ((?:dnc_kernels|benchmarks)\b[\w.]*)((?: [^\s#&;|]+)*)", text):
                first = re.match(r" ([a-z][\w-]*)(?= |$)", rest)
                options = found.setdefault((module, first[1] if first else ""), {})
                options.update(dict.fromkeys(re.findall(r"--[a-z][\w-]*", rest), f"{place(page)}:{line}"))
                options.setdefault("", f"{place(page)}:{line}")
    return found


COMMANDS = commands()
# in a process of its own: modules of the benchmarks decide at import what kind of Triton they want
ASK_FOR_HELP = """
import contextlib, io, json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv, text, status = [*filter(None, command), "--help"], io.StringIO(), None
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        except SystemExit as stopped:
            status = stopped.code
        except ImportError as error:
            status = str(error)
            if getattr(error, "name", None):
                text.write("pip install " + error.name)
    print(json.dumps([status, text.getvalue()]), file=sys.__stdout__)
"""


@pytest.fixture(scope="module")
def help_texts():
    """Command -> exit status and what it prints for --help."""
    asked = sorted(COMMANDS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK_FOR_HELP, json.dumps(asked)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(asked), done.stderr
    return dict(zip(asked, answers, strict=True))


@pytest.mark.parametrize("command", sorted(COMMANDS), ids=lambda command: " ".join(command).strip())
def test_command_exists_and_has_its_options(command, help_texts):
    status, text = help_texts[command]
    if status and "pip install" in text and not text.startswith("usage"):
        pytest.skip(text)
    assert not status, f"{COMMANDS[command]['']}: {status}: {text}"
    unknown = [f"{where}: {option}" for option, where in COMMANDS[command].items() if option not in text]
    assert not unknown


# links and files


@cache
def anchors(page):
    """Anchors of the headings, as GitHub makes them."""
    text, found = FENCE.sub("", page.read_text()), []
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


def test_links_and_their_anchors_resolve():
    broken = []
    for page in FOLLOWED:
        text = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text())
        text = re.sub(r"`[^`\n]*`", "", text)
        for link in re.finditer(r"\]\(([^()\s]+)\)", text):
            if re.match(r"\w+:", link[1]):
                continue
            path, _, anchor = link[1].partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{place(page)}:{text.count(chr(10), 0, link.start()) + 1}: {link[1]}")
    assert not broken


@cache
def files():
    """Every file of the tree, and every folder with a slash behind it."""
    found = [place(p) for p in ROOT.iterdir() if p.is_file()]
    for path in (p for folder in FOLDERS for p in [ROOT / folder, *(ROOT / folder).rglob("*")]):
        if "__pycache__" not in path.parts:
            found.append(place(path) + "/" * path.is_dir())
    return found


def is_path(code):
    """Whether code names a file or folder of the tree: from one of our folders on, or source by its name."""
    if not re.fullmatch(r"[\w.*/-]+", code) or code.endswith(".so"):
        return False
    return ("/" in code and code.partition("/")[0] in FOLDERS) or bool(re.search(r"\w\.(py|cpp|cu|h|md)$", code))


def exists(path):
    return any(fnmatch(f, pattern) for f in files() for pattern in (path, path + "/", "*/" + path))


def test_files_that_are_named_exist():
    absent = [
        f"{place(page)}:{line}: {code}"
        for page in FOLLOWED
        for line, code in code_of(page)
        if is_path(code) and not exists(code)
    ]  # fmt: skip
    assert not absent


@pytest.mark.parametrize(
    ("code", "there"),
    [("csrc/cuda", True), ("csrc/cuda/similarity*", True), ("triton_loss.py", True), ("csrc/gpu/", False), ("lost.cu", False)],
)
def test_a_file_that_is_not_there_is_found(code, there):
    assert is_path(code) and exists(code) == there


def test_every_page_is_listed():
    listed = (ROOT / "docs" / "README.md").read_text()
    assert [
        place(p) for p in PAGES[1:] if p.name != "README.md" and f"({p.relative_to(ROOT / 'docs').as_posix()})" not in listed
    ] == []
