"""A small language model and its tokeniser, which several test files run, and a stand-in for transformers that gives them."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, WIDTH = 128, 16


class Model(nn.Module):
    """A residual stream of three layers in which a token sees those before it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x.cumsum(1) / 4).tanh()
        return self.head(x)


class Letters:
    """A token a letter; 1 begins a window, 2 ends a document."""

    bos_token_id, eos_token_id, all_special_ids, model_max_length = 1, 2, (1, 2), 4

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % VOCAB for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{token}>" if token < 3 else chr(token) for token in ids)


def transformers(**changes: Any) -> Any:
    """What the commands ask of the package, for a model of any name."""

    class Auto:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> Any:
            if name == "nowhere":
                raise OSError("nowhere is not a local folder and is not a valid model identifier")
            return types.SimpleNamespace(architectures=["ToyForCausalLM"])

    class AutoModel(Auto):
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> Any:
            Auto.from_pretrained(name)
            return Model()

    class AutoTokenizer(Auto):
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> Any:
            Auto.from_pretrained(name)
            return Letters()

    package = types.ModuleType("transformers")
    vars(package).update(AutoConfig=Auto, AutoModel=AutoModel, AutoModelForCausalLM=AutoModel, AutoTokenizer=AutoTokenizer, **changes)
    return package
