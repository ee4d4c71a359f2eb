"""The layers of the package, what ``import fastsae`` loads, and how long it takes."""

from __future__ import annotations

import ast
import graphlib
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_sources import PACKAGE, sources

import fastsae

FLOORS = (
    ("_C", "_cuda", "_core", "latents"),
    ("native", "kernels"),
    ("audit", "dispatch", "gradients", "packed", "reference", "testing", "verify"),
    ("ops",),
    ("codes", "compare", "formats", "functional", "plots", "polytopes"),
    ("batches", "optim", "sae", "superposition", "trainer"),
    ("patch",),
    ("distributed", "lm", "store"),
    ("__init__",),
    ("__main__", "commands", "demo", "studies"),
)  # a module imports from its own floor or from those above it in this table, lazily and for types too
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it."""
    known = {module for module, _ in sources()} | {"fastsae._C", "fastsae._cuda"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "fastsae":
                yield name if name in known else name.rpartition(".")[0] or name


def test_no_floor_imports_from_above() -> None:
    assert len(FLOORS) <= 10
    wrong, seen = [], 0
    for module, path in sources():
        for name in imports(path):
            seen += 1
            if HEIGHT[room(name)] > HEIGHT[room(module)]:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)
    assert seen > 30


def test_no_circle() -> None:
    graph = {module: set(imports(path)) - {module} for module, path in sources()}
    graph |= {name: set() for names in graph.values() for name in names if name not in graph}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_kernels_and_the_extension_are_named_by_dispatch_strings_only() -> None:
    for module, path in sources():
        for name in imports(path):
            if room(name) in ("_C", "_cuda"):
                assert room(module) == "native", f"{module} imports {name}"
            if room(module) in ("ops", "dispatch", "sae", "__init__", "latents"):
                assert room(name) not in ("kernels", "native"), f"{module} imports {name}"


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# What torch loads by itself does not count.
LOADED = """
import sys, torch
before = set(sys.modules)
import fastsae
new = {name.split(".")[0] for name in set(sys.modules) - before} | {name for name in sys.modules if name.startswith("fastsae.")}
print(" ".join(sorted(new)))
"""


def test_import_loads_neither_kernels_nor_optional_packages() -> None:
    loaded = set(run(LOADED).split())
    assert "fastsae.ops.encode" in loaded
    heavy = {"triton", "matplotlib", "scipy", "transformers", "safetensors", "pandas", "sklearn", "hypothesis", "pytest", "torchvision"}
    assert not loaded & (
        heavy | {"fastsae._C", "fastsae.native.loader", "fastsae.kernels", "fastsae.kernels.decode", "fastsae.testing", "fastsae.plots"}
    )


USE = """
import torch, fastsae
x, W = torch.randn(5, 8), torch.randn(12, 8, requires_grad=True)
latents = fastsae.encode_topk(x, W, k=3)
fastsae.decode(latents, W).sum().backward()
assert bool(W.grad.isfinite().all())
print(fastsae.spline_hash(x, W).shape, fastsae.mmcs(x, W.detach()))
print(fastsae.explain(fastsae.decode, latents, W))
"""


def test_works_without_triton() -> None:
    assert "triton is not installed" in run("import sys; sys.modules['triton'] = None\n" + USE)


def test_works_without_the_extension() -> None:
    printed = run("import sys; sys.modules['fastsae._C'] = None\n" + USE)
    line = next(line for line in printed.splitlines() if line.strip().startswith("cpu"))
    assert "extension" in line
    assert "install" in line
    assert "reference  chosen" in printed


def test_works_without_optional_packages() -> None:
    blocked = ("matplotlib", "scipy", "safetensors", "pandas", "sklearn", "transformers")
    calls = ("fastsae.match(a, a).one_to_one()", "fastsae.match(a, a).plot('x.png')", "fastsae.match('x.safetensors', a)")
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport torch, fastsae\na = torch.randn(3, 4)\n"
    for call in calls:
        code += f"try:\n    {call}\nexcept ImportError as error:\n    print(error)\n"
    printed = run(code + USE).splitlines()
    for line, name in zip(printed, ("SciPy", "matplotlib", "safetensors")):
        assert name in line
        assert "pip install 'fastsae-kernels[" in line


def test_import_time() -> None:
    # CPU time: what else runs on the machine is not the import's. Bytecode is kept, as in any installed package.
    # Without the garbage collector: whether it walks through torch's million objects here or a moment later is chance, and 150 ms.
    code = "import gc, time, torch; gc.disable(); start = time.process_time(); import fastsae; print(time.process_time() - start)"
    best = min(float(run(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(4)) * 1e3
    print(f"import fastsae on top of torch: {best:.0f} ms of CPU time (target 50 ms)")
    assert best < 150


def test_public_names() -> None:
    assert len(set(fastsae.__all__)) == len(fastsae.__all__) <= 45
    documentation = fastsae.__doc__
    assert documentation
    for name in fastsae.__all__:
        assert getattr(fastsae, name).__doc__, f"{name} has no documentation"
        assert name in documentation or name[0].isupper(), f"the package's documentation does not mention {name}"


@pytest.mark.parametrize("module", ["codes", "compare", "distributed", "functional", "optim", "patch", "polytopes", "sae", "superposition"])
def test_public_names_of_modules(module: str) -> None:
    public = importlib.import_module(f"fastsae.{module}")
    for name in public.__all__:
        assert getattr(public, name).__doc__, f"fastsae.{module}.{name} has no documentation"


def test_no_function_hides_a_module() -> None:
    for module, _ in sources():
        outer, _, name = module.rpartition(".")
        if outer:
            found = getattr(importlib.import_module(outer), name, None)
            assert found is None or isinstance(found, types.ModuleType), f"{module} is hidden by {found!r}"
