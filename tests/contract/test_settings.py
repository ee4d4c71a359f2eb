"""Nothing depends on torch's process-wide settings, and all are afterwards what they were: default device and dtype, precision, modes.

The operations themselves are run under drawn settings by ``test_contract.py``; here is what is built on them.
"""

from __future__ import annotations

import ast
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from package_sources import sources
from surroundings import GRADLESS, NEWER, PLACES, PRECISIONS, SETTINGS, newer, older, precision, reset_precision, surroundings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastsae
from fastsae import SAE, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK, Trainer, polytopes, superposition
from fastsae._core.precision import full_precision
from fastsae.dispatch import OPS
from fastsae.reference import product, running_sums
from fastsae.superposition import init
from fastsae.trainer import Batches

# ---------------------------------------------------------------- what the source says

# They make a tensor where nobody gave one: on the default device, floating ones in the default dtype.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_compressed_tensor", "sparse_coo_tensor", "sparse_csc_tensor",
    "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "vander", "zeros",
    "bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window",
}  # fmt: skip
FLOATING = {"empty", "empty_permuted", "empty_strided", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros"}
OWN_PROCESS = "fastsae.demo"  # `fastsae demo`; studies, which set a default device, are looked at


def _floating(call: ast.Call, name: str) -> bool:
    """Whether the default dtype decides: always for some, for others where they are given floats, as far as that can be seen."""
    given = call.args[1:2] if name == "full" else call.args[:1]
    return name in FLOATING or any(
        (isinstance(node, ast.Constant) and isinstance(node.value, float)) or (isinstance(node, ast.Name) and node.id == "float")
        for value in given if name in ("full", "tensor", "as_tensor", "asarray", "scalar_tensor", "arange") for node in ast.walk(value)
    )  # fmt: skip


def test_factories_name_device_and_dtype() -> None:
    wrong = []
    for module, path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch"):
                continue
            name, named = node.func.attr, {keyword.arg for keyword in node.keywords}
            missing = [] if "device" in named else ["device"]
            missing += ["dtype"] if "dtype" not in named and _floating(node, name) else []
            if name in FACTORIES and missing and None not in named and not module.startswith(OWN_PROCESS):
                wrong.append(f"{module}:{node.lineno} {ast.unparse(node)} without {' and '.join(missing)}")
    assert not wrong, "\n".join(wrong)


def test_the_list_of_factories_is_torch_s() -> None:
    from torch.utils._device import _device_constructors

    known = {constructor.__name__ for constructor in _device_constructors()}
    assert known - FACTORIES <= {
        "empty_quantized",
        "fft_fftfreq",
        "fft_rfftfreq",
        "nested_tensor",
        "sparse_bsc_tensor",
        "sparse_bsr_tensor",
    }


def test_precision_is_read_and_set_in_one_place() -> None:
    for module, path in sources():
        text = path.read_text()
        if module != "fastsae._core.precision":
            assert not any(name in text for name in ("matmul_precision", "allow_tf32", "fp32_precision")), module


# ---------------------------------------------------------------- precision

SETTERS = [*(older(value) for value in ("highest", "high", "medium")), *PRECISIONS["allow_tf32"]]
VALUES = {"generic": ("ieee", "tf32", "bf16", "none"), "cuda": ("ieee", "tf32", "none"), "mkldnn": ("ieee", "tf32", "bf16", "none")}
if NEWER:
    SETTERS += [newer(*place, value) for place in PLACES for value in VALUES[place[0]]]


@pytest.fixture
def reset() -> Iterator[None]:
    yield
    reset_precision()


def _inside() -> set[Any]:
    names = (("cuda", "matmul"), ("mkldnn", "matmul")) if NEWER else ()
    return {torch._C._get_fp32_precision_getter(*name) for name in names}  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("seed", range(20 if os.environ.get("HYPOTHESIS_PROFILE") != "deep" else 2000))
def test_precision_is_restored_whatever_was_set(seed: int, reset: None) -> None:
    """Also what only later settings show: whether a setting was set itself or takes the value of a more general one."""
    drawn = random.Random(seed)
    for _ in range(20):
        before, later = ([drawn.choice(SETTERS) for _ in range(n)] for n in (drawn.randint(1, 5), 3))
        seen = []
        for entered in (False, True):
            reset_precision()
            for setter in before:
                setter()
            if entered:
                with full_precision(), full_precision():
                    assert _inside() <= {"ieee", "none"}
            seen.append([precision()])
            for setter in later:
                setter()
                seen[-1].append(precision())
        assert seen[0] == seen[1]


def test_threads_and_forks_leave_full_precision_in_any_order(reset: None) -> None:
    PRECISIONS["medium"][0]()
    before, barrier = precision(), threading.Barrier(2, timeout=60)
    found = []

    def first() -> None:
        with full_precision():
            barrier.wait()  # the other enters while this one is inside, and is still there when it has left
            barrier.wait()
        barrier.wait()

    thread = threading.Thread(target=first)
    thread.start()
    barrier.wait()
    with full_precision():
        barrier.wait()
        barrier.wait()
        found.append(_inside())
        if hasattr(os, "fork"):
            child = os.fork()
            if child == 0:  # the thread that forks is outside of any product as far as the child is concerned
                os._exit(0 if precision() == before else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()
    assert found[0] <= {"ieee", "none"} and precision() == before


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("shapes", [((64, 64), (64, 64)), ((4, 32, 64), (4, 64, 32))])
def test_product(name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    """The bits and layouts of torch's product and its gradients, also where the backward runs later and elsewhere."""
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) for shape in shapes)
    for left, right in ((a, b), (a, b.mT.contiguous().mT), (a.mT.contiguous().mT, b)):
        plain = [t.detach().requires_grad_() for t in (left, right)]
        ours = [t.detach().requires_grad_() for t in (left, right)]
        expected = plain[0] @ plain[1]
        expected = expected, *torch.autograd.grad(expected.square().sum(), plain)
        with surroundings([name]):
            result = product(*ours)
        with surroundings([name, "autocast"]):
            result = result, *torch.autograd.grad(result.square().sum(), ours)
        for x, y in zip(result, expected, strict=True):
            assert torch.equal(x, y) and x.stride() == y.stride()
    assert torch.autograd.gradgradcheck(product, [t[..., :3, :3].double().requires_grad_() for t in (a, b)])


# ---------------------------------------------------------------- addresses


def _other_device() -> Iterator[Any]:
    for op in OPS.values():
        for row in op.rows:
            if row.backend == "cpu":
                yield pytest.param(op, row, id=op.name)


@pytest.mark.parametrize(("op", "row"), list(_other_device()))
def test_no_address_of_another_device(op: Any, row: Any) -> None:
    """A tensor that is not on the CPU is refused or an error, whichever argument it is; never an address."""
    for args in list(op.samples(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0)))[:12]:
        for position in [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and row.reason(args) is None]:
            moved = (*args[:position], args[position].to("meta"), *args[position + 1 :])
            if row.reason(moved) is None:
                with pytest.raises((TypeError, ValueError)):
                    op(*moved, backend="cpu")


# ---------------------------------------------------------------- what is built on the operations


def _t(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32, device="cpu")


X, W, MASK = _t(48, 16), _t(64, 16), _t(48) > -1
NET = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)).requires_grad_(False)
for _number, _parameter in enumerate(NET.parameters()):
    _parameter.copy_(_t(*_parameter.shape, seed=_number) / 4)
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"activation": TopK(4), "aux": AuxK(8), "dead_after": 30},
    "batchtopk": {"activation": BatchTopK(3.0), "prefixes": [8, 64]},
    "jumprelu": {"activation": JumpReLU(0.1, bandwidth=0.2), "l0": 0.01},
    "relu": {"activation": ReLU(), "l1": 0.02},
    "gated": {"activation": Gated(), "l1": 0.02},
    "gated slots": {"activation": Gated(), "l1": 0.02, "dense": False},
    "transcoder": {"activation": TopK(4), "d_out": 16, "skip": True},
    "dense transcoder": {"activation": ReLU(), "l1": 0.02, "d_out": 16, "skip": True, "dense": True},
}


def _sae(kind: str, **options: Any) -> SAE:
    return SAE(16, 64, **{"device": "cpu", "seed": 0, **KINDS[kind], **options})


def _target(sae: SAE) -> Tensor | None:
    return X.flip(0) if sae.transcoder else None


def _loss(kind: str) -> Any:
    sae, x = _sae(kind).train(), X.clone().requires_grad_()
    loss = sae.loss(x, target=_target(sae), mask=MASK)
    loss.loss.backward()
    return loss.loss, loss.fvu, loss.l0, x.grad, sae.state_dict(), [p.grad for p in sae.parameters()], sae.eval()(X).x_hat


def _steps(kind: str) -> Any:
    sae = _sae(kind)
    sae.init_from(X, target=_target(sae), b_dec="geometric_median", norm="rms")
    opt = fastsae.optim.Adam(sae, lr=1e-2, clip=1.0, schedule=fastsae.optim.warmup_linear_decay(2, 3, 6))
    last = Trainer(sae, opt, progress=False).fit(Batches(X, _target(sae), MASK, size=16, seed=1), 4)
    return last, sae.state_dict(), opt.state_dict(), opt.to_torch().state_dict()["state"]


def _trainer() -> Any:
    sae = _sae("batchtopk")
    last = Trainer(sae, torch.optim.Adam(sae.parameters(), lr=1e-2), clip=1.0, progress=False).fit(Batches(X, mask=MASK, size=16), 4)
    return last, sae.state_dict()


def _several() -> Any:
    saes = SAEs(_sae("relu", seed=seed, dense=dense) for seed, dense in ((0, True), (1, True)))
    return fastsae.optim.Adam(saes, lr=1e-2).step(X), saes.state_dict()


def _files(folder: Path) -> Any:
    sae = _sae("batchtopk", activation=BatchTopK(4))
    found: list[Any] = []
    for name in ("fastsae", "saelens", "dictionary_learning"):
        sae.prefixes = [8, 64] if name == "dictionary_learning" else None
        sae.save_pretrained(folder / name, format=name)
        found.append(SAE.from_pretrained(folder / name, device="cpu").state_dict())
    fastsae.save_checkpoint(folder / "checkpoint.pt", sae, fastsae.optim.Adam(sae, lr=1e-3))
    found.append(fastsae.load_checkpoint(folder / "checkpoint.pt")[0].state_dict())
    return found, fastsae.mmcs(folder / "fastsae", folder / "saelens")


def _matches() -> Any:
    found = fastsae.match(W, _t(40, 16), weights=(W[:, 0].abs(), None))
    variants = [fastsae.mmcs(W, W if kind.exclude_self else _t(40, 16), variant=kind) for kind in fastsae.compare.MMCS_VARIANTS.values()]
    return (
        found.a_to_b,
        found.most_negative,
        found.histogram(20),
        found.one_to_one(4),
        fastsae.compare.mmcs_matrix([W, W + 1, _t(40, 16)]),
        variants,
    )


def _codes() -> Any:
    hashes, codes = fastsae.spline_hash(X, W), fastsae.spline_code(X, W)
    counter = fastsae.codes.CodeCounter(["a"])
    counter.update({"a": hashes}, MASK)
    graph = fastsae.codes.neighbour_graph(codes, k=5)
    density = fastsae.codes.boundary_density(codes, codes.flip(0), X, X.flip(0))
    return (
        hashes,
        str(counter.table()),
        torch.from_numpy(graph.data),
        density,
        fastsae.codes.count_codes(hashes),
        fastsae.codes.near_zero_counts(X, W, eps=0.1),
    )


def _trace() -> Any:
    with fastsae.codes.trace(NET, "*") as traced:
        checkpoint(NET, X, use_reentrant=False)
    return traced.pop()


def _polytopes() -> Any:
    net = polytopes.as_net(NET)
    mlp, codes = polytopes.as_net(NET[:3]), fastsae.codes.pack_signs(_t(48, 24))
    return (
        polytopes.affine_map(net, X), polytopes.soft_affine_map(net, X), polytopes.local_complexity(net, X, 0.1, 8),
        polytopes.crossings(net, X[:4], X[4:8]), polytopes.shell(net, X[:4], radius=1.0), polytopes.boundary_norms(net, X),
        polytopes.frobenius_pairs(mlp, codes), polytopes.frobenius_topk(mlp, codes, codes, 3),
        polytopes.expected_hamming(X.sigmoid(), X.flip(0).sigmoid()), polytopes.soft_code(X),
    )  # fmt: skip


def _nearest() -> Any:
    A, x = _t(8, 5, 16).requires_grad_(), X.clone().requires_grad_()
    y = polytopes.NearestAffine(_t(8, 16), A, _t(8, 5))(x)
    return y, torch.autograd.grad(y.square().sum(), (A, x))


def _data() -> Any:
    drawn = []
    for options in (
        {},
        {"covariance": "low_rank"},
        {"covariance": "wishart_over_max", "decay": "power"},
        {"covariance": "low_rank", "link": "copula"},
    ):
        data = superposition.SuperpositionData(24, 16, mean_active=2, noise=0.1, ensure_nonempty=True, **options)
        drawn += [data.sample(50), data.expected_probabilities]
    statistics = superposition.ActivationStatistics(16).update(X)
    starts = [
        init.orthogonal(20, 16), init.noised_singular_vectors(W, 20), init.noised_unit_vectors(20, 16), init.principal_components(X, 20),
        init.data_points(X, 20, noise=0.1), init.random_directions(20, 16), init.token_positions(1024),
    ]  # fmt: skip
    toy = superposition.toy_model_features(24, 8, density=0.1, importance=0.9, steps=3, batch=16)
    return drawn, statistics.overall(), statistics.quantiles([0.1, 0.5]), starts, toy.features


def _sweep() -> Any:
    data = superposition.SuperpositionData(24, 16, mean_active=2)
    runs = superposition.train_many(data, l1=[0.05, 0.1], n_features=24, stop=4, batch=32, window=2, cooldown=2, snapshots=(0, 2))
    return [
        (run.row()["mmcs"], run.loss, run.l0, run.fvu, run.losses, run.dictionary, run.dead, run.similarity, run.snapshots) for run in runs
    ]


UNROUNDED = ("NearestAffine", "matches", "polytopes", "data")  # autocast rounds the inputs of the others
TRAINS = {**{f"loss, {kind}": lambda kind=kind: _loss(kind) for kind in KINDS}, "NearestAffine": _nearest, "trainer": _trainer}
PATHS: dict[str, Callable[[], Any]] = {
    **TRAINS, **{f"steps, {kind}": lambda kind=kind: _steps(kind) for kind in KINDS},
    "several": _several, "matches": _matches, "codes": _codes, "trace": _trace, "polytopes": _polytopes, "data": _data, "sweep": _sweep,
}  # fmt: skip


def _bits(result: Any) -> list[Any]:
    """All numbers of a result, tensors with device and dtype."""
    if is_dataclass(result):
        result = vars(result)
    if isinstance(result, Mapping):
        return [number for key, value in result.items() for number in (key, *_bits(value))]
    if isinstance(result, (tuple, list)):
        return [number for value in result for number in _bits(value)]
    if not isinstance(result, Tensor):
        return [repr(result)]
    if result.device.type != "cpu":
        return [result.device]
    wide = result.detach().double() if result.is_floating_point() else result
    return [result.dtype, result.shape, wide.numpy().tobytes()]


@cache
def _expected(name: str) -> list[Any]:
    return _bits(PATHS[name]())


def _agrees(name: str, names: list[str], run: Callable[[], Any], expected: list[Any]) -> None:
    with surroundings(names):
        result = run()
    for place, (got, want) in enumerate(zip(_bits(result), expected, strict=True)):
        assert got == want, f"{name} under {names}: result {place}"


_DRAWN = st.lists(st.sampled_from(sorted(SETTINGS)), min_size=1, max_size=3, unique=True).filter(
    lambda names: sum(name in PRECISIONS for name in names) < 2
)


@pytest.mark.parametrize("name", PATHS)
@settings(max_examples=max(2, settings().max_examples // 6))
@given(names=_DRAWN)
def test_settings_change_nothing(name: str, names: list[str]) -> None:
    names = [n for n in names if n != "one thread" and not (n in GRADLESS and name in TRAINS)]  # products are torch's in dense losses
    if name not in UNROUNDED:
        names = [n for n in names if n != "autocast"]
    _agrees(name, names, PATHS[name], _expected(name))


@pytest.mark.parametrize("kind", KINDS)
def test_fused_steps_under_autocast(kind: str) -> None:
    """Of rounded inputs; weights and state keep their dtype, tiled gradients too."""
    losses = []
    for names in ([], ["autocast"]):
        sae = _sae(kind)
        opt = fastsae.optim.Adam(sae, lr=1e-3)
        with surroundings(names):
            losses.append([float(opt.step(X, _target(sae), MASK).loss) for _ in range(3)])
        assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.03)  # bfloat16: 2^-8 an entry


def test_files_under_other_defaults(tmp_path: Path) -> None:
    expected = _bits(_files(tmp_path / "plain"))
    for number, name in enumerate(("default device", "with device", "default torch.float16", "default torch.float64", "inference")):
        _agrees("files", [name], lambda number=number: _files(tmp_path / str(number)), expected)


def test_modules_are_made_where_torch_s_are() -> None:
    for where in ("default device", "with device"):
        with surroundings([where]):
            assert {t.device.type for t in SAE(16, 64, BatchTopK(4), seed=0).state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", ["medium", *(["all bf16"] if NEWER else [])])
def test_a_compiled_loss_keeps_full_precision(name: str) -> None:
    """A compiler would take products out of their context, forward and backward."""
    sae = _sae("dense transcoder")

    def run(loss: Callable[[Tensor, Tensor | None], Tensor]) -> list[Tensor]:
        value = loss(X, _target(sae))
        return [value.detach(), *torch.autograd.grad(value, list(sae.parameters()))]

    def loss(x: Tensor, target: Tensor | None) -> Tensor:
        return sae.loss(x, target=target).loss

    expected = run(loss)
    torch._dynamo.reset()
    with surroundings([name]):
        compiled = run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_running_sums() -> None:
    """torch's cumsum of floats raises on a GPU in deterministic mode; the other way is taken on every device but the CPU."""
    t = _t(5, 7)
    assert torch.equal(running_sums(t), t.cumsum(0)) and running_sums(t.to("meta")).shape == t.shape
