"""Files against the libraries themselves: what they save we read, what we save they read, with the same latents and reconstructions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import load
from torch import Tensor

from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK, mmcs

sae_lens = load("sae_lens", "sae-lens")
sparsify = load("sparsify", "eai-sparsify")
dictionary_learning = load("dictionary_learning", "dictionary-learning")

from dictionary_learning import utils as dl_utils  # noqa: E402
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from sae_lens import saes  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

D, F, K, OUT = 12, 40, 5, 7
X = torch.randn(30, D, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def shaken(module: Any) -> Any:
    """Every parameter away from its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
            if "threshold" in name:
                p.abs_()
    return module


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def agrees(ours: SAE, latents: Tensor, x_hat: Tensor) -> None:
    run = ours.eval()(X)
    close(run.latents.to_dense(), latents)  # pyright: ignore[reportOptionalMemberAccess]
    close(run.x_hat, x_hat)


# ---------------------------------------------------------------- SAELens

LENS = {
    "StandardSAE": {},
    "GatedSAE": {},
    "JumpReLUSAE": {},
    "TopKSAE": {"k": K},
    "TopKSAE, rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "AbsTopKSAE": {"k": K},
    "AbsTopKSAE, rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "Transcoder": {"d_out": OUT},
    "SkipTranscoder": {"d_out": OUT},
    "JumpReLUTranscoder": {"d_out": OUT},
    "JumpReLUSkipTranscoder": {"d_out": OUT},
}


def lens(name: str, **more: Any) -> Any:
    cls = name.split(",")[0]
    module = saes if hasattr(saes, cls) else saes.transcoder
    more = {**LENS[name], **more} | ({"apply_b_dec_to_input": False} if "Transcoder" in name else {})
    return shaken(getattr(module, cls)(getattr(module, cls + "Config")(d_in=D, d_sae=F, **more)))


@torch.no_grad()
@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("name", LENS)
def test_saelens_files(name: str, pre: bool, tmp_path: Path) -> None:
    theirs = lens(name, apply_b_dec_to_input=pre)
    theirs.save_model(tmp_path)
    ours = SAE.from_pretrained(tmp_path)
    agrees(ours, theirs.encode(X), theirs(X))
    assert mmcs(tmp_path, theirs) == pytest.approx(1, abs=1e-5)
    if "TopK" not in name:
        theirs.fold_W_dec_norm()
        agrees(SAE.from_pretrained(tmp_path, fold_decoder_norm=True), theirs.encode(X), theirs(X))
    again = saes.SAE.load_from_disk(ours.save_pretrained(tmp_path / "again", format="saelens", metadata={"hook_name": "blocks.1"}))
    assert type(again).__name__ == name.split(",")[0] and again.cfg.metadata.hook_name == "blocks.1"
    agrees(ours, again.encode(X), again(X))


@torch.no_grad()
def test_saelens_trained_files_and_older_configurations(tmp_path: Path) -> None:
    config = saes.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)
    trained = shaken(saes.BatchTopKTrainingSAE(config))
    trained.topk_threshold = torch.tensor(0.6, dtype=torch.float64)
    trained.save_inference_model(tmp_path / "batch")
    theirs = saes.SAE.load_from_disk(tmp_path / "batch")
    agrees(SAE.from_pretrained(tmp_path / "batch"), theirs.encode(X), theirs(X))
    # The same weights beside a configuration of version 5, which the library converts as it loads.
    lens("StandardSAE").save_model(tmp_path / "old")
    old = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
    }
    (tmp_path / "old" / "cfg.json").write_text(json.dumps({**old, "sae_lens_version": "5.3.0", "normalize_activations": False}))
    theirs = saes.SAE.load_from_disk(tmp_path / "old")
    assert type(theirs).__name__ == "TopKSAE"
    agrees(SAE.from_pretrained(tmp_path / "old"), theirs.encode(X), theirs(X))
    # A scale that was not folded.
    theirs = lens("StandardSAE", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path / "scaled")
    ours = SAE.from_pretrained(tmp_path / "scaled", scaling_factor=1.7)
    theirs.fold_activation_norm_scaling_factor(1.7)
    agrees(ours, theirs.encode(X), theirs(X))


# ---------------------------------------------------------------- sparsify


def slots(out: Any) -> Tensor:
    return torch.zeros(X.shape[0], F).scatter(1, out.top_indices, out.top_acts)


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}, {"skip_connection": True}], ids=str
)
def test_sparsify_files(config: dict[str, Any], tmp_path: Path) -> None:
    theirs = shaken(SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **config)))
    theirs.save_to_disk(tmp_path / "a")
    ours = SAE.from_pretrained(tmp_path / "a")
    agrees(ours, slots(theirs.encode(X)), theirs(X).sae_out)
    for folder in (ours.save_pretrained(tmp_path / "b", format="sparsify"), ours.save(tmp_path / "c")):
        again = SparseCoder.load_from_disk(folder)
        agrees(ours, slots(again.encode(X)), again(X).sae_out)
    assert mmcs(theirs, tmp_path / "a") == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_sparsify_without_a_number_of_latents(tmp_path: Path) -> None:
    theirs = shaken(SparseCoder(D, SparseCoderConfig(expansion_factor=3, k=K)))
    theirs.save_to_disk(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["num_latents"] == 0
    assert SAE.from_pretrained(tmp_path).d_sae == 3 * D


# ---------------------------------------------------------------- dictionary_learning

DICTIONARIES: dict[str, Any] = {
    "AutoEncoder": lambda: AutoEncoder(D, F),
    "AutoEncoderNew": lambda: AutoEncoderNew(D, F),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D, F),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, F),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, F, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, F, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, F, K, [8, 12, 20]),
}


def saved(ae: Any, folder: Path) -> Path:
    """As ``trainSAE`` saves it."""
    folder.mkdir()
    trainer = {"dict_class": type(ae).__name__, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "m", "device": "cpu"}
    if hasattr(ae, "k"):
        trainer["k"] = ae.k.item()
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    torch.save({name: tensor.cpu() for name, tensor in ae.state_dict().items()}, folder / "ae.pt")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("threshold", [-1.0, 0.5])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning_files(name: str, threshold: float, tmp_path: Path) -> None:
    theirs = shaken(DICTIONARIES[name]())
    if "TopK" in name:
        theirs.threshold.fill_(threshold)
    folder = saved(theirs, tmp_path / "a")
    loaded, _ = dl_utils.load_dictionary(str(folder), device="cpu")
    ours = SAE.from_pretrained(folder)
    agrees(ours, loaded.encode(X), loaded(X))
    if name == "AutoEncoder":  # as it was before its loader made the decoder's norms 1
        agrees(SAE.from_pretrained(folder, fold_decoder_norm=False), theirs.encode(X), theirs(X))
    if name == "JumpReluAutoEncoder":
        loaded.apply_b_dec_to_input = True
        agrees(SAE.from_pretrained(folder, pre_bias=True), loaded.encode(X), loaded(X))
        loaded.apply_b_dec_to_input = False
    again, config = dl_utils.load_dictionary(str(ours.save_pretrained(tmp_path / "b", format="dictionary_learning")), device="cpu")
    assert type(again).__name__ == name == config["trainer"]["dict_class"]
    agrees(ours, again.encode(X), again(X))
    assert mmcs(theirs, folder) == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------- ours, read by all

OURS = {
    "topk": (TopK(K), ("saelens", "sparsify", "dictionary_learning")),
    "abstopk": (AbsTopK(K), ("saelens",)),
    "relu": (ReLU(), ("saelens", "dictionary_learning")),
    "jumprelu": (JumpReLU(0.2), ("saelens", "dictionary_learning")),
    "gated": (Gated(), ("saelens", "dictionary_learning")),
    "batchtopk": (BatchTopK(K), ("saelens", "dictionary_learning")),
}


@torch.no_grad()
@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_our_files_in_every_library(name: str, pre: bool, tmp_path: Path) -> None:
    activation, formats = OURS[name]
    ours = shaken(SAE(D, F, activation, pre_bias=pre, seed=0))
    if name == "batchtopk":
        ours.running_threshold.fill_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for format in formats:  # noqa: A001
            folder = ours.save_pretrained(tmp_path / format, format=format)
            if format == "saelens":
                theirs = saes.SAE.load_from_disk(folder)
                agrees(ours, theirs.encode(X), theirs(X))
            elif format == "sparsify":
                theirs = SparseCoder.load_from_disk(folder)
                agrees(ours, slots(theirs.encode(X)), theirs(X).sae_out)
            else:
                theirs, _ = dl_utils.load_dictionary(str(folder), device="cpu")
                if name == "relu":  # its loader has made the decoder's rows unit ones, by default
                    agrees(SAE.from_pretrained(folder), theirs.encode(X), theirs(X))
                    continue
                agrees(ours, theirs.encode(X), theirs(X))
