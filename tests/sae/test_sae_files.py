"""The SAE module's files: what is saved and loaded, and damaged folders."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from sae_cases import build, build_variant, each, rows, variant

from fastsae import SAE, AuxK, BatchTopK, ReLU, SAEs, TopK

# ---------------------------------------------------------------- files


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("safetensors")
    sae = build(kind, dtype=dtype)
    folder = sae.save(tmp_path / "a" / "sae")
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae.safetensors"]
    again = SAE.load(str(folder))
    assert type(again.activation) is type(sae.activation)
    for name, parameter in sae.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter)
        assert dict(again.named_parameters())[name].dtype is dtype
    x = rows(6, 7, dtype=dtype)
    assert not again.training
    assert torch.equal(again(x).x_hat, sae.eval()(x).x_hat)
    if getattr(sae.activation, "bandwidth", None) is not None:
        assert torch.equal(again.loss(x, l0=1.0).loss, sae.loss(x, l0=1.0).loss)
    with torch.no_grad():
        sae.W_enc.add_(1)
    sae.save(folder)  # over the old one
    assert torch.equal(SAE.load(folder).W_enc, sae.W_enc)


def test_saved_names_are_those_of_sparsify(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    folder = SAE(7, 20, TopK(3), seed=0).save(tmp_path / "sae")
    assert {name: list(t.shape) for name, t in safetensors.load_file(folder / "sae.safetensors").items()} == {
        "encoder.weight": [20, 7],
        "encoder.bias": [20],
        "W_dec": [20, 7],
        "b_dec": [7],
    }
    config = json.loads((folder / "cfg.json").read_text())
    assert (config["d_in"], config["num_latents"], config["k"], config["activation"]) == (7, 20, 3, "topk")


DAMAGES = {
    "broken json": ("cfg.json", lambda raw: b"{"),
    "another json": ("cfg.json", lambda raw: b"[1]"),
    "no json at all": ("cfg.json", lambda raw: b"\xff\xfe\x00"),
    "missing key": ("cfg.json", lambda raw: raw.replace(b'"d_in"', b'"width"')),
    "other activation": ("cfg.json", lambda raw: raw.replace(b'"topk"', b'"softmax"')),
    "other size": ("cfg.json", lambda raw: raw.replace(b"20", b"21")),
    "size as text": ("cfg.json", lambda raw: raw.replace(b"20", b'"20"')),
    "k out of range": ("cfg.json", lambda raw: raw.replace(b'"k": 3', b'"k": 300')),
    "empty weights": ("sae.safetensors", lambda raw: b""),
    "cut header": ("sae.safetensors", lambda raw: raw[:50]),
    "cut weights": ("sae.safetensors", lambda raw: raw[:-4]),
    "wrong name": ("sae.safetensors", lambda raw: raw.replace(b"encoder.bias", b"encoder.Bias")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    sae = SAE(7, 20, TopK(3), seed=0)
    folder = sae.save(tmp_path / "sae")
    name, change = DAMAGES[damage]
    raw = (folder / name).read_bytes()
    assert change(raw) != raw
    (folder / name).write_bytes(change(raw))
    if change(raw).startswith(b"{\n"):  # another configuration, as an interrupted save leaves it: that of the weights counts
        with pytest.warns(UserWarning, match="is not the configuration inside sae.safetensors, which counts"):
            assert SAE.load(folder).config() == sae.config()
        path = folder / "sae.safetensors"  # before there was one
        safetensors.save_file({name: tensor.clone() for name, tensor in safetensors.load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"SAE\.load: .* is not a folder that SAE\.save wrote"):
        SAE.load(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    folder = SAE(7, 20, TopK(3), seed=0).save(tmp_path / "sae")
    (folder / "cfg.json").unlink()  # is for other readers
    tensors = {name: tensor.clone() for name, tensor in safetensors.load_file(folder / "sae.safetensors").items()}
    assert SAE.load(folder).k == 3
    safetensors.save_file(tensors, folder / "sae.safetensors")
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        SAE.load(folder)
    (folder / "sae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae\.safetensors"):
        SAE.load(folder)


@each
@variant
def test_save_and_load_variants(tmp_path: Path, kind: str, name: str) -> None:
    pytest.importorskip("safetensors")
    aux = None if kind == "gated" else AuxK(5, relu=False, denominator="total")
    sae = build_variant(kind, name, objective="fvu", l1=0.25, aux=aux, dead_after=77)
    sae.loss(rows(9, 7), rows(9, sae.d_out))
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.config() == {**sae.config(), "normalize_decoder": False}  # rows that are not of norm 1
    for (name, a), (_, b) in zip(sae.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(again.eval()(rows(9, 7)).x_hat, sae.eval()(rows(9, 7)).x_hat)


def test_files_of_earlier_versions_load(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    sae = build("jumprelu_band")
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, "threshold": sae.threshold}
    safetensors.save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 7, "num_latents": 20, "activation": "jumprelu", "bandwidth": 0.5}))
    again = SAE.load(tmp_path)
    assert torch.equal(again.loss(rows(5, 7), l0=1.0).loss, sae.loss(rows(5, 7), l0=1.0).loss)
    assert again.unit_rows == ("W_dec",)


def test_an_interrupted_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    sae = SAE(7, 20, TopK(3), seed=0)
    folder = sae.save(tmp_path / "sae")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SAE(7, 20, TopK(3), seed=1).save(folder)
    assert torch.equal(SAE.load(folder).W_dec, sae.W_dec)


# ---------------------------------------------------------------- what evaluation needs, and the Hub


def test_silent_counts_and_the_running_threshold_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    members = [SAE(8, 32, BatchTopK(2), dead_after=20, seed=seed) for seed in range(2)]
    for sae in members:
        for step in range(3):
            sae.loss(rows(10, 8, seed=step))
    for of, again in (
        (members[0], SAE.load(members[0].save(tmp_path / "a"))),
        (members[0], SAE.from_pretrained(members[0].save_pretrained(tmp_path / "b"), dtype=torch.bfloat16)),
        (members[1], SAEs.load(SAEs(copy.deepcopy(members)).save(tmp_path / "c"))[1]),
    ):
        assert 0 < int(of.dead_features.sum()) < 32
        assert torch.equal(again.silent, of.silent) and again.silent.dtype is torch.int64
        assert torch.equal(again.dead_features, of.dead_features)
        assert torch.equal(again.running_threshold, of.running_threshold) and float(again.running_threshold) > 0


class FakeApi:
    """huggingface_hub.HfApi, of which nothing leaves the machine."""

    calls: ClassVar[list[tuple[str, Any]]] = []
    readme = False

    def __init__(self, token: Any = None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        self.calls.append(("create", (repo_id, private, exist_ok)))
        return types.SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return self.readme

    def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> Any:
        copied = Path(tempfile.mkdtemp(dir=self.calls[0][1]))
        shutil.copytree(folder_path, copied, dirs_exist_ok=True)
        self.calls.append(("upload", (repo_id, copied, revision, commit_message)))
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeApi]:
    pytest.importorskip("safetensors")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=FakeApi))
    FakeApi.calls[:] = [("folder", tmp_path)]
    return FakeApi


def test_push_to_hub(hub: type[FakeApi], monkeypatch: pytest.MonkeyPatch) -> None:
    sae = SAE(8, 32, TopK(3), seed=0)
    assert sae.push_to_hub("dictionary", private=True, token="secret", revision="pr") == "https://hub/me/dictionary/commit/1"
    (_, token), (_, created), (_, (repository, folder, revision, message)) = hub.calls[1:]
    assert (token, created, repository, revision) == ("secret", ("dictionary", True, True), "me/dictionary", "pr") and message
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "cfg.json", "sae.safetensors"]
    x = rows(6, 8)
    assert torch.equal(SAE.from_pretrained(folder)(x).x_hat, sae.eval()(x).x_hat)
    card = (folder / "README.md").read_text()
    assert 'SAE.from_pretrained("me/dictionary")' in card and "secret" not in card and card.startswith("---\ntags:\n- sparse-autoencoder")

    monkeypatch.setattr(hub, "readme", True)  # what somebody has written stays
    sae.push_to_hub("us/many", format="saelens", subfolder="layers/5", metadata={"model_name": "m"})
    folder = hub.calls[-1][1][1]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "layers/5/cfg.json",
        "layers/5/sae_weights.safetensors",
    ]
    sae.push_to_hub("us/many", card="# Ours\n")
    assert (hub.calls[-1][1][1] / "README.md").read_text() == "# Ours\n"


def test_push_to_hub_refuses_before_it_uploads(hub: type[FakeApi], monkeypatch: pytest.MonkeyPatch) -> None:
    sae = SAE(8, 32, ReLU(), seed=0)
    for call, error, message in (
        (lambda: sae.push_to_hub(3), TypeError, "SAE.push_to_hub: repo_id must be the name of a repository, got int"),  # pyright: ignore
        (lambda: sae.push_to_hub("a/b", subfolder="../c"), ValueError, "SAE.push_to_hub: subfolder must be a relative path"),
        (lambda: sae.push_to_hub("a/b", format="sparsify"), ValueError, "sparsify"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert len(hub.calls) == 1
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"SAE.push_to_hub: writing to the Hub needs huggingface_hub: pip install 'fastsae-kernels\[hub\]'"
    ):
        sae.push_to_hub("a/b")
