"""The language model that studies read: SmolLM2-135M from the package index, and a tiny random one to see whether a study runs."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsae import SAE
from fastsae.lm import Edit, packaged, splice, token_windows
from fastsae.lm.hooks import call
from fastsae.store import ActivationShards, LatentStore, LatentWriter
from fastsae.studies import Study


def held_out(windows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Windows to train on, and ``count`` evenly spaced ones to judge by."""
    chosen = torch.zeros(len(windows), dtype=torch.bool, device="cpu")
    chosen[torch.linspace(0, len(windows) - 1, count + 2, dtype=torch.float64, device="cpu").long()[1:-1]] = True
    return windows[~chosen], windows[chosen]


@dataclass(frozen=True)
class Language:
    """A model of language with text.

    Attributes:
        model: the output of a causal one holds logits. layer: name of a layer's residual stream, with the layer's number to be filled in.
        bos: begins every window. texts: documents, texts or token ids. tokenizer: of the texts, or None. causal: whether it predicts
            the next token.
    """

    model: nn.Module
    layer: str
    bos: int
    texts: Sequence[Any] = ()
    tokenizer: Any = None
    causal: bool = True

    def split(self, training: int, held: int, context: int) -> tuple[Tensor, Tensor]:
        """``held_out`` windows ``[n, context]`` of at least so many tokens beside BOS each."""
        counts = [-(-tokens // (context - 1)) for tokens in (training, held)]
        windows = token_windows(self.texts, context, self.tokenizer, bos=self.bos, most=sum(counts))
        if len(windows) < sum(counts):
            raise ValueError(f"study: the text has {len(windows)} windows of {context} tokens, {sum(counts)} are asked for")
        return held_out(windows, counts[1])

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
    model, tokenizer = packaged.load("smollm2")
    return Language(model, "model.layers.{}", tokenizer.bos_token_id, packaged.documents(10**9), tokenizer)


@torch.no_grad()
def name_features(study: Study, found: Language, shards: ActivationShards, hook: str, sae: SAE, windows: Tensor) -> list[dict[str, Any]]:
    """Features at even steps of density, each with the tokens on which it is largest and, of a causal model, what ablating it does there.

    windows: those that the first rows of the shards come from; of each as many tokens are left out.
    """
    folder = study.out / "latents"
    shutil.rmtree(folder, ignore_errors=True)
    context = int((shards.read(0, min(shards.rows, windows.shape[1]), ["sequence"])["sequence"] == 0).sum())
    with LatentWriter(folder, sae.d_sae, context) as writer:
        for first in study.track(range(0, len(windows), 32), "latents"):
            last = min(first + 32, len(windows))
            part = shards.read(first * context, last * context, [hook, "token"])
            writer.append(sae.encode(part[hook].float().view(last - first, context, -1)), part["token"].view(last - first, context))
    store = LatentStore(folder)
    fired = store.fired()
    least = min(20, int(fired.max()))
    often = (fired >= least).nonzero().flatten()
    often = often[fired[often].argsort(stable=True)]
    chosen = often[torch.linspace(0, len(often) - 1, study["named"] + 2, dtype=torch.float64, device="cpu").round().long()[1:-1].unique()]
    rows: list[dict[str, Any]] = []
    for feature in study.track(chosen.tolist(), "features"):
        top = store.top(feature, 20, before=6, after=2)
        peaks = Counter(found.word(token) for token in top.tokens[:, 6].tolist())
        example = "".join(
            found.word(token) if at != 6 else f"[{found.word(token)}]" for at, token in enumerate(top.tokens[0].tolist()) if token >= 0
        )
        row = {"feature": feature, "fires_on": int(fired[feature]) / store.rows}
        row["peaks"] = ", ".join(f"{word.strip()!r} {n}" for word, n in peaks.most_common(3))
        row["example"] = " ".join(example.split())
        rows.append(row | (ablated(found, hook, sae, feature, windows[top.sequence[:8].unique()]) if found.causal else {}))
    shutil.rmtree(folder)
    return rows


def ablated(found: Language, hook: str, sae: SAE, feature: int, windows: Tensor) -> dict[str, float]:
    """``nats_there``: mean KL of the next token's distribution on the tokens where the feature fires, without it."""
    clean = found.logits(windows)
    with splice(found.model, {hook: sae}, edit={hook: [Edit([feature])]}) as seen:
        changed = found.logits(windows)
    latents: Any = seen.latents[hook]
    fires = ((latents.indices == feature) & (latents.values != 0)).any(-1)
    fires[:, 0] = False  # BOS, which the dictionary has not seen
    kl = torch.nn.functional.kl_div(changed.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return {"nats_there": float(kl[fires].mean()) if bool(fires.any()) else 0.0}


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
        self.linear, self.activation = linear, nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.linear(x))
