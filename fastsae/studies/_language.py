"""The models that the demo and studies of language read, with their text; dictionaries of them, and what their features say."""

from __future__ import annotations

import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastsae import SAE, TopK, Trainer
from fastsae.lm import Edit, harvest, packaged, splice, token_windows
from fastsae.lm.hooks import call
from fastsae.optim import Adam, warmup_linear_decay
from fastsae.polytopes import Net, as_net, mlp_block
from fastsae.store import ActivationShards, LatentStore, LatentWriter
from fastsae.studies import Study
from fastsae.superposition import SuperpositionData


@dataclass(frozen=True)
class Language:
    """A model of language with text.

    Attributes:
        model: the output of a causal one holds logits. layer: name of a layer's residual stream, with the layer's number to be filled in.
        special: tokens that begin and, of two, end every window. texts: documents, texts or token ids. tokenizer: of the texts, or None.
        causal: whether it predicts the next token. truth: the directions that its activations are made of, where they are known.
    """

    model: nn.Module
    layer: str
    special: list[int]
    texts: list[Any]
    tokenizer: Any = None
    causal: bool = True
    truth: Tensor | None = None

    def split(self, training: int, held: int, context: int) -> tuple[Tensor, Tensor]:
        """Windows ``[n, context]`` of at least so many tokens beside special ones each: to train on, and evenly spaced ones to judge by."""
        counts = [-(-tokens // (context - len(self.special))) for tokens in (training, held)]
        bos, ends = next(iter(self.special), None), torch.tensor(self.special[1:], dtype=torch.int64, device="cpu")
        windows = token_windows(self.texts, context - len(ends), self.tokenizer, bos=bos, most=sum(counts))
        if len(windows) < sum(counts):
            raise ValueError(f"study: the text has {len(windows)} windows of {context} tokens, {sum(counts)} are asked for")
        windows = torch.cat([windows, ends.expand(len(windows), -1)], 1)
        chosen = torch.zeros(len(windows), dtype=torch.bool, device="cpu")
        chosen[torch.linspace(0, len(windows) - 1, counts[1] + 2, dtype=torch.float64, device="cpu").long()[1:-1]] = True
        return windows[~chosen], windows[chosen]

    def word(self, token: int) -> str:
        if self.tokenizer is None:
            return f"<{token}>"
        word = self.tokenizer.decode([token])
        return word if len(self.special) < 2 else word.removeprefix("##") if word.startswith("##") else f" {word}"  # two: WordPiece

    def mlp_input(self, layer: int) -> str:
        """The hook where the residual stream enters a layer's MLP."""
        kinds = {"layers": ".0:input", "encoder": ".intermediate.dense:input", "model": ".post_attention_layernorm:input"}
        return self.layer.format(layer) + kinds[self.layer.partition(".")[0]]

    @torch.no_grad()
    def logits(self, windows: Tensor) -> Tensor:
        output = call(self.model, windows, None)
        return (output if isinstance(output, Tensor) else output.logits).float()


def language(study: Study) -> Language:
    """What ``study["source"]`` says. ImportError: a package is missing, with what to install.

    "smollm2", "minilm"; "random": a tiny untrained model; "superposition": no language, but sparse combinations of twice as many random
    unit features as dimensions, 5 active on average (after Sharkey, Braun & Millidge 2022); token i is sample i, and its word the strongest
    feature in it.
    """
    source, rows = study["source"], study["train_tokens"] + study["held_tokens"]
    if source == "random":
        vocabulary, width, options = 97, 16, dict[str, Any](dtype=torch.float32, device="cpu")
        with torch.random.fork_rng():
            torch.manual_seed(study.seed)
            layers = nn.Sequential(*(nn.Sequential(nn.Linear(width, width, **options), nn.GELU()) for _ in range(2)))
            embed, head = nn.Embedding(vocabulary, width, **options), nn.Linear(width, vocabulary, **options)
        model = nn.Sequential(OrderedDict(embed=embed, layers=layers, head=head)).eval()
        ids = torch.randint(1, vocabulary, (4096,), generator=study.generator(1), device="cpu")
        return Language(model, "layers.{}", [0], [ids.tolist()])
    if source == "superposition":
        width, rows = study["width"], rows + 256
        data = SuperpositionData(2 * width, width, mean_active=5, rate=0.99, seed=study.seed)
        x, latents, _ = data.sample(rows)
        strongest = latents.to_dense().argmax(1)
        with torch.random.fork_rng():
            torch.manual_seed(study.seed)
            mlp = nn.Sequential(nn.Linear(width, 6 * width, dtype=torch.float32, device="cpu"), nn.ReLU())
        model = nn.Sequential(OrderedDict(x0=nn.Embedding.from_pretrained(x), x0_mlp=mlp))
        words = SimpleNamespace(decode=lambda ids: f"feature {strongest[ids[0]]}; ")
        return Language(model, "x{}", [], [list(range(rows))], words, False, data.features)
    model, tokenizer = packaged.load(source)
    texts = packaged.documents(8 * rows)
    if source == "minilm":
        return Language(model, "encoder.layer.{}", [tokenizer.cls_token_id, tokenizer.sep_token_id], texts, tokenizer, False)
    return Language(model, "model.layers.{}", [tokenizer.bos_token_id], texts, tokenizer)


def train(
    study: Study,
    shards: ActivationShards,
    hook: str,
    kind: Any,
    file: Path,
    seed: int = 0,
    features: int | None = None,
    watch: Callable[[int, SAE], object] | None = None,
    **options: Any,
) -> SAE:
    """One dictionary of a layer, from its shards; ``file``: its checkpoint, from which it goes on. features: None: ``study["features"]``.
    watch: called every ``log_every`` steps. options: of ``Trainer``."""
    steps, d = study["steps"], shards.columns[hook][1][0]
    batches = shards.batches(study["batch"], hook, seed=seed, dtype=torch.float32)
    first = shards.read(0, min(shards.rows, 16_384), [hook])[hook].float()
    sae = SAE(d, features or study["features"], kind, dead_after=study["batch"] * max(1, steps // 4), seed=seed).init_from(
        first, norm="rms"
    )
    opt = Adam(sae, lr=study["lr"], betas=(0.9, 0.99), schedule=warmup_linear_decay(max(1, steps // 20), steps // 2, steps))
    if watch is not None:
        options["callback"] = lambda step, _: watch(step, sae)
    trainer = Trainer(sae, opt, progress=study.progress, checkpoint=file, every=50, **options)
    trainer.fit(batches, steps, resume=file.exists())
    return sae.fold_().eval()


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
        rows.append(row | (ablated(found, hook, sae, feature, windows[top.sequence[: study["ablated"]].unique()]) if found.causal else {}))
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
    return {"nats_there": float(divergence(clean, changed)[fires].mean()) if bool(fires.any()) else 0.0}


def divergence(clean: Tensor, changed: Tensor) -> Tensor:
    """``[..]``: KL(clean || changed) of the distributions with logits ``[.., V]``."""
    return nn.functional.kl_div(changed.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class IntoMlp:
    """The residual stream where it enters an MLP, and a dictionary of it.

    Attributes:
        net: the MLP as a function of x. hook: where x is. training: what the dictionary ``sae`` (TopK) was trained on. windows: others.
        x: ``[N, D]``, their rows. tokens: ``[N]``.
    """

    found: Language
    net: Net
    hook: str
    training: ActivationShards
    windows: Tensor
    x: Tensor
    tokens: Tensor
    sae: SAE


def into_mlp(study: Study) -> IntoMlp:
    """Of ``study["layer"]``; the dictionary has ``study["features"]`` and ``study["k"]``."""
    found = language(study)
    windows, held = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    layer = found.layer.format(study["layer"])
    random = study["source"] == "random"
    net = as_net(found.model.get_submodule(layer)) if random else mlp_block(found.model, study["layer"])
    hook = found.mlp_input(study["layer"])
    options: dict[str, Any] = {"ignore": found.special, "dtype": torch.float32, "progress": study.progress}
    shards = harvest(found.model, windows, hook, study.parts / "activations", **options)
    sae = train(study, shards, hook, TopK(study["k"]), study.parts / "dictionary", study.seed)
    rows = harvest(found.model, held, hook, study.parts / "held", **options)
    x, tokens = rows.read(0, rows.rows, [hook, "token"]).values()
    return IntoMlp(found, net, hook, shards, held, x, tokens, sae)
