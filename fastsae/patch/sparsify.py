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

The trainer calls its coders, then an optimiser on dense gradients; ``train_step`` does the same for one batch and, for
``torch.optim.Adam``, forms none.

Of the library's own time, at (B, D, F, k) = (256, 768, 24576, 32) and (1024, 512, 8192, 32), two CPU cores (``fastsae bench dropin``):
``train_step`` 0.15 and 0.37, ``fastsae.encode`` 0.28 and 0.42, ``encode`` 0.29 and 0.30; ``Trainer.fit`` about 0.75.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
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
from fastsae.packed import Unchanged
from fastsae.patch import _adam
from fastsae.patch._adapter import LIBRARIES, Adapter, Library, changed, library_way, need_slots, tampered
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
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=_BF16):
            return _forward(self, x, y, dead_mask, total_variance)

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self: Any) -> None:
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
        out, gradients = _gradients(coder, x, x if y is None else y, dead_mask, auxk_alpha)
        _adam.step(optimizer, gradients, project=(coder.W_dec,) if project else ())  # pyright: ignore[reportArgumentType]
        return out
    out = coder(x=x, y=y, dead_mask=dead_mask)
    (out.fvu + auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
    if project:
        coder.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    return out


def _why_not_fused(coder: Any, optimizer: Any, x: Tensor, y: Tensor | None) -> str | None:
    reason = why_dense(coder) or _adam.refuses(optimizer)
    if reason is not None:
        return reason
    parameters = list(coder.parameters())
    if not _adam.holds(optimizer, coder):
        return "the optimiser does not hold the coder's parameters"
    if tampered(coder) or not isinstance(coder.W_dec, nn.Parameter) or not isinstance(coder.b_dec, nn.Parameter):
        return "the coder has a hook, or a parameter that is computed from another"
    if any(p.grad is not None or not p.is_contiguous() or not p.requires_grad for p in parameters):
        return "a parameter has a gradient already, is frozen or is not contiguous"
    if torch.cuda.is_available() or checks.autocasting(x.device):
        return "autocast is on"  # the library turns it on wherever there is a GPU
    if any(t.dtype is not coder.dtype or t.dim() != 2 or t.requires_grad for t in (x, x if y is None else y)):
        return "x or y is not a matrix of the coder's dtype, or asks for a gradient"
    return None


@torch.no_grad()
def _gradients(coder: Any, x: Tensor, y: Tensor, dead_mask: Tensor | None, alpha: float) -> tuple[Any, Mapping[Tensor, Gradient]]:
    """``forward`` and its backward by slots."""
    inputs, k, backend = _inputs(coder, x), coder.cfg.k, then_any(preference(None))
    xc, W, b = inputs
    F, W_dec = W.shape[0], coder.W_dec
    values, indices = _best(coder, xc, W, b, k)
    out = DECODE(values, indices, None, W_dec, None, backend=backend) + coder.b_dec
    if coder.W_skip is not None:
        out = out + x @ coder.W_skip.mT
    error = y - out
    variance = (y - y.mean(0)).pow(2).sum()
    G = error * (-2 / variance)
    b_dec = G.sum(0)
    decoder: list[Gradient] = [RowGradient(values, indices, None, G, F)]
    dvalues = DECODE_DVALUES(G, indices, None, W_dec, backend=backend)
    fvu, auxk_loss, multi = error.pow(2).sum() / variance, out.new_tensor(0.0), out.new_tensor(0.0)
    if dead_mask is not None and (dead := int(dead_mask.sum())) > 0:
        most = y.shape[-1] // 2
        aux_values, aux_indices = _aux(inputs, dead_mask, min(most, dead))
        difference = DECODE(aux_values, aux_indices, None, W_dec, None, backend=backend) - error
        scale = min(dead / most, 1.0) / variance
        auxk_loss = scale * difference.pow(2).sum()
        decoder.append(RowGradient(aux_values, aux_indices, None, difference * (2 * alpha * scale), F))
    latents = values, indices
    if coder.cfg.multi_topk:
        latents = _best(coder, xc, W, b, 4 * k)
        out = DECODE(*latents, None, W_dec, None, backend=backend) + coder.b_dec
        difference = out - y
        multi = difference.pow(2).sum() / variance
        rows = difference * (2 / (8 * variance))
        decoder.append(RowGradient(*latents, None, rows, F))
        b_dec += rows.sum(0)
    if not coder.cfg.transcode:
        b_dec -= DECODE(dvalues, indices, None, W, None, backend=backend).sum(0)
    gradients: dict[Tensor, Gradient] = {
        coder.encoder.weight: RowGradient(dvalues, indices, None, xc, F),
        coder.encoder.bias: feature_sums(dvalues, indices, None, F, backend).to(b.dtype),
        W_dec: total(decoder),
        coder.b_dec: b_dec,
    }
    if coder.W_skip is not None:
        gradients[coder.W_skip] = G.mT @ x
    return sys.modules["sparsify.sparse_coder"].ForwardOutput(out, *latents, fvu, auxk_loss, multi), gradients


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
            None,
            leaves={
                "fit": "it calls its coders, which are accelerated, and an optimiser on dense gradients",
                "k_decay_steps": "keeps latents of value 0 at first, which get gradients: which, is a tie that torch.topk breaks otherwise",
            },
            parts=lambda trainer: {f"saes[{name!r}]": coder for name, coder in trainer.saes.items()},
        ),
    },
    "257437e02778 041341b52c3b",  # with Triton's decoder and without
)
