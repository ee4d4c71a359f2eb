"""What an SAE is built of, in JSON's types: ``SAE.config`` and ``SAE.from_config``. The names that sparsify knows are its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from fastsae._core import checks
from fastsae.sae.activations import AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.sae.losses import AuxK, JumpLoss
from fastsae.sae.rows import By


class Settings(Protocol):
    """The attributes of an SAE that are no tensors; see its arguments."""

    d_in: int
    d_sae: int
    d_out: int
    activation: Activation
    transcoder: bool
    skip: bool
    tied: bool
    pre_bias: bool
    normalise_decoder: bool
    prefixes: list[int] | None
    objective: str
    l1: float
    l0: float
    aux: AuxK | None
    jump: JumpLoss | None
    dense: bool | None
    normalise_rows: By | None
    dead_after: int


def to_json(sae: Settings) -> dict[str, Any]:
    activation = sae.activation
    config: dict[str, Any] = {"d_in": sae.d_in, "num_latents": sae.d_sae, "activation": type(activation).__name__.lower()}
    if isinstance(activation, TopK):  # AbsTopK is one
        config |= {"k": activation.k, "relu": activation.relu}
    if isinstance(activation, BatchTopK):
        config |= {"k": activation.k, "rate": activation.rate}
    if isinstance(activation, JumpReLU):
        config["bandwidth"] = activation.bandwidth
    return config | {
        "expansion_factor": 0,
        "normalize_decoder": sae.normalise_decoder,
        "transcode": not sae.pre_bias,  # sparsify's word for it
        "transcoder": sae.transcoder,
        "pre_bias": sae.pre_bias,
        "d_out": sae.d_out,
        "skip_connection": sae.skip,
        "tied": sae.tied,
        "prefixes": sae.prefixes,
        "objective": sae.objective,
        "l1": checks.plain(sae.l1),
        "l0": checks.plain(sae.l0),
        "aux": None if sae.aux is None else asdict(sae.aux),
        "jump": None if sae.jump is None else asdict(sae.jump),
        "normalise_rows": sae.normalise_rows,
        "dead_after": checks.plain(sae.dead_after),
    }


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``SAE``; KeyError, TypeError or ValueError where they are none."""
    if "n_layers" in config:
        raise ValueError(f"it is of a Crosscoder of {config['n_layers']} layers, which SAE is not")
    kind = config["activation"]
    activation: Activation
    if kind == "topk":
        activation = TopK(config["k"], config.get("relu", True))
    elif kind == "abstopk":
        activation = AbsTopK(config["k"])
    elif kind == "batchtopk":
        activation = BatchTopK(config["k"], config.get("rate", 0.01))
    elif kind == "jumprelu":
        activation = JumpReLU(bandwidth=config.get("bandwidth"))
    elif kind in ("relu", "gated"):
        activation = ReLU() if kind == "relu" else Gated()
    else:
        raise ValueError(f"unknown activation {kind!r}")
    same = ("prefixes", "tied", "objective", "l1", "l0", "dead_after", "pre_bias", "normalise_rows")
    options = {name: config[name] for name in same if name in config}
    options |= {"skip": config.get("skip_connection", False), "normalise_decoder": config.get("normalize_decoder")}
    transcoder = checks.flag("SAE", "transcoder", config.get("transcoder", config.get("transcode", False)))
    options["d_out"] = config["d_out"] if transcoder else None
    if not transcoder and config.get("d_out") not in (None, config["d_in"]):
        raise ValueError(f"d_out={config['d_out']!r} is for transcoders")
    options["aux"] = None if config.get("aux") is None else AuxK(**config["aux"])
    options["jump"] = None if config.get("jump") is None else JumpLoss(**config["jump"])
    return {"d_in": config["d_in"], "d_sae": config["num_latents"], "activation": activation, **options}
