"""Every command through ``main``: what it prints and writes is what the functions give; wrong input is said in a line, with exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_language import WIDTH, Letters, Model, transformers

import fastsae
from fastsae import SAE, TopK, __main__
from fastsae.__main__ import main
from fastsae.lm import evaluate, token_windows
from fastsae.store import ActivationShards, LatentStore

pytest.importorskip("safetensors", reason="safetensors is not installed (extra [store])")

TEXT = "Lorem ipsum dolor sit amet, consectetur adipiscing elit.\n\nSed do eiusmod tempor.\n" * 6
HOOKS = ("layers.1", "layers.2:input")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text and two dictionaries, and a model of any name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", transformers())
    (tmp_path / "a.txt").write_text(TEXT)
    sae = SAE(WIDTH, 40, TopK(3), seed=1)
    sae.save(tmp_path / "sae")
    fastsae.save_checkpoint(tmp_path / "run.pt", sae)
    SAE(WIDTH + 1, 40, TopK(3), seed=1).save(tmp_path / "wide")
    return tmp_path


HARVEST = ["harvest", "toy", "a.txt", "--hooks", ",".join(HOOKS), "--out", "acts", "--context", "9"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """What a command prints, from JSON where it is asked for."""
    assert main(list(arguments)) == code
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in arguments else out


@pytest.mark.parametrize("name", [name for name, *_ in __main__._COMMANDS])
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([name], *([name, verb] for verb in ("build", "show", "delphi") if name == "latents")):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--help"])
        assert ended.value.code == 0 and f"usage: fastsae {' '.join(arguments)}" in capsys.readouterr().out


def windows() -> torch.Tensor:
    return token_windows([TEXT], 9, Letters())


# ---------------------------------------------------------------- harvest


def test_harvest(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = said(capsys, *HARVEST, "--batch", "5", "--json")
    store, tokens = ActivationShards(work / "acts"), windows()
    keep = (tokens != 1) & (tokens != 2)
    assert report["rows"] == len(store) == int(keep.sum()) and report["columns"]["layers.1"] == ["float32", WIDTH]
    inputs: list[torch.Tensor] = []
    model = Model().eval()
    model.layers[2].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(tokens)
    rows = store.read(0, len(store))
    torch.testing.assert_close(rows["layers.2:input"], inputs[0][keep], rtol=1e-5, atol=1e-6)
    assert torch.equal(rows["token"].long(), tokens[keep]) and store.about["ignore"] == [1, 2]
    assert said(capsys, *HARVEST, "--batch", "5", "--json") == report, "a finished one is left as it is"
    shown = said(capsys, *HARVEST[:3], "--hooks", "layers.0", "--out", "some", "--tokens", "50", "--keep-special", "--dtype", "float16")
    assert "128 rows of 1 windows of 128 tokens" in shown
    assert ActivationShards(work / "some").columns["layers.0"] == (torch.float16, (WIDTH,))
    assert said(capsys, "harvest", "toy", "--list", "--json")["layers.2"] == "Linear"
    assert "layers.2                                 Linear" in said(capsys, "harvest", "toy", "--list")


def test_texts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = work / "texts" / "deeper"
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_text('{"text": "abcdefgh"}\n\n{"text": "ij"}\n')
    (work / "texts" / "a.md").write_text("one\ntwo\n\nthree")
    (work / "texts" / "image.bin").write_bytes(b"\xff\xfe")
    for lines, documents in (((), ["one\ntwo\n\nthree"]), (("--lines",), ["one", "two", "three"])):
        out = f"out{len(lines)}"
        said(capsys, "harvest", "toy", "texts", *lines, "--hooks", "layers.0", "--out", out, "--context", "5", "--keep-special")
        expected = token_windows([*documents, "abcdefgh", "ij"], 5, Letters())
        store = ActivationShards(work / out)
        assert torch.equal(store.read(0, len(store))["token"].view(-1, 5).long(), expected)


def test_a_data_set(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str, split: str, streaming: bool) -> list[dict[str, str]]:
        assert (name, configuration, split, streaming) == ("corpus", "en", "test", True)
        return [{"text": TEXT}]

    wanted = ["harvest", "toy", "--hooks", "layers.0", "--out", "o", "--dataset", "corpus", "en", "--split", "test", "--context", "9"]
    package = type(sys)("datasets")
    monkeypatch.setitem(sys.modules, "datasets", package)
    vars(package)["load_dataset"] = load_dataset
    assert said(capsys, *wanted, "--json")["about"]["sequences"] == len(windows())
    vars(package)["load_dataset"] = lambda *_, **__: [{"content": TEXT}]
    assert main(wanted) == 2 and "must have a column text, got content" in capsys.readouterr().err


# ---------------------------------------------------------------- eval


EVAL = ["eval", "sae", "toy", "a.txt", "--hook", "layers.1", "--context", "9", "--batch", "4"]


def test_eval(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    report = said(capsys, *EVAL, "--ablations", "zero,mean", "--out", "ev", "--json")
    expected = evaluate(
        SAE.load(work / "sae"), Model(), windows(), "layers.1", ignore=[1, 2], ablations=("zero", "mean"), batch=4, progress=False
    )
    assert report["values"] == expected.values and report["tokens"] == expected.tokens and report["partial"] is False
    assert json.loads((work / "ev/evaluation.json").read_text()) == report and (work / "ev/density.png").stat().st_size > 0
    assert said(capsys, *EVAL).splitlines()[0] == f"{expected.tokens} tokens"
    said(capsys, *HARVEST)
    again = said(capsys, "eval", "run.pt", "toy", "acts", "--hook", "layers.1", "--batch", "4", "--json")
    assert again["values"] == {name: value for name, value in expected.values.items() if not name.endswith("_mean")}


def test_an_interrupted_eval_keeps_what_is_done(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    calls = 0

    def forward(self: Model, input_ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 7:  # in the third batch, of three calls each
            raise KeyboardInterrupt
        return plain(self, input_ids)

    plain = Model.forward
    monkeypatch.setattr(Model, "forward", forward)
    report = said(capsys, *EVAL, "--out", "ev", "--json", code=130)
    monkeypatch.undo()
    first = evaluate(SAE.load(work / "sae"), Model(), windows()[:8], "layers.1", ignore=[1, 2], batch=4, progress=False)
    assert report["partial"] is True and report["values"] == first.values
    assert json.loads((work / "ev/evaluation.json").read_text()) == report


# ---------------------------------------------------------------- latents


def test_latents(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, *HARVEST)
    report = said(capsys, "latents", "build", "sae", "acts", "--column", "layers.1", "--out", "store", "--json")
    shards, tokens, sae = ActivationShards(work / "acts"), windows(), SAE.load(work / "sae")
    rows = shards.read(0, len(shards))
    dense = torch.zeros(*tokens.shape, 40)
    with torch.no_grad():
        dense[rows["sequence"].long(), rows["position"].long()] = sae.encode(rows["layers.1"]).to_dense()
    store = LatentStore(work / "store")
    assert torch.equal(torch.cat([latents.to_dense() for _, latents, _ in store.parts()]), dense)
    assert torch.equal(torch.cat([part for _, _, part in store.parts()]).long(), tokens), "those without a row too"
    fired = (dense != 0).sum((0, 1))
    assert (report["sequences"], report["entries"], report["dead"]) == (len(tokens), int(fired.sum()), int((fired == 0).sum()))
    files = {path: path.read_bytes() for path in (work / "store").rglob("*.*")}
    assert said(capsys, "latents", "build", "sae", "acts", "--column", "layers.1", "--out", "store", "--json") == report
    assert {path: path.read_bytes() for path in (work / "store").rglob("*.*")} == files, "a finished one is left as it is"

    overview = said(capsys, "latents", "show", "store", "--top", "3", "--json")
    assert overview["tokens"] == len(rows["token"]) and overview["dead"] == (fired == 0).nonzero().flatten().tolist()
    assert overview["dense"] == (fired > 0.1 * len(rows["token"])).nonzero().flatten().tolist()
    best = [one["feature"] for one in overview["most_frequent"]]
    assert best == fired.argsort(descending=True, stable=True)[:3].tolist()
    assert f"dead     {report['dead']} never fire" in said(capsys, "latents", "show", "store")

    shown = said(capsys, "latents", "show", "store", "--feature", str(best[0]), "--top", "4", "--tokeniser", "toy", "--json")
    assert shown["fired"] == int(fired[best[0]]) and sum(shown["histogram"]["counts"]) == shown["fired"]
    for one in shown["examples"]:
        sequence, position = one["sequence"], one["position"]
        assert one["value"] == float(dense[sequence, position, best[0]]) == float(dense[sequence, :, best[0]].max())
        before, peak, after = (Letters().decode(part.tolist()) for part in tokens[sequence].split([position, 1, 8 - position]))
        assert one["text"] == f"{before}«{peak}»{after}".replace("\n", "↵")
    plain = said(capsys, "latents", "show", "store", "--feature", str(best[0]), "--top", "1")
    assert f"fires on {shown['fired']} of {len(rows['token'])} tokens" in plain and f"«{int(tokens[tuple(where(shown))])}»" in plain
    assert "fires on 0 of" in said(capsys, "latents", "show", "store", "--feature", str(overview["dead"][0]))

    assert said(capsys, "latents", "delphi", "store", "d", "--module", "layers.1", "--splits", "2").strip() == "d/layers.1"
    assert sorted(path.name for path in (work / "d/layers.1").iterdir()) == ["0_19.safetensors", "20_39.safetensors"]


def where(shown: Any) -> tuple[int, int]:
    return shown["examples"][0]["sequence"], shown["examples"][0]["position"]


def test_plots_of_latents(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    said(capsys, *HARVEST)
    said(capsys, "latents", "build", "sae", "acts", "--column", "layers.1", "--out", "store")
    for name, options in (("f.png", ("--feature", "3")), ("d.png", ())):
        said(capsys, "latents", "show", "store", *options, "--plot", name)
        assert (work / name).stat().st_size > 0


def test_latents_of_a_harvest_without_its_windows(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, *HARVEST)
    (work / "acts/tokens.safetensors").unlink()
    said(capsys, "latents", "build", "sae", "acts", "--column", "layers.1", "--out", "store")
    tokens = windows()
    tokens[(tokens == 1) | (tokens == 2)] = -1
    assert torch.equal(torch.cat([part for _, _, part in LatentStore(work / "store").parts()]).long(), tokens)


# ---------------------------------------------------------------- mmcs


def test_mmcs_of_alive_features(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (SAE(6, size, TopK(2), seed=size, dead_after=100) for size in (10, 7))
    a.silent[:4], b.silent[2] = 100, 70
    for name, sae in (("a.pt", a), ("b.pt", b)):
        fastsae.save_checkpoint(work / name, sae)
    report = said(capsys, "mmcs", "a.pt", "b.pt", "--alive", "--json")
    assert [one["alive"] for one in report["dictionaries"]] == [6, 7]
    assert report["mean"] == fastsae.mmcs(a, b, alive=(a.silent < 100, None))
    assert "a  10 features (6 alive), D = 6" in said(capsys, "mmcs", "a.pt", "b.pt", "--alive", "--dead-after", "70")
    assert said(capsys, "mmcs", "a.pt", "b.pt", "--alive", "--dead-after", "70", "--variant", "hungarian_above", "--json")[
        "hungarian_above"
    ] == fastsae.mmcs(a, b, variant="hungarian_above", alive=(a.silent < 70, b.silent < 70))
    for given, message in (
        (["run.pt", "sae", "--alive"], "sae does not know which of its features are dead: --alive needs a checkpoint"),
        (["a.pt", "b.pt", "--alive", "--dead-after", "0"], "need an alive feature"),
    ):
        assert main(["mmcs", *given]) == 2
        assert message in capsys.readouterr().err


def test_mmcs_of_saelens_sparsities(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SAELens writes log10(share of tokens + 1e-10) of each feature."""
    from safetensors.torch import save_file

    saes = [SAE(6, 8, TopK(2), seed=seed) for seed in range(2)]
    share = torch.tensor([0, 1e-8, 1e-3, 0, 0.5, 0, 1, 0.1])
    for number, sae in enumerate(saes):
        sae.save_pretrained(work / str(number), format="saelens")
        save_file({"sparsity": torch.log10(share + 1e-10)}, work / str(number) / "sparsity.safetensors")
    report = said(capsys, "mmcs", "0", "1", "--alive", "--json")
    assert report["mean"] == fastsae.mmcs(*saes, alive=(share > 0, share > 0)) and report["dictionaries"][0]["alive"] == 5


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["harvest", "toy", "a.txt"], "harvest: give --hooks and --out, or --list to see what can be hooked"),
        (["harvest", "nowhere", "--list"], "harvest: nowhere is not a local folder"),
        ([*HARVEST[:2], "none.txt", *HARVEST[3:]], "none.txt"),
        ([*HARVEST[:2], "sae", *HARVEST[3:]], "harvest: sae holds no .txt, .md, .rst, .py, .jsonl files"),
        ([*HARVEST[:2], "bad.jsonl", *HARVEST[3:]], 'bad.jsonl, line 2, must be a JSON object with "text"'),
        ([*HARVEST[:2], "bad.txt", *HARVEST[3:]], "bad.txt must be text in UTF-8"),
        ([*HARVEST[:2], *HARVEST[3:]], "harvest: give TEXT or --dataset"),
        ([*HARVEST, "--dataset", "x"], "harvest: give TEXT or --dataset"),
        ([*HARVEST[:4], "layers.7", *HARVEST[5:]], "harvest: hook 'layers.7' must be the name of a module, or name:input; there are"),
        ([*HARVEST[:-1], "100000"], "must fill at least one window of 100000 tokens"),
        ([*HARVEST, "--batch", "0"], "batch must be"),
        (["eval", "nothing", *EVAL[2:]], "nothing is neither a folder nor a file"),
        (["eval", "wide", *EVAL[2:]], "x must have shape"),
        ([*EVAL, "--ablations", "noise"], "ablations must be of zero and mean, got 'noise'"),
        ([*EVAL[:5], "layers.7"], "hook 'layers.7' must be the name"),
        (["latents", "build", "sae", "sae", "--out", "s"], "must hold columns of equally many rows"),
        (["latents", "build", "sae", "x.npy", "--out", "s"], "x.npy must be what a harvest writes, and lacks position, sequence, token"),
        (["latents", "build", "sae", "nothing", "--out", "s"], "nothing is neither a file nor a folder"),
        (["latents", "show", "sae"], "latents: LatentStore: sae holds no latents.json"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "bad.jsonl").write_text('{"text": "x"}\n["text"]\n')
    (work / "bad.txt").write_bytes(b"\xff\xfe\x00")
    np.save(work / "x.npy", np.zeros((5, WIDTH), np.float32))
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"fastsae {arguments[0]}: ") and message in error


def test_wrong_input_after_a_harvest(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, *HARVEST)
    build = ["latents", "build", "sae", "acts", "--out", "store", "--column", "layers.1"]
    said(capsys, *build)
    for arguments, message in (
        ([*HARVEST, "--keep-special"], "is about"),
        ([*build[:-1], "layers.9"], "--column must name one of the dictionary's width 16, got 'layers.9' of layers.1 [16]"),
        (build[:-2], "--column must name one of the dictionary's width 16, got None of"),
        (["latents", "build", "wide", *build[3:]], "--column must name one of the dictionary's width 17"),
        ([*build[:-1], "layers.2:input"], "has about="),
        (["latents", "show", "store", "--feature", "40"], "feature must be"),
        (["eval", *EVAL[1:3], "acts", *EVAL[4:6], "--context", "5"], "--context must be that of acts, 9, got 5"),
        (["eval", *EVAL[1:3], "acts", "a.txt", *EVAL[4:6]], "TEXT must be one folder of `fastsae harvest` or texts"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err, arguments
    manifest = json.loads((work / "acts/activations.json").read_text())
    manifest["about"]["ignore"] = []
    (work / "acts/activations.json").write_text(json.dumps(manifest))
    assert main([*build[:5], "again", *build[6:]]) == 2 and "must hold a finished harvest of" in capsys.readouterr().err


def test_what_is_not_installed_is_named(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module, arguments, extra in (
        ("matplotlib.figure", [*EVAL, "--out", "ev"], "fastsae-kernels[plot]"),
        ("datasets", [*HARVEST[:2], *HARVEST[3:], "--dataset", "x"], "pip install datasets"),
        ("transformers", HARVEST, "pip install 'fastsae-kernels[lm]'"),
        ("transformers", EVAL, "pip install 'fastsae-kernels[lm]'"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert main(arguments) == 2
        assert extra in capsys.readouterr().err.splitlines()[-1]


def test_interrupts_say_how_to_go_on(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    said(capsys, *HARVEST)
    monkeypatch.setattr("fastsae.commands.harvest.harvest", interrupt)
    assert main(HARVEST) == 130
    assert "fastsae harvest: interrupted; acts keeps its whole shards" in capsys.readouterr().err
    monkeypatch.setattr("fastsae.store.latents.LatentWriter.append", interrupt)
    assert main(["latents", "build", "sae", "acts", "--out", "store", "--column", "layers.1"]) == 130
    assert "fastsae latents: interrupted; store keeps its whole parts" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from fastsae._core.checkout import checkout_hidden

    with checkout_hidden():
        real = pytest.importorskip("transformers", reason="transformers is not installed (extra [lm])")
        tokenizers = pytest.importorskip("tokenizers")
        config = real.LlamaConfig(
            vocab_size=60, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
        )
        torch.manual_seed(0)
        real.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        pieces = {piece: number for number, piece in enumerate(["<s>", "</s>", *sorted(set(TEXT))])}
        split = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=pieces, merges=[]))
        real.PreTrainedTokenizerFast(tokenizer_object=split, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    SAE(WIDTH, 40, TopK(3), seed=1).save(tmp_path / "sae")
    report = said(capsys, "harvest", "model", "a.txt", "--hooks", "model.layers.0", "--out", "acts", "--context", "9", "--json")
    assert report["about"]["ignore"] == [0, 1] and report["rows"] == len(TEXT) // 8 * 8
    values = said(capsys, "eval", "sae", "model", "acts", "--hook", "model.layers.0", "--json")["values"]
    assert values["l0"] == 3 and values["ce_zero"] > 0
