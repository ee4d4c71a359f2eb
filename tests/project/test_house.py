"""The house's own rules: files and functions of a size that is read in one sitting, and no logic that stands in two places."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from places import ROOT

FILE_LINES, FUNCTION_LINES, TWICE = 600, 80, 6
PYTHON = [ROOT / "setup.py", *sorted(path for room in ("fastsae", "kernels", "bench", "tests") for path in (ROOT / room).rglob("*.py"))]
CPP = sorted(path for end in ("*.h", "*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(end))

# Being mended: empty it.
TO_MEND: set[str] = set()

# Pairs of files that may hold the same lines, each with its reason.
SAME_LINES: dict[tuple[str, str], str] = {}


def name_of(path: Path, root: Path = ROOT) -> str:
    return path.relative_to(root).as_posix()


# ---------------------------------------------------------------- sizes


def first_comment(lines: list[str]) -> str:
    return next((line.strip() for line in lines if line.strip().startswith("#")), "")


def test_no_file_is_longer_than_a_sitting() -> None:
    """Or its first comment says why: ``# Longer than 600 lines: ...``."""
    too_long = []
    for path in PYTHON:
        lines = path.read_text().splitlines()
        if len(lines) > FILE_LINES and not first_comment(lines).startswith(f"# Longer than {FILE_LINES} lines: "):
            too_long.append(name_of(path))
    assert not too_long


def test_no_function_is_longer_than_a_screen_or_two() -> None:
    """Or the first comment in it says why: ``# Longer than 80 lines: ...``."""
    too_long = []
    for path in PYTHON:
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = lines[node.lineno - 1 : node.end_lineno]
                if len(body) > FUNCTION_LINES and not first_comment(body).startswith(f"# Longer than {FUNCTION_LINES} lines: "):
                    too_long.append(f"{name_of(path)}: {node.name}")
    assert not set(too_long) - TO_MEND


# ---------------------------------------------------------------- the same lines twice

Line = tuple[int, str]
HEAD = re.compile(r"(template|namespace|extern|struct|class)\b|(?!(if|for|while|switch|else|do)\b)[^=]*\(")  # of what a brace opens in C++


def _logic_of_python(text: str) -> Iterator[Line]:
    """Lines without comments, imports, docstrings, decorators and signatures."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            left_out.update(range(min(n.lineno for n in (node, *node.decorator_list)), max(node.lineno + 1, node.body[0].lineno)))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            left_out.update(range(node.lineno, (node.end_lineno or 0) + 1))
    words: dict[int, list[str]] = defaultdict(list)
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent and token.start[0] not in left_out:
            words[token.start[0]].append(token.string)
    for number in sorted(words):
        yield number, " ".join(words[number])


def _logic_of_cpp(text: str) -> Iterator[Line]:
    """Lines without comments, includes, and the heads of functions, classes and namespaces."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"//.*|^\s*#\s*(include|pragma).*", "", text, flags=re.MULTILINE)
    left_out: set[int] = set()
    depth = line = 0
    head, first = "", 0
    for character in text:
        line += character == "\n"
        depth += (character == "(") - (character == ")")
        if depth == 0 and character in "{};":
            if character == "{" and HEAD.match(head):
                left_out.update(range(first, line + 1))
            head = ""
        elif head or not character.isspace():
            first = first if head else line
            head += character
    for number, content in enumerate(text.split("\n")):
        if number not in left_out and content.strip():
            yield number + 1, " ".join(content.split())


def repeated(paths: list[Path], root: Path = ROOT) -> Iterator[tuple[str, int, str, int, int]]:
    """(file, line, file, line, lines that are the same) of every run that stands in two places."""
    lines: list[tuple[str, int, str]] = []
    for path in paths:
        logic = (_logic_of_python if path.suffix == ".py" else _logic_of_cpp)(path.read_text())
        lines += [(name_of(path, root), number, content) for number, content in logic if re.search(r"\w", content)]
        lines.append((name_of(path, root), 0, f"end of {path}"))
    seen: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for start in range(len(lines) - TWICE + 1):
        seen[tuple(content for *_, content in lines[start : start + TWICE])].append(start)
    for places in seen.values():
        for here, there in pairwise(places):
            if here and lines[here - 1][2] == lines[there - 1][2] and there - 1 != here:
                continue  # the middle of a longer run
            count = next(n for n in range(len(lines)) if lines[here + n][2] != lines[there + n][2])
            yield *lines[here][:2], *lines[there][:2], count


def test_no_logic_stands_in_two_places() -> None:
    package = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in ("fastsae", "kernels")]
    found = [run for paths in (package, CPP) for run in repeated(paths)]
    assert not [f"{run[0]}:{run[1]} and {run[2]}:{run[3]}: {run[4]} lines" for run in found if (run[0], run[2]) not in SAME_LINES]
    assert SAME_LINES.keys() <= {(run[0], run[2]) for run in found}, "a pair that is no longer the same needs no exception"


def test_what_is_repeated_is_found(tmp_path: Path) -> None:
    added = [f"total += {n} * size" for n in range(TWICE)]
    python = "def f(size: int) -> int:\n    total = 0\n", "def g(\n    size: int,\n) -> int:\n    total = 1\n\n"
    cpp = "template <class T>\nvoid f(T total,\n  T size) {\n", "int g(int size) {\n  int total = 0;\n"
    for heads, names, end, note in ((python, ("a.py", "b.py"), "", "  # why"), (cpp, ("a.h", "b.cpp"), ";", "  // why")):
        paths = [tmp_path / name for name in names]
        for path, head, rest in zip(paths, heads, ("", note)):
            path.write_text(head + "\n".join(f"    {line}{end}{rest}" for line in added) + ("\n}\n" if end else "\n"))
        ((*where, count),) = repeated(paths, tmp_path)
        assert (where[0], where[2], count) == (*names, TWICE)
        paths[1].write_text(paths[1].read_text().replace("3 *", "9 *"))
        assert not list(repeated(paths, tmp_path))
