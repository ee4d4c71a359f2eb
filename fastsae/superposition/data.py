"""Data in superposition: sparse combinations of more features than there are dimensions, with the truth beside them.

    probabilities of activity   p = probability(z, index), z normal, perhaps correlated          (several published constructions)
    activity                    Bernoulli(p), or all features whose z is low enough (a copula)
    coefficients                a law on [0, ..)
    x                           decode(latents, features): the sparse decode of an SAE

Sampling costs what is active, not what exists: Bernoulli variables of fixed probabilities p are the cells that a Poisson process of rate
``-log(1 - p)`` hits at least once, and its points are drawn directly. Where probabilities are drawn for every sample, candidates come
from an upper bound of them and are thinned. (What cannot work so is named under ``rescale`` and ``link``.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks, seeds
from fastsae._core.precision import full_precision
from fastsae.latents import RaggedLatents
from fastsae.ops.decode import decode
from fastsae.reference import chunks, product

_COVARIANCES = ("low_rank", "symmetric_uniform", "wishart", "wishart_over_max", "wishart_over_count")
_LAWS: Mapping[str, Callable[[int, torch.Generator], Tensor]] = {
    "uniform": lambda count, g: seeds.uniform(g, count),
    "uniform_product": lambda count, g: seeds.uniform(g, count) * seeds.uniform(g, count),
    "one": lambda count, g: torch.ones(count, device="cpu", dtype=torch.float32),
    "half_normal": lambda count, g: seeds.normal(g, count).abs(),
    "exponential": lambda count, g: torch.empty(count, device="cpu", dtype=torch.float32).exponential_(generator=g),
}


class SuperpositionBatch(NamedTuple):
    """``x [n, D]``; the true ``latents`` (``RaggedLatents`` over G features, features ascending); ``features [G, D]``."""

    x: Tensor
    latents: RaggedLatents
    features: Tensor


_DATA = 0xDA7A
"""The stream of samples, so that a dictionary which starts from random directions of the same seed does not start at the true features."""


def unit_features(n_features: int, d: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[G, D]``: directions uniform on the sphere (normal rows, scaled to norm 1)."""
    n_features = checks.integer("unit_features", "n_features", n_features, 1)
    d = checks.integer("unit_features", "d", d, 1)
    rows = torch.randn(n_features, d, generator=generator, dtype=torch.float64, device="cpu")
    return (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).to(dtype)


class SuperpositionData:
    """Samples whose true features are known: ``x = sum over active g of coefficient * features[g]``.

    Args:
        n_features: number of true features G.
        d: dimension D; any ratio G / D.
        mean_active: features active a sample on average, as ``rescale`` says; below G.
        decay: how probabilities fall with the index g = 0, 1, ..: "geometric", ``p * rate^g``; "power", ``p ** (rate * g)``; "zipf",
            ``p * (g + 1)^-rate``; None, all alike.
        rate: of the decay. Geometric: in (0, 1].
        covariance: of the normal z behind the probabilities ``Phi(z)``. None: no z, p is fixed. "low_rank": ``L L^T + diagonal`` with
            ``L [G, rank]``, marginal variance 1, of which ``shared`` comes from L. "symmetric_uniform": ``(U + U^T) / 2`` of uniforms,
            its diagonal raised by 1.001 times the magnitude of its least eigenvalue. "wishart": ``Z Z^T``, Z normal ``[G, G]``;
            "wishart_over_max": the same over its largest entry; "wishart_over_count": over G. Or a positive semi-definite ``[G, G]``
            tensor. Its factor is computed once.
        rank, shared: of "low_rank"; shared in 0 .. 1.
        redraw: when z is drawn anew: for every "sample", every "batch" (call of ``sample``), or "once".
        link: "probability": a feature is active with the probability above, independent given z. "copula": a feature is active where
            ``Phi(z / sd) < p`` with p its decayed probability: its marginal is p exactly, features are active together because z is
            correlated. Needs a covariance, and redraw="sample".
        rescale: what brings the mean to ``mean_active``: "expected", one factor for all draws, so that the mean over draws is right;
            "draw", every draw of z has a factor of its own, so that its probabilities sum to ``mean_active`` before they are clamped
            to 1; None, no factor, and ``mean_active`` only serves to divide: ``p = decay * mean_active / G`` (without covariance).
        coefficients: law of an active feature: "uniform" on [0, 1), "uniform_product" of two such, "one", "half_normal", "exponential"
            (mean 1), or a function of (count, generator) that gives a tensor ``[count]``.
        ensure_nonempty: a sample without any active feature gets one at random with coefficient 1.
        parents: int64 ``[G]``, a hierarchy: a feature whose parent (-1: none) is not active is not active either, which lowers the mean.
        noise: standard deviation of normal noise added to every entry of x.
        features: ``[G, D]`` true features in place of random unit ones, of any norm (``toy_model_features`` makes some).
        seed: of features, covariance and samples. dtype, device: of what comes out; random numbers are drawn on the CPU.

    Probabilities above 1 act as 1, so the mean can be below ``mean_active`` (always so with decay="power" and few features).

    Memory: the factor, and where probabilities are drawn for every sample with rescale="draw", a full-rank covariance, decay="power" or
    the copula, temporaries of 64 MiB (the cost is then by G, otherwise by what is active plus G for each draw).

    Raises: TypeError, ValueError as usual.

    Source: Sharkey, Braun & Millidge 2022, "Taking features out of superposition with sparse autoencoders", and its replications, whose
    choices differ; ``preset`` has them by name.

    Example:
        >>> data = fastsae.superposition.SuperpositionData(512, 256, mean_active=5, seed=0)
        >>> x, latents, features = data.sample(1024)
    """

    def __init__(
        self,
        n_features: int,
        d: int,
        *,
        mean_active: float = 5.0,
        decay: str | None = "geometric",
        rate: float = 0.99,
        covariance: str | Tensor | None = None,
        rank: int = 16,
        shared: float = 0.5,
        redraw: str = "sample",
        link: str = "probability",
        rescale: str | None = "expected",
        coefficients: str | Callable[[int, torch.Generator], Tensor] = "uniform",
        ensure_nonempty: bool = False,
        parents: Tensor | None = None,
        noise: float = 0.0,
        features: Tensor | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        op = "SuperpositionData"
        n_features = checks.integer(op, "n_features", n_features, 1)
        d = checks.integer(op, "d", d, 1)
        mean_active = checks.number(op, "mean_active", mean_active)
        if mean_active > n_features:
            raise ValueError(f"{op}: mean_active must be at most n_features={n_features}, got {mean_active}")
        for name, value, known in (
            ("decay", decay, ("geometric", "power", "zipf", None)),
            ("redraw", redraw, ("sample", "batch", "once")),
            ("link", link, ("probability", "copula")),
            ("rescale", rescale, ("expected", "draw", None)),
        ):
            if value not in known:
                raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        rate = checks.number(op, "rate", rate)
        if decay == "geometric" and rate > 1:
            raise ValueError(f"{op}: rate of a geometric decay must be above 0 and at most 1, got {rate}")
        if isinstance(coefficients, str) and coefficients not in _LAWS:
            raise ValueError(f"{op}: coefficients must be a function or one of {', '.join(_LAWS)}, got {coefficients!r}")
        if not isinstance(coefficients, str) and not callable(coefficients):
            raise TypeError(f"{op}: coefficients must be a name or a function, got {type(coefficients).__name__}")
        checks.flag(op, "ensure_nonempty", ensure_nonempty)
        if checks.number(op, "noise", noise, positive=False) < 0:
            raise ValueError(f"{op}: noise must be at least 0, got {noise}")
        seed = checks.integer(op, "seed", seed, 0)
        if dtype not in checks.FLOATS:
            raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        if link == "copula" and (covariance is None or redraw != "sample" or rescale != "expected"):
            raise ValueError(f"{op}: link='copula' needs a covariance, redraw='sample' and rescale='expected'")
        if rescale is None and covariance is not None:
            got = covariance if isinstance(covariance, str) else "a tensor"
            raise ValueError(f"{op}: rescale=None goes with covariance=None, got {got}")
        if parents is not None:
            parents = _checked_parents(op, parents, n_features)

        self.n_features, self.d, self.mean_active, self.decay, self.rate = n_features, d, float(mean_active), decay, float(rate)
        self.redraw, self.link, self.rescale, self.coefficients = redraw, link, rescale, coefficients
        self.ensure_nonempty, self.parents, self.noise, self.seed = ensure_nonempty, parents, float(noise), seed
        self.dtype, self.device = dtype, torch.device(device or "cpu")
        self.generator = torch.Generator().manual_seed(seeds.stream_seed(seed, _DATA))
        made = unit_features(n_features, d, self.generator, torch.float64)
        if features is not None:
            checks.tensor(op, "features", features)
            checks.shape(op, "features", features, (n_features, d), f"[G={n_features}, D={d}]")
        self.features = (made if features is None else features.detach()).to(device=self.device, dtype=dtype)
        self._factor, self._own = self._factored(op, covariance, rank, shared)
        self.marginal_variance: Tensor | None = None
        """``[G]`` variance of z; None without a covariance."""
        if self._factor is not None:
            self.marginal_variance = (self._factor.square().sum(1) + self._own.square()).float()
        self._decay = self._decays()
        self._sum = float(self._expected().sum())
        self._once = self._probabilities(self._normal(1))[0] if covariance is not None and redraw == "once" else None

    # ------------------------------------------------------------ probabilities

    def _factored(self, op: str, covariance: Any, rank: int, shared: float) -> tuple[Tensor | None, Tensor]:
        """``L`` and the standard deviations of what each feature has of its own: z = L u + own * e."""
        G, g = self.n_features, self.generator
        none = torch.zeros(G, device="cpu", dtype=torch.float32)
        if covariance is None:
            return None, none
        if isinstance(covariance, Tensor):
            checks.tensor(op, "covariance", covariance)
            checks.shape(op, "covariance", covariance, (G, G), f"[G={G}, G={G}]")
            matrix = covariance.detach().cpu().double()
            if not torch.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-8):
                raise ValueError(f"{op}: covariance must be symmetric")
        elif covariance not in _COVARIANCES:
            raise ValueError(f"{op}: covariance must be a tensor, None or one of {', '.join(_COVARIANCES)}, got {covariance!r}")
        elif covariance == "low_rank":
            rank = checks.integer(op, "rank", rank, 1)
            if not 0 <= checks.number(op, "shared", shared, positive=False) <= 1:
                raise ValueError(f"{op}: shared must be in 0 .. 1, got {shared}")
            return unit_features(G, rank, g) * shared**0.5, none + (1 - shared) ** 0.5
        elif covariance == "symmetric_uniform":
            matrix = torch.rand(G, G, generator=g, dtype=torch.float64, device="cpu")
            matrix = (matrix + matrix.T) / 2
            matrix += 1.001 * torch.linalg.eigvalsh(matrix)[0].abs() * torch.eye(G, device="cpu", dtype=torch.float32)
        else:
            Z = torch.randn(G, G, generator=g, dtype=torch.float64, device="cpu")
            if covariance == "wishart_over_max":
                return (Z / (Z @ Z.T).max().sqrt()).float(), none
            return (Z / G**0.5 if covariance == "wishart_over_count" else Z).float(), none
        values, vectors = torch.linalg.eigh(matrix)
        if float(values[0]) < -1e-6 * float(values.abs().max()):
            raise ValueError(f"{op}: covariance must be positive semi-definite, its least eigenvalue is {float(values[0])}")
        return (vectors * values.clamp_min(0).sqrt()).float(), none

    def _decays(self) -> Tensor:
        """Factor ``[G]`` on a probability; with "power" its exponent."""
        index = torch.arange(self.n_features, dtype=torch.float64, device="cpu")
        if self.decay == "geometric":
            return self.rate**index
        if self.decay == "power":
            return self.rate * index
        return (index + 1) ** -self.rate if self.decay == "zipf" else torch.ones_like(index)

    def _expected(self) -> Tensor:
        """Decayed probabilities ``[G]`` before they are rescaled, averaged over z."""
        if self.rescale is None:
            return self._decay / self.n_features
        if self._factor is None or self.link == "copula":
            return 0.5**self._decay if self.decay == "power" else self._decay
        if self.decay != "power":
            return self._decay / 2  # z is symmetric
        quantiles = torch.special.ndtri((torch.arange(4096, dtype=torch.float64, device="cpu") + 0.5) / 4096)
        assert self.marginal_variance is not None
        sd = self.marginal_variance.double().sqrt()
        return torch.stack([torch.special.ndtr(s * quantiles).pow(a).mean() for s, a in zip(sd, self._decay)])

    @property
    def expected_probabilities(self) -> Tensor:
        """``[G]``: how often each feature is active, averaged over draws of z; exact but for "draw" rescaling, samples that
        ``ensure_nonempty`` fills, probabilities clamped at 1 and ``parents``, which it leaves out."""
        scale = self.mean_active if self.rescale is None else self.mean_active / self._sum
        return (self._expected() * scale).clamp(max=1.0).float()

    def _normal(self, rows: int) -> Tensor:
        """z ``[rows, G]``."""
        assert self._factor is not None
        z = product(seeds.normal(self.generator, rows, self._factor.shape[1]), self._factor.T)
        if bool(self._own.any()):
            z += self._own * seeds.normal(self.generator, rows, self.n_features)
        return z

    def _probabilities(self, z: Tensor) -> Tensor:
        """``[rows, G]`` of z ``[rows, G]``, rescaled and clamped."""
        p = torch.special.ndtr(z.double())
        p = p.pow(self._decay) if self.decay == "power" else p * self._decay
        total = p.sum(1, keepdim=True) if self.rescale == "draw" else self._sum
        return (p * (self.mean_active / total)).clamp_(max=1.0)

    # ------------------------------------------------------------ activity

    def _active(self, n: int) -> tuple[Tensor, Tensor]:
        """(row, feature) of every active cell, in order."""
        if self._factor is None:
            return self._poisson(n, self.expected_probabilities.double())
        if self._once is not None:
            return self._poisson(n, self._once)
        if self.redraw == "batch":
            return self._poisson(n, self._probabilities(self._normal(1))[0])
        if self.link == "probability" and self.rescale == "expected" and self.decay != "power" and self._factor.shape[1] < self.n_features:
            return self._thinned(n)
        found = [self._dense(part.stop - part.start, part.start) for part in chunks(n, 4 * self.n_features)]
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        rows, features = (torch.cat([nothing, *(pair[i] for pair in found)]) for i in (0, 1))
        return rows, features

    def _poisson(self, n: int, p: Tensor) -> tuple[Tensor, Tensor]:
        """Cells of independent Bernoulli(p) variables: those that the points of a Poisson process of rate -log(1 - p) fall on."""
        always = p >= 1
        rates = torch.where(always, 0.0, -torch.log1p(-p)).cumsum(0)
        total = float(rates[-1]) * n
        count = int(torch.poisson(torch.tensor([total], dtype=torch.float64, device="cpu"), self.generator))
        drawn = torch.rand(count, generator=self.generator, dtype=torch.float64, device="cpu") * rates[-1]
        features = torch.searchsorted(rates, drawn, right=True)
        features.clamp_(max=self.n_features - 1)  # a product that rounds up to the sum
        cells = torch.randint(max(n, 1), (count,), generator=self.generator, device="cpu") * self.n_features + features
        if bool(always.any()):
            fixed = always.nonzero().flatten()
            cells = torch.cat([cells, (torch.arange(n, device="cpu").unsqueeze(1) * self.n_features + fixed).flatten()])
        cells = torch.unique(cells)
        return cells // self.n_features, cells % self.n_features

    def _thinned(self, n: int) -> tuple[Tensor, Tensor]:
        """As ``_dense``: candidates by the bound Phi < 1, kept with the probability that z leaves; z only where there is a candidate."""
        assert self._factor is not None
        scale = self._decay * (self.mean_active / self._sum)
        rows, features = self._poisson(n, scale.clamp(max=1.0))
        shared = seeds.normal(self.generator, n, self._factor.shape[1])
        own = seeds.normal(self.generator, rows.shape[0])
        z = (self._factor[features] * shared[rows]).sum(1) + self._own[features] * own
        wanted = (torch.special.ndtr(z.double()) * scale[features]).clamp(max=1.0)
        drawn = torch.rand(rows.shape[0], generator=self.generator, dtype=torch.float64, device="cpu")
        keep = drawn * scale[features].clamp(max=1.0) < wanted
        return rows[keep], features[keep]

    def _dense(self, n: int, first: int) -> tuple[Tensor, Tensor]:
        z = self._normal(n)
        if self.link == "copula":
            assert self.marginal_variance is not None
            active = z < torch.special.ndtri(self.expected_probabilities.double()).float() * self.marginal_variance.sqrt()
        else:
            active = seeds.uniform(self.generator, z.shape) < self._probabilities(z)
        rows, features = active.nonzero(as_tuple=True)
        return rows + first, features

    def _with_parents(self, rows: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Drops what has an inactive parent, then what has lost its parent, and so on down the hierarchy."""
        assert self.parents is not None
        while True:
            parent = self.parents[features]
            cells = rows * self.n_features + features
            wanted = rows * self.n_features + parent.clamp_min(0)
            at = torch.searchsorted(cells, wanted).clamp_(max=max(cells.shape[0] - 1, 0))
            keep = (parent < 0) | (cells[at] == wanted) if cells.shape[0] else parent < 0
            if bool(keep.all()):
                return rows, features
            rows, features = rows[keep], features[keep]

    # ------------------------------------------------------------ samples

    def sample(self, n: int) -> SuperpositionBatch:
        """The next ``n`` samples: ``SuperpositionBatch(x, latents, features)``. With redraw="batch" this is one batch."""
        n = checks.integer("SuperpositionData.sample", "n", n, 0)
        rows, columns = self._active(n)
        if self.parents is not None:
            rows, columns = self._with_parents(rows, columns)
        law = _LAWS[self.coefficients] if isinstance(self.coefficients, str) else self.coefficients
        values: Any = law(rows.shape[0], self.generator)  # of a user's function
        if not isinstance(values, Tensor) or values.shape != rows.shape or not values.is_floating_point():
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"SuperpositionData.sample: coefficients must give a floating tensor [{rows.shape[0]}], got {got}")
        counts = torch.bincount(rows, minlength=n)
        if self.ensure_nonempty and bool((empty := counts == 0).any()):
            added = empty.nonzero().flatten()
            rows, order = torch.sort(torch.cat([rows, added]), stable=True)
            columns = torch.cat([columns, torch.randint(self.n_features, added.shape, generator=self.generator, device="cpu")])[order]
            values = torch.cat([values, values.new_ones(added.shape)])[order]
            counts = counts + empty
        crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        values, crow, columns = values.to(self.device, self.dtype), crow.to(self.device), columns.to(self.device)
        latents = RaggedLatents(values, crow, columns, self.n_features, torch.Size((n,)))
        with full_precision(self.device):
            x = decode(latents, self.features)
        if self.noise:
            x = x + self.noise * seeds.normal(self.generator, n, self.d).to(x)
        return SuperpositionBatch(x, latents, self.features)

    def batches(self, size: int) -> SuperpositionStream:
        """Endless batches ``x [size, D]``, for ``Trainer.fit`` and loops; their position goes into a checkpoint."""
        return SuperpositionStream(self, checks.integer("SuperpositionData.batches", "size", size, 1))

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the random numbers: with equal arguments, ``load_state_dict`` makes the same samples come next."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SuperpositionData:
        """A published variant by its name in ``PRESETS``; ``changes`` replace arguments, e.g. ``n_features=128, d=64, seed=1``."""
        if name not in PRESETS:
            raise ValueError(f"SuperpositionData.preset: name must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})


class SuperpositionStream:
    """Endless batches of a ``SuperpositionData``."""

    def __init__(self, data: SuperpositionData, size: int):
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.data.sample(self.size).x

    def state_dict(self) -> dict[str, Tensor]:
        return self.data.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.data.load_state_dict(state)


def _checked_parents(op: str, parents: Any, n_features: int) -> Tensor:
    checks.tensor(op, "parents", parents, checks.INDICES)
    checks.shape(op, "parents", parents, (n_features,), f"[G={n_features}]")
    parents = parents.detach().cpu().long()
    if bool(((parents < -1) | (parents >= n_features)).any()):
        raise IndexError(f"{op}: parents must be -1 or 0 .. {n_features - 1}, got {int(parents.min())} .. {int(parents.max())}")
    walk = parents
    for _ in range(n_features):
        if bool((walk < 0).all()):
            return parents
        walk = torch.where(walk < 0, walk, parents[walk.clamp_min(0)])
    raise ValueError(f"{op}: parents must not lead back to a feature itself")


_SHARKEY: dict[str, Any] = {"n_features": 512, "d": 256, "mean_active": 5.0, "decay": "geometric", "rate": 0.99}
_HOAGY: dict[str, Any] = {**_SHARKEY, "covariance": "symmetric_uniform", "redraw": "batch", "rescale": "draw", "ensure_nonempty": True}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "hoagy_correlated": _HOAGY,
    "hoagy_uncorrelated": {**_SHARKEY, "rescale": None},
    "hoagy_products": {**_HOAGY, "coefficients": "uniform_product"},
    "generate_sharkey": {**_SHARKEY, "covariance": "wishart", "redraw": "sample", "decay": "power", "rescale": "draw"},
    "toy_feature_dataset": {**_SHARKEY, "covariance": "wishart_over_max", "redraw": "once", "rescale": "draw"},
    "toy_model_generator": {
        **_SHARKEY, "n_features": 2048, "covariance": "wishart_over_count", "redraw": "sample", "rescale": "draw",
    },
    "synth_sae_bench": {
        "n_features": 16384, "d": 768, "mean_active": 32.0, "decay": "zipf", "rate": 0.5, "covariance": "low_rank", "rank": 25,
        "shared": 0.1, "link": "copula", "coefficients": "half_normal",
    },
}  # fmt: skip
"""Arguments of ``SuperpositionData`` by the names of published generators.

Four replications of Sharkey, Braun & Millidge 2022 draw four different distributions; all have U[0, 1) coefficients, 512 features in 256
dimensions (``toy_model_generator``: 2048), 5 active, decay 0.99:

=======================  ==================================  ===================  ========  ==========================================
name                     covariance (marginal variance)      z is drawn           decay     also
=======================  ==================================  ===================  ========  ==========================================
``hoagy_correlated``     symmetrised uniform (about 9.7)     once a batch         p 0.99^g  an empty sample gets one coefficient 1
``hoagy_uncorrelated``   none                                                     p 0.99^g  not rescaled: 0.97 active (its code's default)
``hoagy_products``       as hoagy_correlated                                                coefficients are products of two uniforms
``generate_sharkey``     Wishart (about G: p near 0 or 1)    for every sample     p^0.99g   scaled for every sample
``toy_feature_dataset``  Wishart over its maximum (<= 1)     once                 p 0.99^g
``toy_model_generator``  Wishart over G (about 1)            for every sample     p 0.99^g  scaled for every sample
``synth_sae_bench``      low rank and diagonal (1)           for every sample     Zipf      a copula: SynthSAEBench-like
=======================  ==================================  ===================  ========  ==========================================

Sources: HoagyC/sparse_coding, ``replicate_toy_models.py`` and ``sc_datasets/random_dataset.py``; three independent replications, under
the names of their generators. ``synth_sae_bench`` has the size, the copula and the kind of marginals of SynthSAEBench (arXiv 2602.14687);
its number of active features, exponent, rank and law are our choice, and its hierarchy is left to ``parents``.
"""


class ToyModel(NamedTuple):
    """``features [G, D]``: row g is what feature g becomes in the D hidden dimensions; ``bias [G]``; the ``loss`` of the last batch."""

    features: Tensor
    bias: Tensor
    loss: float


@torch.inference_mode(False)  # it trains
@full_precision(torch.device("cpu"))
def toy_model_features(
    n_features: int,
    d: int,
    *,
    density: float = 0.05,
    importance: float = 1.0,
    steps: int = 2000,
    batch: int = 1024,
    lr: float = 1e-2,
    seed: int = 0,
) -> ToyModel:
    """Trains a toy model of superposition and returns where its encoder puts each feature.

    The model is ``f_hat = ReLU(W W^T f + b)``, ``W [G, D]``, on sparse f (each entry U[0, 1) with probability ``density``, else 0), with
    the loss ``mean over f of sum_g importance^g (f_g - f_hat_g)^2``. One-hot feature g is sent to ``W[g]``. Features that the model gave
    up have a row near 0: see the norms.

    Args:
        n_features, d: G and D. density: in (0, 1]. importance: weight of feature g is its g-th power, in (0, 1].
        steps, batch, lr: of Adam, with a cosine decay to 0. seed: of everything.

    Example:
        >>> made = toy_model_features(64, 16, density=0.05)
        >>> data = SuperpositionData(64, 16, mean_active=3.2, decay=None, features=made.features)

    Raises: TypeError, ValueError as usual.

    Source: Elhage et al. 2022, "Toy Models of Superposition" (arXiv 2209.10652).
    """
    op = "toy_model_features"
    for name, count in (("n_features", n_features), ("d", d), ("steps", steps), ("batch", batch)):
        checks.integer(op, name, count, 1)
    for name, value in (("density", density), ("importance", importance)):
        if checks.number(op, name, value) > 1:
            raise ValueError(f"{op}: {name} must be above 0 and at most 1, got {value}")
    lr = checks.number(op, "lr", lr)
    seed = checks.integer(op, "seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    W = (unit_features(n_features, d, generator) * min(1.0, math.sqrt(d / n_features))).requires_grad_()
    bias = torch.zeros(n_features, requires_grad=True, device="cpu", dtype=torch.float32)
    weight = importance ** torch.arange(n_features, device="cpu").float()
    optimizer = torch.optim.Adam([W, bias], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = W.new_zeros(())
    for _ in range(steps):
        f = seeds.uniform(generator, batch, n_features)
        f *= seeds.uniform(generator, batch, n_features) < density
        with torch.enable_grad():
            f_hat = torch.relu((f @ W) @ W.T + bias)
            loss = (weight * (f - f_hat).square()).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
    return ToyModel(W.detach(), bias.detach(), float(loss.detach()))
