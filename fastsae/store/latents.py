"""Sparse latents of a stream of tokens on disk, by token and by feature, in bounded memory."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks, files
from fastsae.formats.weight_files import read_json
from fastsae.latents import RaggedLatents, TopKLatents
from fastsae.store.columns import digest, map_safetensors

MANIFEST = "latents.json"
_MEMORY = 512 << 20
_ENTRY_BYTES = 40  # of an entry while it is sorted: row, feature, value, the order, and what sorting needs


class Examples(NamedTuple):
    """Where a feature is largest: ``values [k]`` descending, ``sequence [k]``, ``position [k]``, and around each the ``tokens [k, width]``
    and the feature's ``activations [k, width]`` (-1 and 0 outside of the sequence)."""

    values: Tensor
    sequence: Tensor
    position: Tensor
    tokens: Tensor
    activations: Tensor


def _save(path: Path, columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """One file of columns; its entry in a manifest."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("LatentWriter needs safetensors: pip install 'fastsae-kernels[store]'") from error
    files.replace(path, lambda part: save_file({name: column.contiguous() for name, column in columns.items()}, part))
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}


class LatentWriter:
    """Appends the latents of token sequences to a folder; ``LatentStore`` reads them.

    Args:
        folder: made where missing. One that a writer has written to before goes on behind its last whole part: ``sequences`` says how many.
        n_features, context: features of the dictionary, tokens of every sequence.
        about: what it is, as JSON values. A folder with another one is refused.
        dtype: of the stored values, float32 or float16.
        tokens_a_part: of each part but the last. Memory: their latents, while they are written.
        writer: number of this writer, of several that fill one folder at the same time.

    ``append(latents, tokens)`` takes what an encoder returned for ``[sequences, context]`` and token ids of that shape; latents of 0 are
    not stored. ``close``, or the end of a ``with`` block, writes the rest. A killed writer leaves whole parts.

    Raises: TypeError, ValueError: latents or tokens of another shape. OSError that names the path: it could not be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        n_features: int,
        context: int,
        about: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        tokens_a_part: int = 1 << 16,
        writer: int = 0,
    ):
        op = "LatentWriter"
        self.folder = Path(folder)
        self.n_features = checks.integer(op, "n_features", n_features, 1, 2**31 - 1)
        self.context = checks.integer(op, "context", context, 1)
        self.writer = checks.integer(op, "writer", writer, 0)
        if dtype not in (torch.float32, torch.float16):
            raise TypeError(f"{op}: dtype must be float32 or float16, got {dtype}")
        self.dtype, self._most = dtype, max(1, checks.integer(op, "tokens_a_part", tokens_a_part, 1) // self.context)
        self._facts = {"n_features": self.n_features, "context": self.context, "dtype": str(dtype)[6:], "about": dict(about or {})}
        self._facts = json.loads(json.dumps(self._facts))
        self._parts: list[dict[str, Any]] = []
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # counts of each token, features, values, tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._manifest()
        if path.exists():
            found = read_json(path)
            if wrong := [name for name, value in self._facts.items() if found.get(name) != value]:
                raise ValueError(f"{op}: {path} has {wrong[0]}={found.get(wrong[0])!r}, got {self._facts[wrong[0]]!r}")
            self._parts = found["parts"]

    def _manifest(self) -> Path:
        return self.folder / (MANIFEST if self.writer == 0 else f"latents-{self.writer}.json")

    @property
    def sequences(self) -> int:
        """Sequences in whole parts: where a run that was killed goes on."""
        return sum(part["sequences"] for part in self._parts)

    def append(self, latents: object, tokens: Tensor) -> None:
        """Adds sequences; see the class."""
        op = "LatentWriter.append"
        checks.tensor(op, "tokens", tokens, (torch.int64, torch.int32, torch.int16))
        checks.shape(op, "tokens", tokens, (None, self.context), f"[sequences, context={self.context}]")
        if not isinstance(latents, (TopKLatents, RaggedLatents)):
            raise TypeError(f"{op}: latents must be TopKLatents or RaggedLatents, got {type(latents).__name__}")
        if latents.batch_shape != tokens.shape or latents.n_features != self.n_features:
            got = f"{list(latents.batch_shape)} of {latents.n_features}"
            raise ValueError(f"{op}: latents must be of {list(tokens.shape)} tokens and {self.n_features} features, got {got}")
        row, feature, value = entries_of(latents)
        keep = (value != 0).nonzero().flatten()
        row, feature, value = (t.detach()[keep].cpu() for t in (row, feature, value))
        if not bool((row[1:] >= row[:-1]).all()):
            raise AssertionError("an encoder's slots are in the order of rows")
        counts = torch.bincount(row, minlength=tokens.numel())
        order = (row * self.n_features + feature).argsort()  # ascending features within a token
        self._pending.append((counts, feature[order].to(torch.int32), value[order].to(self.dtype), tokens.flatten().to("cpu", torch.int32)))
        if sum(len(part[0]) for part in self._pending) >= self._most * self.context:
            self.close()

    def close(self) -> None:
        """Writes what is left as a part."""
        if not self._pending:
            return
        counts, feature, value, token = (torch.cat(parts) for parts in zip(*self._pending))
        crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        path = self.folder / f"{self.writer:03d}-{len(self._parts):06d}.safetensors"
        made = _save(path, {"crow": crow, "feature": feature, "value": value, "token": token})
        parts = [*self._parts, made | {"sequences": len(token) // self.context, "entries": len(value)}]
        files.replace_text(self._manifest(), json.dumps({"format": 1, **self._facts, "parts": parts}, indent=1) + "\n")
        self._parts, self._pending = parts, []

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()


class LatentStore:
    """Latents that ``LatentWriter`` has stored. Rows are tokens: sequence s, position p is row ``s * context + p``; all writers' sequences
    count, one writer's after the other's.

    Args:
        folder: of it.
        memory: bytes that sorting by feature may take.

    What asks by feature needs the order by feature, which the first such call makes (an external merge beside the parts, as large as
    they are); more latents written afterwards make it anew.

    Raises: FileNotFoundError: nothing was written there. ValueError: damaged, or writers differ.
    """

    def __init__(self, folder: str | os.PathLike[str], *, memory: int = _MEMORY):
        self.folder = Path(folder)
        self.memory = checks.integer("LatentStore", "memory", memory, 1)
        manifests = sorted(self.folder.glob("latents*.json"), key=lambda path: (len(path.name), path.name))
        manifests = [path for path in manifests if path.name != _INDEX]
        if not manifests:
            raise FileNotFoundError(f"LatentStore: {self.folder} holds no {MANIFEST}")
        facts: dict[str, Any] = {}
        self._parts: list[dict[str, Any]] = []
        for number, path in enumerate(manifests):
            found = read_json(path)
            try:
                own = {name: found[name] for name in ("format", "n_features", "context", "dtype", "about")}
                self._parts += found["parts"]
            except (KeyError, TypeError) as error:
                raise ValueError(f"LatentStore: {path} is damaged: it holds no {error}") from error
            if number and own != facts:
                raise ValueError(f"LatentStore: {path} holds {own}, {manifests[0]} {facts}")
            facts = own
        self.n_features, self.context = int(facts["n_features"]), int(facts["context"])
        self.about: dict[str, Any] = facts["about"]
        for part in self._parts:
            path = self.folder / str(part["file"])
            if not path.exists() or path.stat().st_size != part["bytes"]:
                raise ValueError(
                    f"LatentStore: {path} must have {part['bytes']} bytes, got {path.stat().st_size if path.exists() else 'no file'}"
                )
        self.sequences = sum(int(part["sequences"]) for part in self._parts)
        self.rows, self.entries = self.sequences * self.context, sum(int(part["entries"]) for part in self._parts)

    def verify(self) -> None:
        """Compares every file's bytes with its hash; ValueError names one that differs."""
        index = self.folder / "by_feature" / _INDEX
        ranges = [({**entry, "file": f"by_feature/{entry['file']}"}) for entry in (read_json(index)["ranges"] if index.exists() else [])]
        for part in (*self._parts, *ranges):
            if digest(self.folder / part["file"]) != part["sha256"]:
                raise ValueError(
                    f"LatentStore.verify: {self.folder / part['file']} is damaged: its content has another hash than it was written with"
                )

    def parts(self) -> Iterator[tuple[int, RaggedLatents, Tensor]]:
        """By token: (first row, latents ``[sequences, context]``, tokens of that shape) of each part, in memory one after the other."""
        first = 0
        for part in self._parts:
            columns = map_safetensors(self.folder / part["file"], same_rows=False).columns
            shape = (int(part["sequences"]), self.context)
            latents = RaggedLatents(columns["value"], columns["crow"], columns["feature"], self.n_features, shape)
            yield first, latents, columns["token"].view(shape)
            first += shape[0] * self.context

    # ------------------------------------------------------------ by feature

    def _by_feature(self) -> list[dict[str, Any]]:
        """The ranges of features on disk, made where they are missing or of other parts."""
        path, made_of = self.folder / "by_feature" / _INDEX, [part["sha256"] for part in self._parts]
        if path.exists():
            found = read_json(path)
            if found.get("made_of") == made_of:
                return found["ranges"]
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        ranges = self._merge(path.parent)
        files.replace_text(path, json.dumps({"made_of": made_of, "ranges": ranges}, indent=1) + "\n")
        return ranges

    def _merge(self, folder: Path) -> list[dict[str, Any]]:
        """Parts sorted by feature one by one (runs), then a range of features of all runs at a time."""
        counts = torch.zeros(self.n_features, dtype=torch.int64, device="cpu")
        ends: list[Tensor] = []
        runs: list[Path] = []
        for first, latents, _ in self.parts():
            order = latents.col.argsort(stable=True)
            own = torch.bincount(latents.col.long(), minlength=self.n_features)
            counts += own
            ends.append(torch.nn.functional.pad(own.cumsum(0), (1, 0)))
            rows = torch.repeat_interleave(latents.crow.diff())[order] + first
            runs.append(folder / f"run-{len(runs):06d}.safetensors")
            _save(runs[-1], {"feature": latents.col[order], "value": latents.values[order], "row": rows})
        total = counts.cumsum(0)
        ranges: list[dict[str, Any]] = []
        start = 0
        while start < self.n_features:
            before = int(total[start - 1]) if start else 0
            stop = int(torch.searchsorted(total, before + max(self.memory // _ENTRY_BYTES, 1), right=True))
            stop = min(max(stop, start + 1), self.n_features)
            pieces: list[tuple[Tensor, Tensor, Tensor]] = []
            for run, end in zip(runs, ends):
                c, a, b = map_safetensors(run).columns, int(end[start]), int(end[stop])
                pieces.append((c["feature"][a:b], c["row"][a:b], c["value"][a:b]))
            feature, row, value = (
                (torch.cat(parts) for parts in zip(*pieces)) if pieces else (torch.empty(0, device="cpu", dtype=torch.int32),) * 3
            )
            order = feature.argsort(stable=True)  # rows ascend within a feature, as they do over the runs
            crow = torch.nn.functional.pad(counts[start:stop].cumsum(0), (1, 0))
            made = _save(folder / f"{len(ranges):06d}.safetensors", {"crow": crow, "row": row[order], "value": value[order]})
            ranges.append(made | {"start": start, "stop": stop})
            start = stop
        for run in runs:
            run.unlink()
        return ranges

    def occurrences(self, feature: int) -> tuple[Tensor, Tensor]:
        """(rows ascending int64, values) of a feature: on which tokens it fires, and how strongly."""
        feature = checks.integer("LatentStore.occurrences", "feature", feature, 0, self.n_features - 1, "n_features - 1")
        found = next(entry for entry in self._by_feature() if entry["start"] <= feature < entry["stop"])
        columns = map_safetensors(self.folder / "by_feature" / found["file"], same_rows=False).columns
        a, b = columns["crow"][feature - found["start"] :][:2].tolist()
        return columns["row"][a:b].long(), columns["value"][a:b].clone()

    def fired(self) -> Tensor:
        """``[F]`` int64: on how many tokens each feature fires."""
        crows = (map_safetensors(self.folder / "by_feature" / e["file"], same_rows=False).columns["crow"] for e in self._by_feature())
        return torch.cat([crow.diff() for crow in crows])

    def histogram(self, feature: int, bins: int = 50) -> tuple[Tensor, Tensor]:
        """(edges ``[bins + 1]``, counts ``[bins]``) of a feature's values where it fires."""
        values = self.occurrences(feature)[1].float()
        bins = checks.integer("LatentStore.histogram", "bins", bins, 1)
        found = torch.histogram(values, bins) if len(values) else torch.histogram(values, bins, range=(0.0, 1.0))
        return found.bin_edges, found.hist.long()

    def top(self, feature: int, k: int = 20, *, before: int = 16, after: int = 8, one_a_sequence: bool = False) -> Examples:
        """The k tokens on which a feature is largest, with the tokens around them; equal values: the earlier token first.

        Args:
            feature: its number. k: at most so many. before, after: tokens of context, within the sequence.
            one_a_sequence: of each sequence its largest token only.
        """
        op = "LatentStore.top"
        k, before, after = checks.integer(op, "k", k, 1), checks.integer(op, "before", before, 0), checks.integer(op, "after", after, 0)
        rows, values = self.occurrences(feature)
        order = values.argsort(descending=True, stable=True)
        if one_a_sequence:
            sequence, seen = (rows // self.context)[order], set[int]()
            order = order[[i for i, s in enumerate(sequence.tolist()) if not (s in seen or seen.add(s))][:k]]
        rows_k = rows[order[:k]]
        around = rows_k[:, None] + torch.arange(-before, after + 1, device="cpu")
        inside = around.div(self.context, rounding_mode="floor") == (rows_k // self.context)[:, None]
        at = torch.searchsorted(rows, around).clamp_(max=max(len(rows) - 1, 0))
        fires = inside & (rows[at] == around) if len(rows) else inside
        activations = torch.where(fires, values[at], 0) if len(rows) else torch.zeros(around.shape, device="cpu", dtype=torch.float32)
        tokens = torch.where(inside, self.tokens(around.clamp(0, self.rows - 1)), -1)
        return Examples(values[order[:k]], rows_k // self.context, rows_k % self.context, tokens, activations)

    def tokens(self, rows: Tensor) -> Tensor:
        """The token ids of rows, of any shape."""
        result = torch.empty(rows.shape, dtype=torch.int64, device="cpu")
        for first, _, token in self.parts():
            here = (rows >= first) & (rows < first + token.numel())
            result[here] = token.flatten()[rows[here] - first].long()
        return result

    def cooccurrence(self, features: Tensor | Sequence[int] | None = None) -> Any:
        """SciPy CSR ``[n, n]`` int64: on how many tokens two features fire together, exactly; the diagonal is ``fired``. ``features``: of
        which (their order is the result's); None: all, which is large where many pairs meet. Needs SciPy (extra ``studies``)."""
        try:
            import numpy as np
            from scipy.sparse import csr_matrix
        except ImportError as error:
            raise ImportError("LatentStore.cooccurrence needs SciPy: pip install 'fastsae-kernels[studies]'") from error
        chosen = (
            torch.arange(self.n_features, device="cpu") if features is None else torch.as_tensor(features, dtype=torch.int64, device="cpu")
        )
        number = torch.full((self.n_features,), -1, dtype=torch.int64, device="cpu")
        number[chosen] = torch.arange(len(chosen), device="cpu")
        total: Any = csr_matrix((len(chosen), len(chosen)), dtype=np.int64)
        for _, latents, _ in self.parts():
            column = number[latents.col.long()]
            keep = column >= 0
            row = torch.repeat_interleave(latents.crow.diff())[keep]
            ones = np.ones(int(keep.sum()), dtype=np.int64)
            fires = csr_matrix((ones, (row.numpy(), column[keep].numpy())), shape=(latents.crow.numel() - 1, len(chosen)))
            total = total + fires.T @ fires
        return total.tocsr()

    # ------------------------------------------------------------ delphi

    def to_delphi(self, folder: str | os.PathLike[str], module: str, splits: int = 5) -> Path:
        """Writes the cache files of delphi (eai-delphi 0.1.3, ``LatentCache.save_splits``) for a module: the same bytes that it writes for
        these latents. Values of at most 1e-5 are left out, as it does. Returns the folder ``folder/module``."""
        from safetensors.numpy import save_file

        splits = checks.integer("LatentStore.to_delphi", "splits", splits, 1, self.n_features)
        tokens = torch.cat([token.long() for _, _, token in self.parts()]).numpy()
        out = Path(folder) / module
        out.mkdir(parents=True, exist_ok=True)
        edges = torch.linspace(0, self.n_features, steps=splits + 1, dtype=torch.float32, device="cpu").long().tolist()
        for start, stop in itertools.pairwise(edges):
            row, feature, value = self._range(start, stop)
            keep = value.abs() > 1e-5
            order = (row[keep] * (stop - start) + feature[keep]).argsort()
            row, feature, value = row[keep][order], feature[keep][order], value[keep][order]
            where = torch.stack([row // self.context, row % self.context, feature], 1).numpy()
            small = not len(where) or (int(where[:, 2].max()) < 2**16 and int(where[:, 0].max()) < 2**16)
            found = {"locations": where.astype("uint16" if small else "uint32"), "activations": value.half().numpy(), "tokens": tokens}
            files.replace(out / f"{start}_{stop - 1}.safetensors", lambda part, found=found: save_file(found, part))
        return out

    def _range(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """(row, feature - start, value) of a range of features, by feature, then row."""
        pieces: list[tuple[Tensor, Tensor, Tensor]] = []
        for entry in self._by_feature():
            low, high = max(start, entry["start"]), min(stop, entry["stop"])
            if low < high:
                columns = map_safetensors(self.folder / "by_feature" / entry["file"], same_rows=False).columns
                crow = columns["crow"][low - entry["start"] : high - entry["start"] + 1]
                a, b = int(crow[0]), int(crow[-1])
                feature = torch.repeat_interleave(crow.diff()) + (low - start)
                pieces.append((columns["row"][a:b].long(), feature, columns["value"][a:b]))
        row, feature, value = (torch.cat(parts) for parts in zip(*pieces))
        return row, feature, value


_INDEX = "index.json"


def entries_of(latents: TopKLatents | RaggedLatents) -> tuple[Tensor, Tensor, Tensor]:
    """(row of the flattened batch, feature, value) of every slot."""
    if isinstance(latents, TopKLatents):
        rows = torch.arange(latents.values.shape[:-1].numel(), device=latents.values.device)
        return rows.repeat_interleave(latents.values.shape[-1]), latents.indices.flatten().long(), latents.values.flatten()
    rows = torch.arange(latents.crow.numel() - 1, device=latents.values.device)
    row = torch.repeat_interleave(rows, latents.crow.diff(), output_size=None)
    used = int(latents.crow[-1])  # slots after it are padding
    return row, latents.col[:used].long(), latents.values[:used]
