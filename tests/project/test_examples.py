"""What docstrings show runs as it stands, with ``torch``, ``fastsae`` and the names of its module."""

from __future__ import annotations

import ast
import doctest
import importlib
import warnings

import peers
import pytest
import torch
from package_sources import sources

import fastsae

FEWER = {
    "[0.05, 0.1, 0.2]": "[0.1]",
    "[64, 128, 256]": "[64]",
    'stop="converged"': "stop=3",
    "toy_model_features(64, 16, density=0.05)": "toy_model_features(64, 16, density=0.05, steps=9)",
    "fastsae.SAE(4096, 2**20, fastsae.TopK(64), seed=0)": "fastsae.SAE(16, 64, fastsae.TopK(4), seed=0)",
}
"""Sizes that a test has no time for."""

EXAMPLES = [
    (f"{module}:{node.name}", module, "".join(example.source for example in found))
    for module, path in sources()
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ClassDef | ast.FunctionDef)
    and (found := doctest.DocTestParser().get_examples(ast.get_docstring(node) or ""))
    and module != "fastsae.distributed.module"  # needs torchrun
]


@pytest.mark.parametrize(("module", "text"), [example[1:] for example in EXAMPLES], ids=[example[0] for example in EXAMPLES])
def test_example_runs(module: str, text: str) -> None:
    if "sparsify" in text:
        peers.load("sparsify", "eai-sparsify")
    for word, name in (("sklearn", "sklearn"), ("sweep(", "pandas"), ("SciPy", "scipy")):
        if word in text:
            pytest.importorskip(name)
    for much, little in FEWER.items():
        text = text.replace(much, little)
    names = {**vars(importlib.import_module(module)), "fastsae": fastsae, "torch": torch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for line in ast.parse(text).body:
            exec(compile(ast.Module([line], []), module, "exec"), names)
