"""How good a dictionary of a model is: reconstruction, sparsity, and what the model loses where the dictionary takes a module's place."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae._core.progress import track
from fastsae.lm.harvesting import SeenAll, evaluating, kept_positions
from fastsae.lm.hooks import call, find, first_tensor, plain, watch
from fastsae.patch import is_transcoder, reconstruct, report
from fastsae.plots import feature_density
from fastsae.sae import SAE
from fastsae.store.latents import entries_of

_DENSE = 0.1
"""A feature that fires on more than this share of the tokens is dense."""
_LOGITS = 1 << 20
"""Logits that are compared at a time: what is computed of them stays in a cache."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What ``evaluate`` measured.

    Attributes:
        values: by name, as below. errors: their standard errors over sequences, where there is one.
        density: ``[F]`` float64, the share of the tokens on which each feature fires. fired: ``[F]`` int64, on how many.
        sequences: ``[F]`` int64, in how many sequences each feature fires.
        tokens: tokens that counted.

    The values, means over tokens unless said otherwise:

    ================================  ============================================================================================
    ``fvu``, ``explained_variance``   squared error over the variance about the mean of all tokens; 1 minus it (SAELens)
    ``mse``, ``cosine``               squared error summed over dimensions; cosine of activation and reconstruction
    ``l2_in``, ``l2_out``             norms of the activation and of the reconstruction; ``l2_ratio``: the second over the first
    ``reconstruction_bias``           mean squared norm of the reconstruction over the mean of its product with the activation
                                      (Rajamanoharan et al. 2024, equation 10), over all tokens (SAELens averages it over batches)
    ``l0``, ``l1``                    latents that are not 0; sum of their magnitudes
    ``dead``, ``dense``               features (a count) that never fire; that fire on more than a tenth of the tokens
    ``ce_clean``, ``ce_spliced``      cross-entropy of the next token in nats: of the model; with the reconstruction in the module's place
    ``ce_zero``, ``ce_mean``          with the module ablated
    ``ce_recovered``                  ``(ce_zero - ce_spliced) / (ce_zero - ce_clean)``; ``ce_recovered_mean`` against ``ce_mean``
    ``kl_spliced``, ``kl_zero``, ..   KL(model || changed model) in nats; ``kl_recovered``: ``1 - kl_spliced / kl_zero``
    ================================  ============================================================================================

    Equal to SAELens 6.54's ``run_evals`` and SAEBench 0.6's core on the same tokens and mask, to float32 rounding, but for what depends
    there on the batches: both average ``relative_reconstruction_bias`` over them and have an ``explained_variance_legacy`` of each one's
    variance; SAEBench's ``mse`` is divided by the tokens of the batch. SAEBench's ``explained_variance`` subtracts squares of mean squares,
    which is no variance: SAELens's is ours. SAEBench keeps special tokens with ``exclude_special_tokens_from_reconstruction``, as here.
    """

    values: dict[str, float]
    errors: dict[str, float]
    density: Tensor
    fired: Tensor
    sequences: Tensor
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Values, errors and the number of tokens, as JSON holds them."""
        return {"tokens": self.tokens, "values": self.values, "errors": self.errors}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        lines = [f"{self.tokens} tokens"]
        for name, value in self.values.items():
            error = f"  ± {self.errors[name]:.2g}" if name in self.errors else ""
            lines.append(f"{name:<28} {value:12.6g}{error}")
        return "\n".join(lines)

    def histogram(self, bins: int = 50) -> tuple[Tensor, Tensor]:
        """(edges ``[bins + 1]``, counts ``[bins]``): features by log10 of their density, from one token in all to every one; the dead ones
        are left out."""
        edges = torch.linspace(
            -math.log10(max(self.tokens, 2)), 0, checks.integer("histogram", "bins", bins, 1) + 1, dtype=torch.float64, device="cpu"
        )
        return edges, torch.histogram(self.density[self.density > 0].log10().clamp_max(0), edges).hist.long()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the densities. Needs matplotlib (extra ``plot``)."""
        feature_density({"dictionary": self.fired}, self.tokens, path)


class _Means:
    """Token-weighted means of several values a token, with their standard errors over sequences."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}
        self.counts: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, keep: Tensor) -> None:
        """``values [sequences, positions]``, of which ``keep`` counts."""
        self.sums.setdefault(name, []).append(torch.where(keep, values.double(), 0.0).sum(1).cpu())
        self.counts.setdefault(name, []).append(keep.sum(1).double().cpu())

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """(sum, count) of each sequence."""
        return torch.cat(self.sums[name]), torch.cat(self.counts[name])

    def ratio(self, over: Tensor, under: Tensor) -> tuple[float, float]:
        """``sum(over) / sum(under)`` of numbers a sequence, and its standard error by linearisation."""
        value = float(over.sum() / under.sum())
        n = len(over)
        if n < 2:
            return value, math.nan
        return value, float((over - value * under).square().sum().mul(n / (n - 1)).sqrt() / under.sum().abs())


def evaluate(
    sae: Any,
    model: Any,
    tokens: Tensor,
    hook: str,
    *,
    mask: Tensor | None = None,
    ignore: Iterable[int] = (),
    ablations: Sequence[str] = ("zero",),
    batch: int = 8,
    progress: bool = True,
    callback: Callable[[Evaluation], object] | None = None,
) -> Evaluation:
    """Measures a dictionary on a model's own activations and in the model's place.

    Args:
        sae: an ``SAE`` or transcoder of this library, or of SAELens, sparsify or dictionary_learning; in evaluation mode meanwhile.
        model: a language model whose output is logits ``[batch, context, vocabulary]``, or an object or tuple that holds them first: of
            Hugging Face, TransformerLens or nnsight.
        tokens, mask, ignore, batch, progress: as in ``fastsae.lm.harvest``. Padding and ignored tokens are neither replaced nor counted.
        hook: the module, as in ``fastsae.lm.splice``.
        ablations: what the loss is compared to: "zero" (the module gives 0 at every position) and "mean" (its mean over the tokens that
            count; that costs a pass more, which ends at the module).
        callback: called after each batch with the ``Evaluation`` so far; a true result ends there, and that one is returned.

    Each batch costs one forward call of the model, one with the reconstruction, and one an ablation. No dense latents are formed.

    Returns: ``Evaluation``, whose docstring says what each value is.

    Raises: TypeError, ValueError: as ``splice``; no position counts.
    """
    op = "evaluate"
    model = plain(op, model)
    (point,) = find(op, model, hook)
    if not isinstance(sae, SAE):
        report(sae)  # TypeError of what no adapter knows
    ablations = list(ablations)
    if unknown := [name for name in ablations if name not in ("zero", "mean")]:
        raise ValueError(f"{op}: ablations must be of zero and mean, got {unknown[0]!r}")
    keep, real = kept_positions(op, tokens, mask, ignore)
    if not bool(keep.any()):
        raise ValueError(f"{op}: no position counts: mask and ignore leave nothing of {list(tokens.shape)}")
    batch = checks.integer(op, "batch", batch, 1)
    state = _State(sae, point.is_input or not is_transcoder(sae))

    def parts(label: str) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """(ids, positions that are no padding or None, positions that count) of a batch at a time, on the model's device."""
        device = next(model.parameters(), tokens).device
        for start in track(range(0, len(tokens), batch), label, progress):
            part = slice(start, start + batch)
            yield tokens[part].to(device), None if real is None else real[part].to(device), keep[part].to(device)

    with torch.no_grad(), evaluating(model), contextlib.ExitStack() as stack:
        if isinstance(sae, nn.Module):
            stack.enter_context(evaluating(sae))
        stack.callback(point.module.register_forward_pre_hook(state.read, with_kwargs=True).remove)
        stack.callback(watch(point, state.at_hook).remove)
        if "mean" in ablations:
            state.mean = _mean(model, state, parts("mean"))
        for ids, padding, kept in parts("evaluate"):
            state.replace = None
            clean = _logits(call(model, ids, padding)).log_softmax(-1, dtype=torch.float32)
            state.measure(kept)
            state.means.add("ce_clean", _cross_entropy(clean[:, :-1], ids[:, 1:]), kept[:, :-1])
            for name in ("spliced", *ablations):
                state.replace = name
                state.model_loss(name, clean, _logits(call(model, ids, padding)), ids, kept)
            if callback is not None and callback(state.result(ablations)):
                break
    return state.result(ablations)


def _mean(model: nn.Module, state: _State, parts: Iterator[tuple[Tensor, Tensor | None, Tensor]]) -> Tensor:
    """Of what the module gives, over the tokens that count."""
    total, count = 0, 0
    state.ends = True
    for ids, padding, kept in parts:
        with contextlib.suppress(SeenAll):
            call(model, ids, padding)
        rows = state.seen()[1][kept].double()
        total, count = total + rows.sum(0), count + len(rows)
    state.ends = False
    assert isinstance(total, Tensor)
    return total / count


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else first_tensor(output)


def _cross_entropy(log_q: Tensor, targets: Tensor) -> Tensor:
    return -log_q.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)


class _State:
    """One evaluation: what the hook sees and gives, and the sums."""

    def __init__(self, sae: Any, same: bool):
        self.sae, self.same = sae, same
        self.replace: str | None = None
        self.ends = False
        self.means = _Means()
        self.mean: Tensor | None = None
        self.fired = self.sequences = self.sum_y = torch.zeros((), dtype=torch.int64, device="cpu")
        self._input: Any = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self._x_hat: Any = None
        self._kept: Any = None

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = first_tensor(args if args else kwargs)

    def at_hook(self, y: Tensor) -> Tensor | None:
        if self.replace is None:
            self._seen = (y if self.same else self._input, y)
            if self.ends:
                raise SeenAll
            return None
        if self.replace == "spliced":
            return torch.where(self._kept[..., None], self._x_hat, y)
        return torch.zeros_like(y) if self.replace == "zero" or self.mean is None else self.mean.to(y.dtype).expand_as(y)

    def seen(self) -> tuple[Tensor, Tensor]:
        """(what the dictionary reads, what it stands for) of the last clean call."""
        assert self._seen is not None, "the model did not call the module"
        return self._seen

    def measure(self, kept: Tensor) -> None:
        """Reconstruction and sparsity of the last clean call."""
        x, y = self.seen()
        found = reconstruct(self.sae, x, target=y) if not self.same else reconstruct(self.sae, x)
        latents = found.latents
        assert latents is not None
        self._x_hat, self._kept = found.x_hat.to(y.dtype), kept
        wide, x_hat = y.float(), found.x_hat.float()
        norm, norm_hat, product = wide.norm(dim=-1), x_hat.norm(dim=-1), (wide * x_hat).sum(-1)
        add = self.means.add
        add("mse", (wide - x_hat).square().sum(-1), kept)
        add("square", wide.square().sum(-1), kept)
        add("cosine", product / (norm * norm_hat), kept)
        add("l2_in", norm, kept)
        add("l2_out", norm_hat, kept)
        add("l2_ratio", norm_hat / norm.masked_fill(norm < 1e-4, 1), kept)
        add("square_hat", norm_hat.square(), kept)
        add("product", product, kept)
        row, feature, values = entries_of(latents)
        active = (values != 0) & kept.flatten()[row]
        row, feature = row[active], feature[active].cpu()
        counts = torch.bincount(row, minlength=kept.numel())
        add("l0", counts.view_as(kept), kept)
        size = torch.zeros(kept.numel(), dtype=torch.float64, device=kept.device).index_add_(0, row, values[active].abs().double())
        add("l1", size.view_as(kept), kept)
        pairs = (row.cpu() // kept.shape[1] * latents.n_features + feature).unique() % latents.n_features
        self.fired = self.fired + torch.bincount(feature, minlength=latents.n_features)
        self.sequences = self.sequences + torch.bincount(pairs, minlength=latents.n_features)
        self.sum_y = self.sum_y + y[kept].double().sum(0).cpu()

    def model_loss(self, name: str, clean: Tensor, logits: Tensor, ids: Tensor, kept: Tensor) -> None:
        """Cross-entropy of the next token where this one counts, and the divergence from the clean model's log-probabilities."""
        next_ids = ids.roll(-1, 1)  # what the last position gets does not count
        rows, step = ids.numel(), max(1, _LOGITS // clean.shape[-1])
        loss, divergence = clean.new_empty(rows), clean.new_empty(rows)
        for part in (slice(start, start + step) for start in range(0, rows, step)):
            log_p, log_q = clean.flatten(0, 1)[part], logits.flatten(0, 1)[part].log_softmax(-1, dtype=torch.float32)
            loss[part] = _cross_entropy(log_q, next_ids.flatten()[part])
            divergence[part] = torch.sub(log_p, log_q, out=log_q).mul_(log_p.exp()).sum(-1)
        self.means.add(f"ce_{name}", loss.view_as(ids)[:, :-1], kept[:, :-1])
        self.means.add(f"kl_{name}", divergence.view_as(ids), kept)

    def result(self, ablations: Sequence[str]) -> Evaluation:
        m = self.means
        values: dict[str, float] = {}
        errors: dict[str, float] = {}

        def put(name: str, over: Tensor, under: Tensor, less: bool = False) -> None:
            value, error = m.ratio(over, under)
            values[name], errors[name] = 1 - value if less else value, error

        squares, counts = m.of("square")
        residual, _ = m.of("mse")
        tokens = int(counts.sum())
        variance = squares - counts * (self.sum_y.square().sum() / tokens**2)
        put("fvu", residual, variance)
        put("explained_variance", residual, variance, less=True)
        for name in ("mse", "cosine", "l2_in", "l2_out", "l2_ratio", "l0", "l1"):
            put(name, *m.of(name))
            if name == "l2_ratio":
                put("reconstruction_bias", m.of("square_hat")[0], m.of("product")[0])
        density = self.fired.double() / tokens
        values |= {"dead": int((self.fired == 0).sum()), "dense": int((density > _DENSE).sum())}
        for name in ("clean", "spliced", *ablations):
            put(f"ce_{name}", *m.of(f"ce_{name}"))
        for name in ("spliced", *ablations):
            put(f"kl_{name}", *m.of(f"kl_{name}"))
        for name in ablations:
            ending = "" if name == "zero" else f"_{name}"
            ablated, spliced = m.of(f"ce_{name}")[0], m.of("ce_spliced")[0]
            put(f"ce_recovered{ending}", ablated - spliced, ablated - m.of("ce_clean")[0])
            put(f"kl_recovered{ending}", m.of("kl_spliced")[0], m.of(f"kl_{name}")[0], less=True)
        return Evaluation(values, errors, density, self.fired, self.sequences, tokens)
