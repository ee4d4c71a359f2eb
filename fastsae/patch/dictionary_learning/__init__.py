"""dictionary_learning: its dictionaries and trainers. Tested with dictionary-learning 0.1.0.

    ae = fastsae.accelerate(AutoEncoderTopK.from_pretrained(...))
    trainer = fastsae.accelerate(TopKTrainer(...)); trainer.update(step, x)

    trainSAE(data, [{"trainer": lambda **config: fastsae.accelerate(TopKTrainer(**config)), "k": 32, ..}], steps)

What changes: ``encode`` forms no dense pre-activations and scatters the selected ones into the dense tensor that the library returns;
``forward`` and ``decode`` multiply slots; ``fastsae.encode(ae, x)`` returns the slots themselves. ``update`` of the TopK, BatchTopK,
Matryoshka, Standard, Gated and JumpReLU trainers forms neither dense latents nor dense gradients, and projects, clips, applies Adam and
normalises in one pass over each weight, on the state of the trainer's own optimiser. Of the April-update trainer it is the part after the
backward that changes. ReLU, JumpReLU and gated dictionaries of which more than 1/8 of the latents fire (most do at the start)
take the library's products.

What does not: parameters, names and shapes in ``state_dict``, files, losses, schedulers, dead-feature counts, AuxK, thresholds,
resampling, ``loss`` (which logging calls). Numbers agree up to rounding, selections outside ties; under autocast to bfloat16 selections are
those of the rounded inputs.

Three things differ. The first fast update lays the weights out feature-major in memory (``decoder.weight`` stays ``[D, F]``, with strides
``(1, D)``); ``torch.save`` keeps that, and other formats may want ``.contiguous()``. The projection leaves out the 1e-6 that the
library adds to norms that are 1, about 2e-6 of a component that is being removed. And ``b_dec`` of a Matryoshka trainer keeps its dtype
where the library gives it that of the first batch.

The library's main branch reports the version of the release: an ``update`` that differs from the release's (it has no ``k_anneal_steps``)
is the library's own, as a warning and ``fastsae.report`` say; its dictionary stays fast.

``PAnnealTrainer`` and ``GatedAnnealTrainer`` are left alone: their losses change form while they run; accelerate their ``ae``.

Of the library's own time, at (B, D, F, k) = (256, 768, 24576, 32) and (1024, 512, 8192, 32), TopK, two CPU cores (``fastsae bench
dropin``): ``update`` 0.05 and 0.12, ``fastsae.encode`` 0.31 and 0.37, ``encode`` 0.36 and 0.38.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastsae.patch._adapter import LIBRARIES, Adapter, Library
from fastsae.patch.dictionary_learning import sae as _sae
from fastsae.patch.dictionary_learning import train as _train

_ENCODER = {
    "topk": "encode_topk",
    "batchtopk": "encode_threshold, or encode_batch_topk with use_threshold=False",
    "gated": "encode_gated; the library's product where over 1/8 fire",
    "jumprelu": "encode_threshold; the library's product where over 1/8 fire",
    "relu": "encode_threshold; the library's product where over 1/8 fire",
}
_MORE = {
    "topk": "return_topk=True",
    "batchtopk": "return_active=True",
    "gated": "return_gate=True, normalize_decoder=True",
    "jumprelu": "output_pre_jump=True",
    "relu": "ghost_mask",
}


def _of_sae(kind: _sae.Kind) -> Adapter:
    replaces = {
        "encode": f"{_ENCODER[kind.activation]}, scattered into the dense tensor that is asked for",
        "decode": "product of slots, where no gradient for dense latents is asked for and at most 1/8 of them are not 0",
        "forward": "encode and decode by slots",
    }
    leaves = {_MORE[kind.activation]: "asks for dense pre-activations or other latents: the library's own"}
    return Adapter(
        _sae.Methods,
        replaces,
        leaves,
        now=lambda ae: dict(_sae.now(ae)),
        encode=_sae.encode,
        reconstruct=_sae.reconstruct,
        decoder=_sae.decoder,
    )


def _now(trainer: Any) -> Mapping[str, str]:
    reason = _train.why_not_adam(trainer)
    if reason is None:
        W = _sae.encoder(trainer.ae)
        reason = _train.why_not_fused(trainer, torch.zeros(1, W.shape[1], dtype=W.dtype, device=W.device))
    return {} if reason in (None, _train.MANY_FIRE) else {"update": str(reason)}


def _of_trainer(name: str) -> Adapter:
    fused = name in _train.STEPS
    by = "slots for latents and gradients; " if fused else "the library's forward and backward; "
    return Adapter(
        _train.TrainerMethods,
        {"update": f"{by}projection, clipping, Adam and unit features in one pass"},
        {"loss": "logging calls it for dense latents"},
        parts=lambda trainer: {"ae": trainer.ae} if _sae.is_known(trainer.ae) else {},
        now=_now,
    )


_TRAINERS = {
    "top_k": ("TopKTrainer",),
    "batch_top_k": ("BatchTopKTrainer",),
    "matryoshka_batch_top_k": ("MatryoshkaBatchTopKTrainer",),
    "jumprelu": ("JumpReluTrainer",),
    "standard": ("StandardTrainer", "StandardTrainerAprilUpdate"),
    "gdm": ("GatedSAETrainer",),
}
_ANNEALED = "its loss changes form while it runs; its dictionary is accelerated"

LIBRARY = LIBRARIES["dictionary_learning"] = Library(
    "dictionary-learning",
    "0.1.0",
    "0.2",
    {
        **{f"dictionary_learning.{name}": _of_sae(kind) for name, kind in _sae.KINDS.items()},
        **{f"dictionary_learning.trainers.{file}.{name}": _of_trainer(name) for file, names in _TRAINERS.items() for name in names},
        **{
            f"dictionary_learning.trainers.{name}": Adapter(None, leaves={"update": _ANNEALED}, parts=lambda trainer: {"ae": trainer.ae})
            for name in ("p_anneal.PAnnealTrainer", "gated_anneal.GatedAnnealTrainer")
        },
    },
    "015863ab5ab1 7a575139cdfb 92841d14634c 2a5f19093c36 ca5e2194a7da 37749afaba48 0ef3b36bfbee cfde8301a6a7 114258cf66f2 "
    "657da228331d 493880424bba 5c2a9dbf1bf7 171ccbb63a1b 018d931aab9f "
    "8775db6b7787 8b0e5611bf02 9a6663cf2cb9",  # the last three: update of the main branch of August 2025, which anneals k
)
