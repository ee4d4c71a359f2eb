"""A model in which modules give what a dictionary makes of them: reconstructed, ablated, steered."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae.latents import Latents
from fastsae.lm.hooks import Point, find, first_tensor, plain, watch
from fastsae.patch import decoder, encode, is_transcoder, reconstruct, report
from fastsae.sae import SAE
from fastsae.sae.rows import normalised
from fastsae.store.latents import entries_of


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of some features' latents: ``new = (old * scale, or value where given) + add``.

    Attributes:
        features: their numbers, int64 ``[n]`` or a list; none: nothing is edited.
        scale: 0 ablates (the default, where neither ``value`` nor ``add`` is given), 1 leaves them, others scale.
        value: clamps: the latent becomes this one, in rows where it was not active too.
        add: is added, in every row (steering).
        where: rows that are edited, bool of the hidden states' batch shape ``[batch, seq]`` or broadcast to it; None: all.
    """

    features: Tensor | Sequence[int]
    scale: float | None = None
    value: float | None = None
    add: float | None = None
    where: Tensor | None = None

    def new(self, old: Tensor) -> Tensor:
        scale = self.scale if self.scale is not None else (0.0 if self.value is None and self.add is None else 1.0)
        made = old * scale if self.value is None else torch.full_like(old, self.value)
        return made if self.add is None else made + self.add


@dataclass
class Spliced:
    """What is known of the last call in the block: ``latents`` by hook, before edits (None where nothing was encoded)."""

    latents: dict[str, Latents | None] = field(default_factory=dict)


@contextlib.contextmanager
def splice(
    model: Any,
    saes: Mapping[str, Any],
    *,
    error: Literal["keep", "drop"] = "keep",
    edit: Mapping[str, Sequence[Edit]] | None = None,
) -> Generator[Spliced, None, None]:
    """Within the block the named modules give what their dictionaries make of them; afterwards, or after an exception, nothing is left.

    Args:
        model: any module, or nnsight's wrapper of one; call, generate or trace with it in the block, eagerly.
        saes: ``{name: sae}``: an ``SAE`` of this library, or of SAELens, sparsify or dictionary_learning. The name of a module stands for
            its output y, ``name:input`` for its input. A transcoder reads the module's input and stands for its output.
            TransformerLens's hook points are modules: ``blocks.3.hook_resid_post``.
        error: "drop": y becomes the reconstruction x_hat. "keep": what the dictionary misses stays, so that only edits change anything:
            rows without an edited latent keep y bit for bit, others become ``y + decode(z' - z)`` over the latents that changed.
        edit: ``{name: [Edit, ..]}``, one after the other.

    Yields ``Spliced``: its ``latents[name]`` are those of the last call.

    Gradients: with "drop" through x_hat; with "keep" y's own pass to the model as without the block, and x_hat's to the dictionary and
    its latents: ``y + (x_hat - stop_gradient(x_hat))`` of the stopped input.

    Raises: TypeError, ValueError: wrong names, dictionaries or edits; from the model's call: a width that does not fit.
    """
    op = "splice"
    if error not in ("keep", "drop"):
        raise ValueError(f"{op}: error must be 'keep' or 'drop', got {error!r}")
    points = find(op, plain(op, model), saes)
    for name, sae in saes.items():
        if not isinstance(sae, SAE):
            try:
                report(sae)
            except TypeError as problem:
                raise TypeError(f"{op}: the dictionary of {name} must be a fastsae.SAE or of a supported library: {problem}") from None
    edits: dict[str, list[Any]] = {name: list(several) for name, several in (edit or {}).items()}
    for name, several in edits.items():
        if name not in saes:
            raise ValueError(f"{op}: edit names {name!r}, expected of {', '.join(saes)}")
        for one in several:
            checks.instance(op, "edits", one, Edit, "Edit")
    state = Spliced()
    with contextlib.ExitStack() as stack:
        for point in points:
            sae, several = saes[point.name], edits.get(point.name, ())
            checked = [_checked(op, one, _decoder(op, point.name, sae)) for one in several]
            _install(stack, state, point, sae, error, [one for one in checked if numbers(one).numel()])
        yield state


def _checked(op: str, one: Edit, rows: Tensor) -> Edit:
    features = torch.as_tensor(one.features, dtype=torch.int64, device=rows.device).flatten()
    if features.numel() and not 0 <= int(features.min()) <= int(features.max()) < len(rows):
        raise ValueError(f"{op}: an edit's features must be in 0 .. {len(rows) - 1}, got {int(features.min())} to {int(features.max())}")
    if one.scale is not None and one.value is not None:
        raise ValueError(f"{op}: an edit has scale or value, not both")
    where = None if one.where is None else checks.mask(op, "where", one.where)
    return Edit(features, one.scale, one.value, one.add, where)


def _decoder(op: str, name: str, sae: Any) -> Tensor:
    try:
        return decoder(sae)
    except (TypeError, ValueError) as problem:
        raise type(problem)(f"{op}: the dictionary of {name} cannot be edited: {problem}") from None


def _install(stack: contextlib.ExitStack, state: Spliced, point: Point, sae: Any, error: str, edits: list[Edit]) -> None:
    inputs: list[Tensor] = []
    transcoder = is_transcoder(sae) and not point.is_input
    if transcoder:

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[:] = [first_tensor(args if args else kwargs)]

        stack.callback(point.module.register_forward_pre_hook(read, with_kwargs=True).remove)

    def seen(y: Tensor) -> Tensor | None:
        x = inputs.pop() if transcoder else y
        made, state.latents[point.name] = _spliced(sae, x, y, error, edits)
        return made

    stack.callback(watch(point, seen).remove)


def _spliced(sae: Any, x: Tensor, y: Tensor, error: str, edits: list[Edit]) -> tuple[Tensor | None, Latents | None]:
    """(what takes y's place or None, the latents)."""
    if error == "keep":
        x = x.detach()
        if not edits and not torch.is_grad_enabled():
            return None, encode(sae, x)
    if not isinstance(sae, SAE):
        found = reconstruct(sae, x)
        latents, x_hat = found.latents, found.x_hat
    else:
        latents = sae.encode(x)
        x_hat = sae.decode(latents, x) if error == "drop" or torch.is_grad_enabled() else None
    if error == "drop":
        assert x_hat is not None
        made = x_hat
    else:
        made = y if x_hat is None else _Through.apply(y, x_hat.to(y.dtype))
    if edits:
        assert latents is not None
        change, changed = _change(sae, x, latents, y.shape[:-1], edits)
        made = torch.where(changed[..., None], (made.to(change.dtype) + change).to(y.dtype), made.to(y.dtype))
    return made.to(y.dtype), latents


class _Through(torch.autograd.Function):
    """y itself; gradients reach both."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x_hat: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, grad


def _fitting(where: Tensor, batch: torch.Size) -> Tensor:
    try:
        return where.expand(batch)
    except RuntimeError as error:
        got = f"{list(batch)}, got {list(where.shape)}"
        raise ValueError(f"splice: an edit's where must have the hidden states' batch shape {got}") from error


def numbers(edit: Edit) -> Tensor:
    """Of the features of a checked edit."""
    assert isinstance(edit.features, Tensor)
    return edit.features


def _change(sae: Any, x: Tensor, latents: Latents, batch: torch.Size, edits: list[Edit]) -> tuple[Tensor, Tensor]:
    """(decode(z' - z) over the edited features ``[*batch, d_out]``, the rows where a latent changed ``[*batch]``)."""
    features = torch.cat([numbers(one) for one in edits]).unique()
    old = _of_features(latents, features)
    new = old
    for one in edits:
        at = torch.searchsorted(features, numbers(one))
        edited = new.index_copy(-1, at, one.new(new[..., at]))
        new = edited if one.where is None else torch.where(_fitting(one.where.to(old.device), batch)[..., None], edited, new)
    step = new - old
    change = step @ decoder(sae)[features].to(step.dtype)
    if isinstance(sae, SAE):
        by = None if sae.transcoder else sae.normalise_rows
        change = change / sae.scale[1] if by is None else change * normalised(x, by)[1].size
    return change, (step != 0).any(-1)


def _of_features(latents: Latents, features: Tensor) -> Tensor:
    """``[*batch, n]``: the latents of a few features (ascending), without the others."""
    row, columns, values = entries_of(latents)
    at = torch.searchsorted(features, columns).clamp_(max=len(features) - 1)
    found = values.new_zeros((latents.slots.rows, len(features)))
    found = found.index_put((row, at), torch.where(features[at] == columns, values, 0.0), accumulate=True)
    return found.reshape(*latents.batch_shape, len(features))
