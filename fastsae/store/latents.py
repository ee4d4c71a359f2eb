"""Sparse latents of a stream of tokens on disk, by token and by feature, in bounded memory."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae._core import checks, files
from fastsae.formats.weight_files import read_json
from fastsae.latents import RaggedLatents, TopKLatents
from fastsae.store.columns import Shard, digest, map_safetensors
from fastsae.store.writer import manifest_of, manifests

MANIFEST = "latents.json"
_MEMORY = 512 << 20
_SORTED_BYTES = 16  # of an entry while it is sorted: feature and value as they lie in the file, row and value as they become
_MERGED_BYTES = 24  # of an entry of a range of features: row and value in its run, beside the other runs', and merged
_FEW = 4096  # entries of a feature that are sorted without selecting first
_DELPHI_TOKENS = 1 << 16  # read from delphi's files at a time
_PAIR_BYTES = 24  # of a pair of features that fire on one token, while pairs are counted


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
        writer: number of this writer, of several that fill one folder at the same time; see ``fastsae.store.join``.

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
        self._manifest, self.joined = manifest_of(self.folder, self.writer, MANIFEST)
        if (path := self._manifest).exists():
            found = read_json(path)
            if wrong := [name for name, value in self._facts.items() if found.get(name) != value]:
                raise ValueError(f"{op}: {path} has {wrong[0]}={found.get(wrong[0])!r}, got {self._facts[wrong[0]]!r}")
            self._parts = found["parts"]

    @property
    def sequences(self) -> int:
        """Sequences in whole parts: where a run that was killed goes on."""
        return sum(part["sequences"] for part in self._parts)

    def append(self, latents: object, tokens: Tensor) -> None:
        """Adds sequences; see the class."""
        op = "LatentWriter.append"
        if self.joined:
            raise ValueError(f"{op}: {self.folder} holds all of its writers' parts, and nothing can be added")
        checks.tensor(op, "tokens", tokens, (torch.int64, torch.int32, torch.int16))
        checks.shape(op, "tokens", tokens, (None, self.context), f"[sequences, context={self.context}]")
        if not isinstance(latents, (TopKLatents, RaggedLatents)):
            raise TypeError(f"{op}: latents must be TopKLatents or RaggedLatents, got {type(latents).__name__}")
        if latents.batch_shape != tokens.shape or latents.n_features != self.n_features:
            got = f"{list(latents.batch_shape)} of {latents.n_features}"
            raise ValueError(f"{op}: latents must be of {list(tokens.shape)} tokens and {self.n_features} features, got {got}")
        counts, feature, value = (t.cpu() for t in _by_token(latents))
        self._pending.append((counts, feature, value.to(self.dtype), tokens.flatten().to("cpu", torch.int32)))
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
        files.replace_text(self._manifest, json.dumps({"format": 1, **self._facts, "parts": parts}, indent=1) + "\n")
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
        if not (paths := manifests(self.folder, MANIFEST)[0]):
            raise FileNotFoundError(f"LatentStore: {self.folder} holds no {MANIFEST}")
        facts: dict[str, Any] = {}
        self._parts: list[dict[str, Any]] = []
        self._ranges: list[dict[str, Any]] | None = None
        for number, path in enumerate(paths):
            found = read_json(path)
            try:
                own = {name: found[name] for name in ("format", "n_features", "context", "dtype", "about")}
                self._parts += found["parts"]
            except (KeyError, TypeError) as error:
                raise ValueError(f"LatentStore: {path} is damaged: it holds no {error}") from error
            if number and own != facts:
                raise ValueError(f"LatentStore: {path} holds {own}, {paths[0]} {facts}")
            facts = own
        self.n_features, self.context = int(facts["n_features"]), int(facts["context"])
        self.dtype = {"float32": torch.float32, "float16": torch.float16}[facts["dtype"]]
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
        for number, part in enumerate(self._parts):
            columns, shape = self._columns(number), (int(part["sequences"]), self.context)
            latents = RaggedLatents(columns["value"], columns["crow"], columns["feature"], self.n_features, shape)
            yield first, latents, columns["token"].view(shape)
            first += shape[0] * self.context

    def _columns(self, part: int) -> Mapping[str, Tensor]:
        return map_safetensors(self.folder / self._parts[part]["file"], same_rows=False).columns

    # ------------------------------------------------------------ by feature

    def _by_feature(self) -> list[dict[str, Any]]:
        """The ranges of features on disk, made where they are missing or of other parts."""
        path, made_of = self.folder / "by_feature" / _INDEX, [part["sha256"] for part in self._parts]

        def known() -> list[dict[str, Any]] | None:
            found = read_json(path) if path.exists() else {}
            return found["ranges"] if found.get("made_of") == made_of else None

        self._ranges = self._ranges or known()
        if self._ranges is None:
            with files.locked(self.folder / ".by_feature.lock"):  # another process may be making it
                self._ranges = known()
                if self._ranges is None:
                    shutil.rmtree(path.parent, ignore_errors=True)
                    path.parent.mkdir()
                    self._ranges = self._merge(path.parent)
                    files.replace_text(path, json.dumps({"made_of": made_of, "ranges": self._ranges}, indent=1) + "\n")
        return self._ranges

    def _merge(self, folder: Path) -> list[dict[str, Any]]:
        """Tokens transposed some at a time (runs), then a range of features of all runs at a time."""
        sparse, runs = _scipy_sparse(), self._runs(folder)
        ends = torch.zeros(self.n_features, dtype=torch.int64, device="cpu")
        for run in runs:
            ends += run.read("crow", 1, self.n_features + 1)
        ranges: list[dict[str, Any]] = []
        start = 0
        while start < self.n_features:
            before = int(ends[start - 1]) if start else 0
            stop = int(torch.searchsorted(ends, before + max(self.memory // _MERGED_BYTES, 1), right=True))
            stop = min(max(stop, start + 1), self.n_features)
            pieces: list[Any] = []
            for run in runs:
                crow = run.read("crow", start, stop + 1)
                a, b = int(crow[0]), int(crow[-1])
                parts = _bits(run.read("value", a, b)), run.read("row", a, b).numpy(), (crow - a).numpy()
                pieces.append(sparse.csr_matrix(parts, shape=(stop - start, run.rows)))
            made = sparse.hstack(pieces, format="csr")  # rows ascend within a feature, as they do over the runs
            row, value = torch.from_numpy(made.indices), torch.from_numpy(made.data).view(self.dtype)
            columns = {"crow": torch.from_numpy(made.indptr).long(), "row": row, "value": value}
            ranges.append(_save(folder / f"{len(ranges):06d}.safetensors", columns) | {"start": start, "stop": stop})
            start = stop
        for run in runs:
            run.path.unlink()
        return ranges

    def _runs(self, folder: Path) -> list[Shard]:
        """Files of the entries of some tokens each, by feature, then row."""
        from safetensors.torch import save_file

        sparse = _scipy_sparse()
        runs: list[Shard] = []
        for _, latents, tokens in self.parts():
            step = max(1, self.memory // _SORTED_BYTES * tokens.numel() // max(latents.col.numel(), 1))
            for start in range(0, tokens.numel(), step):
                some = latents.rows(slice(start, start + step))
                shape = (len(some.crow) - 1, self.n_features)
                columns = _bits(some.values), some.col.numpy(), some.crow.to(torch.int32).numpy()
                made = sparse.csr_matrix(columns, shape=shape).tocsc()  # a counting sort
                path = folder / f"run-{len(runs):06d}.safetensors"
                found = {"crow": made.indptr, "row": made.indices, "value": made.data}
                save_file({name: torch.from_numpy(column) for name, column in found.items()}, path)  # not synced: a crash starts anew
                runs.append(replace(map_safetensors(path, same_rows=False), rows=shape[0]))
        return runs

    def occurrences(self, feature: int) -> tuple[Tensor, Tensor]:
        """(rows ascending int64, values) of a feature: on which tokens it fires, and how strongly."""
        feature = checks.integer("LatentStore.occurrences", "feature", feature, 0, self.n_features - 1, "n_features - 1")
        entry = next(entry for entry in self._by_feature() if feature < entry["stop"])
        crow, row, value = self._range(entry)
        a, b = crow[feature - entry["start"] :][:2].tolist()
        return row[a:b].long(), value[a:b].clone()

    def fired(self) -> Tensor:
        """``[F]`` int64: on how many tokens each feature fires."""
        return torch.cat([self._range(entry)[0].diff() for entry in self._by_feature()])

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
        feature = checks.integer("LatentStore.top", "feature", feature, 0, self.n_features - 1, "n_features - 1")
        return next(self.tops([feature], k, before=before, after=after, one_a_sequence=one_a_sequence))[1]

    def tops(
        self,
        features: Tensor | Sequence[int] | None = None,
        k: int = 20,
        *,
        before: int = 16,
        after: int = 8,
        one_a_sequence: bool = False,
    ) -> Iterator[tuple[int, Examples]]:
        """(feature, ``top`` of it) of many features, ascending, in one pass over them and bounded memory. ``features``: an index or a mask
        ``[F]``; None: all."""
        op = "LatentStore.tops"
        k, before, after = checks.integer(op, "k", k, 1), checks.integer(op, "before", before, 0), checks.integer(op, "after", after, 0)
        chosen = checks.sorted_subset(
            None if features is None else torch.as_tensor(features, device="cpu"), self.n_features, f"{op}: features"
        )
        every = torch.arange(self.n_features, device="cpu") if chosen is None else chosen
        shift = torch.arange(-before, after + 1, device="cpu")
        most = max(1, self.memory // (256 * self._candidates(k, one_a_sequence) + 128 * k * len(shift)))  # features at a time

        def found() -> Iterator[tuple[int, Examples]]:
            for entry in self._by_feature():
                for some in every[(every >= entry["start"]) & (every < entry["stop"])].split(most):
                    if len(some):
                        yield from self._tops(entry, some, k, shift, one_a_sequence)

        return found()

    def _tops(self, entry: Mapping[str, Any], features: Tensor, k: int, shift: Tensor, once: bool) -> Iterator[tuple[int, Examples]]:
        crow, row, value = self._range(entry)
        begins, ends = (crow[features - entry["start"] + i].tolist() for i in (0, 1))
        at, lengths = self._largest(row, value, list(zip(begins, ends)), k, once)
        rows = row[at].long()
        around = rows[:, None] + shift
        inside = around.div(self.context, rounding_mode="floor") == (rows // self.context)[:, None]
        around.clamp_(0, self.rows - 1)
        near = around.to(row.dtype)
        where = [torch.searchsorted(row[a:b], n).clamp_(max=b - a - 1).add_(a) for a, b, n in zip(begins, ends, near.split(lengths))]
        here = torch.cat(where)
        activations = torch.where(inside & (row[here] == near), value[here], 0)
        tokens = torch.where(inside, self.tokens(around), -1)
        columns = (value[at], rows // self.context, rows % self.context, tokens, activations)
        for feature, *examples in zip(features.tolist(), *(column.split(lengths) for column in columns)):
            yield feature, Examples(*examples)

    def _range(self, entry: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(crow, rows, values) of a range of features, mapped."""
        columns = map_safetensors(self.folder / "by_feature" / entry["file"], same_rows=False).columns
        return columns["crow"], columns["row"], columns["value"]

    def _largest(self, row: Tensor, value: Tensor, pieces: list[tuple[int, int]], k: int, once: bool) -> tuple[Tensor, list[int]]:
        """Where in the columns the k largest values of each piece lie, descending, ties in order; and how many of each. All pieces at once,
        after the largest of those that have many: as many as hold k, or k sequences."""
        most = self._candidates(k, once)
        candidates: list[Tensor] = []
        for a, b in pieces:
            at = torch.arange(a, b, device="cpu")
            if b - a > most:
                values = value[a:b]
                at = at[~(values < values.topk(most).values[-1])]  # those that tie with the last one too
            candidates.append(at)
        at = torch.cat(candidates)
        sizes = torch.tensor([len(some) for some in candidates], device="cpu")
        piece = torch.arange(len(pieces), dtype=torch.int32, device="cpu").repeat_interleave(sizes)
        order = value[at].argsort(descending=True, stable=True)
        order = order[piece[order].argsort(stable=True)]
        at, piece = at[order], piece[order].long()
        if once:
            _, first = np.unique((piece * self.sequences + row[at] // self.context).numpy(), return_index=True)
            first = torch.from_numpy(first).sort().values
            at, piece = at[first], piece[first]
        counts = torch.bincount(piece, minlength=len(pieces))
        keep = torch.arange(len(at), device="cpu") - (counts.cumsum(0) - counts)[piece] < k
        return at[keep], counts.clamp(max=k).tolist()

    def _candidates(self, k: int, once: bool) -> int:
        return max(_FEW, k * self.context if once else k)

    def tokens(self, rows: Tensor) -> Tensor:
        """The token ids of rows, of any shape."""
        wanted, order = rows.flatten().sort()
        result = torch.empty(wanted.shape, dtype=torch.int64, device="cpu")
        starts = torch.tensor([0, *(part["sequences"] for part in self._parts)], device="cpu").cumsum(0) * self.context
        ends = torch.searchsorted(wanted, starts).tolist()
        for number, (a, b) in enumerate(itertools.pairwise(ends)):
            if a < b:
                token = self._columns(number)["token"]
                result[order[a:b]] = token[wanted[a:b] - starts[number]].long()
        return result.view(rows.shape)

    def cooccurrence(self, features: Tensor | Sequence[int] | None = None) -> Any:
        """SciPy CSR ``[n, n]`` of integers: on how many tokens two features fire together, exactly; the diagonal is ``fired``.

        Args:
            features: of which (their order is the result's); None: all.

        Memory: ``memory``, and four times the result, which has 8 bytes for each pair that meets (12 from 2^31 pairs on).
        """
        sparse = _scipy_sparse()
        chosen = (
            torch.arange(self.n_features, device="cpu") if features is None else torch.as_tensor(features, dtype=torch.int64, device="cpu")
        )
        number = torch.full((self.n_features,), -1, dtype=torch.int32, device="cpu")
        number[chosen] = torch.arange(len(chosen), dtype=torch.int32, device="cpu")
        dtype = np.int32 if self.rows < 2**31 else np.int64
        sums: list[Any] = [sparse.csr_matrix((len(chosen), len(chosen)), dtype=dtype)]  # of ever fewer pairs
        for _, latents, _ in self.parts():
            column = number[latents.col.long()]
            keep = column >= 0
            crow = torch.nn.functional.pad(keep.cumsum(0), (1, 0))[latents.crow]
            pairs, column, start = crow.diff().square().cumsum(0), column[keep].numpy(), 0
            while start < len(pairs):
                before = int(pairs[start - 1]) if start else 0
                stop = int(torch.searchsorted(pairs, before + self.memory // _PAIR_BYTES, right=True))
                stop = max(stop, start + 1)
                own = crow[start : stop + 1]
                a, b = int(own[0]), int(own[-1])
                entries = np.ones(b - a, dtype=dtype), column[a:b], (own - a).to(torch.int32).numpy()
                fires = sparse.csr_matrix(entries, shape=(stop - start, len(chosen)))
                made = fires.T.tocsr() @ fires
                while sums and sums[-1].nnz <= made.nnz:
                    made = made + sums.pop()
                sums.append(made)
                start = stop
        while len(sums) > 1:
            sums.append(sums.pop() + sums.pop())
        return sums[0]

    def conditional(self, features: Tensor | Sequence[int] | None = None) -> Any:
        """SciPy CSR ``[n, n]`` float64: entry (i, j) is the share of the tokens on which i fires where j fires too, P(j | i). Of what
        ``cooccurrence`` counts; rows of features that never fire are empty."""
        made = self.cooccurrence(features)
        fired = made.diagonal()
        made = made.astype(np.float64)
        made.data /= np.repeat(fired, np.diff(made.indptr))
        return made

    # ------------------------------------------------------------ delphi

    def to_delphi(self, folder: str | os.PathLike[str], module: str, splits: int = 5) -> Path:
        """Writes the cache files of delphi (eai-delphi 0.1.3, ``LatentCache.save_splits``) for a module: the same bytes that it writes for
        these latents. Values of at most 1e-5 are left out, as it does. Returns the folder ``folder/module``. Memory: all tokens, and one
        split of the features."""
        from safetensors.numpy import save_file

        splits = checks.integer("LatentStore.to_delphi", "splits", splits, 1, self.n_features)
        tokens = torch.cat([token.long() for _, _, token in self.parts()]).numpy()
        out = Path(folder) / module
        out.mkdir(parents=True, exist_ok=True)
        edges = torch.linspace(0, self.n_features, steps=splits + 1, dtype=torch.float32, device="cpu").long().tolist()
        for start, stop in itertools.pairwise(edges):
            places: list[Any] = []
            values: list[Tensor] = []
            for first, latents, _ in self.parts():
                keep = ((latents.col >= start) & (latents.col < stop) & (latents.values.abs() > 1e-5)).nonzero().flatten()
                row = torch.repeat_interleave(latents.crow.diff())[keep] + first
                where = torch.stack([row // self.context, row % self.context, latents.col[keep] - start], 1)
                places.append(where.numpy().astype("uint32"))
                values.append(latents.values[keep].half())
            where = np.concatenate(places)
            if not len(where) or max(int(where[:, 2].max()), int(where[:, 0].max())) < 2**16:
                where = where.astype("uint16")
            found = {"locations": where, "activations": torch.cat(values).numpy(), "tokens": tokens}
            files.replace(out / f"{start}_{stop - 1}.safetensors", lambda part, found=found: save_file(found, part))
        return out

    @classmethod
    def from_delphi(cls, cache: str | os.PathLike[str], folder: str | os.PathLike[str], *, memory: int = _MEMORY) -> LatentStore:
        """A store in ``folder`` of what lies in delphi's cache files of one module (the folder ``cache``, as ``to_delphi`` returns it).

        Raises: FileNotFoundError: no such files. ValueError: damaged, without tokens, or a split is missing.
        """
        splits = sorted((tuple(map(int, path.stem.split("_"))), path) for path in Path(cache).glob("*_*.safetensors"))
        if not splits:
            raise FileNotFoundError(f"LatentStore.from_delphi: {cache} holds no cache files of delphi")
        if (starts := [start for (start, _), _ in splits]) != (expected := [0, *(last + 1 for (_, last), _ in splits[:-1])]):
            raise ValueError(f"LatentStore.from_delphi: {cache} must hold splits that start at {expected}, got {starts}")
        found = [map_safetensors(path, same_rows=False).columns for _, path in splits]
        if missing := [path for (_, path), columns in zip(splits, found) if {"locations", "activations", "tokens"} - set(columns)]:
            raise ValueError(f"LatentStore.from_delphi: {missing[0]} must hold locations, activations and tokens")
        tokens, n_features = found[0]["tokens"], splits[-1][0][1] + 1
        sequences, context = tokens.shape
        step = max(1, _DELPHI_TOKENS // context)
        with LatentWriter(folder, n_features, context, {"delphi": Path(cache).name}, dtype=found[0]["activations"].dtype) as writer:
            for first in range(0, sequences, step):
                some = tokens[first : first + step]
                pieces: list[tuple[Tensor, Tensor, Tensor]] = []
                for start, columns in zip(starts, found):
                    where = columns["locations"].numpy()
                    a, b = (bisect.bisect_left(where[:, 0], s) for s in (first, first + len(some)))
                    sequence, position, feature = torch.from_numpy(where[a:b].astype("int64")).unbind(1)
                    pieces.append(((sequence - first) * context + position, feature + start, columns["activations"][a:b]))
                row, feature, value = (torch.cat(parts) for parts in zip(*pieces))
                if len(row) and not 0 <= int(row.min()) <= int(row.max()) < some.numel():
                    raise ValueError(f"LatentStore.from_delphi: {cache} is damaged: its locations are not in the order of sequences")
                order = row.argsort(stable=True)  # splits in the order of their features
                crow = torch.nn.functional.pad(torch.bincount(row, minlength=some.numel()).cumsum(0), (1, 0))
                writer.append(RaggedLatents(value[order], crow, feature[order], n_features, tuple(some.shape)), some)
        return cls(folder, memory=memory)


_INDEX = "index.json"


def _scipy_sparse() -> Any:
    try:
        import scipy.sparse
    except ImportError as error:
        raise ImportError("LatentStore by feature needs SciPy: pip install 'fastsae-kernels[store]'") from error
    return scipy.sparse


def _bits(values: Tensor) -> Any:
    """Values as the integers that their bits are: SciPy moves those of any dtype, and keeps NaN."""
    return values.view({4: torch.int32, 2: torch.int16}[values.itemsize]).numpy()


def _by_token(latents: TopKLatents | RaggedLatents) -> tuple[Tensor, Tensor, Tensor]:
    """(entries of each token, int32 features, values) of what is not 0, features ascending within a token."""
    if isinstance(latents, TopKLatents):
        feature, order = latents.slots.indices.to(torch.int32).sort(1)  # row by row: much quicker than all entries at once
        value = latents.slots.values.detach().gather(1, order)
        keep = value != 0
        return keep.sum(1), feature[keep], value[keep]
    row, feature, value = entries_of(latents)
    keep = (value != 0).nonzero().flatten()
    row, feature, value = (t.detach()[keep] for t in (row, feature, value))
    key = row * latents.n_features + feature
    if bool((key[1:] < key[:-1]).any()):
        order = key.argsort(stable=True)
        row, feature, value = row[order], feature[order], value[order]
    return torch.bincount(row, minlength=latents.crow.numel() - 1), feature.to(torch.int32), value


def entries_of(latents: TopKLatents | RaggedLatents) -> tuple[Tensor, Tensor, Tensor]:
    """(row of the flattened batch, feature, value) of every slot."""
    if isinstance(latents, TopKLatents):
        rows = torch.arange(latents.values.shape[:-1].numel(), device=latents.values.device)
        return rows.repeat_interleave(latents.values.shape[-1]), latents.indices.flatten().long(), latents.values.flatten()
    rows = torch.arange(latents.crow.numel() - 1, device=latents.values.device)
    row = torch.repeat_interleave(rows, latents.crow.diff(), output_size=None)
    used = int(latents.crow[-1])  # slots after it are padding
    return row, latents.col[:used].long(), latents.values[:used]
