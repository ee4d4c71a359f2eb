"""Networks as the polytope functions see them: affine maps, activations, normalisations and residual branches, in order.

A ``Net`` is a flat tuple of stages and holds the module's own parameters, not copies: a change of the weights is seen by the next call.
Modules are recognised by what they are (PyTorch) or by their names (Hugging Face, which is not imported).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsae._core import checks
from fastsae._core.precision import full_precision

PIECEWISE = ("relu", "leaky_relu")
GATES = ("gelu", "gelu_tanh", "silu", "quick_gelu")
"""Activations ``z * q(z)`` with a gate q between 0 and 1."""
ASSIGNMENTS = ("sigmoid", "tanh", "softmax")
"""Activations that are soft assignments to constants."""


@dataclass(frozen=True, eq=False)
class Affine:
    """``h -> h W^T + b``; ``W [out, in]`` of any strides."""

    W: Tensor
    b: Tensor | None


@dataclass(frozen=True)
class Activation:
    """One of ``PIECEWISE``, ``GATES``, ``ASSIGNMENTS``; ``slope`` is what a leaky ReLU does below 0."""

    kind: str
    slope: float = 0.0


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm (``centred``) or RMSNorm: ``weight * h / sqrt(mean(h^2) + eps) + bias``."""

    centred: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Save:
    """The start of a residual branch: what comes here is added at the matching ``Add``."""


@dataclass(frozen=True)
class Add:
    """The end of a residual branch."""


Stage = Affine | Activation | Norm | Save | Add


def activate(z: Tensor, act: Activation) -> Tensor:
    if act.kind == "relu":
        return z.relu()
    if act.kind == "leaky_relu":
        return F.leaky_relu(z, act.slope)
    if act.kind == "gelu":
        return F.gelu(z)
    if act.kind == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if act.kind == "silu":
        return F.silu(z)
    if act.kind == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    if act.kind == "sigmoid":
        return z.sigmoid()
    return z.tanh() if act.kind == "tanh" else z.softmax(-1)


def normalise(h: Tensor, norm: Norm) -> Tensor:
    if norm.centred:
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.eps)
    h = h if norm.weight is None else h * norm.weight
    return h if norm.bias is None else h + norm.bias


class Net:
    """A network whose polytopes can be asked for; made by ``as_net`` and ``mlp_block``.

    Attributes:
        stages: what it does, in order. d_in, d_out: widths of input and output. widths: neurons of each activation layer; layer number l of
            ``crossings`` and of hash keys is ``widths[l]``'s.

    Calling it runs it on ``x [.., d_in]`` (differentiable); ``preactivations`` returns what its activation layers get.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self.d_in, self.d_out, self.widths = _shapes(self.stages)

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, None)

    def preactivations(self, x: Tensor) -> list[Tensor]:
        """``[.., H]`` of each activation layer."""
        found: list[Tensor] = []
        self._run(x, found)
        return found

    def _run(self, x: Tensor, found: list[Tensor] | None) -> Tensor:
        last = max((i for i, stage in enumerate(self.stages) if isinstance(stage, Activation)), default=-1)
        h, saved = x, []
        for i, stage in enumerate(self.stages):
            if isinstance(stage, Affine):
                h = F.linear(h, stage.W, stage.b)
            elif isinstance(stage, Activation):
                if found is not None:
                    found.append(h)
                    if i == last:
                        break
                h = activate(h, stage)
            elif isinstance(stage, Norm):
                h = normalise(h, stage)
            elif isinstance(stage, Save):
                saved.append(h)
            else:
                h = h + saved.pop()
        return h

    def to(self, dtype: torch.dtype) -> Net:
        """The same network with its parameters detached and converted (float64: widened exactly)."""

        def cast(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach().to(dtype)

        stages: list[Stage] = []
        for stage in self.stages:
            if isinstance(stage, Affine):
                stages.append(Affine(stage.W.detach().to(dtype), cast(stage.b)))
            elif isinstance(stage, Norm):
                stages.append(Norm(stage.centred, cast(stage.weight), cast(stage.bias), stage.eps))
            else:
                stages.append(stage)
        return Net(stages)

    @property
    def device(self) -> torch.device:
        tensors = (t for stage in self.stages for t in vars(stage).values() if isinstance(t, Tensor))
        return next((t.device for t in tensors), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        tensors = (t for stage in self.stages for t in vars(stage).values() if isinstance(t, Tensor))
        return next((t.dtype for t in tensors), torch.float32)

    def __repr__(self) -> str:
        def show(stage: Stage) -> str:
            if isinstance(stage, Affine):
                return f"{stage.W.shape[1]}→{stage.W.shape[0]}"
            if isinstance(stage, Activation):
                return stage.kind
            if isinstance(stage, Norm):
                return "layer_norm" if stage.centred else "rms_norm"
            return "(" if isinstance(stage, Save) else "+)"

        return f"Net({' '.join(map(show, self.stages))})"


def _shapes(stages: Iterable[Stage]) -> tuple[int | None, int | None, tuple[int, ...]]:
    """(input width, output width, widths of activation layers); None where no stage says."""
    first: int | None = None
    width: int | None = None
    widths: list[int] = []
    saved: list[int | None] = []
    for stage in stages:
        expected = None
        if isinstance(stage, Affine):
            expected = stage.W.shape[1]
        elif isinstance(stage, Norm):
            given = stage.weight if stage.weight is not None else stage.bias
            expected = None if given is None else given.shape[0]
        elif isinstance(stage, Add):
            start = saved.pop()
            if start is not None and start != width:
                raise ValueError(f"as_net: a residual branch must end with its input's width {start}, got {width}")
            continue
        if expected is not None:
            if width is not None and expected != width:
                raise ValueError(f"as_net: a layer for inputs of width {expected} follows one of width {width}")
            width = expected
            first = expected if first is None else first
        if isinstance(stage, Save):
            saved.append(width)
        if isinstance(stage, Activation):
            if width is None:
                raise ValueError("as_net: an activation must follow a Linear layer (its number of neurons is unknown)")
            widths.append(width)
        if isinstance(stage, Affine):
            width = stage.W.shape[0]
    return first, width, tuple(widths)


# ---------------------------------------------------------------- from modules

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
_IGNORED = (nn.Identity, nn.Dropout)
_KNOWN = "Linear, ReLU, LeakyReLU, GELU, SiLU, Sigmoid, Tanh, Softmax, LayerNorm, RMSNorm, Sequential"


def _hf(module: nn.Module) -> str:
    """The class name of a Hugging Face module, or an empty string."""
    return type(module).__name__ if type(module).__module__.startswith("transformers.") else ""


def _activation(op: str, module: nn.Module) -> Activation | None:
    if isinstance(module, nn.ReLU):
        return Activation("relu")
    if isinstance(module, nn.LeakyReLU):
        return Activation("leaky_relu", float(module.negative_slope))
    if isinstance(module, nn.GELU):
        return Activation("gelu" if module.approximate == "none" else "gelu_tanh")
    if isinstance(module, nn.SiLU):
        return Activation("silu")
    if isinstance(module, nn.Sigmoid):
        return Activation("sigmoid")
    if isinstance(module, nn.Tanh):
        return Activation("tanh")
    if isinstance(module, nn.Softmax):
        if module.dim != -1:
            raise ValueError(f"{op}: Softmax must be over the neurons (dim=-1), got dim={module.dim}")
        return Activation("softmax")
    kind = _HF_ACTIVATIONS.get(_hf(module))
    return None if kind is None else Activation(kind)


def _stages(op: str, module: Any) -> list[Stage]:
    if isinstance(module, Net):
        return list(module.stages)
    if isinstance(module, (nn.Sequential, list, tuple)):
        return [stage for part in module for stage in _stages(op, part)]
    if not isinstance(module, nn.Module):
        raise TypeError(f"{op}: module must be a torch.nn.Module, a Net or a list of them, got {type(module).__name__}")
    act = _activation(op, module)
    if act is not None:
        return [act]
    if isinstance(module, nn.Linear):
        return [Affine(module.weight, module.bias)]
    if _hf(module) == "Conv1D":
        parameters: Any = module  # of transposed weights
        return [Affine(parameters.weight.T, parameters.bias)]
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            raise ValueError(f"{op}: LayerNorm must be over the last dimension alone, got normalized_shape={module.normalized_shape}")
        return [Norm(True, module.weight, module.bias, float(module.eps))]
    if isinstance(module, nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            raise ValueError(f"{op}: RMSNorm must be over the last dimension alone, got normalized_shape={module.normalized_shape}")
        weight: Any = module.weight
        eps = torch.finfo(torch.float32 if weight is None else weight.dtype).eps if module.eps is None else module.eps
        return [Norm(False, weight, None, float(eps))]
    if isinstance(module, _IGNORED):
        return []
    if _is_gated(module):
        raise ValueError(f"{op}: {_gated_name(module)} ({type(module).__name__}) multiplies two branches and has no piecewise affine form")
    raise ValueError(
        f"{op}: {type(module).__name__} is not supported; supported: {_KNOWN}, and a list of such parts of a module of your own"
    )


def as_net(module: nn.Module | Net | Sequence[nn.Module | Net], *, residual: bool = False) -> Net:
    """What the polytope functions take, from modules.

    Args:
        module: ``torch.nn.Sequential`` (nested ones too), one module, or a list of modules and nets that run one after the other. Known are
            Linear (and Hugging Face's Conv1D), ReLU, LeakyReLU, GELU, SiLU, Sigmoid, Tanh, Softmax(-1), LayerNorm, RMSNorm; Identity and
            Dropout do nothing (as in evaluation).
        residual: the net is ``x + module(x)``.

    Returns:
        A ``Net`` over the modules' own parameters.

    A transformer's MLP with its norm and residual is ``mlp_block(model, layer)``.

    Raises: TypeError: not a module. ValueError: a module that is not supported, by name (SwiGLU and GeGLU multiply two branches), or widths
        that do not fit.
    """
    op = "as_net"
    checks.flag(op, "residual", residual)
    stages = _stages(op, module)
    return Net([Save(), *stages, Add()] if residual else stages)


# ---------------------------------------------------------------- the MLP of a transformer


def _is_gated(module: nn.Module) -> bool:
    names = set(dict(module.named_children()))
    return "gate_proj" in names or "gate_up_proj" in names or {"wi_0", "wi_1"} <= names or {"w1", "w2", "w3"} <= names


def _gated_name(module: nn.Module) -> str:
    acts = [child for child in module.modules() if _activation("mlp_block", child) is not None or isinstance(child, nn.SiLU)]
    kinds = {act.kind for child in acts if (act := _activation("mlp_block", child)) is not None}
    return "SwiGLU" if "silu" in kinds else "GeGLU" if kinds & {"gelu", "gelu_tanh"} else "a gated MLP"


def _blocks(op: str, model: nn.Module) -> Sequence[nn.Module]:
    """The transformer's layers: its longest ``ModuleList``."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"{op}: model must be a transformer with a ModuleList of layers, got {type(model).__name__}")
    return max(lists, key=len)  # pyright: ignore[reportReturnType]


def _parts(op: str, block: nn.Module) -> tuple[nn.Module | None, nn.Module, Any, nn.Module]:
    """(norm before, first matrix, activation, second matrix) of a Hugging Face layer."""
    children = dict(block.named_children())
    mlp = children.get("mlp")
    if "intermediate" in children and "output" in children:  # BERT and its relatives: the norm follows the residual sum
        first = children["intermediate"]
        return None, first.dense, first.intermediate_act_fn, children["output"].dense  # pyright: ignore[reportReturnType]
    for module in (mlp, block):
        if module is not None and _is_gated(module):
            raise ValueError(
                f"{op}: {_gated_name(module)} ({type(module).__name__}) multiplies two branches and has no piecewise affine form"
            )
    if mlp is not None and hasattr(mlp, "c_fc"):  # GPT-2
        return children.get("ln_2"), mlp.c_fc, mlp.act, mlp.c_proj  # pyright: ignore[reportReturnType]
    if mlp is not None and hasattr(mlp, "dense_h_to_4h"):  # GPT-NeoX (Pythia)
        return children.get("post_attention_layernorm"), mlp.dense_h_to_4h, mlp.act, mlp.dense_4h_to_h  # pyright: ignore[reportReturnType]
    shown = ", ".join(children)
    raise ValueError(f"{op}: the MLP of {type(block).__name__} is not known (BERT, GPT-2 and GPT-NeoX layers are), it has {shown}")


def mlp_block(model: nn.Module, layer: int, *, norm: bool = True, residual: bool = True) -> Net:
    """The MLP of a transformer's layer, as a function of the residual stream: ``x + W_out act(W_in norm(x) + b_in) + b_out``.

    Args:
        model: a Hugging Face model of the BERT, GPT-2 or GPT-NeoX (Pythia) kind. layer: 0 .. layers - 1.
        norm: with the LayerNorm before the MLP, where the model has one there (BERT normalises after the sum: its MLP gets the sum's
            normalised output, which is x, and the norm after the MLP is left out). False: a function of the normalised input.
        residual: with the skip connection. Not with ``norm=False`` in a model that normalises before the MLP: the skip starts before it.

    Returns:
        A ``Net`` over the model's own parameters. Dropout is left out, as in evaluation.

    Raises: TypeError: not a module. ValueError: layer out of range; an MLP that is not known; SwiGLU and GeGLU, by name.
    """
    op = "mlp_block"
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # of callers without a type checker
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    blocks = _blocks(op, model)
    layer = checks.integer(op, "layer", layer, 0, len(blocks) - 1, "the number of layers less 1")
    checks.flag(op, "norm", norm)
    checks.flag(op, "residual", residual)
    before, first, act, second = _parts(op, blocks[layer])
    if before is not None and residual and not norm:
        raise ValueError(
            f"{op}: residual must be False with norm=False: the skip connection starts before the norm of {type(model).__name__}"
        )
    known = _activation(op, act) if isinstance(act, nn.Module) else None
    if known is None:
        raise ValueError(f"{op}: the activation {type(act).__name__} is not supported")
    stages = [*_stages(op, first), known, *_stages(op, second)]
    if before is not None and norm:
        stages = [*_stages(op, before), *stages]
    return Net([Save(), *stages, Add()] if residual else stages)


# ---------------------------------------------------------------- shared by what asks nets


Function = TypeVar("Function", bound=Callable[..., Any])


def full_products(function: Function) -> Function:
    """Runs a function with products in the dtype of its tensors: no autocast, no TF32."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), torch.device("cpu"))
        with full_precision(device):
            return function(*args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


def check_net(op: str, net: Any) -> Net:
    if not isinstance(net, Net):
        raise TypeError(f"{op}: net must be a Net (fastsae.polytopes.as_net, fastsae.polytopes.mlp_block), got {type(net).__name__}")
    if net.d_in is None:
        raise ValueError(f"{op}: net must hold at least one Linear layer, got {net!r}")
    return net


def check_points(op: str, name: str, x: Any, net: Net, like: Tensor | None = None, same: bool = False) -> Tensor:
    """``x [.., d_in]`` floating on the net's device, and of its dtype where ``same``."""
    checks.tensor(op, name, x, (net.dtype,) if same else checks.FLOATS, like)
    if x.device != net.device:
        raise TypeError(f"{op}: {name} must be on {net.device} like the net, got {x.device}")
    if x.dim() == 0 or x.shape[-1] != net.d_in:
        raise ValueError(f"{op}: {name} must have shape [.., d_in={net.d_in}], got {list(x.shape)}")
    return x


@dataclass(frozen=True, eq=False)
class Mlp:
    """``W_out act(W_in x + b_in) + b_out (+ x)``, what the closed forms of one layer take."""

    W_in: Tensor
    b_in: Tensor | None
    act: Activation
    W_out: Tensor
    b_out: Tensor | None
    residual: bool


def one_mlp(op: str, net: Net) -> Mlp:
    """The net as one MLP; a preceding normalisation is left out (the maps are those of the normalised input). ValueError otherwise."""
    stages = list(net.stages)
    residual = bool(stages) and isinstance(stages[0], Save) and isinstance(stages[-1], Add)
    if residual:
        stages = stages[1:-1]
    if stages and isinstance(stages[0], Norm):
        stages = stages[1:]
    if len(stages) == 3:
        first, act, second = stages
        if isinstance(first, Affine) and isinstance(act, Activation) and isinstance(second, Affine):
            return Mlp(first.W, first.b, act, second.W, second.b, residual)
    raise ValueError(f"{op}: net must be one MLP (Linear, activation, Linear; a norm before it and a residual are fine), got {net!r}")
