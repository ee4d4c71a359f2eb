"""The two kinds of latents: dense and sparse forms, slices of rows, pytrees, and that they are frozen."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from fastsae import RaggedLatents, TopKLatents, decode

# [2, 2] rows over 6 features, with duplicates in a row, a slot of value 0 and columns that do not ascend.
TOPK = TopKLatents(
    torch.tensor([[[3.0, 2.0, 1.0], [5.0, 4.0, 0.0]], [[1.0, 1.0, 1.0], [-1.0, -2.0, -3.0]]]),
    torch.tensor([[[4, 1, 4], [0, 5, 2]], [[3, 3, 3], [5, 0, 1]]]),
    6,
)
DENSE_TOPK = [[0, 2, 0, 0, 4, 0], [5, 0, 0, 0, 0, 4], [0, 0, 0, 3, 0, 0], [-2, -3, 0, 0, 0, -1]]
RAGGED = RaggedLatents(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]), torch.tensor([0, 2, 2, 4, 5]), torch.tensor([1, 3, 2, 2, 0]), 4, (2, 2))
DENSE_RAGGED = [[0, 1, 0, 2], [0, 0, 0, 0], [0, 0, 7, 0], [0, 0, 0, 0]]
BOTH = pytest.mark.parametrize(("latents", "dense"), [(TOPK, DENSE_TOPK), (RAGGED, DENSE_RAGGED)], ids=["topk", "ragged"])


def with_values(latents: Any, values: torch.Tensor) -> Any:
    return dataclasses.replace(latents, values=values)


@BOTH
def test_to_dense(latents: Any, dense: list[list[float]]) -> None:
    result = latents.to_dense()
    assert result.shape == (2, 2, latents.n_features)
    assert result.reshape(4, -1).tolist() == dense
    assert with_values(latents, latents.values.bfloat16()).to_dense().dtype is torch.bfloat16


@BOTH
def test_to_dense_is_differentiable(latents: Any, dense: list[list[float]]) -> None:
    values = latents.values.clone().requires_grad_()
    weight = torch.arange(4 * latents.n_features).reshape(2, 2, -1).float()
    (grad,) = torch.autograd.grad((with_values(latents, values).to_dense() * weight).sum(), [values])
    eye = torch.eye(latents.n_features)
    (expected,) = torch.autograd.grad((decode(with_values(latents, values), eye) * weight).sum(), [values])
    assert torch.equal(grad, expected)


@BOTH
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_sparse_forms_are_sorted_and_coalesced(latents: Any, dense: list[list[float]], index_dtype: torch.dtype) -> None:
    field = "indices" if isinstance(latents, TopKLatents) else "col"
    latents = dataclasses.replace(latents, **{field: getattr(latents, field).to(index_dtype)})
    csr, csc = latents.to_csr(), latents.to_csc()
    assert (csr.layout, csc.layout) == (torch.sparse_csr, torch.sparse_csc)
    for sparse, pointers, others in ((csr, csr.crow_indices(), csr.col_indices()), (csc, csc.ccol_indices(), csc.row_indices())):
        assert sparse.shape == (4, latents.n_features)
        assert sparse.to_dense().tolist() == dense
        # Strictly ascending within each row (column): sorted, no duplicates.
        assert all(bool((part.diff() > 0).all()) for part in others.split(pointers.diff().tolist()))
        torch._validate_compressed_sparse_indices(  # pyright: ignore[reportPrivateImportUsage]  (torch has no public one)
            sparse.layout is torch.sparse_csr, pointers, others, *((4, latents.n_features)[:: 1 if sparse is csr else -1]), others.numel()
        )


def test_csc_names_the_rows_that_fire_a_feature() -> None:
    csc = TOPK.to_csc()
    start, stop = csc.ccol_indices()[5:7].tolist()
    assert csc.row_indices()[start:stop].tolist() == [1, 3]
    assert csc.values()[start:stop].tolist() == [4.0, -1.0]


@BOTH
@pytest.mark.parametrize("rows", [slice(0, 4), slice(1, 3), slice(2, None), slice(-1, None), slice(3, 1), slice(2, 99), slice(0, 0)])
def test_rows(latents: Any, dense: list[list[float]], rows: slice) -> None:
    part = latents.rows(rows)
    assert type(part) is type(latents)
    assert part.to_dense().tolist() == dense[rows]
    assert part.n_features == latents.n_features
    assert tuple(part.batch_shape) == (len(dense[rows]),)
    assert decode(part, torch.eye(latents.n_features)).tolist() == dense[rows]


def test_rows_are_views() -> None:
    assert TOPK.rows(slice(1, 3)).values.data_ptr() == TOPK.values[0, 1].data_ptr()
    assert RAGGED.rows(slice(2, 4)).col.data_ptr() == RAGGED.col[2:].data_ptr()
    assert TOPK.rows(slice(0, 4, 2)).to_dense().tolist() == DENSE_TOPK[::2]


@BOTH
def test_rows_refuse_what_is_no_slice(latents: Any, dense: list[list[float]]) -> None:
    with pytest.raises(TypeError, match="rows must be a slice, got int"):
        latents.rows(1)
    with pytest.raises(ValueError, match="step 1, got step 2"):
        RAGGED.rows(slice(0, 4, 2))


@BOTH
def test_pytree_round_trip(latents: Any, dense: list[list[float]]) -> None:
    leaves, spec = pytree.tree_flatten(latents)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.n_features == latents.n_features
    assert again.batch_shape == latents.batch_shape
    assert again.to_dense().reshape(4, -1).tolist() == dense
    doubled = pytree.tree_map(lambda leaf: leaf * 2 if leaf.is_floating_point() else leaf, latents)
    assert torch.equal(doubled.to_dense(), 2 * latents.to_dense())
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


@BOTH
def test_copies(latents: Any, dense: list[list[float]]) -> None:
    for again in (copy.deepcopy(latents), copy.copy(latents), pickle.loads(pickle.dumps(latents))):
        assert again.to_dense().reshape(4, -1).tolist() == dense
        assert again.n_features == latents.n_features


@BOTH
def test_frozen_and_compared_by_identity(latents: Any, dense: list[list[float]]) -> None:
    for field in dataclasses.fields(latents):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(latents, field.name, None)
    assert latents == latents
    assert latents != copy.deepcopy(latents)  # and no ambiguous truth value of a tensor
    assert len({latents, latents}) == 1


@BOTH
@pytest.mark.parametrize("bad", [-1, 6, 2**40])
@pytest.mark.parametrize("form", ["to_dense", "to_csr", "to_csc"])
def test_an_index_out_of_range_is_an_error_in_every_form(latents: Any, dense: list[list[float]], bad: int, form: str) -> None:
    field = "indices" if isinstance(latents, TopKLatents) else "col"
    index = getattr(latents, field).clone()
    index.view(-1)[2] = bad
    with pytest.raises(IndexError, match=rf"{field} holds {bad} at \[.*\], expected 0 <= index < {latents.n_features}"):
        getattr(dataclasses.replace(latents, **{field: index}), form)()


def test_empty_latents() -> None:
    nothing = TopKLatents(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), 5)
    assert nothing.to_dense().shape == nothing.to_csr().shape == nothing.to_csc().shape == (0, 5)
    hollow = RaggedLatents(torch.zeros(0), torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 5, (2,))
    assert hollow.to_dense().eq(0).all()
    assert hollow.to_csr().values().numel() == 0


def test_batch_shapes() -> None:
    single = TopKLatents(torch.tensor([2.0, 1.0]), torch.tensor([3, 0]), 4)
    assert single.batch_shape == ()
    assert single.to_dense().tolist() == [1.0, 0.0, 0.0, 2.0]
    assert single.to_csr().shape == (1, 4)
    assert single.rows(slice(0, 1)).values.shape == (1, 2)
