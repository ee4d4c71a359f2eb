"""``fastsae latents``: a dictionary's latents on disk, built from stored activations; what a feature fires on; delphi's files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import plots
from fastsae._core.progress import track
from fastsae.commands import _language
from fastsae.latents import RaggedLatents
from fastsae.sae import SAE
from fastsae.store import ActivationShards, Examples, LatentStore, LatentWriter, open_activations
from fastsae.store.latents import entries_of

REFUSED = (TypeError, ValueError, IndexError)
_ROWS = 1 << 13  # tokens that are encoded at a time
_DENSE = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True)

    one = verbs.add_parser("build", help="encode stored activations; a build that was killed goes on where it was")
    one.set_defaults(verb_run=_build)
    one.add_argument("sae", metavar="SAE", help="what SAE.from_pretrained reads, of this library or another, or a checkpoint")
    one.add_argument("shards", type=Path, metavar="SHARDS", help="folder of `fastsae harvest`")
    one.add_argument("--column", metavar="HOOK", help="of the shards (default: the only one of the dictionary's width)")
    one.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the store")
    one.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="of the stored values (default: float32)")
    one.add_argument("--device", default="cpu", help="of the encoder (default: cpu)")
    one.add_argument("--json", action="store_true")

    one = verbs.add_parser("show", help="dead, dense and most frequent features; with --feature what it fires on")
    one.set_defaults(verb_run=_show)
    one.add_argument("store", type=Path, metavar="STORE")
    one.add_argument("--feature", type=int, metavar="N")
    one.add_argument("--top", type=int, default=10, metavar="N", help="examples, or features (default: 10)")
    one.add_argument("--tokeniser", metavar="MODEL", help="shows tokens as text: name or folder of a Hugging Face model")
    one.add_argument("--gguf", metavar="FILE", help="the tokeniser is that of this GGUF file of its folder")
    one.add_argument("--plot", type=Path, metavar="FILE", help="image of the feature's values, or of all features' densities")
    one.add_argument("--json", action="store_true")

    one = verbs.add_parser("delphi", help="write the cache files of delphi")
    one.set_defaults(verb_run=_delphi)
    one.add_argument("store", type=Path, metavar="STORE")
    one.add_argument("out", type=Path, metavar="OUT")
    one.add_argument("--module", required=True, metavar="NAME", help="what delphi calls the hook, a folder of OUT")
    one.add_argument("--splits", type=int, default=5, metavar="N", help="files (default: 5)")


def run(options: argparse.Namespace) -> int:
    return options.verb_run(options)


def _build(options: argparse.Namespace) -> int:
    sae, shards = _language.dictionary_of(options.sae).to(options.device), open_activations(options.shards)
    column = _column(shards, options.column, sae)
    tokens, rows = _grid(shards)
    about = {name: shards.about[name] for name in ("model", "gguf", "tokens") if name in shards.about}
    about |= {"hook": column, "sae": options.sae, "weights": _language.digest_of(sae), "counted": len(rows)}
    dtype = getattr(torch, options.dtype)
    step = max(1, _ROWS // tokens.shape[1])
    try:
        with torch.no_grad(), LatentWriter(options.out, sae.d_sae, tokens.shape[1], about, dtype=dtype) as writer:
            for start in track(range(writer.sequences, len(tokens), step), "latents"):
                part = tokens[start : start + step]
                first, last = (int(torch.searchsorted(rows, at * tokens.shape[1])) for at in (start, start + len(part)))
                x = shards.read(first, last, [column])[column].to(sae.W_dec.device, sae.W_dec.dtype)
                writer.append(_placed(sae, x, rows[first:last] - start * tokens.shape[1], part.shape), part)
        store = LatentStore(options.out)
        fired = store.fired()  # sorts by feature, so that `show` need not
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{options.out} keeps its whole parts, and the same command goes on behind them") from None
    report = {"out": str(options.out), "sequences": store.sequences, "context": store.context, "entries": store.entries}
    report |= {"l0": store.entries / max(len(rows), 1), "features": store.n_features, "dead": int((fired == 0).sum()), "about": store.about}
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{store.entries} latents of {len(rows)} tokens (L0 {report['l0']:.2f}) in {options.out}")
        print(f"{report['dead']} of {store.n_features} features never fire")
    return 0


def _column(shards: ActivationShards, name: str | None, sae: SAE) -> str:
    """The activations that the dictionary reads."""
    wide = [n for n, (dtype, shape) in shards.columns.items() if dtype.is_floating_point and shape == (sae.d_in,)]
    chosen = wide[0] if name is None and len(wide) == 1 else name
    if chosen not in wide:
        there = ", ".join(f"{n} {list(shape)}" for n, (_, shape) in shards.columns.items())
        raise ValueError(f"--column must name one of the dictionary's width {sae.d_in}, got {name!r} of {there}")
    return chosen


def _grid(shards: ActivationShards) -> tuple[Tensor, Tensor]:
    """(tokens ``[sequences, context]``, -1 where nobody knows; the place in it of each row of the shards, ascending)."""
    if missing := {"token", "position", "sequence"} - set(shards.columns) or {"sequences", "context"} - set(shards.about):
        raise ValueError(f"{shards.path} must be what a harvest writes, and lacks {', '.join(sorted(missing))}")
    found = {name: column.long() for name, column in shards.read(0, len(shards), ["token", "position", "sequence"]).items()}
    shape = int(shards.about["sequences"]), int(shards.about["context"])
    rows = found["sequence"] * shape[1] + found["position"]
    if not bool((rows[1:] > rows[:-1]).all()):
        raise ValueError(f"{shards.path} must hold sequences in ascending order, each once")
    if not (shards.path / _language.WINDOWS).is_file():
        return torch.full(shape, -1, dtype=torch.int64, device="cpu").view(-1).index_put((rows,), found["token"]).view(shape), rows
    tokens = _language.read_windows(shards.path)
    ignored = torch.tensor(shards.about["ignore"], dtype=torch.int64, device="cpu")
    expected = int((~torch.isin(tokens, ignored)).sum())
    if len(rows) != expected or not torch.equal(tokens.view(-1)[rows], found["token"]):
        raise ValueError(f"{shards.path} must hold a finished harvest of {expected} rows, got {len(rows)}")
    return tokens, rows


def _placed(sae: SAE, x: Tensor, rows: Tensor, shape: torch.Size) -> RaggedLatents:
    """The latents of rows at their places in ``[sequences, context]``; the tokens without a row have none."""
    row, feature, value = entries_of(sae.encode(x))
    counts = torch.bincount(rows.to(row.device)[row], minlength=shape.numel())
    crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return RaggedLatents(value, crow, feature, sae.d_sae, shape)


def _show(options: argparse.Namespace) -> int:
    store = LatentStore(options.store)
    report = _overview(store, options) if options.feature is None else _feature(store, options)
    if options.json:
        print(json.dumps(report, indent=1))
    return 0


def _counted(store: LatentStore) -> int:
    """Tokens that could fire: without the special ones that a harvest has left out."""
    return int(store.about.get("counted", store.rows))


def _overview(store: LatentStore, options: argparse.Namespace) -> dict[str, Any]:
    fired = store.fired()
    counted = _counted(store)
    density = fired.double() / max(counted, 1)
    often = fired.argsort(descending=True, stable=True)[: max(options.top, 0)].tolist()
    dead, dense = ((mask).nonzero().flatten().tolist() for mask in (fired == 0, density > _DENSE))
    report = {"tokens": counted, "entries": store.entries, "features": store.n_features, "dead": dead, "dense": dense}
    report |= {"most_frequent": [{"feature": f, "fired": int(fired[f]), "density": float(density[f])} for f in often], "about": store.about}
    if options.plot:
        plots.feature_density({str(options.store): fired}, counted, options.plot)
    if not options.json:
        print(f"{counted} tokens, {store.entries} latents, {store.n_features} features")
        print(f"dead     {len(dead)} never fire")
        print(f"dense    {len(dense)} fire on more than {_DENSE:.0%} of the tokens")
        print("feature     fired  density")
        for feature in often:
            print(f"{feature:>7} {int(fired[feature]):>9}  {density[feature]:.3%}")
    return report


def _feature(store: LatentStore, options: argparse.Namespace) -> dict[str, Any]:
    counted, (_, values) = _counted(store), store.occurrences(options.feature)
    found = store.top(options.feature, options.top, one_a_sequence=True)
    edges, counts = store.histogram(options.feature, 12)
    examples = _examples(found, None if options.tokeniser is None else _language.tokenizer_of(options.tokeniser, options.gguf))
    report: dict[str, Any] = {"feature": options.feature, "fired": len(values), "density": len(values) / max(counted, 1)}
    report |= {"histogram": {"edges": edges.tolist(), "counts": counts.tolist()}, "examples": examples, "about": store.about}
    if options.plot:
        plots.values_of_feature(edges, counts, options.feature, options.plot)
    if not options.json:
        print(f"feature {options.feature}: fires on {len(values)} of {counted} tokens ({report['density']:.3%})")
        for low, count in zip(edges.tolist(), counts.tolist()) if len(values) else ():
            print(f"{low:>10.4g}  {'█' * -(-40 * count // max(int(counts.max()), 1)):<40}  {count}")
        for one in examples:
            print(f"{one['value']:>10.4g}  {one['sequence']}:{one['position']}  {one['text']}")
        if examples and options.tokeniser is None:
            print("tokens by their ids; --tokeniser MODEL shows them as text")
    return report


def _examples(found: Examples, tokenizer: Any) -> list[dict[str, Any]]:
    """Each with its text, the largest token in « »."""

    def text(ids: list[int]) -> str:
        known = [token for token in ids if token >= 0]
        return " ".join(map(str, known)) if tokenizer is None else tokenizer.decode(known).replace("\n", "↵")

    result: list[dict[str, Any]] = []
    space = " " if tokenizer is None else ""
    for value, sequence, position, tokens in zip(*(column.tolist() for column in found[:4])):
        parts = text(tokens[:_BEFORE]), f"«{text(tokens[_BEFORE : _BEFORE + 1])}»", text(tokens[_BEFORE + 1 :])
        entry = {"value": value, "sequence": sequence, "position": position, "tokens": tokens, "text": space.join(parts)}
        result.append(entry)
    return result


_BEFORE = 16


def _delphi(options: argparse.Namespace) -> int:
    print(LatentStore(options.store).to_delphi(options.out, options.module, options.splits))
    return 0
