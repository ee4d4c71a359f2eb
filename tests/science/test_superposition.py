"""Superposition data and its published variants, initialisations, statistics of streams."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastsae
from fastsae import superposition
from fastsae.superposition import (
    PRESETS,
    ActivationStatistics,
    SuperpositionData,
    init,
    sample_tokens,
    token_positions,
    toy_model_features,
    unit_features,
)


def activity(data: SuperpositionData, n: int, calls: int = 1) -> Tensor:
    """``[calls, n, G]`` bool."""
    return torch.stack([data.sample(n).latents.to_dense() != 0 for _ in range(calls)])


def within(measured: Tensor | float, expected: Tensor | float, sd: Tensor | float, width: float = 5.5) -> bool:
    """Every measured number lies within ``width`` standard deviations (one in 10^7 falls outside by chance)."""
    return bool(((torch.as_tensor(measured) - torch.as_tensor(expected)).abs() <= width * torch.as_tensor(sd) + 1e-12).all())


# ---------------------------------------------------------------- data


def test_x_is_the_decoded_truth() -> None:
    data = SuperpositionData(40, 16, mean_active=4, seed=3)
    x, latents, features = data.sample(200)
    assert x.shape == (200, 16) and features.shape == (40, 16) and latents.n_features == 40
    torch.testing.assert_close(x, latents.to_dense() @ features)
    torch.testing.assert_close(torch.linalg.vector_norm(features, dim=1), torch.ones(40))
    assert all(bool((latents.col[a:b].diff() > 0).all()) for a, b in pairwise(latents.crow.tolist()))
    assert data.sample(0).x.shape == (0, 16)
    double = SuperpositionData(40, 16, mean_active=4, seed=3, dtype=torch.float64)
    torch.testing.assert_close(double.sample(200).x.float(), x)
    assert SuperpositionData(40, 16, dtype=torch.bfloat16).sample(3).x.dtype is torch.bfloat16


@pytest.mark.parametrize("covariance", [None, "low_rank", "wishart_over_count"])
def test_seeded_and_resumable(covariance: str | None) -> None:
    def make(seed: int = 1) -> SuperpositionData:
        return SuperpositionData(30, 8, covariance=covariance, rank=3, noise=0.1, seed=seed)

    data, again, other = make(), make(), make(2)
    data.sample(10)
    state = data.state_dict()
    after = data.sample(20).x
    again.sample(10)
    assert torch.equal(again.sample(20).x, after)
    again.load_state_dict(state)
    assert torch.equal(again.sample(20).x, after)
    assert torch.equal(pickle.loads(pickle.dumps(again)).sample(5).x, again.sample(5).x)
    other.sample(10)
    assert not torch.equal(other.sample(20).x, after)
    # A dictionary of the same seed does not start at the truth.
    assert float(fastsae.match_cosine(init.random_directions(30, 8, seed=1), data.features).similarity.max()) < 0.999


def test_stream_trains_and_resumes() -> None:
    data = SuperpositionData(16, 8, mean_active=2)
    stream = data.batches(4)
    first = iter(stream)
    next(first)
    state = stream.state_dict()
    x = next(first)
    stream.load_state_dict(state)
    assert torch.equal(next(iter(stream)), x)
    sae = fastsae.SAE(8, 16, fastsae.ReLU(), l1=0.1, seed=0)
    trainer = fastsae.Trainer(sae, fastsae.optim.Adam(sae), progress=False)
    assert trainer.fit(data.batches(16), steps=3)["loss"] > 0


@pytest.mark.parametrize("decay", ["geometric", "power", "zipf", None])
def test_probabilities_of_a_decay(decay: str | None) -> None:
    data = SuperpositionData(24, 8, mean_active=3, decay=decay, rate=0.9, covariance=None)
    p = data.expected_probabilities.double()
    index = torch.arange(24, dtype=torch.float64)
    shape = {"geometric": 0.9**index, "power": 0.5 ** (0.9 * index), "zipf": (index + 1) ** -0.9, None: torch.ones(24)}[decay]
    expected = (shape * 3 / shape.sum()).clamp(max=1)
    torch.testing.assert_close(p, expected.double(), rtol=1e-5, atol=0)
    n = 40_000
    active = activity(data, n)[0].double()
    assert within(active.mean(0), p, (p * (1 - p) / n).sqrt())
    # Independent: the number active has the variance of independent features.
    assert abs(float(active.sum(1).var()) / float((p * (1 - p)).sum()) - 1) < 0.05


def test_certain_features_are_always_active() -> None:
    data = SuperpositionData(4, 4, mean_active=3.5, decay="geometric", rate=0.5)
    assert data.expected_probabilities[0] == 1
    active = activity(data, 500)[0]
    assert bool(active[:, 0].all()) and not bool(active[:, 3].all())


@pytest.mark.parametrize("redraw", ["sample", "batch", "once"])
def test_redraw_rule(redraw: str) -> None:
    """Counts of a feature vary between batches only where z is drawn for a batch; between features, only where it is drawn once."""
    data = SuperpositionData(64, 8, mean_active=8, decay=None, covariance="wishart_over_count", redraw=redraw, seed=5)
    n, calls = 400, 30
    share = activity(data, n, calls).double().mean(1)  # [calls, G]
    binomial = 8 / 64 * (1 - 8 / 64) / n
    between_batches = float(share.var(0).mean()) / binomial
    between_features = float(share.mean(0).var()) / (binomial / calls)
    large = {"sample": (False, False), "batch": (True, True), "once": (False, True)}[redraw]
    assert (between_batches > 3) == large[0], between_batches
    assert (between_features > 3) == large[1], between_features
    assert abs(float(share.mean()) * 64 - 8) < (2.0 if redraw == "once" else 0.5)


@pytest.mark.parametrize("link", ["probability", "copula"])
def test_low_rank_correlation_is_the_dense_ones(link: str) -> None:
    """The thinned sampler against plain draws of z: marginals, and how often pairs are active together."""
    options: dict[str, Any] = {"mean_active": 3.0, "decay": "geometric", "rate": 0.9, "rank": 2, "shared": 0.9}
    data = SuperpositionData(12, 8, covariance="low_rank", link=link, seed=2, **options)
    n = 60_000
    fast = activity(data, n)[0].double()
    p = data.expected_probabilities.double()
    assert within(fast.mean(0), p, (p * (1 - p) / n).sqrt())
    assert data.marginal_variance is not None
    torch.testing.assert_close(data.marginal_variance, torch.ones(12))
    rows, features = data._dense(n, 0)
    plain = torch.zeros(n, 12, dtype=torch.float64).index_put_((rows, features), torch.ones((), dtype=torch.float64))
    together, expected = fast.T @ fast / n, plain.T @ plain / n
    assert within(together, expected, (2 * expected.clamp_min(1e-4) / n).sqrt())
    if link == "probability":
        assert float((together - p.outer(p)).fill_diagonal_(0).abs().max()) > 0.01, "features are correlated"


def test_given_covariance() -> None:
    matrix = torch.full((6, 6), 0.8)
    matrix.fill_diagonal_(1)
    data = SuperpositionData(6, 4, mean_active=2, decay=None, covariance=matrix, link="copula", seed=0)
    assert data.marginal_variance is not None
    torch.testing.assert_close(data.marginal_variance, torch.ones(6))
    active = activity(data, 20_000)[0].double()
    assert within(active.mean(0), 1 / 3, (2 / 9 / 20_000) ** 0.5)
    assert float(torch.corrcoef(active.T)[0, 1]) > 0.4


def test_power_decay_averages_over_z() -> None:
    data = SuperpositionData(20, 8, mean_active=3, decay="power", covariance="wishart_over_count", seed=4)
    p, n = data.expected_probabilities.double(), 40_000
    # Quantiles of z stand for its distribution: good to a percent, beside the noise of sampling. (Clamping, for p near 1, lowers p.)
    free = p < 0.2
    assert within(activity(data, n)[0].double().mean(0)[free], p[free], (p * (1 - p) / n).sqrt()[free] + 0.002 * p[free])


LAWS = {
    "uniform": (1 / 2, 1 / 12),
    "uniform_product": (1 / 4, 7 / 144),
    "one": (1, 0),
    "half_normal": (0.7979, 0.3634),
    "exponential": (1, 1),
}


@pytest.mark.parametrize("law", LAWS)
def test_law_of_the_coefficients(law: str) -> None:
    values = SuperpositionData(50, 4, mean_active=10, coefficients=law).sample(3000).latents.values.double()
    mean, variance = LAWS[law]
    assert abs(float(values.mean()) - mean) < 0.03
    assert abs(float(values.var()) - variance) < 0.06
    assert float(values.min()) >= 0


def test_own_law_noise_features_and_filled_samples() -> None:
    features = 3 * unit_features(10, 4)
    data = SuperpositionData(
        10, 4, mean_active=0.5, coefficients=lambda n, g: 2 + torch.rand(n, generator=g), features=features, ensure_nonempty=True, seed=1
    )
    x, latents, truth = data.sample(500)
    assert torch.equal(truth, features)
    counts = latents.crow.diff()
    assert int(counts.min()) == 1
    single = latents.values[latents.crow[:-1]]
    assert bool(((single >= 2) | (single == 1)).all()) and bool((single == 1).any())
    torch.testing.assert_close(x, latents.to_dense() @ features)
    noisy = SuperpositionData(10, 4, mean_active=0.5, noise=0.5).sample(4000)
    assert abs(float((noisy.x - noisy.latents.to_dense() @ noisy.features).std()) - 0.5) < 0.02


def test_hierarchy() -> None:
    parents = torch.tensor([-1, 0, 1, 2, -1, 4])
    data = SuperpositionData(6, 4, mean_active=4, decay=None, parents=parents)
    active = activity(data, 4000)[0]
    for child, parent in enumerate(parents.tolist()):
        if parent >= 0:
            assert not bool((active[:, child] & ~active[:, parent]).any())
            share = float(active[active[:, parent], child].double().mean())
            assert abs(share - 4 / 6) < 0.06  # of those left: still its own probability


# What each published variant must show: mean active, expected marginal variance of z, and the coefficients' mean.
STATISTICS = {
    "hoagy_correlated": (5.0, 9.7, 0.5),
    "hoagy_uncorrelated": (0.97, None, 0.5),
    "hoagy_products": (5.0, 9.7, 0.25),
    "generate_sharkey": (5.0, 512.0, 0.5),
    "toy_feature_dataset": (5.0, None, 0.5),
    "toy_model_generator": (5.0, 1.0, 0.5),
    "synth_sae_bench": (32.0, 1.0, 0.798),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str) -> None:
    mean, variance, coefficient = STATISTICS[name]
    small = {"synth_sae_bench": {"n_features": 2048}, "toy_model_generator": {"n_features": 512}}
    data = SuperpositionData.preset(name, **small.get(name, {}))
    assert (data.n_features, data.d) == (small.get(name, PRESETS[name])["n_features"], PRESETS[name]["d"])
    calls, n = (40, 100) if data.redraw == "batch" else (1, 2000)
    active = activity(data, n, calls).double().flatten(0, 1)
    assert abs(float(active.sum(1).mean()) - mean) < 0.1 * mean + 0.05
    if variance is not None:
        assert data.marginal_variance is not None
        assert abs(float(data.marginal_variance.mean()) - variance) < 0.03 * variance
    if name == "toy_feature_dataset":
        assert data.marginal_variance is not None and float(data.marginal_variance.max()) <= 1 + 1e-5
    values = data.sample(1000).latents.values
    forced = int((values == 1).sum()) if data.ensure_nonempty else 0
    assert abs((float(values.sum()) - forced) / (values.shape[0] - forced) - coefficient) < 0.05 * coefficient + 0.01
    if name == "hoagy_correlated":
        assert float(active.sum(1).min()) >= 1
    # The decay: the first half of the features is active more often by the factor that 0.99^g or 1 / (g + 1)^0.5 gives it.
    half = data.n_features // 2
    ratio = float(active[:, :half].sum() / active[:, half:].sum())
    if name == "generate_sharkey":  # p is near 0 or 1, which powers leave alone, but for p ** 0: feature 0 is active twice as often
        assert float(active[:, 0].mean()) > 1.3 * float(active.mean())
    elif name == "synth_sae_bench":
        index = torch.arange(1, 2049) ** -0.5
        assert abs(ratio / float(index[:half].sum() / index[half:].sum()) - 1) < 0.1
    else:
        assert abs(ratio / 0.99**-half - 1) < 0.25


def test_preset_covariances_are_what_they_are_called() -> None:
    data = SuperpositionData.preset("hoagy_correlated", n_features=64, d=8)
    assert data._factor is not None
    matrix = data._factor @ data._factor.T
    off = matrix[~torch.eye(64, dtype=torch.bool)]
    assert abs(float(off.mean()) - 0.5) < 0.02 and abs(float(off.var()) - 1 / 24) < 0.004
    assert float(torch.linalg.eigvalsh(matrix.double())[0]) < 0.02, "raised by 1.001 of its least eigenvalue: nearly singular"
    over_max = SuperpositionData(64, 8, covariance="wishart_over_max")
    assert over_max._factor is not None
    assert float((over_max._factor @ over_max._factor.T).max()) == pytest.approx(1, abs=1e-5)


def test_toy_model_features() -> None:
    made = toy_model_features(10, 5, density=0.05, steps=600, batch=256, seed=1)
    again = toy_model_features(10, 5, density=0.05, steps=600, batch=256, seed=1)
    assert torch.equal(made.features, again.features) and made.bias.shape == (10,)
    norms = torch.linalg.vector_norm(made.features, dim=1)
    assert int((norms > 0.8).sum()) > 5, "more features than dimensions are kept: superposition"
    cosine = fastsae.match_cosine(made.features, -made.features).similarity
    assert float(cosine.max()) > 0.9, "a low ratio makes antipodal pairs"
    dense = toy_model_features(10, 5, density=1.0, importance=0.7, steps=600, batch=256, seed=1)
    assert int((torch.linalg.vector_norm(dense.features, dim=1) > 0.5).sum()) <= 6, "dense features are not put in superposition"
    data = SuperpositionData(10, 5, mean_active=1, decay=None, features=made.features)
    x, latents, features = data.sample(50)
    torch.testing.assert_close(x, latents.to_dense() @ features)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "n_features must be an int", {"n_features": 2.0}),
        (ValueError, "d must be at least 1", {"d": 0}),
        (ValueError, "mean_active must be at most n_features=8, got 9", {"mean_active": 9}),
        (ValueError, "decay must be one of 'geometric', 'power', 'zipf', None, got 'linear'", {"decay": "linear"}),
        (ValueError, "rate of a geometric decay", {"rate": 1.5}),
        (ValueError, "redraw must be one of", {"redraw": "never"}),
        (ValueError, "coefficients must be a function or one of", {"coefficients": "normal"}),
        (TypeError, "coefficients must be a name or a function, got int", {"coefficients": 3}),
        (ValueError, "covariance must be a tensor, None or one of", {"covariance": "full"}),
        (ValueError, r"covariance must have shape \[G=8, G=8\], got \[4, 4\]", {"covariance": torch.eye(4)}),
        (ValueError, "covariance must be symmetric", {"covariance": torch.ones(8, 8).triu()}),
        (ValueError, "covariance must be positive semi-definite", {"covariance": -torch.eye(8)}),
        (ValueError, "rank must be at least 1", {"covariance": "low_rank", "rank": 0}),
        (ValueError, r"shared must be in 0 \.\. 1, got 2", {"covariance": "low_rank", "shared": 2}),
        (ValueError, "link='copula' needs a covariance", {"link": "copula"}),
        (ValueError, "rescale=None goes with covariance=None", {"rescale": None, "covariance": "wishart"}),
        (ValueError, "noise must be at least 0", {"noise": -1}),
        (TypeError, "dtype must be float32", {"dtype": torch.int64}),
        (ValueError, r"features must have shape \[G=8, D=4\], got \[4, 8\]", {"features": torch.ones(4, 8)}),
        (IndexError, r"parents must be -1 or 0 \.\. 7", {"parents": torch.full((8,), 8)}),
        (ValueError, "parents must not lead back", {"parents": torch.tensor([1, 0, -1, -1, -1, -1, -1, -1])}),
        (TypeError, "ensure_nonempty must be a bool", {"ensure_nonempty": 1}),
        (ValueError, "seed must be at least 0", {"seed": -1}),
    ],
)
def test_data_says_what_is_wrong(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^SuperpositionData: {message}"):
        SuperpositionData(**{"n_features": 8, "d": 4, "mean_active": 2, **options})


def test_samples_and_presets_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"name must be one of hoagy_correlated, .*, got 'sharkey'"):
        SuperpositionData.preset("sharkey")
    with pytest.raises(ValueError, match="n must be at least 0"):
        SuperpositionData(4, 4, mean_active=1).sample(-1)
    with pytest.raises(ValueError, match="size must be at least 1"):
        SuperpositionData(4, 4, mean_active=1).batches(0)
    with pytest.raises(ValueError, match="coefficients must give a floating tensor"):
        SuperpositionData(4, 4, mean_active=2, coefficients=lambda n, g: torch.ones(n + 1)).sample(3)
    with pytest.raises(ValueError, match="density must be above 0 and at most 1, got 2"):
        toy_model_features(4, 2, density=2)


# ---------------------------------------------------------------- initialisations

X = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 10)

STARTS: dict[str, Callable[[int, int, int], Tensor]] = {
    "random": lambda F, D, seed: init.random_directions(F, D, seed=seed),
    "orthogonal": lambda F, D, seed: init.orthogonal(F, D, seed=seed),
    "singular": lambda F, D, seed: init.noised_singular_vectors(X[:D], F, seed=seed),
    "axes": lambda F, D, seed: init.noised_unit_vectors(F, D, seed=seed),
    "components": lambda F, D, seed: init.principal_components(X[:, :D], F, seed=seed),
    "points": lambda F, D, seed: init.data_points(X[:, :D], F, noise=0.1, seed=seed),
}


@pytest.mark.parametrize("name", STARTS)
@given(F=st.integers(1, 120), D=st.integers(1, 9), seed=st.integers(0, 5))
def test_starts_have_unit_rows_for_any_ratio(name: str, F: int, D: int, seed: int) -> None:
    rows = STARTS[name](F, D, seed)
    assert rows.shape == (F, D) and rows.dtype is torch.float32
    torch.testing.assert_close(torch.linalg.vector_norm(rows, dim=1), torch.ones(F))
    assert torch.equal(rows, STARTS[name](F, D, seed))
    if D > 2 and F > 2:
        assert not torch.equal(rows, STARTS[name](F, D, seed + 1))


def test_what_starts_are_made_of() -> None:
    rows = init.orthogonal(20, 8)
    torch.testing.assert_close(rows[:8] @ rows[:8].T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[8:16].T @ rows[8:16], torch.eye(8), atol=1e-5, rtol=0)
    assert not torch.equal(rows[:8], rows[8:16])
    torch.testing.assert_close(init.noised_unit_vectors(10, 8, noise=0)[8:], torch.eye(8)[:2])

    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    U = torch.linalg.svd(weight)[0]
    torch.testing.assert_close(init.noised_singular_vectors(weight, 6, noise=0).abs(), U.T.abs(), atol=1e-5, rtol=0)
    near = init.noised_singular_vectors(weight, 12, noise=0.1)
    cosine = (near * U.T.repeat(2, 1)).sum(1).abs()
    assert float(cosine.min()) > 0.99 and float(cosine.max()) < 1 and not torch.equal(near[:6], near[6:])

    components = init.principal_components(X + 100, 18, noise=0)
    assert int(components[0].abs().argmax()) == 8 and float(components[0].abs().max()) > 0.9, "the widest axis first, without the mean"
    torch.testing.assert_close(components[:9], -components[9:])
    variance = ((X - X.mean(0)) @ components[:9].T).var(0)
    assert bool((variance.diff() < 0).all())

    points = init.data_points(X, 50, centre=False)
    assert len({tuple(row) for row in points.tolist()}) == 50
    assert float(fastsae.match_cosine(points, X).similarity.min()) > 1 - 1e-5
    zero = init.data_points(torch.zeros(3, 4), 5)
    torch.testing.assert_close(torch.linalg.vector_norm(zero, dim=1), torch.ones(5))


def test_start_from() -> None:
    sae = fastsae.SAE(8, 20, fastsae.ReLU())
    rows = init.orthogonal(20, 8)
    assert superposition.start_from(sae, rows) is sae
    assert torch.equal(sae.W_dec, rows) and torch.equal(sae.W_enc, rows)
    with pytest.raises(ValueError, match=r"rows must have shape \[F=20, D=8\], got \[8, 20\]"):
        superposition.start_from(sae, rows.T)
    with pytest.raises(ValueError, match="d_in=8 and d_out=4"):
        superposition.start_from(fastsae.SAE(8, 20, fastsae.ReLU(), d_out=4), torch.ones(20, 4))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("n_features must be at least 1", lambda: init.orthogonal(0, 4)),
        ("noise must be at least 0", lambda: init.noised_unit_vectors(4, 4, noise=-1)),
        ("d must be at least 1", lambda: init.noised_unit_vectors(4, 0)),
        (r"x must have shape \[n, D\]", lambda: init.principal_components(torch.ones(3), 4)),
        ("x must be finite", lambda: init.data_points(torch.full((3, 3), torch.nan), 4)),
        ("seed must be at least 0", lambda: init.random_directions(4, 4, seed=-1)),
        (r"length must be at least 106 \(skip \+ count, 100 \+ 6\)", lambda: token_positions(105)),
        (r"x must have shape \[\.\., T, D\]", lambda: sample_tokens(torch.ones(3))),
    ],
)
def test_starts_say_what_is_wrong(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_six_tokens_of_1024() -> None:
    positions = token_positions(1024)
    assert positions.tolist() == [100, 284, 469, 653, 838, 1023]
    x = torch.arange(1024.0).view(1, 1024, 1).expand(2, -1, 3)
    assert sample_tokens(x)[1, :, 2].tolist() == positions.tolist()
    assert token_positions(106).tolist() == list(range(100, 106))
    assert token_positions(9, 1, skip=3).tolist() == [3]


# ---------------------------------------------------------------- statistics


def test_statistics_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 5, generator=generator).exp() * torch.tensor([1.0, 10.0, -1.0, 0.0, 1e-3]) + torch.tensor(
        [0.0, 100.0, 0.0, 2.0, 0.0]
    )
    x[:, 0] = torch.where(torch.rand(3000, generator=generator) < 0.3, 0.0, x[:, 0])
    made = ActivationStatistics(5)
    for part in x.split(701):
        made.update(part.view(-1, 1, 5))
    d = x.double().numpy()
    for ours, theirs in (
        (made.mean(), d.mean(0)), (made.variance(), d.var(0)), (made.minimum(), d.min(0)), (made.maximum(), d.max(0)),
        (made.sparsity(), (d == 0).mean(0)), (made.positive(), (d > 0).mean(0)),
    ):  # fmt: skip
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-9, atol=1e-15)
    changing = [0, 1, 2, 4]
    for ours, theirs in ((made.skewness(), stats.skew(d[:, changing])), (made.kurtosis(), stats.kurtosis(d[:, changing]))):
        torch.testing.assert_close(ours[changing], torch.from_numpy(theirs), rtol=1e-7, atol=0)
    assert float(made.kurtosis()[3]) == -3 and float(made.skewness()[3]) == 0
    everything = made.overall()
    assert everything["count"] == d.size and everything["kurtosis"] == pytest.approx(stats.kurtosis(d.ravel()), rel=1e-7)
    assert everything["variance"] == pytest.approx(d.var(), rel=1e-9) and everything["sparsity"] == pytest.approx((d == 0).mean())
    exact = torch.from_numpy(d).flatten().sort().values
    for q, value in everything["quantiles"].items():
        assert value == pytest.approx(float(exact[max(1, -int(-q * d.size // 1)) - 1]), rel=1 / 32 + 1e-6), q


@given(cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 3), scale=st.sampled_from([1e-3, 1.0, 1e4]), masked=st.booleans())
def test_merged_streams_equal_one(cuts: list[int], seed: int, scale: float, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 3, generator=generator).relu() * scale + seed
    mask = torch.rand(60, generator=generator) < 0.7 if masked else torch.ones(60, dtype=torch.bool)
    whole = ActivationStatistics(3).update(x, mask=mask)
    merged = ActivationStatistics(3)
    edges = [0, *sorted(cuts), 60]
    for a, b in pairwise(edges):
        merged.merge(ActivationStatistics(3).update(x[a:b], mask=mask[a:b]))
    assert merged.count == whole.count == int(mask.sum())
    levels = [0, 0.1, 0.5, 0.9, 1]
    for name in ("sparsity", "positive", "minimum", "maximum"):
        assert torch.equal(getattr(merged, name)(), getattr(whole, name)())
    assert torch.equal(merged.quantiles(levels), whole.quantiles(levels))
    for name in ("mean", "variance", "skewness", "kurtosis"):
        torch.testing.assert_close(getattr(merged, name)(), getattr(whole, name)(), rtol=1e-6, atol=1e-9)
    again = ActivationStatistics.from_state_dict(merged.state_dict())
    assert again.overall() == merged.overall()


@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_near_the_exact_ones(values: list[float], q: float) -> None:
    made = ActivationStatistics(1, sub_bins=32).update(torch.tensor(values).view(-1, 1))
    exact = sorted(values)[max(1, -int(-q * len(values) // 1)) - 1]
    assert abs(float(made.quantiles([q])) - exact) <= abs(exact) / 64 * (1 + 1e-6) + 2**-24


def test_statistics_say_what_is_wrong() -> None:
    made = ActivationStatistics(3)
    with pytest.raises(ValueError, match="nothing has been counted yet"):
        made.mean()
    with pytest.raises(ValueError, match=r"x must have shape \[\.\., D=3\], got \[2, 4\]"):
        made.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="x must be finite"):
        made.update(torch.tensor([[1.0, torch.inf, 0.0]]))
    with pytest.raises(TypeError, match="x must have dtype"):
        made.update(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must have shape \[2\]"):
        made.update(torch.ones(2, 3), mask=torch.ones(3, dtype=torch.bool))
    assert made.count == 0
    with pytest.raises(ValueError, match=r"other must have \(n_neurons, sub_bins, zero\) = \(3, 16, 0.0\), got \(3, 8, 0.0\)"):
        made.merge(ActivationStatistics(3, sub_bins=8))
    with pytest.raises(TypeError, match="other must be ActivationStatistics"):
        made.merge(torch.ones(3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"q must be in 0 \.\. 1, got 2"):
        made.update(torch.ones(2, 3)).quantiles([2])
