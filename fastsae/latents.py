"""What an SAE's encoder takes and returns: the inputs of its scores, slots, and latents, of a fixed number a row or ragged.

``TopKLatents`` and ``RaggedLatents`` are pytrees, and what the public functions speak of; ``Slots`` is what operations work on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsae._core import flags

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
R = TypeVar("R")


class ScoreInputs(NamedTuple):
    """What the scores ``b + scale * (x - b_pre) @ W.T`` of an encoder are made of, in the order in which operations take it."""

    x: Tensor
    """``[rows, D]``."""
    W: Tensor
    """``[F, D]``."""
    b: Tensor | None = None
    """``[F]``."""
    b_pre: Tensor | None = None
    """``[D]``."""
    scale: Tensor | None = None
    """``[F]``."""
    features: Tensor | None = None
    """Those that take part: an index, or a mask ``[F]``."""
    packed: Tensor | None = None
    """A handle's words of W (``fastsae.pack``)."""


_N_INPUTS = len(ScoreInputs._fields)


def of_inputs(function: Callable[Concatenate[ScoreInputs, P], R]) -> Callable[..., R]:
    """An encoder's function for the table of operations, whose arguments come one by one: the first seven become its ``ScoreInputs``."""

    @functools.wraps(function)
    def row(*args: Any, **options: Any) -> R:
        return function(ScoreInputs._make(args[:_N_INPUTS]), *args[_N_INPUTS:], **options)

    return row


class Slots(NamedTuple):
    """What fires where, a slot each; operations take the three one after the other (``*slots``).

    ``values`` and ``indices`` (features) are ``[rows, K]``, or ``[nnz]`` with ``crow [rows + 1]``: row r owns slots
    ``crow[r] .. crow[r + 1] - 1``.
    """

    values: Tensor
    indices: Tensor
    crow: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.indices.shape[0] if self.crow is None else self.crow.shape[0] - 1

    def row_of(self) -> Tensor:
        """``[slots]``: the row that owns each slot."""
        rows = torch.arange(self.rows, device=self.indices.device)
        if self.crow is None:
            return rows.repeat_interleave(self.indices.shape[1])
        return torch.repeat_interleave(rows, self.crow.diff(), output_size=self.indices.shape[0])

    def safe(self, n_features: int, name: str | None = None) -> Slots:
        """Indices in int64 and in range. A bad one: IndexError on the CPU; elsewhere its slot becomes NaN at feature 0, and
        ``fastsae.check()`` raises."""
        indices = self.indices.long()
        if torch.compiler.is_compiling() or indices.numel() == 0:
            return self._replace(indices=indices)
        bad = (indices < 0) | (indices >= n_features)
        if indices.device.type == "cpu":
            if bad.any():
                where = bad.nonzero()[0].tolist()
                name = name or ("latents.indices" if self.crow is None else "latents.col")
                raise IndexError(f"{name} holds {int(indices[tuple(where)])} at {where}, expected 0 <= index < {n_features}")
            return self._replace(indices=indices)
        flags.flag(indices.device).logical_or_(bad.any())
        return Slots(self.values.masked_fill(bad, float("nan")), indices.masked_fill(bad, 0), self.crow)

    def bounds(self) -> list[int]:
        """``crow`` on the host, which waits; ValueError unless it rises from 0 to the number of slots."""
        assert self.crow is not None
        bounds, nnz = self.crow.tolist(), self.indices.numel()
        if bounds[0] != 0 or bounds[-1] != nnz or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"latents.crow must rise from 0 to nnz={nnz}, got {bounds[:4]} .. {bounds[-1]}")
        return bounds

    def flat(self) -> Slots:
        """The same slots as ``[nnz]`` with a ``crow``."""
        if self.crow is not None:
            return self
        rows, k = self.indices.shape
        return Slots(self.values.reshape(-1), self.indices.reshape(-1), torch.arange(rows + 1, device=self.indices.device) * k)

    def by_range(self, cuts: Sequence[int]) -> Slots:
        """The slots in the order of (range of features, row), stable, with ``crow [ranges * rows + 1]``; ``cuts`` rises from 0 to all."""
        values, indices, _ = self.flat()
        ends = torch.tensor(cuts[1:], dtype=torch.int64, device=indices.device)
        place, order = torch.sort(torch.bucketize(indices, ends, right=True) * self.rows + self.row_of(), stable=True)
        crow = torch.searchsorted(place, torch.arange(len(ends) * self.rows + 1, device=indices.device))
        return Slots(values[order], indices[order], crow)

    def by_feature(self, n_features: int) -> Slots:
        """The transpose: values and rows (as ``indices``) in the order of features, stable, with ``crow [n_features + 1]``."""
        features, order = torch.sort(self.indices.reshape(-1), stable=True)
        crow = torch.searchsorted(features, torch.arange(n_features + 1, device=features.device))
        return Slots(self.values.reshape(-1)[order], self.row_of()[order], crow)


def _slice(name: str, rows: Any) -> slice:
    if not isinstance(rows, slice):
        raise TypeError(f"{name}: rows must be a slice, got {type(rows).__name__}")
    return rows


@contextlib.contextmanager
def _no_beta_warning() -> Generator[None]:
    """torch warns once in a process that its sparse tensors of rows and columns are in beta state."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CS[RC] tensor support is in beta")
        yield


EMPTY_A_ROW = 256
"""Empty slots of a padded result that share one row of their own, where an operation needs a row for every slot."""


def pointers(crow: Tensor, n_slots: int) -> Tensor:
    """``crow`` with rows after the last one for the slots that belong to none: ``ceil(n_slots / EMPTY_A_ROW)`` rows more."""
    ends = torch.arange(1, -(-n_slots // EMPTY_A_ROW) + 1, device=crow.device) * EMPTY_A_ROW
    return torch.cat([crow, (crow[-1] + ends).clamp_(max=n_slots)])


def to_capacity(op: str, capacity: int | None, values: Tensor, col: Tensor, crow: Tensor, *marks: Tensor) -> tuple[Tensor, ...]:
    """Entries of an encoder filled up with empty slots to ``capacity`` (None: as they are). More than fit: ValueError on the CPU; elsewhere
    the last are cut off, and ``fastsae.check()`` raises."""
    if capacity is None:
        return values, col, crow, *marks
    n = values.shape[0]
    if n > capacity:
        if values.device.type == "cpu":
            raise ValueError(f"{op}: capacity must be at least the number of latents ({n}), got {capacity}")
        flags.overflow(values.device).fill_(1)
    fit = [torch.nn.functional.pad(slots, (0, capacity - n)) for slots in (values, col, *marks)]  # a negative width cuts
    return fit[0], fit[1], crow.clamp(max=capacity), *fit[2:]


class _Latents:
    """What both kinds share; they differ in how rows are delimited."""

    values: Tensor
    n_features: int
    batch_shape: Any

    def _coordinates(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """(row, feature, value) of each slot, and the number of rows."""
        raise NotImplementedError

    def _part(self, rows: slice) -> Self:
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """``[.., n_features]``, of ``to_dense()``."""
        return torch.Size((*self.batch_shape, self.n_features))

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, rows: slice) -> Self:
        """A slice of the first batch dimension; a view."""
        if not self.batch_shape:
            raise IndexError(f"{type(self).__name__}: one row cannot be sliced")
        return self._part(_slice(type(self).__name__, rows))

    def to(self, *args: Any, **options: Any) -> Self:
        """As ``Tensor.to``: a dtype is that of the values."""
        values = self.values.to(*args, **options)
        return pytree.tree_map_only(Tensor, lambda t: values if t is self.values else t.to(values.device), self)

    def cpu(self) -> Self:
        return self.to("cpu")

    def detach(self) -> Self:
        """Values without gradients."""
        return pytree.tree_map_only(Tensor, Tensor.detach, self)

    def to_dense(self) -> Tensor:
        """``[.., n_features]`` in the dtype of the values; duplicates add. Differentiable in the values."""
        row, feature, value, rows = self._coordinates()
        dense = value.new_zeros(rows, self.n_features).index_put((row, feature), value, accumulate=True)
        return dense.reshape(*self.batch_shape, self.n_features)

    def _to_coo(self) -> Tensor:
        row, feature, value, rows = self._coordinates()
        return torch.sparse_coo_tensor(
            torch.stack([row, feature]), value, (rows, self.n_features), check_invariants=False, device=value.device
        ).coalesce()

    def to_csr(self) -> Tensor:
        """``torch.sparse_csr`` of shape ``[rows, n_features]`` (batch dimensions flattened): columns sorted, duplicates added."""
        with _no_beta_warning():
            return self._to_coo().to_sparse_csr()

    def to_csc(self) -> Tensor:
        """``torch.sparse_csc`` of shape ``[rows, n_features]``: feature-major, which rows fire a feature. Duplicates added."""
        with _no_beta_warning():
            return self._to_coo().to_sparse_csc()


@dataclass(frozen=True, eq=False)
class TopKLatents(_Latents):
    """K latents a row.

    Attributes:
        values: ``[.., K]`` floating, descending by score.
        indices: ``[.., K]`` int64 or int32, ``0 <= index < n_features``, unique in a row.
        n_features: size of the dictionary.
    """

    values: Tensor
    indices: Tensor
    n_features: int

    @property
    def batch_shape(self) -> torch.Size:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.values.shape[:-1]

    def rows(self, rows: slice) -> TopKLatents:
        """The latents of some rows of the flattened batch; a view."""
        part = _slice("TopKLatents", rows)
        return TopKLatents(self.slots.values[part], self.slots.indices[part], self.n_features)

    def _part(self, rows: slice) -> TopKLatents:
        return TopKLatents(self.values[rows], self.indices[rows], self.n_features)

    @property
    def slots(self) -> Slots:
        rows, k = math.prod(self.batch_shape), self.values.shape[-1]
        return Slots(self.values.reshape(rows, k), self.indices.reshape(rows, k))

    def _coordinates(self) -> tuple[Tensor, Tensor, Tensor, int]:
        slots = self.slots.safe(self.n_features, "TopKLatents.indices")
        return slots.row_of(), slots.indices.reshape(-1), slots.values.reshape(-1), slots.rows


@dataclass(frozen=True, eq=False)
class RaggedLatents(_Latents):
    """Any number of latents a row, in compressed sparse rows.

    Attributes:
        values: ``[nnz]`` floating.
        crow: ``[rows + 1]`` int64; row r owns slots ``crow[r] .. crow[r+1]-1``.
        col: ``[nnz]`` int64 or int32 features, ascending in a row.
        n_features: size of the dictionary.
        batch_shape: the batch dimensions of the input; their product is the number of rows.
        padded: whether slots may follow those of the last row (an encoder's ``capacity``): from ``crow[-1]`` on they are empty, of value 0
            and column 0, and belong to no row. How many there are, the host need not know; ``trim()`` asks and drops them.
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    n_features: int
    batch_shape: tuple[int, ...] | torch.Size
    padded: bool = False

    def trim(self) -> RaggedLatents:
        """Without empty slots: values and columns are views of the others. The host waits for their number; as it is where none are."""
        return replace(self.rows(slice(None)), batch_shape=self.batch_shape) if self.padded else self

    def _to_coo(self) -> Tensor:
        return super(RaggedLatents, self.trim())._to_coo()

    def rows(self, rows: slice) -> RaggedLatents:
        """The latents of a contiguous range of rows of the flattened batch (step 1); values and columns are views."""
        start, stop, step = _slice("RaggedLatents", rows).indices(self.crow.shape[0] - 1)
        if step != 1:
            raise ValueError(f"RaggedLatents.rows: rows must be a slice of step 1, got step {step}")
        stop = max(start, stop)
        lo, hi = int(self.crow[start]), int(self.crow[stop])
        return RaggedLatents(self.values[lo:hi], self.crow[start : stop + 1] - lo, self.col[lo:hi], self.n_features, (stop - start,))

    def _part(self, rows: slice) -> RaggedLatents:
        start, stop, step = rows.indices(len(self))
        inner = math.prod(self.batch_shape[1:])
        part = self.rows(slice(start * inner, max(start, stop) * inner, step))
        return replace(part, batch_shape=(max(start, stop) - start, *self.batch_shape[1:]))

    @property
    def slots(self) -> Slots:
        return Slots(self.values, self.col, self.crow)

    def _coordinates(self) -> tuple[Tensor, Tensor, Tensor, int]:
        slots = self.slots.safe(self.n_features, "RaggedLatents.col")
        values, features, rows = slots.values, slots.indices, slots.rows
        if not self.padded:
            return slots.row_of(), features, values, rows
        slot = torch.arange(values.shape[0], device=values.device)
        row = (torch.searchsorted(self.crow, slot, right=True) - 1).clamp_(0, max(rows - 1, 0))
        return row, features, torch.where(slot < self.crow[-1], values, 0), rows


Latents = TopKLatents | RaggedLatents


torch.serialization.add_safe_globals([TopKLatents, RaggedLatents])  # torch.load(weights_only=True) reads saved ones
pytree.register_pytree_node(
    TopKLatents,
    lambda latents: ([latents.values, latents.indices], latents.n_features),
    lambda leaves, n_features: TopKLatents(*leaves, n_features),  # pyright: ignore[reportArgumentType, reportCallIssue]
    serialized_type_name="fastsae.TopKLatents",
)
pytree.register_pytree_node(
    RaggedLatents,
    lambda latents: ([latents.values, latents.crow, latents.col], (latents.n_features, tuple(latents.batch_shape), latents.padded)),
    lambda leaves, context: RaggedLatents(*leaves, *context),  # pyright: ignore[reportArgumentType, reportCallIssue, reportGeneralTypeIssues]
    serialized_type_name="fastsae.RaggedLatents",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: (context[0], tuple(context[1]), context[2]),  # JSON knows no tuples
)
