"""What the studies of polytopes look at: a classifier of scikit-learn's digits, and the MLP of all-MiniLM-L6-v2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsae._core.extras import needed
from fastsae.lm import harvest, packaged
from fastsae.polytopes import Net, as_net, mlp_block
from fastsae.studies import Study


@dataclass(frozen=True)
class Digits:
    """A ReLU classifier of 8 x 8 digits (pixels 0 .. 1), before and after training, with the images that it was not trained on.

    Attributes:
        net, untrained: logits of 10 classes. x: ``[N, 64]``. y: ``[N]``. accuracy: on x. seen: what it was trained on.
    """

    net: Net
    untrained: Net
    x: Tensor
    y: Tensor
    accuracy: float
    seen: Tensor

    def predict(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(-1)


def digits(study: Study, hidden: Sequence[int] = (), channels: Sequence[int] = ()) -> Digits:
    """Trains ReLU layers (default ``study["hidden"]``) for ``study["epochs"]``: Adam (1e-3, decay 1e-4), batches of 64, 2/3 of the images.

    channels: those of 3 x 3 convolutions with ReLU, at all 64 places, instead of the hidden layers."""
    found = needed("sklearn.datasets", "the digits need scikit-learn", "studies").load_digits()
    x, y = torch.tensor(found.data / 16, dtype=torch.float32, device="cpu"), torch.tensor(found.target, device="cpu")
    order = torch.randperm(x.shape[0], generator=study.generator(1), device="cpu")
    train, test = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
    typed: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    with torch.random.fork_rng():
        torch.manual_seed(study.seed)
        widths = [64, *(hidden or study["hidden"])] if not channels else [1, *channels]
        module = nn.Sequential()
        for before, after in pairwise(widths):
            module.append(nn.Conv2d(before, after, 3, padding=1, **typed) if channels else nn.Linear(before, after, **typed))
            module.append(nn.ReLU())
        module.extend([nn.Flatten(), nn.Linear((64 if channels else 1) * widths[-1], 10, **typed)])
    net = as_net(module, input_shape=(1, 8, 8) if channels else None)
    untrained = net.to(torch.float64).to(torch.float32)  # with parameters of its own, which training does not change
    optimiser = torch.optim.Adam(module.parameters(), 1e-3, weight_decay=1e-4)
    shuffle = study.generator(2)
    for _ in study.track(range(study["epochs"]), "training"):
        for batch in train[torch.randperm(len(train), generator=shuffle, device="cpu")].split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    module.requires_grad_(False)
    accuracy = float((net(x[test]).argmax(1) == y[test]).float().mean())
    return Digits(net, untrained, x[test], y[test], accuracy, x[train])


def lines(axis: Any, rows: list[dict[str, Any]], by: str, x: str, y: str, **options: Any) -> None:
    """A line of (x, y) for each value of ``by``; options of the axis."""
    for label in dict.fromkeys(row[by] for row in rows):
        axis.plot(*zip(*((row[x], row[y]) for row in rows if row[by] == label)), "o-", ms=4, label=label)
    axis.set(**options)


def pairs(y: Tensor, count: int, generator: torch.Generator, same: bool) -> tuple[Tensor, Tensor]:
    """``count`` random pairs of rows of the same or of different classes."""
    first: list[Tensor] = []
    second: list[Tensor] = []
    while sum(map(len, first)) < count:
        a, b = torch.randint(len(y), (2, 4 * count + 16), generator=generator, device="cpu")
        keep = ((y[a] == y[b]) == same) & (a != b)
        first.append(a[keep])
        second.append(b[keep])
    return torch.cat(first)[:count], torch.cat(second)[:count]


@dataclass(frozen=True)
class Tokens:
    """Inputs of an MLP, with what each of them is.

    Attributes:
        net: the MLP, without residual. x: ``[N, D]``, its inputs. kind: ``[N]`` int64. names: of kinds.
    """

    net: Net
    x: Tensor
    kind: Tensor
    names: list[str]


def tokens(study: Study, source: str, layers: Sequence[int]) -> list[Tokens]:
    """One for each layer. source: "minilm": of ``study["tokens"]`` tokens of text the whole words that occur ``study["each"]`` times or
    more, that many of each. "digits": hidden layers of the classifier, for runs without a model."""
    if source == "digits":
        one, kinds = digits(study), list("0123456789")
        stages = one.net.stages
        return [Tokens(Net(stages[2 * n : 2 * n + 3]), Net(stages[: 2 * n])(one.x), one.y, kinds) for n in layers]
    model, tokenizer = packaged.load("minilm")
    model.requires_grad_(False)
    special, hooks = [tokenizer.cls_token_id, tokenizer.sep_token_id], [f"encoder.layer.{n}.intermediate.dense:input" for n in layers]
    with TemporaryDirectory() as folder:
        windows = packaged.minilm_windows(tokenizer, study["tokens"])
        data = harvest(model, windows, hooks, folder, ignore=special, batch=32, progress=study.progress)
        token, *x = data.read(0, data.rows, ["token", *hooks]).values()
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    word = torch.tensor([token.isalpha() and len(token) >= 3 for token in vocabulary], device="cpu")
    rows = word[token.long()].nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=study.generator(3), device="cpu")]
    _, inverse, counts = token[rows].unique(return_inverse=True, return_counts=True)
    order = inverse.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device="cpu") - (counts.cumsum(0) - counts)[inverse[order]]
    rows = rows[(counts[inverse] >= study["each"]) & (rank < study["each"])]
    kinds, kind = token[rows].unique(return_inverse=True)
    names = [vocabulary[kind] for kind in kinds.tolist()]
    return [Tokens(mlp_block(model, n, residual=False), inputs[rows], kind, names) for n, inputs in zip(layers, x)]
