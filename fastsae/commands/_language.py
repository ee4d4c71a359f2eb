"""What the commands of language models share: their options, models, text as windows of tokens, dictionaries from files."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._core import files
from fastsae._core.checkout import checkout_hidden
from fastsae._core.extras import needed
from fastsae.formats import weight_files
from fastsae.lm import token_windows
from fastsae.sae import SAE
from fastsae.sae.checkpoints import load_checkpoint
from fastsae.store.columns import map_safetensors

WINDOWS = "tokens.safetensors"
"""Beside the shards of ``fastsae harvest``: the windows that it ran over, with the tokens that have no row."""

_ENDINGS = (".txt", ".md", ".rst", ".py", ".jsonl")


def add_arguments(parser: argparse.ArgumentParser, batch: int) -> None:
    """Model and text: what ``model_of`` and ``windows_of`` read."""
    parser.add_argument("model", metavar="MODEL", help="name or folder of a Hugging Face model")
    known = f'files or folders ({", ".join(_ENDINGS)} with "text"), or a folder of `fastsae harvest`'
    parser.add_argument("text", nargs="*", type=Path, metavar="TEXT", help=known)
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="name (and configuration) of a data set instead, its column text")
    parser.add_argument("--split", default="train", help="of the data set (default: train)")
    parser.add_argument("--lines", action="store_true", help="every line of a text file is a document (default: the file is one)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a window (default: 128)")
    parser.add_argument("--tokens", type=int, metavar="N", help="at most so many (default: all of the text)")
    parser.add_argument("--batch", type=int, default=batch, help=f"windows a forward call (default: {batch})")
    parser.add_argument("--gguf", metavar="FILE", help="the model is this GGUF file of its folder")
    special = parser.add_mutually_exclusive_group()
    special.add_argument("--ignore-special", action="store_true", help="leave BOS and other special tokens out (the default)")
    special.add_argument("--keep-special", action="store_true", help="count them as any other token")
    parser.add_argument("--model-dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default: float32")
    parser.add_argument("--device", help="of the model (default: cuda where there is one, else cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def tokenizer_of(name: str, gguf: str | None = None) -> Any:
    """A tokeniser of Hugging Face; ImportError where transformers is not installed."""
    with checkout_hidden():
        tokenizer = _transformers().AutoTokenizer.from_pretrained(name, **_file(gguf))
    tokenizer.model_max_length = 1 << 40  # documents are cut into windows: a longer one is no reason to warn
    return tokenizer


def model_of(options: argparse.Namespace, *, logits: bool) -> Any:
    """The model on its device. ``logits``: one that predicts tokens; else what the configuration names, a plain encoder too."""
    with checkout_hidden():
        transformers = _transformers()
        file, kind = _file(options.gguf), transformers.AutoModelForCausalLM
        if not logits and not file:
            made_for = transformers.AutoConfig.from_pretrained(options.model).architectures or ["ForCausalLM"]
            if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in made_for):
                kind = transformers.AutoModel
        model = kind.from_pretrained(options.model, dtype=getattr(torch, options.model_dtype), **file)
    return model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _file(gguf: str | None) -> dict[str, str]:
    return {} if gguf is None else {"gguf_file": gguf}


def _transformers() -> Any:
    return needed("transformers", "models and tokenisers need transformers", "lm")


def windows_of(options: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, list[int]]:
    """(``[sequences, context]`` int64, ids that are left out) of what TEXT or ``--dataset`` names."""
    ignored = [] if options.keep_special else sorted(set(tokenizer.all_special_ids))
    harvested = [path for path in options.text if (path / WINDOWS).is_file()]
    if harvested:
        if len(options.text) > 1 or options.dataset:
            raise ValueError(f"TEXT must be one folder of `fastsae harvest` or texts, got {harvested[0]} and more")
        windows = read_windows(harvested[0])
        if options.context not in (None, windows.shape[1]):
            raise ValueError(f"--context must be that of {harvested[0]}, {windows.shape[1]}, got {options.context}")
        return windows if options.tokens is None else windows[: max(1, options.tokens // windows.shape[1])], ignored
    if bool(options.text) == bool(options.dataset):
        raise ValueError("give TEXT or --dataset")
    texts = _of_dataset(options.dataset, options.split) if options.dataset else _of_files(options.text, options.lines)
    context = 128 if options.context is None else options.context
    most = None if options.tokens is None else max(1, options.tokens // max(context, 1))
    return token_windows(texts, context, tokenizer, most=most), ignored


def write_windows(folder: Path, windows: Tensor) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / WINDOWS, lambda part: save_file({"tokens": windows.to(torch.int32)}, part))


def read_windows(folder: Path) -> Tensor:
    return map_safetensors(folder / WINDOWS).columns["tokens"].long()


def _of_files(paths: Iterable[Path], lines: bool) -> Iterator[str]:
    for path in paths:
        inside = [path] if not path.is_dir() else sorted(p for p in path.rglob("*") if p.suffix in _ENDINGS and p.is_file())
        if not inside:
            raise FileNotFoundError(f"{path} holds no {', '.join(_ENDINGS)} files")
        for file in inside:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} must be text in UTF-8: {error}") from error
            if file.suffix == ".jsonl":
                yield from (_text_of(file, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
            elif lines:
                yield from (line for line in text.splitlines() if line.strip())
            else:
                yield text


def _text_of(file: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}, line {number}, must be a JSON object with "text": {error!r}') from error
    if not isinstance(text, str):
        raise ValueError(f'{file}, line {number}: "text" must be a text, got {type(text).__name__}')
    return text


def _of_dataset(names: list[str], split: str) -> Iterator[str]:
    try:
        with checkout_hidden():
            import datasets
    except ImportError as error:
        raise ImportError("--dataset needs datasets: pip install datasets") from error
    loaded: Any = datasets.load_dataset(*names, split=split, streaming=True)
    for row in loaded:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"--dataset {names[0]}: its rows must have a column text, got {', '.join(row)}")
        yield row["text"]


def dictionary_of(source: str) -> SAE:
    """What ``SAE.from_pretrained`` reads, or a checkpoint; in evaluation mode."""
    if not is_checkpoint(Path(source)):
        return SAE.from_pretrained(source)
    sae = load_checkpoint(source).sae
    if not isinstance(sae, SAE):
        raise ValueError(f"{source} must hold one dictionary, got a stack of {len(sae)}")
    return sae.eval()


def is_checkpoint(path: Path) -> bool:
    """Whether ``save_checkpoint`` wrote it."""
    if not path.is_file() or path.suffix not in (".pt", ".pth"):
        return False
    content, _ = weight_files.load(path)
    return isinstance(content, dict) and {"config", "sae", "extra"} <= content.keys()


def digest_of(sae: SAE) -> str:
    """SHA-256 of what encodes: a store knows whose latents it holds."""
    found = hashlib.sha256(json.dumps(sae.config(), sort_keys=True).encode())
    for name, tensor in sae.state_dict().items():
        if name != "silent":
            found.update(name.encode() + memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()
