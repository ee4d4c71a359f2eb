"""The layers of the package, what ``import fastsae`` loads, and how long it takes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from package_sources import PACKAGE, sources

import fastsae

# studies -> superposition -> trainer -> patch -> polytopes, sae, optim -> fused, dense, losses -> ops -> gradients -> dispatch -> (kernels
# | native): a module may import what is lower, or of its own layer where that layer is one family (the operations). What everybody shares
# is below all of them.
LAYERS = {
    "__main__": 8, "demo": 7, "verify": 6,
    "__init__": 6,
    "studies": 6.5,
    "superposition": 5.95, "trainer": 5.9, "patch": 5.5, "ensemble": 5.5, "polytopes": 5, "sae": 5, "optim": 5,
    "fused": 4.9, "dense": 4.8, "losses": 4.7, "pretrained": 4.6,
    "ops": 4,
    "gradients": 3.5,
    "dispatch": 3, "packed": 3,
    "native_encode": 2.5, "native_match": 2.7, "native_spline": 2.7,
    "kernels": 2, "native_cuda": 1.9, "native": 1.8,
    "testing": 1, "plots": 1,
    "counters": 5, "trace": 5,
    "latents": 0, "activations": 0, "private": 0, "_C": 0,  # and private modules, whose names begin with "_"
}  # fmt: skip
# Inside a function only: how a sample is checked, how a match is drawn.
LAZY_LEAVES = {"testing", "plots"}
FAMILIES = {"ops", "kernels", "patch", "polytopes", "superposition", "studies"}


def layer(module: str) -> str:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return "private" if name.startswith("_") and not name.startswith("__") and name != "_C" else name


def imports(path: Path, module: str) -> Iterator[tuple[str, bool]]:
    """(imported module of the package, whether at the top of the file)."""
    tree = ast.parse(path.read_text())
    lazy = {id(node) for outer in ast.walk(tree) if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in ast.walk(outer)}
    typing = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.dump(outer.test)
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # `from fastsae import x` imports the package, and x where that is a module.
            own = node.module in ("fastsae", "fastsae.ops", "fastsae.kernels")
            names = [f"{node.module}.{alias.name}" for alias in node.names] if own else [node.module]
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{module} imports relatively")
        else:
            continue
        for name in names:
            if name.split(".")[0] == "fastsae":
                yield name, id(node) not in lazy


def test_layers_never_point_up() -> None:
    wrong = []
    seen = 0
    for module, path in sources():
        own = layer(module)
        assert own in LAYERS, f"{module} has no layer: add it to LAYERS"
        for name, at_top in imports(path, module):
            target = layer(name)
            seen += 1
            if target not in LAYERS:  # a name of the package itself, e.g. `from fastsae import SAE`
                target = "__init__"
            same_family = own == target and (own in FAMILIES or own in ("__init__", "__main__"))
            up = LAYERS[target] > LAYERS[own] or (LAYERS[target] == LAYERS[own] > 0 and not same_family)
            helper = own == "testing" and not at_top and name in ("fastsae.ops._common",)  # the score, not an operation
            late = target in LAZY_LEAVES and own == "ops" and at_top
            helper |= name == "fastsae.__version__" and not at_top
            if (up and not helper) or late:
                wrong.append(f"{module} imports {name}{'' if at_top else ' (in a function)'}")
    assert not wrong, "\n".join(wrong)
    assert seen > 30


def test_kernels_and_the_extension_are_named_by_dispatch_strings_only() -> None:
    for module, path in sources():
        if layer(module) in ("ops", "dispatch", "sae", "__init__", "latents", "activations"):
            for name, _ in imports(path, module):
                assert layer(name) not in ("kernels", "native", "_C"), f"{module} imports {name}"


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
    code = "import time, torch; start = time.process_time(); import fastsae; print(time.process_time() - start)"
    best = min(float(run(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(4)) * 1e3
    print(f"import fastsae on top of torch: {best:.0f} ms of CPU time (target 50 ms)")
    assert best < 150


def test_public_names() -> None:
    assert len(set(fastsae.__all__)) == len(fastsae.__all__)
    for name in fastsae.__all__:
        value = getattr(fastsae, name)
        assert value.__doc__, f"{name} has no documentation"
    for name in fastsae.__all__:
        assert name in fastsae.__doc__ or name[0].isupper(), f"the package's documentation does not mention {name}"
