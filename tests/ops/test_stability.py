"""What several dictionaries share, against SciPy's dense assignment, and principal angles against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsae.compare import principal_angles, stability

optimize = pytest.importorskip("scipy.optimize")
linalg = pytest.importorskip("scipy.linalg")


def seeds_of(truth: Tensor, noises: list[float], sizes: list[int], generator: torch.Generator) -> list[Tensor]:
    """Dictionaries that have found some rows of a truth again, in their own order, and random ones besides."""
    made = []
    for noise, size in zip(noises, sizes):
        rows = torch.randn(size, truth.shape[1], generator=generator)
        found = torch.randperm(min(len(truth), size), generator=generator)[: size // 2]
        rows[: len(found)] = truth[found] + noise * torch.randn(len(found), truth.shape[1], generator=generator)
        made.append(rows[torch.randperm(size, generator=generator)])
    return made


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    a, b = (t.double() / t.double().norm(dim=1, keepdim=True) for t in (a, b))
    return (a @ b.T).numpy()


def test_shares_are_those_of_the_dense_assignment() -> None:
    generator = torch.Generator().manual_seed(0)
    dictionaries = seeds_of(torch.randn(40, 12, generator=generator), [0.1, 0.3, 0.6], [40, 40, 30], generator)
    masks = [torch.ones(40, dtype=torch.bool), torch.arange(40) % 5 != 0, torch.ones(30, dtype=torch.bool)]
    alive = [None, masks[1], None]
    levels = (0.5, 0.8, 0.95)
    found = stability(dictionaries, thresholds=levels, alive=alive, candidates=2)
    assert found.pairs == [(0, 1), (0, 2), (1, 2)] and bool(found.exact.all())
    total = [np.zeros(len(d)) for d in dictionaries]
    for place, (i, j) in enumerate(found.pairs):
        kept = [masks[n].nonzero().flatten().numpy() for n in (i, j)]
        similar = cosines(dictionaries[i], dictionaries[j])[np.ix_(*kept)]
        rows, columns = optimize.linear_sum_assignment(similar, maximize=True)
        best = similar[rows, columns]
        for n, level in enumerate(levels):
            # The most disjoint pairs above a level are an assignment of the 0/1 matrix.
            most = optimize.linear_sum_assignment((similar > level).astype(float), maximize=True)
            assert found.shared[place, n] == (best > level).sum() / min(similar.shape)
            assert found.most[place, n] == (similar > level)[most].sum() / min(similar.shape) >= found.shared[place, n]
        total[i][kept[0][rows]] += best / 2
        total[j][kept[1][columns]] += best / 2
    for n, expected in enumerate(total):
        own = found.found_again[n].numpy()
        gone = ~masks[n].numpy()
        assert np.isnan(own[gone]).all()
        np.testing.assert_allclose(own[~gone], expected[~gone], atol=1e-6)


def test_too_few_candidates_are_said_and_the_bound_stays_one() -> None:
    common = torch.ones(12, 8)  # all alike: only ties
    found = stability([common, common], candidates=1, most_candidates=2)
    assert not bool(found.exact.any()) and found.most.tolist() == [[1.0] * 4]
    found = stability([common, common], candidates=1, most_candidates=100)
    assert bool(found.exact.all()) and found.shared.tolist() == found.most.tolist() == [[1.0] * 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": (0.5, 1.0)}, r"thresholds must be in \(-1, 1\)"),
        ({"thresholds": ()}, "thresholds must be in"),
        ({"alive": [None]}, "alive must have one mask or None for each of 2"),
        ({"candidates": 0}, "candidates must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability([torch.eye(3)] * 2, **changes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least two, got 1"):
        stability([torch.eye(3)])


def test_principal_angles() -> None:
    generator = torch.Generator().manual_seed(1)
    for n, m, d in ((3, 5, 9), (4, 2, 6), (6, 6, 6), (1, 1, 3)):
        a, b = torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator)
        expected = np.sort(linalg.subspace_angles(a.double().numpy().T, b.double().numpy().T))
        np.testing.assert_allclose(principal_angles(a, b).numpy(), expected, atol=1e-12)
    planes = torch.eye(4, dtype=torch.float64)[:2], torch.tensor([[1, 0, 3e-9, 0], [0, 1, 0, 0.5]], dtype=torch.float64)
    np.testing.assert_allclose(principal_angles(*planes).numpy(), [3e-9, np.arctan(0.5)], rtol=1e-6)  # a cosine would lose the small one
    twice = torch.tensor([[1.0, 0, 0], [2, 0, 0]])
    assert principal_angles(twice, torch.eye(3)[:2]).tolist() == [0.0]  # dependent rows count once
    assert principal_angles(torch.zeros(2, 3), torch.eye(3)).shape == (0,)
    with pytest.raises(ValueError, match=r"b must be finite, \[n, D=3\]"):
        principal_angles(torch.eye(3), torch.eye(4))
