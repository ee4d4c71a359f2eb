"""sparsify: ``SparseCoder`` and ``Trainer``. Tested with eai-sparsify 1.3.3.

    coder = fastsae.accelerate(SparseCoder.load_from_hub(...))
    trainer = fastsae.accelerate(Trainer(cfg, dataset, model)); trainer.fit()
    out = fastsae.patch.sparsify.train_step(coder, optimizer, x)       one batch, with torch.optim.Adam

What changes: ``encode`` forms no dense pre-activations: its ``pre_acts`` is computed when it is read. ``decode`` and both backward passes
work on slots, on the device that the tensors are on (the library chooses its decoder once, by whether Triton can be imported, and then
fails on the CPU). ``forward`` has AuxK, multi-TopK, the skip connection and a transcoder's target as before.

What does not: parameters, ``state_dict``, files, the ``groupmax`` activation, the losses, the optimisers. In particular AuxK and multi-TopK
give the encoder no gradient here either: the library's encoder ignores the gradient of its pre-activations. A slot of value 0 (a row with
fewer than k positive scores) passes its gradient on, as there; which features such slots name is a tie, which torch.topk breaks in no
order that is defined. ``k_decay_steps`` starts at k = 10 d_in, where such rows are common: those features' encoder rows then move
otherwise than with the library's own coder. ``encode`` takes inputs of any number of dimensions, and its gradients here do too.

``fit`` forms no dense gradient where its optimiser is the default one, schedule-free sign descent, or ``torch.optim.Adam``, and its loss
"fvu": the coders' gradients stay slots until the optimiser's step, which works on its own state; ``grad_acc_steps`` and
``micro_acc_steps`` add slots up. Its signs of gradients that cancel may be others. ``train_step`` does the same for one batch with Adam.
With muon, 8-bit Adam, the losses "ce" and "kl" or several processes the optimiser reads dense gradients, as a warning says.
Under autocast, which the library turns on itself on a GPU, float32 coders step so too, on activations of any float dtype: as there, scores,
latents' gradients and the skip connection are rounded to the lower dtype, everything else is float32. A score's rank is that before
rounding: of scores that round to the same number the library keeps any.

Of the library's own time, at (B, D, F, k) = (256, 768, 24576, 32) and (1024, 512, 8192, 32), two CPU cores (``fastsae bench dropin``):
``train_step`` 0.15 and 0.37, ``fastsae.encode`` 0.28 and 0.42, ``encode`` 0.29 and 0.30;
``Trainer.fit`` 0.34 at the first size, with level avx2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._core import checks, processes
from fastsae.dispatch import preference, then_any
from fastsae.gradients import Gradient, RowGradient, total
from fastsae.latents import TopKLatents
from fastsae.ops.decode import DECODE, DECODE_DVALUES, decode
from fastsae.ops.encode import ENCODE_TOPK, encode_topk
from fastsae.ops.score_gradients import feature_sums, score_gradients
from fastsae.ops.signum import SIGNUM
from fastsae.packed import Unchanged
from fastsae.patch import _adam
from fastsae.patch._adapter import LIBRARIES, STATE, Adapter, Library, changed, library_way, need_slots, tampered
from fastsae.patch._slots import reconstruction
from fastsae.sae.reconstruction import Reconstruction

_BF16 = torch.cuda.is_bf16_supported()
"""Whether ``forward`` runs under autocast on a GPU; the library, too, settles it when it is imported."""
_METHODS = ("encode", "decode", "forward", "remove_gradient_parallel_to_decoder_directions")
GROUPMAX = "groupmax keeps the best of each group of features, which no encoder here does"


class _Encode(torch.autograd.Function):
    """The k largest scores after ReLU; every slot passes its gradient on, also one of value 0; or none does, as with ``pre_acts``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, k: int, backend: str | None, passes: bool) -> tuple[Tensor, Tensor]:
        values, indices = ENCODE_TOPK(x, W, b, None, None, None, None, k, True, backend=backend)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(indices, x, W, b)
        ctx.backend, ctx.passes = then_any(backend), passes
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, x, W, b = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:3], False, False)
        found = score_gradients(grad, indices, None, x, W, b, None, None, needs, ctx.backend)[:3] if ctx.passes else (None, None, None)
        return *found, None, None, None


class _PreActs(torch.autograd.Function):
    """Dense scores after ReLU; like the library's, they give nothing a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(x, W, b))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, None


_outputs: list[type] = []


def output_class() -> type:
    """``EncoderOutput`` whose dense ``pre_acts`` is made when it is read, by name, index or unpacking."""
    if not _outputs:
        base: Any = sys.modules["sparsify.fused_encoder"].EncoderOutput

        class EncoderOutput(base):
            """sparsify's ``EncoderOutput(top_acts, top_indices, pre_acts)``; ``pre_acts`` is computed when read."""

            def __new__(cls, top_acts: Tensor, top_indices: Tensor, inputs: tuple[Tensor, ...]) -> Any:
                self = super().__new__(cls, top_acts, top_indices, None)
                self._inputs, self._grad = inputs, top_acts.requires_grad
                self._unchanged = Unchanged(*inputs)
                # Inference tensors do not tell when they change: the input here is one of its own, weights have to be used at once.
                self._pre_acts = _PreActs.apply(*inputs) if any(t.is_inference() for t in inputs[1:]) else None
                return self

            @property
            def pre_acts(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
                if self._pre_acts is None:
                    if not self._unchanged.holds():
                        raise RuntimeError(
                            "EncoderOutput.pre_acts: the input or the encoder's weights have changed since encode; read it before they "
                            "do, or restore the coder"
                        )
                    with torch.set_grad_enabled(self._grad):
                        self._pre_acts = _PreActs.apply(*self._inputs)
                return self._pre_acts

            def __iter__(self) -> Any:
                return iter((tuple.__getitem__(self, 0), tuple.__getitem__(self, 1), self.pre_acts))

            def __getitem__(self, item: Any) -> Any:
                asked = range(3)[item]
                dense = asked == 2 if isinstance(asked, int) else 2 in asked
                return tuple(self)[item] if dense else tuple.__getitem__(self, item)

            def __reduce__(self) -> Any:
                return base, tuple(self)

            def _replace(self, **changes: Any) -> Any:
                return base(*self)._replace(**changes)

            def _asdict(self) -> dict[str, Any]:
                return base(*self)._asdict()

        EncoderOutput.__module__, EncoderOutput.__qualname__ = base.__module__, base.__qualname__
        _outputs.append(EncoderOutput)
    return _outputs[0]


def why_dense(coder: Any) -> str | None:
    """Why encoding takes the library's own way, or None."""
    if (reason := changed(coder, *_METHODS)) is not None:
        return reason
    if coder.cfg.activation != "topk":
        return GROUPMAX if coder.cfg.activation == "groupmax" else f"activation {coder.cfg.activation!r}"
    if type(coder.encoder) is not nn.Linear:
        return f"the encoder is {type(coder.encoder).__name__}, not nn.Linear"
    if coder.encoder.bias is None:  # pyright: ignore[reportUnnecessaryComparison]  # torch's annotation leaves bias=False out
        return "the encoder has no bias"
    return None


def _library_autocast() -> torch.autocast:
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=_BF16)


def _inputs(coder: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the encoder multiplies, as the library casts it: centred first, then by autocast. An inference tensor is a new one."""
    x = (x.clone() if x.is_inference() else x) if coder.cfg.transcode else x - coder.b_dec
    return checks.autocast(x, coder.encoder.weight, coder.encoder.bias)


def _best(coder: Any, x: Tensor, W: Tensor, b: Tensor, k: int, passes: bool = True) -> tuple[Tensor, Tensor]:
    checks.tensor("SparseCoder.encode", "x", x, (W.dtype,), W)
    if x.dim() == 0 or x.shape[-1] != W.shape[1]:
        raise ValueError(f"SparseCoder.encode: x must have shape [.., d_in={W.shape[1]}], got {list(x.shape)}")
    k = checks.integer("SparseCoder.encode", "k", k, 1, W.shape[0], f"num_latents={W.shape[0]}")
    with torch.autocast(x.device.type, enabled=False):
        values, indices = _Encode.apply(x.reshape(-1, x.shape[-1]), W, b, k, preference(None), passes)  # pyright: ignore[reportGeneralTypeIssues]
    return (values, indices) if x.dim() == 2 else (values.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k))


def _decoded(coder: Any, acts: Tensor, indices: Tensor) -> Tensor:
    """Slots times decoder in the coder's dtype; autocast does not reach the library's product either."""
    with torch.autocast(acts.device.type, enabled=False):
        return decode(TopKLatents(acts.to(coder.dtype), indices, coder.W_dec.shape[0]), coder.W_dec)


def _forward(coder: Any, x: Tensor, y: Tensor | None, dead_mask: Tensor | None, total_variance: Tensor | None) -> Any:
    inputs, k = _inputs(coder, x), coder.cfg.k
    values, indices = _best(coder, *inputs, k)
    y = x if y is None else y
    out = coder.decode(values, indices)
    if coder.W_skip is not None:
        out = out + x.to(coder.dtype) @ coder.W_skip.mT
    error = y - out
    if total_variance is None:
        total_variance = (y - y.mean(0)).pow(2).sum()
    auxk_loss = out.new_tensor(0.0)
    if dead_mask is not None and (dead := int(dead_mask.sum())) > 0:
        most = y.shape[-1] // 2
        aux_values, aux_indices = _aux(inputs, dead_mask, min(most, dead))
        auxk_loss = (_decoded(coder, aux_values, aux_indices) - error.detach()).pow(2).sum()
        auxk_loss = min(dead / most, 1.0) * auxk_loss / total_variance
    fvu = error.pow(2).sum() / total_variance
    multi_topk_fvu = out.new_tensor(0.0)
    if coder.cfg.multi_topk:  # the output is this one's, as in the library
        values, indices = _best(coder, *inputs, 4 * k, passes=False)
        out = coder.decode(values, indices)
        multi_topk_fvu = (out - y).pow(2).sum() / total_variance
    return sys.modules["sparsify.sparse_coder"].ForwardOutput(out, values, indices, fvu, auxk_loss, multi_topk_fvu)


@torch.no_grad()
def _aux(inputs: tuple[Tensor, ...], dead_mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best dead latents of each row; the encoder gets no gradient from them."""
    with torch.autocast(dead_mask.device.type, enabled=False):
        x, W, b = inputs
        latents = encode_topk(x, W, b, k=k, features=dead_mask)
    return latents.values, latents.indices


class CoderMethods:
    """``encode``, ``decode``, ``forward`` and the decoder's two in-place passes of ``SparseCoder``."""

    def encode(self: Any, x: Tensor) -> Any:
        if library_way(self, why_dense(self)):
            return super().encode(x)  # pyright: ignore[reportAttributeAccessIssue]
        inputs = _inputs(self, x)
        return output_class()(*_best(self, *inputs, self.cfg.k), inputs)

    def decode(self: Any, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        if self.W_dec is None or library_way(self, changed(self, *_METHODS)):
            return super().decode(top_acts, top_indices)  # pyright: ignore[reportAttributeAccessIssue]
        return _decoded(self, top_acts, top_indices) + self.b_dec

    def forward(
        self: Any, x: Tensor, y: Tensor | None = None, *, dead_mask: Tensor | None = None, total_variance: Tensor | None = None
    ) -> Any:
        if library_way(self, why_dense(self)):
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)  # pyright: ignore[reportAttributeAccessIssue]
        pending = vars(self)[STATE].pending
        if pending is not None and torch.is_grad_enabled() and _why_not_by_hand(self, x, y) is None:
            out, backward = _by_hand(self, x, x if y is None else y, dead_mask, total_variance)
            losses = _Waiting.apply(self.b_dec, pending, backward, out.fvu, out.auxk_loss, out.multi_topk_fvu)
            return out._replace(fvu=losses[0], auxk_loss=losses[1], multi_topk_fvu=losses[2])  # pyright: ignore[reportOptionalSubscript]
        with _library_autocast():
            return _forward(self, x, y, dead_mask, total_variance)

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self: Any) -> None:
        if vars(self)[STATE].pending:  # the optimiser's step does it
            return
        if self.W_dec is None or self.W_dec.grad is None or library_way(self, changed(self, *_METHODS)):
            super().remove_gradient_parallel_to_decoder_directions()  # pyright: ignore[reportAttributeAccessIssue]
        else:
            along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec.data).unsqueeze(1)
            self.W_dec.grad.addcmul_(along, self.W_dec.data, value=-1)


def encode(coder: Any, x: Tensor) -> TopKLatents:
    """``fastsae.encode``."""
    need_slots(coder, why_dense(coder))
    values, indices = _best(coder, *_inputs(coder, x), coder.cfg.k)
    return TopKLatents(values, indices, coder.encoder.weight.shape[0])


def reconstruct(coder: Any, x: Tensor, target: Tensor | None) -> Reconstruction:
    """``fastsae.reconstruct``."""
    latents = encode(coder, x)
    if coder.W_dec is None:
        raise ValueError(f"reconstruct: {type(coder).__name__} has no decoder")
    x_hat = _decoded(coder, latents.values, latents.indices) + coder.b_dec
    if coder.W_skip is not None:
        x_hat = x_hat + x.to(coder.dtype) @ coder.W_skip.mT
    return reconstruction(x_hat, latents, x if target is None and not coder.cfg.transcode else target)


# ---------------------------------------------------------------- a whole step


def train_step(
    coder: Any,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor | None = None,
    *,
    dead_mask: Tensor | None = None,
    auxk_alpha: float = 0.0,
) -> Any:
    """What ``Trainer.fit`` does with one batch: unit decoder rows, ``forward``, backward of ``fvu + auxk_alpha * auxk_loss +
    multi_topk_fvu / 8``, projection of the decoder's gradient, optimiser step, ``zero_grad``.

    Args:
        coder: a ``SparseCoder``, accelerated or not. optimizer: of its parameters; for ``torch.optim.Adam`` no dense gradient is formed and
            the moments are its own; any other steps on dense gradients.
        x: ``[N, d_in]``. y: ``[N, d_in]``, a transcoder's target. dead_mask, auxk_alpha: as in the library.

    Returns: sparsify's ``ForwardOutput``; after a step without dense gradients its numbers are detached.
    """
    processes.refuse("train_step", "each would train a model of its own: the library's Trainer wraps its coders and averages gradients")
    project = coder.cfg.normalize_decoder and not coder.cfg.transcode
    if project:
        coder.set_decoder_norm_to_unit_norm()
    if _why_not_fused(coder, optimizer, x, y) is None:
        out, backward = _by_hand(coder, x, x if y is None else y, dead_mask, None)
        _adam.step(optimizer, backward(1.0, auxk_alpha, 1 / 8), project=(coder.W_dec,) if project else ())  # pyright: ignore[reportArgumentType]
        return out
    out = coder(x=x, y=y, dead_mask=dead_mask)
    (out.fvu + auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
    if project:
        coder.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    return out


def _why_not_fused(coder: Any, optimizer: Any, x: Tensor, y: Tensor | None) -> str | None:
    if (reason := why_dense(coder) or _adam.refuses(optimizer)) is not None:
        return reason
    return _why_not_by_hand(coder, x, y) if _adam.holds(optimizer, coder) else "the optimiser does not hold the coder's parameters"


def _why_not_by_hand(coder: Any, x: Tensor, y: Tensor | None) -> str | None:
    """Why forward and backward go by autograd, or None."""
    parameters = list(coder.parameters())
    if tampered(coder) or not isinstance(coder.W_dec, nn.Parameter) or not isinstance(coder.b_dec, nn.Parameter):
        return "the coder has a hook, or a parameter that is computed from another"
    if any(p.grad is not None or not p.is_contiguous() or not p.requires_grad for p in parameters):
        return "a parameter has a gradient already, is frozen or is not contiguous"
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        return "a parameter has gradient hooks"
    with _library_autocast():
        low = checks.autocasting(x.device)
    if low and coder.dtype not in (torch.float32, torch.float64):
        return f"autocast is on and the weights are {str(coder.dtype)[6:]}"
    dtypes = (coder.dtype, torch.bfloat16, torch.float16) if low else (coder.dtype,)
    if any(t.dtype not in dtypes or t.dim() != 2 or t.requires_grad for t in (x, x if y is None else y)):
        return "x or y is not a matrix of the coder's dtype, or asks for a gradient"
    return None


Backward = Callable[[Any, Any, Any], dict[Tensor, Gradient]]


@torch.no_grad()
def _by_hand(coder: Any, x: Tensor, y: Tensor, dead_mask: Tensor | None, variance: Tensor | None) -> tuple[Any, Backward]:
    """``forward`` by slots, and its backward: gradients by parameter, given those of ``fvu``, ``auxk_loss`` and ``multi_topk_fvu``."""
    with _library_autocast():
        inputs, skip = _inputs(coder, x), 0.0 if coder.W_skip is None else x.to(coder.dtype) @ coder.W_skip.mT
    with torch.autocast(x.device.type, enabled=False):
        return _slots_by_hand(coder, x.to(coder.dtype), y, inputs, skip, dead_mask, variance)


def _slots_by_hand(
    coder: Any, x: Tensor, y: Tensor, inputs: tuple[Tensor, Tensor, Tensor], skip: Any, dead_mask: Tensor | None, variance: Tensor | None
) -> tuple[Any, Backward]:
    k, backend, dtype, low = coder.cfg.k, then_any(preference(None)), coder.dtype, inputs[1].dtype
    W, W_dec = coder.encoder.weight, coder.W_dec
    F = W.shape[0]
    latents = _best(coder, *inputs, k)
    values, indices = latents[0].to(dtype), latents[1]
    out = DECODE(values, indices, None, W_dec, None, backend=backend) + coder.b_dec + skip
    error = y - out
    variance = (y - y.mean(0)).to(dtype).pow(2).sum() if variance is None else variance
    fvu, auxk_loss, multi = error.pow(2).sum() / variance, out.new_zeros(()), out.new_zeros(())
    extra: list[tuple[int, Tensor, Tensor, Tensor]] = []  # (which loss, slots, d loss / d what they decode to)
    if dead_mask is not None and (dead := int(dead_mask.sum())) > 0:
        most = y.shape[-1] // 2
        acts, where = _aux(inputs, dead_mask, min(most, dead))
        aux = acts.to(dtype), where
        difference = DECODE(*aux, None, W_dec, None, backend=backend) - error
        scale = min(dead / most, 1.0) / variance
        auxk_loss = scale * difference.pow(2).sum()
        extra.append((1, *aux, difference * (2 * scale)))
    if coder.cfg.multi_topk:
        latents = _best(coder, *inputs, 4 * k)
        acts = latents[0].to(dtype)
        out = DECODE(acts, latents[1], None, W_dec, None, backend=backend) + coder.b_dec
        difference = out - y
        multi = difference.pow(2).sum() / variance
        extra.append((2, acts, latents[1], difference * (2 / variance)))

    @torch.no_grad()
    @torch.autocast(x.device.type, enabled=False)  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(*grads: Any) -> dict[Tensor, Gradient]:
        G = error * (-2 / variance * grads[0])
        b_dec = G.sum(0)
        decoder: list[Gradient] = [RowGradient(values, indices, None, G, F)]
        for which, acts, where, rows in extra:
            decoder.append(RowGradient(acts, where, None, rows * grads[which], F))
            b_dec += (rows * grads[which]).sum(0) if which == 2 else 0
        dvalues = DECODE_DVALUES(G, indices, None, W_dec, backend=backend).to(low).to(dtype)
        if not coder.cfg.transcode:
            b_dec -= DECODE(dvalues, indices, None, W, None, backend=backend).sum(0)
        gradients: dict[Tensor, Gradient] = {
            W: RowGradient(dvalues, indices, None, centred, F),
            coder.encoder.bias: feature_sums(dvalues, indices, None, F, backend),
            W_dec: total(decoder),
            coder.b_dec: b_dec,
        }
        return gradients if coder.W_skip is None else {**gradients, coder.W_skip: (G.to(low).mT @ x.to(low)).to(dtype)}

    centred = inputs[0] if low is dtype else x if coder.cfg.transcode else x - coder.b_dec
    return sys.modules["sparsify.sparse_coder"].ForwardOutput(out, *latents, fvu, auxk_loss, multi), backward


# ---------------------------------------------------------------- the trainer


class _Waiting(torch.autograd.Function):
    """Losses whose backward leaves gradients in ``pending``, for the optimiser's step."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, pending: list[Any], backward: Backward, *losses: Tensor) -> tuple[Tensor, ...]:
        ctx.pending, ctx.back = pending, backward
        return tuple(loss.clone() for loss in losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.pending.append(ctx.back(*grads))
        return (None,) * 6


class TrainerMethods:
    """``fit``, whose coders leave gradients as slots and whose optimiser takes them so."""

    def fit(self: Any) -> None:
        if library_way(self, why_not_fit(self)):
            super().fit()  # pyright: ignore[reportAttributeAccessIssue]
            return
        optimizer, coders = self.optimizers[0], [coder for coder in self.saes.values() if STATE in vars(coder)]
        before = vars(optimizer).get("step")

        def step(*args: Any, **options: Any) -> None:
            gradients = {p: [p.grad] for coder in coders for p in coder.parameters() if p.grad is not None}
            pending = [part for coder in coders for part in vars(coder)[STATE].pending]
            if not pending:
                own(*args, **options)
                return
            for p, gradient in (item for part in pending for item in part.items()):
                gradients.setdefault(p, []).append(gradient)
            project = [coder.W_dec for coder in coders if coder.cfg.normalize_decoder and not coder.cfg.transcode]
            take = _adam.step if type(optimizer) is torch.optim.Adam else _signum
            take(optimizer, {p: total(parts) for p, parts in gradients.items()}, project=project)
            for coder in coders:
                vars(coder)[STATE].pending.clear()

        own = optimizer.step
        step._wrapped_by_lr_sched = True  # pyright: ignore[reportFunctionMemberAccess]  # schedulers look for it
        try:
            optimizer.step = step
            for coder in coders:
                vars(coder)[STATE].pending = []
            super().fit()  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            del optimizer.step
            if before is not None:
                optimizer.step = before
            for coder in coders:
                vars(coder)[STATE].pending = None


def why_not_fit(trainer: Any) -> str | None:
    """Why ``fit`` steps on dense gradients, or None."""
    if (reason := changed(trainer, "fit")) is not None:
        return reason
    if trainer.cfg.loss_fn != "fvu" or torch.distributed.is_initialized():
        return f"loss_fn is {trainer.cfg.loss_fn!r}, or there are several processes"
    if len(trainer.optimizers) != 1:
        return "there are several optimisers"
    (optimizer,) = trainer.optimizers
    if type(optimizer).__qualname__ != "ScheduleFreeWrapper":
        return _adam.refuses(optimizer)
    base = optimizer.base
    if type(base).__module__ != "sparsify.sign_sgd" or optimizer.weight_decay_at_y != 0 or {"step"} & (vars(optimizer) | vars(base)).keys():
        return f"the optimiser is a ScheduleFreeWrapper of {type(base).__name__} with settings that sparsify's trainer does not make"
    return "the optimiser has step hooks" if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks else None


@torch.no_grad()
def _signum(optimizer: Any, gradients: Mapping[Tensor, Any], project: list[Tensor]) -> None:
    """``ScheduleFreeWrapper.step`` of ``SignSGD``, on its own state."""
    if not optimizer.train_mode:
        raise RuntimeError("fit: the optimiser is not in train mode")
    projected = {id(p) for p in project}
    for group in optimizer.param_groups:
        rate = group["lr"] * group.get("d", 1.0)
        group["lr_max"] = max(rate, group.get("lr_max", 0))
        weight = (group.get("k", 0) + 1) ** optimizer.r * group["lr_max"] ** optimizer.weight_lr_power
        group["weight_sum"] = group.get("weight_sum", 0.0) + weight
        group["k"] = group.get("k", 0) + 1
        for p in group["params"]:
            if p not in gradients:
                continue
            state, gradient = optimizer.state[p], gradients[p]
            if "z" not in state:
                state["z"] = p.detach().clone(memory_format=torch.preserve_format)
            views = tuple(t.detach() if t.dim() == 2 else t.detach().reshape(1, -1) for t in (p, state["z"]))
            job = _adam.job_of(views, gradient if p.dim() == 2 else gradient.reshape(1, -1), id(p) in projected)
            for tile_views, tile in job.tiles():
                SIGNUM(*tile_views, *tile, group["lr"], optimizer.momentum, weight / group["weight_sum"], job.unit, False)


# ---------------------------------------------------------------- the table


def _now(coder: Any) -> Mapping[str, str]:
    reason = why_dense(coder)
    return {} if reason is None else {"encode": reason, "forward": reason}


LIBRARY = LIBRARIES["sparsify"] = Library(
    "eai-sparsify",
    "1.3.3",
    "1.4",
    {
        "sparsify.sparse_coder.SparseCoder": Adapter(
            CoderMethods,
            {
                "encode": "encode_topk; pre_acts is computed when it is read",
                "decode": "product of slots on the device of the tensors",
                "forward": "slots, with AuxK, multi-TopK, skip connection and target",
                "remove_gradient_parallel_to_decoder_directions": "in place",
            },
            {
                "groupmax": GROUPMAX,
                "AuxK and multi-TopK": "give the encoder no gradient, as in the library",
                "backward": "fills dense gradients, which the caller's optimiser reads; fastsae.patch.sparsify.train_step forms none",
            },
            now=_now,
            encode=encode,
            reconstruct=reconstruct,
            transcoder=lambda coder: coder.cfg.transcode,
            decoder=lambda coder: coder.W_dec,
        ),
        "sparsify.trainer.Trainer": Adapter(
            TrainerMethods,
            {"fit": "its coders' gradients stay slots; projection and Adam or schedule-free sign descent in one pass"},
            {
                "fit": "muon, 8-bit Adam, ce and kl losses and several processes need dense gradients; the coders are accelerated",
                "k_decay_steps": "keeps latents of value 0 at first, which get gradients: which, is a tie that torch.topk breaks otherwise",
            },
            parts=lambda trainer: {f"saes[{name!r}]": coder for name, coder in trainer.saes.items()},
            now=lambda trainer: {} if (reason := why_not_fit(trainer)) is None else {"fit": reason},
        ),
    },
    "257437e02778 041341b52c3b 61cea09ef991 95278206d48c",  # coder and fit, with Triton's decoder and without
)
