"""Networks from modules: those of PyTorch by what they are, those of Hugging Face (which is not imported) by their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsae._core import checks
from fastsae.polytopes.net import Activation, Add, Affine, Net, Norm, Operator, Save, Stage, Times

_HF_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "AccurateGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}
_ACTIVATIONS = ((nn.ReLU, "relu"), (nn.SiLU, "silu"), (nn.Sigmoid, "sigmoid"), (nn.Tanh, "tanh"), (nn.Softmax, "softmax"))
_IGNORED = (nn.Identity, nn.Dropout)
_KNOWN = (
    "Linear, ReLU, LeakyReLU, GELU, SiLU, Sigmoid, Tanh, Softmax, LayerNorm, RMSNorm, BatchNorm, Conv2d, "
    "average pooling, Flatten, Sequential"
)


def _flat(h: Tensor) -> Tensor:
    return h.flatten(1)


def _hf(module: nn.Module) -> str:
    """The class name of a Hugging Face module, or an empty string."""
    return type(module).__name__ if type(module).__module__.startswith("transformers.") else ""


def _activation(op: str, module: nn.Module) -> Activation | None:
    if isinstance(module, nn.LeakyReLU):
        return Activation("leaky_relu", float(module.negative_slope))
    if isinstance(module, nn.GELU):
        return Activation("gelu" if module.approximate == "none" else "gelu_tanh")
    if isinstance(module, nn.Softmax) and module.dim != -1:
        raise ValueError(f"{op}: Softmax must be over the neurons (dim=-1), got dim={module.dim}")
    kind = next((name for known, name in _ACTIVATIONS if isinstance(module, known)), _HF_ACTIVATIONS.get(_hf(module)))
    return None if kind is None else Activation(kind)


def _stages(op: str, module: Any) -> list[Stage]:
    if isinstance(module, Net):
        return list(module.stages)
    if isinstance(module, (nn.Sequential, list, tuple)):
        return [stage for part in module for stage in _stages(op, part)]
    checks.instance(op, "module", module, nn.Module, "a torch.nn.Module, a Net or a list of them")
    act = _activation(op, module)
    if act is not None:
        return [act]
    if isinstance(module, nn.Linear):
        return [Affine(module.weight, module.bias)]
    if _hf(module) == "Conv1D":
        parameters: Any = module  # of transposed weights
        return [Affine(parameters.weight.T, parameters.bias)]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if len(module.normalized_shape) != 1:
            kind = type(module).__name__
            raise ValueError(f"{op}: {kind} must be over the last dimension alone, got normalized_shape={module.normalized_shape}")
        if isinstance(module, nn.LayerNorm):
            return [Norm(True, module.weight, module.bias, float(module.eps))]
        weight: Any = module.weight
        eps = torch.finfo(torch.float32 if weight is None else weight.dtype).eps if module.eps is None else module.eps
        return [Norm(False, weight, None, float(eps))]
    if isinstance(module, _IGNORED):
        return []
    image = _image_stage(op, module)
    if image is not None:
        return [image]
    if _is_gated(module):
        raise ValueError(f"{op}: {_gated_name(module)} ({type(module).__name__}) multiplies two branches and has no piecewise affine form")
    kind = type(module).__name__
    raise ValueError(f"{op}: {kind} is not supported; supported: {_KNOWN}, and a list of such parts of a module of your own")


def _image_stage(op: str, module: nn.Module) -> Operator | None:
    """Affine layers over images, their shapes not yet known."""
    name = type(module).__name__
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise ValueError(f"{op}: Conv2d must pad with zeros, got padding_mode={module.padding_mode!r}")
        options: Any = (module.stride, module.padding, module.dilation, module.groups)
        return Operator(lambda h, W, b: F.conv2d(h, W, b, *options), (module.weight, module.bias))
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        if module.training or module.running_mean is None:
            raise ValueError(f"{op}: {name} must be in evaluation mode with running statistics: of a batch's own it is no map of a point")
        eps, tensors = float(module.eps), (module.running_mean, module.running_var, module.weight, module.bias)
        size = (module.num_features,) if isinstance(module, nn.BatchNorm1d) else ()
        return Operator(lambda h, mean, var, g, b: F.batch_norm(h, mean, var, g, b, False, 0.0, eps), tensors, False, size, size)
    if isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
        return Operator(module.forward)
    if isinstance(module, nn.Flatten):
        if (module.start_dim, module.end_dim) != (1, -1):
            raise ValueError(f"{op}: Flatten must be of all but the batch, got {module}")
        return Operator(_flat)
    return None


def _placed(op: str, stages: Iterable[Stage], shape: tuple[int, ...] | None) -> list[Stage]:
    """The stages with the shapes that the operators meet, from that of the input; what is not over flat vectors is refused."""
    result: list[Stage] = []
    saved: list[tuple[int, ...] | None] = []
    for stage in stages:
        if isinstance(stage, Operator):
            if not stage.into:
                if stage.run is _flat:
                    shape = None if shape is None else (prod(shape),)
                    continue
                if shape is None:
                    raise ValueError(f"{op}: input_shape must be given, [C, H, W] of the images that the first layer gets")
                blank = [None if t is None else torch.empty_like(t, device="meta") for t in stage.tensors]
                dtype = next((t.dtype for t in blank if t is not None), torch.float32)
                try:
                    out = stage.run(torch.empty(1, *shape, device="meta", dtype=dtype), *blank).shape[1:]
                except (RuntimeError, ValueError) as error:
                    raise ValueError(f"{op}: a layer does not fit its input of shape {list(shape)}: {error}") from None
                stage = replace(stage, into=shape, out=tuple(out))
            shape = stage.out
        elif isinstance(stage, Save):
            saved.append(shape)
        elif isinstance(stage, (Add, Times)):
            saved.pop()
        elif shape is not None and len(shape) > 1 and not (isinstance(stage, Activation) and stage.kind != "softmax"):
            raise ValueError(f"{op}: {type(stage).__name__} must follow Flatten, got images of shape {list(shape)}")
        if isinstance(stage, Affine):
            shape = (stage.W.shape[0],)
        result.append(stage)
    return result


def as_net(module: nn.Module | Net | Sequence[nn.Module | Net], *, residual: bool = False, input_shape: Sequence[int] | None = None) -> Net:
    """What the polytope functions take, from modules.

    Args:
        module: ``torch.nn.Sequential`` (nested ones too), one module, or a list of modules and nets that run one after the other. Known are
            Linear (and Hugging Face's Conv1D), ReLU, LeakyReLU, GELU, SiLU, Sigmoid, Tanh, Softmax(-1), LayerNorm, RMSNorm, BatchNorm1d
            and 2d in evaluation mode, Conv2d, AvgPool2d, AdaptiveAvgPool2d, Flatten; Identity and Dropout do nothing (as in evaluation).
        residual: the net is ``x + module(x)``.
        input_shape: ``[C, H, W]`` of the images, where the first layers are over images; the net takes and gives them flat, and its neurons
            are the channels at all places.

    Returns:
        A ``Net`` over the modules' own parameters. BatchNorm, Conv2d and pooling are affine layers, applied as the modules do; where a
        matrix of at most 2^22 elements (32 MiB in float64) holds one, functions that convert the net use that.

    A transformer's MLP with its norm and residual is ``mlp_block(model, layer)``.

    Raises: TypeError: not a module. ValueError: a module that is not supported, by name (SwiGLU and GeGLU multiply two branches), or widths
        that do not fit.
    """
    op = "as_net"
    checks.flag(op, "residual", residual)
    if input_shape is not None:
        input_shape = tuple(checks.integer(op, "input_shape", size, 1) for size in input_shape)
    stages = _placed(op, _stages(op, module), input_shape)
    return Net([Save(), *stages, Add()] if residual else stages)


# ---------------------------------------------------------------- the MLP of a transformer


def _is_gated(module: nn.Module) -> bool:
    names = set(dict(module.named_children()))
    return "gate_proj" in names or "gate_up_proj" in names or {"wi_0", "wi_1"} <= names or {"w1", "w2", "w3"} <= names


def _gated_name(module: nn.Module) -> str:
    kinds = {act.kind for child in module.modules() if (act := _activation("mlp_block", child)) is not None}
    return "SwiGLU" if "silu" in kinds else "GeGLU" if kinds & {"gelu", "gelu_tanh"} else "a gated MLP"


def _blocks(op: str, model: nn.Module) -> Sequence[nn.Module]:
    """The transformer's layers: its longest ``ModuleList``."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"{op}: model must be a transformer with a ModuleList of layers, got {type(model).__name__}")
    return max(lists, key=len)  # pyright: ignore[reportReturnType]


_GATED = {"Llama": 0.0, "Mistral": 0.0, "Qwen2": 0.0, "Qwen3": 0.0, "SmolLM3": 0.0, "Gemma": 1.0, "Gemma2": 1.0, "Gemma3": 1.0}
"""Families of layers (``<family>DecoderLayer``) with a gated MLP behind an RMSNorm, and what their norm adds to its weight."""


def _parts(op: str, block: nn.Module) -> tuple[list[Stage], list[Stage]]:
    """(norm before, the rest) of the MLP of a Hugging Face layer."""

    def two(first: Any, act: Any, second: Any) -> list[Stage]:
        known = _activation(op, act) if isinstance(act, nn.Module) else None
        if known is None:
            raise ValueError(f"{op}: the activation {type(act).__name__} is not supported")
        return [*_stages(op, first), known, *_stages(op, second)]

    children: dict[str, Any] = dict(block.named_children())
    mlp: Any = children.get("mlp")
    if "intermediate" in children and "output" in children:  # BERT and its relatives: the norm follows the residual sum
        first = children["intermediate"]
        return [], two(first.dense, first.intermediate_act_fn, children["output"].dense)
    offset = _GATED.get(type(block).__name__.removesuffix("DecoderLayer"))
    if offset is not None and hasattr(mlp, "gate_proj"):

        def rms(name: str) -> list[Stage]:
            norm = children.get(name)
            eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
            return [] if norm is None else [Norm(False, norm.weight, None, float(eps), offset)]

        before = rms("pre_feedforward_layernorm") or rms("post_attention_layernorm")
        gate, act, *down = two(mlp.gate_proj, mlp.act_fn, mlp.down_proj)
        return before, [Save(), gate, act, Times(mlp.up_proj.weight, mlp.up_proj.bias), *down, *rms("post_feedforward_layernorm")]
    for module in (mlp, block):
        if module is not None and _is_gated(module):
            raise ValueError(
                f"{op}: {_gated_name(module)} ({type(module).__name__}) multiplies two branches, and {type(block).__name__} is not among "
                f"the layers whose gate is known ({', '.join(_GATED)})"
            )
    if mlp is not None and hasattr(mlp, "c_fc"):  # GPT-2
        return _stages(op, children["ln_2"]), two(mlp.c_fc, mlp.act, mlp.c_proj)
    if mlp is not None and hasattr(mlp, "dense_h_to_4h"):  # GPT-NeoX (Pythia)
        return _stages(op, children["post_attention_layernorm"]), two(mlp.dense_h_to_4h, mlp.act, mlp.dense_4h_to_h)
    shown = ", ".join(children)
    raise ValueError(f"{op}: the MLP of {type(block).__name__} is not known (BERT, GPT-2, GPT-NeoX and gated layers are), it has {shown}")


def mlp_block(model: nn.Module, layer: int, *, norm: bool = True, residual: bool = True) -> Net:
    """The MLP of a transformer's layer, as a function of the residual stream: ``x + W_out act(W_in norm(x) + b_in) + b_out``.

    Args:
        model: a Hugging Face model of the BERT, GPT-2, GPT-NeoX (Pythia) kind, or with a gated MLP: Llama (SmolLM2), Mistral, Qwen 2 and 3,
            SmolLM3, Gemma 1 to 3. layer: 0 .. layers - 1.
        norm: with the norm before the MLP, where the model has one there (BERT normalises after the sum: its MLP gets the sum's
            normalised output, which is x, and the norm after the MLP is left out). False: a function of the normalised input.
        residual: with the skip connection. Not with ``norm=False`` in a model that normalises before the MLP: the skip starts before it.

    Returns:
        A ``Net`` over the model's own parameters. Dropout is left out, as in evaluation.

    A gated MLP (SwiGLU, GeGLU) is ``x + W_out (act(W_gate n + b) * (W_up n))``, n = norm(x); its neurons are the gate's, a code the signs
    of ``W_gate n + b``: what spline codes, ``crossings``, ``local_complexity`` and ``validity`` ask. Behind an RMSNorm,
    ``n = g * x / rms(x)`` (Gemma: ``1 + g``, exactly as well), and with r = rms(x) > 0 a neuron w is on where ``w·(g * x) + b r > 0``.
    Without a bias that is ``(w * g)·x > 0``: the regions are cones, cut by hyperplanes through the origin, and crossings are those of one
    affine layer; with a LayerNorm without bias by those of ``w * g`` less its mean. With a bias (``mlp_bias=True``; a LayerNorm's own)
    boundaries are pieces of quadrics and a segment's crossings roots of quadratics, exact too, while what asks for a hyperplane
    (``shell`` and ``validity`` without a radius) is refused. In a region the output is a quadratic of n (times a smooth gate), no affine
    map: ``affine_map``, ``soft_affine_map``, ``boundary_norms`` and the Frobenius distances refuse it by name.

    Raises: TypeError: not a module. ValueError: layer out of range; an MLP that is not known; other gated layers, by name.
    """
    op = "mlp_block"
    checks.instance(op, "model", model, nn.Module, "a torch.nn.Module")
    blocks = _blocks(op, model)
    layer = checks.integer(op, "layer", layer, 0, len(blocks) - 1, "the number of layers less 1")
    checks.flag(op, "norm", norm)
    checks.flag(op, "residual", residual)
    before, stages = _parts(op, blocks[layer])
    if before and residual and not norm:
        raise ValueError(
            f"{op}: residual must be False with norm=False: the skip connection starts before the norm of {type(model).__name__}"
        )
    stages = [*before, *stages] if norm else stages
    return Net([Save(), *stages, Add()] if residual else stages)
