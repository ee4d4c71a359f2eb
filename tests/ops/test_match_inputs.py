"""What `match` takes: views, SAEs, files, stacks, other dtypes; the command and the plot."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastsae
from fastsae import match, mmcs
from fastsae.__main__ import main
from fastsae.compare import mmcs_matrix

optimize = pytest.importorskip("scipy.optimize")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosines(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    a, b = (v / v.square().sum(1, keepdim=True).sqrt().clamp_min(eps) for v in (a, b))
    return a @ b.T


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize(("a", "b"), [((8, 20), (8, 30)), ((20, 8), (8, 30)), ((8, 20), (30, 8))])
def test_a_wrong_orientation_does_not_pass_in_silence(a: tuple[int, int], b: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"feature-major, pass W\.T"):
        match(torch.randn(a), torch.randn(b))


def test_transposed_views_and_saes_and_files(tmp_path: Path) -> None:
    sae = fastsae.SAE(6, 10, fastsae.TopK(2), seed=1)
    other = draw(7, 6, dtype=torch.float32)
    expected = mmcs(sae.W_dec, other)
    assert mmcs(sae, other) == expected
    assert mmcs(sae.W_dec.detach().T.contiguous().T, other) == pytest.approx(expected, abs=1e-6)
    pytest.importorskip("safetensors")
    folder = sae.save(tmp_path / "sae")
    assert mmcs(folder / "sae.safetensors", other) == expected
    assert mmcs(str(folder / "sae.safetensors"), sae) == pytest.approx(1, abs=1e-6)
    assert mmcs(folder, other) == expected
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "must hold one of"), (tmp_path / "damaged.safetensors", "not a safetensors file")):
        with pytest.raises(ValueError, match=message):
            mmcs(path, other)
    for missing in (tmp_path / "missing.safetensors", "nothing"):
        with pytest.raises(FileNotFoundError, match=r"neither a folder nor a file|No such file"):
            mmcs(missing, other)
    assert mmcs(fastsae.save_checkpoint(tmp_path / "run.pt", sae), other) == expected
    for content, message in (
        (sae, "it holds fastsae.sae.module.SAE, which is no tensor"),
        (other, "got Tensor"),
        ({"step": 3}, "got int for 'step'"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=rf"^match: a: .*other.pt .*{message}"):
            mmcs(tmp_path / "other.pt", other)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (fastsae.SAE(6, size, fastsae.TopK(2), seed=size) for size in (10, 7))
    paths = [str(fastsae.save_checkpoint(tmp_path / f"{sae.d_sae}.pt", sae)) for sae in (a, b.to(torch.bfloat16))]
    wide = b.W_dec.detach().float()  # files of two dtypes: the narrower one is widened
    assert main(["mmcs", *paths]) == 0
    said = capsys.readouterr().out
    assert "b  7 features, D = 6" in said and f"a_to_b  {mmcs(a, wide, 'a_to_b'):.4f}" in said and f"mean    {mmcs(a, wide):.4f}" in said
    assert main(["mmcs", *paths, "--variant", "mcc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mcc"] == mmcs(a, wide, variant="mcc")
    assert main(["mmcs", *paths, paths[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["a_to_b"] == mmcs_matrix([a, wide, a]).tolist()
    for wrong, message in (([paths[0]], "give two dictionaries"), ([paths[0], "nothing"], "nothing is neither a folder nor a file")):
        assert main(["mmcs", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_nothing_warns_where_nothing_tells() -> None:
    """Fewer features than dimensions are a small dictionary; the same numbers may be a [D, F] matrix."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((8, 20), (20, 8), (8, 8), (500, 2048)):
            a, b = draw(*shape, dtype=torch.float32), draw(*shape, seed=1, dtype=torch.float32)
            assert match(a, b).shape == (*shape[:1], *shape)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_dictionaries_of_two_dtypes_are_widened(first: torch.dtype, second: torch.dtype, tmp_path: Path) -> None:
    a, b = draw(9, 6).to(first), draw(12, 6, seed=1).to(second)
    wide = first if first == second else torch.float64 if torch.float64 in (first, second) else torch.float32
    found, want = match(a, b), match(a.to(wide), b.to(wide))
    assert found.a_to_b.similarity.dtype == wide
    for ours, theirs in zip((*found.a_to_b, *found.b_to_a), (*want.a_to_b, *want.b_to_a), strict=True):
        assert torch.equal(ours, theirs)
    for name in ("mcc", "absolute"):
        assert mmcs(a, b, variant=name) == mmcs(a.to(wide), b.to(wide), variant=name)
    product = 1e-12 if wide == torch.float64 else 0  # torch's own in float64, whose bits depend on the shapes on some CPUs
    assert float(mmcs_matrix([a, b, a])[1, 2]) == pytest.approx(mmcs(b, a, "a_to_b"), rel=product, abs=0)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        match(a, b.to(torch.float8_e4m3fn))


@given(data=st.data())
def test_the_command_is_the_function_on_drawn_files(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the files: one number from both, or the same complaint from both and an exit code."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder, paths = tmp_path_factory.mktemp("a folder"), []
    for number in range(2):
        F, D = data.draw(st.sampled_from([(9, 6), (6, 9), (6, 6), (0, 6), (12, 5)]), label="F, D")
        W = draw(F, D, seed=number).to(data.draw(st.sampled_from(DTYPES), label="dtype"))
        damage = data.draw(st.sampled_from(["none"] * 6 + ["nan", "integers", "empty", "no decoder", "missing", "3-D"]), label="damage")
        turned = data.draw(st.booleans(), label="turned")
        W = {"nan": W / 0, "integers": W.int(), "3-D": W[None]}.get(damage, W)
        W = (W.mT if turned else W).contiguous()
        kind = data.draw(st.sampled_from(["W_dec", "decoder.weight"]), label="kind")
        tensors = {kind if damage != "no decoder" else "W_enc": W.mT.contiguous() if kind == "decoder.weight" else W}
        if bias := data.draw(st.sampled_from(["", "b_dec", "b_enc"]), label="bias"):
            tensors[bias] = torch.zeros(F if bias == "b_enc" else D)
        ending = data.draw(st.sampled_from(["pt", "safetensors", "npz"]), label="ending")
        path = folder / f"{number} é.{ending}"
        if ending == "pt":
            torch.save(tensors, path)
        elif ending == "safetensors":
            safetensors.save_file(tensors, path)
        else:
            np.savez(path, **{n: t.float().numpy() if t.is_floating_point() else t.numpy() for n, t in tensors.items()})
        if damage == "empty":
            path.write_bytes(b"")
        if damage == "missing":
            path.unlink()
        paths.append(path)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["mmcs", *map(str, paths), "--json"])
    said, number, complaint = err.getvalue(), 0.0, ""
    try:
        number = mmcs(*paths)
    except (OSError, TypeError, ValueError) as error:
        complaint = str(error)
    if complaint:
        tail = complaint.split(str(folder))[-1] if str(folder) in complaint else complaint.split(" must ")[-1]
        assert code == 2 and not out.getvalue() and (tail in said or "features are not finite" in said), (complaint, said)
        assert "need an alive feature" in said or (str(folder) in said and said.startswith("fastsae mmcs: "))
    elif number != number:
        assert code == 2 and "features are not finite" in said
    else:
        assert code == 0 and json.loads(out.getvalue())["mean"] == number and not said


def test_stacks_devices_and_lists_of_files(tmp_path: Path) -> None:
    from fastsae.compare.dictionaries import as_dictionaries

    saes = fastsae.SAEs(fastsae.SAE(6, 10, fastsae.TopK(2), seed=seed) for seed in range(3))
    for pair in ((saes, saes[0]), (saes[0], saes.W_dec)):
        with pytest.raises(
            ValueError, match=r"^match: a \[N, D\].*\(a stack of several dictionaries: give one of them, or all to mmcs_matrix\)$"
        ):
            match(*pair)
    assert torch.equal(mmcs_matrix(saes), mmcs_matrix([sae.W_dec for sae in saes]))  # pyright: ignore[reportArgumentType]
    assert torch.equal(mmcs_matrix(saes.W_dec), mmcs_matrix(saes))  # pyright: ignore[reportArgumentType]
    assert mmcs_matrix([]).shape == (0, 0)
    path = fastsae.save_checkpoint(tmp_path / "run.pt", saes[0])
    assert mmcs_matrix([path, saes[1]])[0, 1] == mmcs(saes[0], saes[1], "a_to_b")
    assert [side.device.type for side in as_dictionaries("match", (path, saes[1].W_dec.to("meta"), path), "abc")] == ["meta"] * 3
    with pytest.raises(ValueError, match=r"^mmcs_matrix: dictionaries\[0\] \[N, D\] and dictionaries\[2\] \[M, D\] must have the same D"):
        mmcs_matrix([saes[0], path, draw(4, 7)])
    with pytest.raises(TypeError, match=r"^mmcs_matrix: dictionaries\[1\] must be on cpu"):
        mmcs_matrix([saes[0], saes[1].W_dec.to("meta")])


class Coder:
    """What a library's SAE shows of itself."""

    def __init__(self, W_dec: Tensor, b_dec: Tensor) -> None:
        self.W_dec, self.b_dec = W_dec, b_dec


def test_a_decoder_beside_a_bias_that_shows_its_orientation(tmp_path: Path) -> None:
    W, other, bias = (draw(*shape, dtype=torch.float32) for shape in ((10, 6), (7, 6), (6,)))
    assert mmcs(Coder(W, bias), other) == mmcs(W, other)
    linear = torch.nn.Module()
    linear.decoder = torch.nn.Linear(10, 6, bias=False)  # as dictionary_learning keeps it, [D, F]
    linear.decoder.weight.data = W.T.clone()
    assert mmcs(linear, other) == pytest.approx(mmcs(W, other), abs=1e-6)
    torch.save({"encoder.weight": W, "decoder.weight": W.T, "b_dec": bias}, tmp_path / "ae.pt")
    assert mmcs(tmp_path / "ae.pt", other) == pytest.approx(mmcs(W, other), abs=1e-6)
    coder = Coder(W.T, bias[:0])
    coder.b_dec, coder.b_enc = None, torch.zeros(10)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"^match: a\.W_dec must be \[F=10, D\] beside its b_enc, got \[6, 10\].*W_dec\.T"):
        match(coder, other)
    with pytest.raises(ValueError, match=r"^match: b\.W_dec must be \[F, D=6\] beside its b_dec, got \[6, 10\].*W_dec\.T"):
        match(other, Coder(W.T, bias))
    safetensors = pytest.importorskip("safetensors.torch")
    files = {
        "sparsify.safetensors": {"encoder.weight": W, "encoder.bias": W[:, 0].clone(), "W_dec": W.clone(), "b_dec": bias},
        "sae_weights.safetensors": {"W_enc": W.T.contiguous(), "b_enc": W[:, 0].clone(), "W_dec": W.clone(), "b_dec": bias},
        "turned.safetensors": {"W_dec": W.T.contiguous(), "b_dec": bias},
    }
    for name, tensors in files.items():
        safetensors.save_file(tensors, tmp_path / name)
        if name == "turned.safetensors":
            with pytest.raises(ValueError, match="feature-major"):
                mmcs(tmp_path / name, tmp_path / name)
        else:
            assert mmcs(tmp_path / name, other) == mmcs(W, other)


@given(st.data())
def test_drawn_dictionaries(data: st.DataObject) -> None:
    n, m, width = (data.draw(st.integers(1, high), label=name) for name, high in (("n", 20), ("m", 20), ("width", 40)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    a, b = (torch.randint(-3, 4, (rows, width), generator=generator).double() for rows in (n, m))
    full = cosines(a, b)
    found = match(a, b, candidates=3)
    torch.testing.assert_close(found.a_to_b.similarity, full.topk(min(3, m), dim=1).values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.b_to_a.similarity, full.T.topk(min(3, n), dim=1).values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(full.gather(1, found.a_to_b.index), found.a_to_b.similarity, rtol=1e-12, atol=1e-12)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    match(draw(30, 5), draw(40, 5, seed=1)).plot(tmp_path / "match.png")
    assert (tmp_path / "match.png").stat().st_size > 1000
