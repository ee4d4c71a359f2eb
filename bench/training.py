"""One training step of a TopK SAE by everybody: ours, plain torch and the peer libraries, all from the same weights.

Everyone has squared error (sparsify: divided by the variance, which Adam does not see), dense Adam and rows of norm 1 in the decoder, its
gradient without the component along them; where a peer's own step differs, its function says so.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

import fastsae
from bench.harness import DEVICE, absent, has_onednn, normal, shapes, unit_rows
from fastsae._core.checkout import checkout_hidden

Built = TypeVar("Built")


class Weights(NamedTuple):
    """``W_enc, W_dec [F, D]``, ``b_enc [F]``, ``b_dec [D]``; latents are ``topk(relu(W_enc (x - b_dec) + b_enc))``."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


@dataclass(frozen=True)
class Start:
    """Where everyone starts: ``W [F, D]`` of unit rows is encoder and decoder, ``b_dec [D]``, ``b_enc`` 0."""

    W: Tensor
    b_dec: Tensor
    k: int
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Runner:
    """Somebody's training step.

    Attributes:
        step: of a batch. opt: its optimiser. weights: as ``Weights``. module: the SAE. target: what ``accelerate`` takes.
        named: the parameters by our names, where each has one.
    """

    step: Callable[..., object]
    opt: Any
    weights: Callable[[], Any]
    module: Any = None
    target: Any = None
    named: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def set_lr(self, lr: float) -> None:
        for group in self.opt.param_groups:
            group["lr"] = lr

    def moments(self) -> dict[str, Tensor]:
        """Adam's first moments."""
        return {name: self.opt.state[parameter]["exp_avg"] for name, parameter in self.named.items()}


SHAPES = shapes([(256, 768, 24576, 32), (1024, 512, 8192, 32)], [(32, 64, 2048, 8)])


def inputs(shape: tuple[int, ...]) -> tuple[Start, Tensor]:
    """Where a row of a bench starts, and its batch; shapes are (B, D, F, k)."""
    rows, width, features, k = shape
    start = Start(unit_rows(features, width), torch.zeros(width, device=DEVICE), k)
    return start, distinct_rows(normal(rows + rows // 4, width, seed=1), start, rows)


def ours(start: Start) -> Runner:
    sae = _sae(start)
    return _own(sae, opt := fastsae.optim.Adam(sae, lr=start.lr, betas=start.betas), opt.step)


def ours_signum(start: Start) -> Runner:
    """sparsify's default rule through our fused step."""
    sae = _sae(start)
    return _own(sae, opt := fastsae.optim.Signum(sae, lr=start.lr), opt.step)


def ours_autograd(start: Start) -> Runner:
    """Our operations under autograd, torch's fused Adam: what a user's own loop does."""
    sae = _sae(start)
    opt = torch.optim.Adam(sae.parameters(), lr=start.lr, betas=start.betas, fused=True)

    def step(x: Tensor) -> None:
        sae.loss(x).loss.backward()
        sae.remove_parallel_gradient_()
        opt.step()
        sae.normalise_decoder_()
        opt.zero_grad()

    return _own(sae, opt, step)


def codes(x: Tensor, W: Tensor, b: Tensor, k: int, gathered: bool) -> tuple[Tensor, Tensor]:
    """Values and indices of a plain top-k; ``gathered``: see ``plain``."""
    if not gathered:
        values, indices = functional.linear(x, W, b).topk(k, sorted=False)
        return values.relu(), indices
    with torch.no_grad():
        indices = torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "").topk(k, sorted=False).indices
    return (torch.bmm(functional.embedding(indices, W), x.unsqueeze(2)).squeeze(2) + b[indices]).relu(), indices


def plain(start: Start, way: Literal["bag", "gathered", "dense"] = "bag") -> Runner:
    """Plain torch: linear, top-k, ``embedding_bag``, fused Adam.

    ``gathered``: the scores come without autograd from oneDNN's product (on many CPUs faster than the one behind ``F.linear``) and only the
    selected ones are formed again from gathered rows, so that the backward needs no product of [B, F] with x. ``dense``: what the dense
    libraries do, a [B, F] code and its product.
    """
    parameters = {
        name: torch.nn.Parameter(value.clone())
        for name, value in (("W_enc", start.W), ("b_enc", start.W.new_zeros(start.W.shape[0])), ("W_dec", start.W), ("b_dec", start.b_dec))
    }
    W_enc, b_enc, W_dec, b_dec = parameters.values()
    opt = torch.optim.Adam(parameters.values(), lr=start.lr, betas=start.betas, fused=True)

    def decode(values: Tensor, indices: Tensor) -> Tensor:
        if way != "dense":
            return functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
        return torch.zeros(values.shape[0], W_dec.shape[0], device=values.device).scatter(1, indices, values) @ W_dec + b_dec

    def step(x: Tensor) -> None:
        ((decode(*codes(x - b_dec, W_enc, b_enc, start.k, way == "gathered")) - x).square().sum() / x.shape[0]).backward()
        step_unit_rows(opt, W_dec)

    return Runner(step, opt, lambda: _detached(W_enc, b_enc, W_dec, b_dec), named=parameters)


@torch.no_grad()
def step_unit_rows(opt: torch.optim.Optimizer, W: Tensor) -> None:
    """A step by torch, W's gradient without its component along each row, W's rows of norm 1 again."""
    grad = W.grad
    assert grad is not None
    grad.addcmul_(W, (grad * W).sum(-1, keepdim=True), value=-1)
    opt.step()
    W.div_(torch.linalg.vector_norm(W, dim=-1, keepdim=True))
    opt.zero_grad()


def sparsify_coder(start: Start) -> Any:
    from sparsify import SparseCoder, SparseCoderConfig

    features, width = start.W.shape
    coder = SparseCoder(width, SparseCoderConfig(num_latents=features, k=start.k), device=start.W.device)
    copy_((coder.encoder.weight, start.W), (coder.encoder.bias, 0), (coder.W_dec, start.W), (coder.b_dec, start.b_dec))
    return coder


def sparsify_step(coder: Any, opt: Any, x: Tensor) -> Any:
    """The part of its ``Trainer.fit`` behind its model."""
    coder.set_decoder_norm_to_unit_norm()
    out = coder(x)
    out.fvu.backward()
    coder.remove_gradient_parallel_to_decoder_directions()
    opt.step()
    opt.zero_grad()
    return out


def sparsify(start: Start, signum: bool = False) -> Runner:
    """sparsify's module and the step of its trainer; ``signum``: its default optimiser in place of torch's Adam."""
    coder = sparsify_coder(start)
    opt: Any
    if signum:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        opt = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=start.lr), momentum=0.95)
        opt.train()
    else:
        opt = torch.optim.Adam(coder.parameters(), lr=start.lr, betas=start.betas)
    weights = (coder.encoder.weight, coder.encoder.bias, coder.W_dec, coder.b_dec)
    return Runner(lambda x: sparsify_step(coder, opt, x), opt, lambda: _detached(*weights), coder, coder)


def saelens(start: Start) -> Runner:
    """SAELens's ``SAETrainer.step``: rows of any norm, latents scaled by it; gradients clipped to norm 1; AuxK once features are dead."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    features, width = start.W.shape
    sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=features, k=start.k, device=str(start.W.device)))
    copy_((sae.W_enc, start.W.T), (sae.b_enc, 0), (sae.W_dec, start.W), (sae.b_dec, start.b_dec))
    options: dict[str, Any] = {"total_training_samples": 10**12, "train_batch_size_samples": 1024, "lr_scheduler_name": "constant"}
    options |= {"lr": start.lr, "lr_end": start.lr, "adam_beta1": start.betas[0], "adam_beta2": start.betas[1]}
    config = SAETrainerConfig(device=str(start.W.device), **options)
    trainer: Any = SAETrainer(config, sae, iter([]))

    def weights() -> Weights:
        norm = torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)  # folded in: score times norm, row over norm
        return _detached(sae.W_enc.T * norm, sae.b_enc * norm.squeeze(1), sae.W_dec / norm, sae.b_dec)

    return Runner(trainer.step, trainer.optimizer, weights, sae, trainer)


def dictionary_learning(start: Start) -> Runner:
    """dictionary_learning's ``TopKTrainer.update``: gradients clipped to norm 1, a running threshold, AuxK once features are dead."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    features, width = start.W.shape
    options: dict[str, Any] = {"activation_dim": width, "dict_size": features, "k": start.k, "lr": start.lr, "seed": 0}
    options |= {"steps": 10**12, "warmup_steps": 0, "layer": 0, "lm_name": "none"}
    trainer: Any = TopKTrainer(device=str(start.W.device), **options)
    ae = trainer.ae
    copy_((ae.encoder.weight, start.W), (ae.encoder.bias, 0), (ae.decoder.weight, start.W.T), (ae.b_dec, start.b_dec))
    for group in trainer.optimizer.param_groups:
        group["betas"] = start.betas
    steps = itertools.count(1)  # from 1: at step 0 it would set b_dec
    weights = (ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec)
    return Runner(lambda x: trainer.update(next(steps), x), trainer.optimizer, lambda: _detached(*weights), ae, trainer)


PEERS: dict[str, Callable[[Start], Runner]] = {
    "sparsify, torch Adam": sparsify,
    "sparsify, its signum": lambda start: sparsify(start, signum=True),
    "SAELens": saelens,
    "dictionary_learning": dictionary_learning,
}


def plain_ways(start: Start) -> dict[str, Runner]:
    ways = {"plain torch": plain(start)}
    if start.W.device.type == "cpu" and has_onednn():
        ways["plain torch, oneDNN and gathered rows"] = plain(start, "gathered")
    return ways


def peers(start: Start, names: list[str] | None = None) -> dict[str, Runner]:
    """Those that can be imported and built here; the others with a warning that says why not."""
    made = {name: build(name, PEERS[name], start) for name in (PEERS if names is None else names)}
    return {name: runner for name, runner in made.items() if runner is not None}


def build(name: str, make: Callable[[Start], Built], start: Start) -> Built | None:
    """What ``make`` builds of a peer's library, or None with a warning where it cannot."""
    if start.W.device.type == "cpu":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # sparsify chooses a decoder at import, not by device
    try:
        with checkout_hidden():
            return make(start)
    except Exception as error:  # an import of theirs may raise anything
        absent(name, error)
        return None


def distinct_rows(x: Tensor, start: Start, rows: int) -> Tensor:
    """The first ``rows`` of ``x`` whose k-th and next scores differ by more than rounding, so that everyone selects the same features."""
    with torch.no_grad():
        top = functional.linear((x - start.b_dec).double(), start.W.double()).topk(start.k + 1).values
    clear = x[top[:, -2] - top[:, -1] > 1e-5 * top[:, 0].abs()]
    if clear.shape[0] < rows:
        raise ValueError(f"bench: {rows} rows without near ties are needed, {clear.shape[0]} of {x.shape[0]} are")
    return clear[:rows].contiguous()


def check_step(mine: Runner, theirs: Runner, x: Tensor, lr: float) -> None:
    """Raises AssertionError unless the first step of both is the same up to rounding.

    First moments are the gradients times ``1 - beta1``: they agree to 1e-5 of their norm (sums of up to B float32 terms in another order).
    At a first step a weight moves by lr times the sign of its gradient, rounding included where that cancels, hence the share of 1e-3.
    """
    mine.step(x)
    theirs.step(x)
    check_gradients(mine, theirs, 1e-5)
    for name in Weights._fields:
        off = (getattr(mine.weights(), name) - getattr(theirs.weights(), name)).abs() > 1e-3 * lr + 1e-6
        if not float(off.double().mean()) < 1e-3:
            raise AssertionError(f"{name} differs in {int(off.sum())} of {off.numel()} elements after one step")


def check_gradients(mine: Runner, theirs: Runner, most: float) -> None:
    """AssertionError unless first moments agree to this share of their norm."""
    a, b = mine.moments(), theirs.moments()
    for name in b:
        error = float(torch.linalg.vector_norm(a[name] - b[name]) / torch.linalg.vector_norm(b[name]))
        if not error < most:
            raise AssertionError(f"gradient of {name} differs by {error:.1e} of its norm")


def _sae(start: Start) -> fastsae.SAE:
    sae = fastsae.SAE(start.W.shape[1], start.W.shape[0], fastsae.TopK(start.k), device=start.W.device, seed=0)
    copy_((sae.W_enc, start.W), (sae.W_dec, start.W), (sae.b_dec, start.b_dec))
    return sae


@torch.no_grad()
def copy_(*pairs: tuple[Any, Tensor | float]) -> None:
    for parameter, value in pairs:
        parameter.copy_(torch.as_tensor(value, device=parameter.device))


def _detached(*tensors: Tensor) -> Weights:
    return Weights(*(tensor.detach() for tensor in tensors))


def _own(sae: fastsae.SAE, opt: Any, step: Callable[[Tensor], object]) -> Runner:
    return Runner(step, opt, lambda: _detached(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), sae, sae, dict(sae.named_parameters()))
