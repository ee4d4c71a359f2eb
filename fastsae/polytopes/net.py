"""Networks as the polytope functions see them: affine maps, activations, normalisations and residual branches, in order.

A ``Net`` is a flat tuple of stages and holds the module's own parameters, not copies: a change of the weights is seen by the next call.
``modules.py`` makes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae._core import checks
from fastsae._core.precision import full_precision

PIECEWISE = ("relu", "leaky_relu")
GATES = ("gelu", "gelu_tanh", "silu", "quick_gelu")
"""Activations ``z * q(z)`` with a gate q between 0 and 1."""
_DENSE = 1 << 22
"""Most elements of a convolution or a pooling as a matrix, 32 MiB in float64; a larger one is applied as an operator."""


@dataclass(frozen=True, eq=False)
class Affine:
    """``h -> h W^T + b``; ``W [out, in]`` of any strides."""

    W: Tensor
    b: Tensor | None

    def __call__(self, h: Tensor) -> Tensor:
        return F.linear(h, self.W, self.b)

    def linear(self, h: Tensor) -> Tensor:
        """Without the bias."""
        return h @ self.W.T

    def pulled(self, G: Tensor) -> Tensor:
        """``G W`` for rows of functionals on the output."""
        return G @ self.W

    @property
    def sizes(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        return self.W.shape[1], self.W.shape[0]


@dataclass(frozen=True, eq=False)
class Operator:
    """An affine layer over images that is applied, not held as a matrix: ``run(h [n, *into], *tensors)`` of shape ``[n, *out]``.

    Attributes:
        dense: whether a matrix is as good where it is small (``_DENSE``). into: empty until the shape of the images is known.
    """

    run: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...] = ()
    dense: bool = True
    into: tuple[int, ...] = ()
    out: tuple[int, ...] = ()

    def __call__(self, h: Tensor) -> Tensor:
        return self.run(h.reshape(-1, *self.into), *self.tensors).reshape(*h.shape[:-1], prod(self.out))

    def linear(self, h: Tensor) -> Tensor:
        return self(h) - self(h.new_zeros(1, h.shape[-1]))

    def pulled(self, G: Tensor) -> Tensor:
        return torch.func.vjp(self, G.new_zeros(*G.shape[:-1], prod(self.into)))[1](G)[0]

    @property
    def sizes(self) -> tuple[int, int]:
        return prod(self.into), prod(self.out)


@dataclass(frozen=True)
class Activation:
    """One of ``PIECEWISE``, ``GATES``, or a soft assignment to constants (sigmoid, tanh, softmax); ``slope``: a leaky ReLU's below 0."""

    kind: str
    slope: float = 0.0


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm (``centred``) or RMSNorm: ``(offset + weight) * h / sqrt(mean(h^2) + eps) + bias``; Gemma's offset is 1."""

    centred: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float = 0.0

    def scaled(self, h: Tensor) -> Tensor:
        return h if self.weight is None else h * (self.weight + self.offset)


@dataclass(frozen=True)
class Save:
    """The start of a residual branch: what comes here is added at the matching ``Add``."""


@dataclass(frozen=True)
class Add:
    """The end of a residual branch."""


@dataclass(frozen=True, eq=False)
class Times:
    """The end of a gated MLP's two branches: ``h -> h * (s W^T + b)``, s what came at the matching ``Save``."""

    W: Tensor
    b: Tensor | None


Stage = Affine | Operator | Activation | Norm | Save | Add | Times


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda z: z.softmax(-1),
}


def activate(z: Tensor, act: Activation) -> Tensor:
    return F.leaky_relu(z, act.slope) if act.kind == "leaky_relu" else _FUNCTIONS[act.kind](z)


def normalise(h: Tensor, norm: Norm) -> Tensor:
    if norm.centred:
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.eps)
    h = norm.scaled(h)
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
            if isinstance(stage, (Affine, Operator)):
                h = stage(h)
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
            elif isinstance(stage, Times):
                h = h * F.linear(saved.pop(), stage.W, stage.b)
            else:
                h = h + saved.pop()
        return h

    def to(self, dtype: torch.dtype) -> Net:
        """The same network with its parameters detached and converted (float64: widened exactly); small operators as matrices."""

        def cast(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach().to(dtype)

        stages: list[Stage] = []
        for stage in self.stages:
            if isinstance(stage, (Affine, Times)):
                stages.append(type(stage)(stage.W.detach().to(dtype), cast(stage.b)))
            elif isinstance(stage, Norm):
                stages.append(replace(stage, weight=cast(stage.weight), bias=cast(stage.bias)))
            elif isinstance(stage, Operator):
                made = replace(stage, tensors=tuple(map(cast, stage.tensors)))
                unit = torch.eye(stage.sizes[0], dtype=dtype, device=self.device) if stage.dense and prod(stage.sizes) <= _DENSE else None
                stages.append(made if unit is None else Affine(made.linear(unit).T.contiguous(), made(torch.zeros_like(unit[0]))))
            else:
                stages.append(stage)
        return Net(stages)

    def _tensors(self) -> Iterable[Tensor]:
        for stage in self.stages:
            fields = stage.tensors if isinstance(stage, Operator) else vars(stage).values()
            yield from (field for field in fields if isinstance(field, Tensor))

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self._tensors()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((t.dtype for t in self._tensors()), torch.float32)

    def __repr__(self) -> str:
        def show(stage: Stage) -> str:
            if isinstance(stage, (Affine, Operator)):
                return f"{stage.sizes[0]}→{stage.sizes[1]}" if isinstance(stage, Affine) else f"{stage.into}→{stage.out}"
            if isinstance(stage, Activation):
                return stage.kind
            if isinstance(stage, Norm):
                return "layer_norm" if stage.centred else "rms_norm"
            return "(" if isinstance(stage, Save) else "*)" if isinstance(stage, Times) else "+)"

        return f"Net({' '.join(map(show, self.stages))})"


def _shapes(stages: Iterable[Stage]) -> tuple[int | None, int | None, tuple[int, ...]]:
    """(input width, output width, widths of activation layers); None where no stage says."""
    first: int | None = None
    width: int | None = None
    widths: list[int] = []
    saved: list[int | None] = []
    for stage in stages:
        expected = None
        if isinstance(stage, (Affine, Operator)):
            expected = stage.sizes[0]
        elif isinstance(stage, Norm):
            given = stage.weight if stage.weight is not None else stage.bias
            expected = None if given is None else given.shape[0]
        elif isinstance(stage, Add):
            start = saved.pop()
            if start is not None and start != width:
                raise ValueError(f"as_net: a residual branch must end with its input's width {start}, got {width}")
            continue
        elif isinstance(stage, Times):
            if (saved.pop() or first, width) != (stage.W.shape[1], stage.W.shape[0]):
                raise ValueError(f"mlp_block: the up projection must be like the gate's, [{width}, ..], got {list(stage.W.shape)}")
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
        if isinstance(stage, (Affine, Operator)):
            width = stage.sizes[1]
    return first, width, tuple(widths)


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


def check_net(op: str, net: Any, neurons: bool = False) -> Net:
    checks.instance(op, "net", net, Net, "a Net (fastsae.polytopes.as_net, fastsae.polytopes.mlp_block)")
    if net.d_in is None:
        raise ValueError(f"{op}: net must hold at least one Linear layer, got {net!r}")
    if neurons and not net.widths:
        raise ValueError(f"{op}: net must have at least one activation layer, got {net!r}")
    return net


def refuse_gated(op: str, net: Net) -> None:
    """ValueError where the net multiplies two branches, for what asks for an affine map."""
    last = ""
    for stage in net.stages:
        last = stage.kind if isinstance(stage, Activation) else last
        if isinstance(stage, Times):
            name = "SwiGLU" if last == "silu" else "GeGLU" if last.startswith("gelu") else "gated"
            raise ValueError(f"{op}: net must be affine in its regions, got a {name} MLP, which multiplies two branches: {net!r}")


def linear_signs(net: Net) -> Net:
    """The net up to its last activation, in float64; a normalisation before that one's layer, both without bias, becomes the affine map
    whose signs are the same: it divides all neurons of a point by one number."""
    last = max((i for i, stage in enumerate(net.stages) if isinstance(stage, Activation)), default=-1)
    stages = list(Net(net.stages[: last + 1]).to(torch.float64).stages)
    bare = [i for i, stage in enumerate(stages) if not isinstance(stage, Save)][-3:]
    norm, layer = (stages[bare[0]], stages[bare[1]]) if len(bare) == 3 else (None, None)
    if isinstance(norm, Norm) and norm.bias is None and isinstance(layer, Affine) and layer.b is None:
        W = norm.scaled(layer.W)
        stages[bare[1]] = Affine(W - W.mean(1, keepdim=True) if norm.centred else W, None)
        del stages[bare[0]]
    return Net(stages)


def one_layer(net: Net) -> bool:
    """One activation layer, of an affine input."""
    return len(net.widths) == 1 and all(isinstance(stage, (Affine, Operator, Activation, Save, Add)) for stage in net.stages)


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
    """``W_out act(W_in x + ..) + .. (+ x)``, what the closed forms of one layer take."""

    W_in: Tensor
    act: Activation
    W_out: Tensor
    residual: bool


def one_mlp(op: str, net: Net) -> Mlp:
    """The net as one MLP; a preceding normalisation is left out (the maps are those of the normalised input). ValueError otherwise."""
    refuse_gated(op, net)
    stages = list(net.stages)
    residual = bool(stages) and isinstance(stages[0], Save) and isinstance(stages[-1], Add)
    if residual:
        stages = stages[1:-1]
    if stages and isinstance(stages[0], Norm):
        stages = stages[1:]
    if len(stages) == 3:
        first, act, second = stages
        if isinstance(first, Affine) and isinstance(act, Activation) and isinstance(second, Affine):
            return Mlp(first.W, act, second.W, residual)
    raise ValueError(f"{op}: net must be one MLP (Linear, activation, Linear; a norm before it and a residual are fine), got {net!r}")
