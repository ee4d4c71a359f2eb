"""Damaged and hostile files of other libraries are refused by what is wrong with them."""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from pretrained_files import (
    B_DEC,
    BARE,
    COOK,
    LENS,
    LINEAR,
    THRESHOLD,
    W_DEC,
    W_ENC,
    D,
    F,
    K,
    X,
    dl,
    ours,
    saelens,
    without_entry,
    write,
)

from fastsae import SAE, mmcs

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


# ---------------------------------------------------------------- damaged and hostile files

READABLE: dict[str, Callable[[Path], Path]] = {
    "fastsae": lambda folder: without_entry(ours("topk").save(folder)),
    "saelens": lambda folder: saelens(folder, {"architecture": "topk", "k": K}, LENS),
    "sparsify": lambda folder: write(folder, {"d_in": D, "num_latents": F, "k": K}, COOK, "sae.safetensors"),
    "dictionary_learning": lambda folder: dl(
        folder, "BatchTopKSAE", {**LINEAR, "b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(0.2)}, k=K
    ),
    "gemma_scope": lambda folder: write(folder, None, {**BARE, "threshold": THRESHOLD}, "params.npz"),
}
WEIGHTS = ("sae.safetensors", "sae_weights.safetensors", "ae.pt", "params.npz")


def weights(folder: Path) -> Path:
    return next(folder / name for name in WEIGHTS if (folder / name).exists())


@pytest.mark.parametrize("format", READABLE)
def test_truncated_and_overwritten_weights(tmp_path: Path, format: str) -> None:  # noqa: A002
    path = weights(READABLE[format](tmp_path))
    raw = path.read_bytes()
    cuts = [0, 1, 7, 8, 20, len(raw) // 3, len(raw) // 2, len(raw) - 5, len(raw) - 1]
    broken = [raw[:cut] for cut in cuts] + [b"\xff" * len(raw), b"no", raw[:8] + b"\x00" * (len(raw) - 8)]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^SAE.from_pretrained: .*" + path.name):
            SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", [name for name in READABLE if name != "gemma_scope"])
def test_damaged_configurations(tmp_path: Path, format: str) -> None:  # noqa: A002
    folder = READABLE[format](tmp_path)
    path = folder / ("config.json" if format == "dictionary_learning" else "cfg.json")
    good = json.loads(path.read_text())
    for text in ("", "{", "[1]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^SAE.from_pretrained: .*cfg.json|config.json"):
            SAE.from_pretrained(folder, format=format)  # pyright: ignore[reportArgumentType]
    inner = good["trainer"] if format == "dictionary_learning" else good
    sizes = {"fastsae": "num_latents", "saelens": "d_sae", "sparsify": "num_latents", "dictionary_learning": "dict_size"}
    for key in (sizes[format], "k"):
        # A size no machine has; sizes that are none. Nothing of that size is ever asked for.
        for value in (10**14, -3, 2.5, math.nan, "20", [20], {"a": 1}):
            changed = {**inner, key: value}
            path.write_text(json.dumps({**good, "trainer": changed} if format == "dictionary_learning" else changed))
            with pytest.raises(ValueError, match=r"^SAE.from_pretrained: "):
                SAE.from_pretrained(folder, format=format)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("format", READABLE)
def test_wrong_shapes_and_names(tmp_path: Path, format: str) -> None:  # noqa: A002
    path = weights(READABLE[format](tmp_path))
    config = next((p for p in tmp_path.glob("*.json")), None)
    text = None if config is None else config.read_text()
    from fastsae.formats.weight_files import read_tensors

    good = read_tensors(path)
    for name in good:
        if name in ("k", "threshold") and good[name].dim() == 0:
            continue
        wrong = [{n: t for n, t in good.items() if n != name}, {**good, name + "2": good[name]}, {**good, name: good[name][:-1]}]
        wrong += [{**good, name: good[name].unsqueeze(0)}, {**good, name: torch.zeros(0)}, {**good, name: good[name].to(torch.int32)}]
        for tensors in wrong:
            write(tmp_path, None, tensors, path.name)
            if config is not None and text is not None:
                config.write_text(text)
            with pytest.raises(ValueError, match=r"^SAE.from_pretrained: "):
                SAE.from_pretrained(tmp_path)


SETTINGS = {  # what each format's configuration may say, with values that it may not
    "fastsae": {
        **dict.fromkeys(("d_in", "num_latents", "d_out", "dead_after", "k"), ("1", 2.5, -1, True, [1], {})),
        **dict.fromkeys(("skip_connection", "tied", "transcoder", "relu", "pre_bias", "normalize_decoder"), ("false", 1, 0, [], {})),
        **dict.fromkeys(("l1", "l0"), ("0", None, True, [1], math.nan, math.inf)),
        "activation": ("TopK", "softmax", None, 1, ["topk"]),
        "objective": ("l2", None, 1, ["mse"]),
        "prefixes": (3, "ab", [3], [3.0, F], [F, 3, F], [True, F], {"a": 1}),
        "aux": (True, 1, "aux", [1], {"k": "1"}, {"k": -1}, {"other": 1}, {"coefficient": math.nan}),
    },
    "saelens": {
        **dict.fromkeys(("d_in", "d_sae", "k"), ("1", 2.5, -1, True, [1], {})),
        **dict.fromkeys(("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "normalize_sae_decoder"), ("false", 1, 0, [], {})),
        "dtype": ("int8", 1, ["float32"]),
    },
    "sparsify": {
        **dict.fromkeys(("d_in", "num_latents", "k"), ("1", 2.5, -1, True, [1])),
        **dict.fromkeys(("skip_connection", "transcode", "normalize_decoder", "signed"), ("false", 1, 0, [], {})),
    },
    "dictionary_learning": {
        **dict.fromkeys(("activation_dim", "dict_size", "k"), ("1", 2.5, -1, True, [1], {})),
        "threshold_beta": ("0.9", math.nan, True, [1]),
        "dict_class": (None, 1, ["AutoEncoder"]),
    },
}


@pytest.mark.parametrize("format", SETTINGS)
def test_settings_of_another_type_are_refused(tmp_path: Path, format: str) -> None:  # noqa: A002
    folder = READABLE[format](tmp_path)
    path = folder / ("config.json" if format == "dictionary_learning" else "cfg.json")
    good = json.loads(path.read_text())
    for key, wrong in SETTINGS[format].items():
        for value in wrong:
            inner = {**good.get("trainer", good), key: value}
            path.write_text(json.dumps({**good, "trainer": inner} if "trainer" in good else inner))
            with pytest.raises(ValueError, match=r"^SAE.from_pretrained: "):
                pytest.fail(f"{key} = {value!r} is taken: {SAE.from_pretrained(folder, format=format)}")  # pyright: ignore[reportArgumentType]


class Bomb:
    """Unpickling it would run a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickles_execute_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = READABLE["dictionary_learning"](tmp_path / "dl")
    torch.save({"encoder.weight": Bomb(mark)}, folder / "ae.pt")
    with pytest.raises(ValueError, match=r"ae.pt is not a file of tensors that torch.load\(weights_only=True\) reads"):
        SAE.from_pretrained(folder)
    (folder / "ae.pt").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match="weights_only=True"):
        SAE.from_pretrained(folder)
    torch.save([W_ENC], folder / "ae.pt")
    with pytest.raises(ValueError, match="must hold a state dict of named tensors, got list"):
        SAE.from_pretrained(folder)
    folder = READABLE["gemma_scope"](tmp_path / "gemma")
    np.savez(folder / "params.npz", W_enc=np.array([Bomb(mark)], dtype=object), W_dec=np.array([Bomb(mark)], dtype=object))
    with pytest.raises(ValueError, match="W_enc must hold floating point numbers, got object"):
        SAE.from_pretrained(folder)
    with pytest.raises(ValueError, match="floating point"):
        mmcs(folder / "params.npz", W_DEC)
    for name in ("sae.safetensors", "sae_weights.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(ValueError, match="not a safetensors file"):
            mmcs(tmp_path / name, W_DEC)
    assert not mark.exists()


def test_huge_claims(tmp_path: Path) -> None:
    # safetensors: a header longer than the file, and tensors beyond its end.
    folder = READABLE["saelens"](tmp_path / "lens")
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}).encode()
    for raw in ((2**63 - 1).to_bytes(8, "little") + b"{}", len(header).to_bytes(8, "little") + header):
        weights(folder).write_bytes(raw)
        with pytest.raises(ValueError, match="not a safetensors file"):
            SAE.from_pretrained(folder)
    # .pt: an expanded tensor claims more than its storage holds.
    folder = READABLE["dictionary_learning"](tmp_path / "dl")
    torch.save({"encoder.weight": torch.zeros(1, 1).expand(10**8, 10**8), "b_dec": B_DEC}, folder / "ae.pt")
    with pytest.raises(ValueError, match=r"encoder.weight claims the shape \[100000000, 100000000\] of torch.float32 but holds 4 bytes"):
        SAE.from_pretrained(folder)
    torch.save({"encoder.weight": W_ENC.to_sparse(), "b_dec": B_DEC}, folder / "ae.pt")
    with pytest.raises(ValueError, match="must be a dense tensor"):
        SAE.from_pretrained(folder)
    # .npz: a header that claims more than the member holds.
    folder = READABLE["gemma_scope"](tmp_path / "gemma")
    for claim, message in (("(100000000, 100000000)", "but holds"), ("(2, -1)", "not an .npz file"), ("__import__('os')", "not an .npz")):
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((2, 2), dtype=np.float32))
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {claim}, }}".encode()
        text += b" " * (117 - len(text)) + b"\n"
        with zipfile.ZipFile(folder / "params.npz", "w") as archive:
            archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16))
        with pytest.raises(ValueError, match=message):
            SAE.from_pretrained(folder)
    # A configuration of many gigabytes is not read.
    folder = READABLE["sparsify"](tmp_path / "sparsify")
    with open(folder / "cfg.json", "wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(ValueError, match="must be at most 16777216 bytes of JSON"):
        SAE.from_pretrained(folder)


def test_arguments(tmp_path: Path) -> None:
    folder = READABLE["sparsify"](tmp_path / "a")
    for bad, kind, message in (
        ({"format": "safetensors"}, ValueError, "format must be one of fastsae, saelens"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32"),
        ({"fold_decoder_norm": 1}, TypeError, "fold_decoder_norm must be a bool"),
        ({"pre_bias": "yes"}, TypeError, "pre_bias must be a bool"),
        ({"scaling_factor": 2.0}, ValueError, "scaling_factor is for SAELens"),
        ({"format": "saelens"}, FileNotFoundError, "needs the file sae_weights.safetensors"),
    ):
        with pytest.raises(kind, match=rf"^(SAE.from_pretrained: .*|{folder}.*){message}"):
            SAE.from_pretrained(folder, **bad)
    with pytest.raises(TypeError, match="source must be a path or the name of a Hub repository, got int"):
        SAE.from_pretrained(3)  # pyright: ignore[reportArgumentType]
    READABLE["saelens"](folder)
    with pytest.raises(ValueError, match=r"must hold one of .*give format="):
        SAE.from_pretrained(folder)
    assert SAE.from_pretrained(folder, format="saelens", device="cpu").k == K
    (folder / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs the file cfg\.json"):
        SAE.from_pretrained(folder, format="sparsify")
    lens = saelens(tmp_path / "s", {"architecture": "standard", "normalize_activations": True}, LENS)
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scaling_factor must be a finite number above 0"):
            SAE.from_pretrained(lens, scaling_factor=factor)


@given(data=st.data())
def test_flipped_bytes_load_or_raise_value_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Nothing but ValueError, whatever bytes of the weights or the configuration are changed, cut out or repeated."""
    folder = tmp_path_factory.mktemp("flipped")
    READABLE[data.draw(st.sampled_from(sorted(READABLE)))](folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, min(300, len(raw) - 1)), st.integers(max(0, len(raw) - 300), len(raw) - 1)))
        kind = data.draw(st.sampled_from(["set", "cut", "repeat"]))
        piece = raw[at : at + data.draw(st.integers(1, 16))]
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        else:
            raw[at : at + len(piece)] = b"" if kind == "cut" else piece + piece
        if not raw:
            break
    path.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the unpickler
        try:
            sae = SAE.from_pretrained(folder)
        except ValueError:
            return
        assert sae(X[:, : sae.d_in]).x_hat.shape == (9, sae.d_out)
