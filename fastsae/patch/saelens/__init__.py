"""SAELens: its SAEs and transcoders, ``SAETrainer``, ``MultiSAETrainer`` and their runners. Tested with sae-lens 6.49 to 6.54;
what 6.49 and 6.50 do otherwise (JumpReLU in training) stays the library's own.

    sae = fastsae.accelerate(SAE.from_pretrained(...))
    trainer = fastsae.accelerate(SAETrainer(cfg, sae, data))
    runner = fastsae.accelerate(LanguageModelSAETrainingRunner(cfg)); runner.run()

What changes: ``encode`` forms no dense pre-activations and scatters the selected ones into the dense tensor that the library returns;
``forward`` and ``decode`` multiply slots; ``fastsae.encode(sae, x)`` returns the slots themselves. A matching pursuit scores packed weights
at every step; ``fastsae.encode(sae, x, packed=fastsae.sae.PursuitWeights(sae.W_dec))`` seldom does.

A trainer's step of any of its training SAEs is by hand: slots for latents and gradients of TopK, AbsTopK, BatchTopK and Matryoshka
BatchTopK SAEs, and of standard, gated and JumpReLU SAEs (every sparsity loss, the pre-activation loss) of which at most 1/8 fire; torch's
products in fewer passes where more do; clipping and Adam or AdamW in one pass over each weight, on the state of the trainer's own
optimiser. That of a matching pursuit forms no dense latents. Of what is left (``lp_norm`` other than 1, AuxK a level, gated SAEs with a
normalisation by row, classes of one's own) it is the optimiser's step alone that changes.

Any other optimiser, coupled weight decay and weights in bfloat16 (whose moments depend on every rounding) step as they do, on dense
gradients that are made from the slots. Under autocast to bfloat16 a step multiplies rounded numbers and sums in float32. Hooks
see the dense tensor that the library shows them; as long as they only read, the step stays what it is.

What does not: parameters, ``state_dict``, files, hooks and what they see, normalisations, ``reshape_activations``, the error term,
learning-rate and coefficient schedulers, checkpoints, the statistics of firing and dead features, AuxK, BatchTopK's threshold. Latents,
outputs, losses and gradients agree up to rounding, selections outside ties; under autocast selections are those of the rounded inputs.

What costs the speed again, and is said once by a warning and by ``fastsae.report``: in ``encode`` and ``forward`` a hook on
``hook_sae_acts_pre`` (it needs dense pre-activations), in ``forward`` also one on ``hook_sae_acts_post``; while training a hook that writes
or is none of ``add_hook``'s forward ones, autocast to float16 or of a matching pursuit, ``compile_sae`` or a ``.grad`` that is there before
a step; methods or an ``activation_fn`` of one's own. Where more than 1/8 of the latents of ReLU, gated and JumpReLU SAEs fire they take
torch's product, and so does the decoder's from 1/20 on: it is faster there.

Three things differ. ``clip_grad_norm_`` sums all squares in float32, which at millions of weights is off by 1e-5 to 1e-4 (measured
against float64); the fused norm is not, so that clipped gradients differ by that factor. The output of a fused step has no ``hidden_pre``
(reading it raises) and losses without a graph. A decoder row of norm 0 under ``rescale_acts_by_decoder_norm`` makes the library's whole
output NaN; here it adds nothing.

Of the library's own time, at (B, D, F, k) = (256, 768, 24576, 32) and (1024, 512, 8192, 32), TopK, two CPU cores (``fastsae bench
dropin``): a trainer's step 0.08 and 0.12, ``fastsae.encode`` 0.32 and 0.37 (packed weights: 0.28 and 0.36), ``encode`` 0.33 and 0.37.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastsae.patch._adapter import LIBRARIES, Adapter, Library
from fastsae.patch.saelens import sae as _sae
from fastsae.patch.saelens import train as _train

_ENCODER = {
    "topk": "encode_topk",
    "abstopk": "encode_topk by magnitude",
    "batchtopk": "encode_batch_topk",
    "pursuit": "k times encode_topk of one feature, from slots",
    "gated": "encode_gated; torch's product where over 1/8 fire",
    "jumprelu": "encode_threshold; torch's product where over 1/8 fire",
    "relu": "encode_threshold; torch's product where over 1/8 fire",
}


def _of_sae(kind: _sae.Kind) -> Adapter:
    replaces = {
        "encode": f"{_ENCODER[kind.activation]}, scattered into the dense tensor that is asked for",
        "decode": "product of slots, where no gradient for dense latents is asked for and at most 1/20 of them are not 0",
        "forward": "encode and decode by slots; torch's product where over 1/20 fire",
    }
    leaves = {}
    if kind.transcoder:
        replaces["forward_with_activations"] = replaces["forward"]
    mixin = _sae.TranscoderMethods if kind.transcoder else _sae.SAEMethods
    if kind.training and kind.activation == "pursuit":
        mixin, replaces["encode_with_hidden_pre"] = _sae.PursuitMethods, f"{replaces['encode']}; zeros, as the library's"
    elif kind.training:
        leaves["training_forward_pass"] = "it returns dense pre-activations; accelerate the trainer for fast training"
        leaves["encode_with_hidden_pre"] = "it returns dense pre-activations"
    return Adapter(
        mixin,
        replaces,
        leaves,
        now=lambda sae: dict(_sae.now(sae)),
        encode=_sae.encode,
        reconstruct=_sae.reconstruct,
        packs=True,
        transcoder=lambda sae: kind.transcoder,
        decoder=_sae.decoder,
        methods=_sae.METHODS,
    )


def _trainer_now(trainer: Any) -> Mapping[str, str]:
    reason = _train.why_not_ours(trainer) or _train.why_not_adam(trainer) or _train.why_never_fused(trainer.sae)
    if reason is None:
        sample = trainer.sae.W_enc.new_zeros(1, trainer.sae.W_enc.shape[0])
        reason = _train.why_not_fused(trainer, trainer.sae, sample, trainer.dead_neurons)
    return {} if reason is None else {"_train_step": reason}


_STEP = "slots for latents and gradients, clipping and Adam in one pass"
_LEFT = {
    "temporal_sae.TemporalSAE": "its latents depend on the other tokens",
}

_REST = Adapter(None, leaves={"encode": "nothing is known of it"}, encode=_sae.own_encode, reconstruct=_sae.own_reconstruct)

LIBRARY = LIBRARIES["sae_lens"] = Library(
    "sae-lens",
    "6.49",
    "6.55",
    {
        **{f"sae_lens.saes.{name}": _of_sae(kind) for name, kind in _sae.KINDS.items()},
        **{f"sae_lens.saes.{name}": replace(_REST, leaves={"encode": why}) for name, why in _LEFT.items()},
        "sae_lens.training.sae_trainer.SAETrainer": Adapter(
            _train.TrainerMethods,
            {"_train_step": _STEP},
            parts=lambda trainer: {"sae": trainer.sae},
            now=_trainer_now,
            methods=("_train_step",),
        ),
        "sae_lens.training.multi_sae_trainer.MultiSAETrainer": Adapter(
            None,
            leaves={"fit": "it calls its trainers, which are accelerated"},
            parts=lambda trainer: {f"trainers[{name!r}]": part for name, part in trainer.trainers.items()},
        ),
        "sae_lens.llm_sae_training_runner.LanguageModelSAETrainingRunner": Adapter(
            None,
            {"run_trainer_with_interruption_handling": "the trainer made in run is accelerated for the run"},
            parts=lambda runner: {"sae": runner.sae},
            during=("run_trainer_with_interruption_handling",),
        ),
        "sae_lens.multi_sae_training_runner.MultiSAETrainingRunner": Adapter(
            None,
            {"_run_with_interruption_handling": "the trainers made in run are accelerated for the run"},
            parts=lambda runner: {f"saes[{name!r}]": sae for name, sae in runner.saes.items()},
            during=("_run_with_interruption_handling",),
        ),
        "sae_lens.synthetic.synthetic_sae_runner.SyntheticSAERunner": Adapter(
            None,
            {"run": "the trainer made in run is accelerated"},
            parts=lambda runner: {"sae": runner.sae},
            makes={"run": "SAETrainer"},
        ),
    },
    "e235e34e565a 7a5ca6822dd0 e6bb47f9f213 8d388ed67ce6 6f188b664885 20ba9adbaa7e db430324b95a ee8b898e4c53 8da3e941dd9f "
    "9ce8d2a5d3a3 277679a2c057 91d931f49e78 9503007fe4d6 285f9309b093 ef366f1653d7 89a234b35adc 7db44379513b 669a4f63c602 "
    "476b1136e6ce 00c9a8d733aa 3b2642c4afd9 ee1df533adf6 9755afcaa4f4 "
    "63b4bdc6133b a62bb96758ca 83dc813e435e "
    "4602266f7336 f2bc344c382e",  # 6.49: the trainer with a gradient scaler; 6.50: JumpReLU's loss without a target
    "sae_lens.saes.sae.SAE",
    _REST,
)
