"""Distinct codes of a stream: how many samples a layer has seen, how many different codes, how many of these only once.

``count_codes`` answers for one batch that fits memory; a ``CodeCounter`` takes batches as they come, in any order and from any number of
processes, and gives the same table as one ``count_codes`` over everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae._core import checks, files, processes
from fastsae._core.extras import needed
from fastsae.formats import weight_files

_FORMAT = "fastsae CodeCounter 1"
_KINDS = ("hll", "cpc")


class CodeCount(NamedTuple):
    """One layer of a ``CodeCounter``.

    Attributes:
        layer: its name.
        seen: samples counted.
        distinct: different codes among them; an estimate where the counter sketches.
        singletons: codes seen exactly once; None where the counter sketches.
        saturation: ``distinct / seen`` (0 where nothing was seen). Near 1 nearly every sample has a code of its own, and the number of
            codes says more about the number of samples than about the network: choose fewer neurons.
    """

    layer: str | int
    seen: int
    distinct: int
    singletons: int | None
    saturation: float


class CodeTable(tuple[CodeCount, ...]):
    """Rows of ``CodeCount``, one a layer; printing it aligns them."""

    def __str__(self) -> str:
        rows = [("layer", "seen", "distinct", "singletons", "saturation")]
        for row in self:
            singletons = "-" if row.singletons is None else f"{row.singletons:,}"
            rows.append((str(row.layer), f"{row.seen:,}", f"{row.distinct:,}", singletons, f"{row.saturation:.4f}"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
            for row in rows
        )


class _Exact:
    """Codes with their counts, as sorted runs that at least halve in length: a code is merged about log2(distinct) times in all."""

    def __init__(self, codes: np.ndarray, counts: np.ndarray) -> None:
        self.runs = [(codes, counts)] if codes.shape[0] else []

    @classmethod
    def empty(cls) -> _Exact:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    def update(self, hashes: np.ndarray) -> None:
        if hashes.shape[0]:
            self._push(*np.unique(hashes, return_counts=True))

    def merge(self, other: _Exact) -> None:
        for codes, counts in list(other.runs):
            self._push(codes, counts)

    def _push(self, codes: np.ndarray, counts: np.ndarray) -> None:
        self.runs.append((codes, counts.astype(np.int64, copy=False)))
        self.runs.sort(key=lambda run: -run[0].shape[0])
        while len(self.runs) > 1 and self.runs[-2][0].shape[0] < 2 * self.runs[-1][0].shape[0]:
            self._join()
            self.runs.sort(key=lambda run: -run[0].shape[0])

    def _join(self) -> None:
        (a, a_counts), (b, b_counts) = self.runs.pop(), self.runs.pop()
        codes = np.concatenate([a, b])
        order = np.argsort(codes, kind="stable")  # two sorted runs: NumPy's stable sort merges them
        codes, counts = codes[order], np.concatenate([a_counts, b_counts])[order]
        first = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
        self.runs.append((codes[first], np.add.reduceat(counts, first)))

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        while len(self.runs) > 1:
            self._join()
        return self.runs[0] if self.runs else (np.empty(0, np.int64), np.empty(0, np.int64))

    def summary(self) -> tuple[int, int | None]:
        codes, counts = self.merged()
        return codes.shape[0], int((counts == 1).sum())


class _Sketch:
    """An Apache DataSketches HLL or CPC sketch of mixed hashes."""

    def __init__(self, kind: str, lg_k: int, data: bytes | None = None) -> None:
        self.kind, self.lg_k = kind, lg_k
        self.library = needed("datasketches", "CodeCounter: sketches need Apache DataSketches", "studies")
        self.type = self.library.hll_sketch if kind == "hll" else self.library.cpc_sketch
        if data is not None:
            self.sketch = self.type.deserialize(data)
        else:
            self.sketch = self.type(lg_k, self.library.tgt_hll_type.HLL_8) if kind == "hll" else self.type(lg_k)

    def update(self, hashes: np.ndarray) -> None:
        add = self.sketch.update
        for code in _mixed(np.unique(hashes)).tolist():
            add(code)

    def merge(self, other: _Sketch) -> None:
        self.sketch = self._union(self.sketch, other.sketch)

    def _union(self, *sketches: Any) -> Any:
        union = self.library.hll_union(self.lg_k) if self.kind == "hll" else self.library.cpc_union(self.lg_k)
        for sketch in sketches:
            union.update(sketch)
        return union.get_result(self.library.tgt_hll_type.HLL_8) if self.kind == "hll" else union.get_result()

    def bytes(self) -> bytes:
        return self.sketch.serialize_compact() if self.kind == "hll" else self.sketch.serialize()

    def summary(self) -> tuple[int, int | None]:
        # Of a union of two: its estimate depends on the content alone, an unmerged sketch's also on the order of updates.
        return round(self._union(self.sketch, self.sketch).get_estimate()), None


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection: XOR hashes are linear, and a sketch must not see that."""
    z = hashes.view(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).view(np.int64)


class CodeCounter:
    """Counts distinct codes layer by layer over a stream of hashes.

    Args:
        layers: their number (named 0, 1, ..), or their names.
        exact: True: every distinct hash is kept with its count, 16 bytes each (at most twice that in a merge).
        sketch: "hll" or "cpc", instead of ``exact``: an Apache DataSketches sketch a layer, of constant size (``pip install
            'fastsae-kernels[studies]'``); ``distinct`` is an estimate and ``singletons`` None.
        lg_k: binary logarithm of a sketch's size, 4 .. 21; the relative standard error is about ``1.04 / sqrt(2^lg_k)`` for HLL (14:
            0.8 %) and less for CPC.

    Hashes are 64-bit ones of ``hash_signs``, ``spline_hash`` or ``hash_code``, all with one seed; hashes of several layers combined with
    ``combine_hashes`` are a layer like any other. The table depends neither on the order of updates nor on how the stream was divided.
    Pickling works, for other processes.

    Example:
        >>> counter = fastsae.codes.CodeCounter(["mlp.0", "mlp.1"])
        >>> hashes = {name: fastsae.codes.hash_signs(torch.randn(2, 50, 8)) for name in ("mlp.0", "mlp.1")}
        >>> counter.update(hashes, mask=torch.ones(2, 50))
        >>> print(counter.table())

    Raises: TypeError, ValueError: arguments. ImportError: a sketch without ``datasketches``.
    """

    def __init__(
        self, layers: int | Sequence[str | int] = 1, *, exact: bool | None = None, sketch: str | None = None, lg_k: int = 14
    ) -> None:
        op = "CodeCounter"
        if exact is not None:
            checks.flag(op, "exact", exact)
        if sketch is not None and sketch not in _KINDS:
            raise ValueError(f"{op}: sketch must be one of {', '.join(_KINDS)} or None, got {sketch!r}")
        if exact is not None and exact is (sketch is not None):
            raise ValueError(f"{op}: exact={exact} does not go with sketch={sketch!r}: exact counts, or a sketch of kind hll or cpc")
        self.names = _names(op, layers)
        self.sketch = sketch
        self.lg_k = checks.integer(op, "lg_k", lg_k, 4, 21)
        self._seen = [0] * len(self.names)
        self._layers: list[_Exact | _Sketch] = [self._empty() for _ in self.names]

    def _empty(self) -> _Exact | _Sketch:
        return _Exact.empty() if self.sketch is None else _Sketch(self.sketch, self.lg_k)

    def update(self, hashes: Tensor | Mapping[Any, Tensor], mask: Tensor | None = None) -> None:
        """Counts a batch.

        Args:
            hashes: int64 ``[.., L]``, ``[..]`` for a single layer, or a dict of some layers' ``[..]``, which need not have equal shapes
                unless there is a mask. Any device.
            mask: ``[..]``, bool or 0 and 1; samples where it is False do not count (padding).

        Cost: a sort of the batch, and merges that move a code about log2(distinct) times over the whole life of the counter; a sketch costs
        about a quarter of a microsecond for each distinct hash of the batch. Nothing is counted where an argument is wrong.

        Raises: TypeError: dtype. ValueError: shape, or a layer that the counter does not have.
        """
        op = "CodeCounter.update"
        mask = None if mask is None else checks.mask(op, "mask", mask)
        chosen = []
        for place, layer in self._split(op, hashes):
            chosen.append((place, _masked(op, f"hashes of layer {self.names[place]!r}", layer, mask).cpu().numpy()))
        for place, codes in chosen:
            self._seen[place] += codes.shape[0]
            self._layers[place].update(codes)

    def _split(self, op: str, hashes: Any) -> Iterator[tuple[int, Tensor]]:
        if isinstance(hashes, Mapping):
            for name, layer in hashes.items():
                if name not in self.names:
                    raise ValueError(f"{op}: hashes has a layer {name!r}, expected of {_list(self.names)}")
                yield self.names.index(name), checks.tensor(op, f"hashes[{name!r}]", layer, (torch.int64,))
            return
        checks.tensor(op, "hashes", hashes, (torch.int64,))
        count = len(self.names)
        if count == 1 and (hashes.dim() == 1 or hashes.shape[-1:] != (1,)):
            yield 0, hashes
        elif hashes.dim() == 0 or hashes.shape[-1] != count:
            raise ValueError(f"{op}: hashes must have shape [.., L={count}] or be a dict of layers, got {list(hashes.shape)}")
        else:
            yield from enumerate(hashes.unbind(-1))

    def merge(self, other: CodeCounter) -> CodeCounter:
        """Adds what another counter of the same layers and kind has counted; ``other`` stays as it is. Returns itself.

        Raises: TypeError: not a CodeCounter. ValueError: other layers, or another kind or size of sketch.
        """
        op = "CodeCounter.merge"
        checks.instance(op, "other", other, CodeCounter, "a CodeCounter")
        if other.names != self.names:
            raise ValueError(f"{op}: other must count the layers {_list(self.names)}, got {_list(other.names)}")
        kinds = [c.sketch if c.sketch is None else f"{c.sketch} with lg_k={c.lg_k}" for c in (self, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{op}: other must be of the same kind ({kinds[0] or 'exact'}), got {kinds[1] or 'exact'}")
        for place, layer in enumerate(other._layers):
            self._seen[place] += other._seen[place]
            self._layers[place].merge(layer)  # pyright: ignore[reportArgumentType]
        return self

    def merged(self, group: Any = None) -> CodeCounter:
        """What the counters of all processes of a torch.distributed group have seen together: a new counter, the same on each of them;
        called by all. None: the default group; a copy without one. Memory: the counters of all.

        Raises: as ``merge``, on all processes.
        """
        first, *others = processes.everyones(self, group)
        for other in others:
            first.merge(other)
        return first

    def table(self) -> CodeTable:
        """One ``CodeCount`` a layer, in the order of ``names``; printable."""
        rows = []
        for name, seen, layer in zip(self.names, self._seen, self._layers):
            distinct, singletons = layer.summary()
            rows.append(CodeCount(name, seen, distinct, singletons, distinct / seen if seen else 0.0))
        return CodeTable(rows)

    def __repr__(self) -> str:
        kind = "exact" if self.sketch is None else f"{self.sketch}, lg_k={self.lg_k}"
        return f"CodeCounter({len(self.names)} layers, {kind}, {sum(self._seen)} seen)"

    # ---- state: plain arrays, for pickle and for files

    def __getstate__(self) -> dict[str, np.ndarray]:
        if self.sketch is None:
            merged = [layer.merged() for layer in self._layers if isinstance(layer, _Exact)]
            data, counts = (np.concatenate([run[i] for run in merged]) for i in (0, 1))
            sizes = [run[0].shape[0] for run in merged]
        else:
            parts = [np.frombuffer(layer.bytes(), np.uint8) for layer in self._layers if isinstance(layer, _Sketch)]
            data, counts, sizes = np.concatenate(parts), np.empty(0, np.int64), [part.shape[0] for part in parts]
        about = {"format": _FORMAT, "layers": self.names, "sketch": self.sketch, "lg_k": self.lg_k}
        return {
            "about": np.array(json.dumps(about)),
            "seen": np.array(self._seen, np.int64),
            "ends": np.cumsum(sizes, dtype=np.int64),
            "data": data,
            "counts": counts,
        }

    def __setstate__(self, state: Mapping[str, np.ndarray]) -> None:
        about = json.loads(str(state["about"]))
        if not isinstance(about, dict) or about.get("format") != _FORMAT or not isinstance(about.get("layers"), list):
            raise ValueError("not the state of a CodeCounter of this version")
        self.__init__(about["layers"], sketch=about["sketch"], lg_k=about["lg_k"])
        seen, ends, data, counts = (np.asarray(state[name]) for name in ("seen", "ends", "data", "counts"))
        size = len(self.names)
        kind = np.int64 if self.sketch is None else np.uint8
        if any(a.dtype != np.int64 for a in (seen, ends, counts)) or data.dtype != kind or seen.shape != (size,) or ends.shape != (size,):
            raise ValueError("arrays of another size or type")
        bounds = [0, *ends.tolist()]
        whole = counts.shape == (data.shape if self.sketch is None else (0,))
        if bounds[-1] != data.shape[0] or any(a > b for a, b in pairwise(bounds)) or bool((seen < 0).any()) or not whole:
            raise ValueError("sizes do not fit")
        for place, (start, stop) in enumerate(pairwise(bounds)):
            part = data[start:stop]
            if self.sketch is None:
                number = counts[start:stop]
                if bool((part[1:] <= part[:-1]).any()) or bool((number < 1).any()) or int(number.sum()) != int(seen[place]):
                    raise ValueError(f"the codes of layer {self.names[place]!r} are not sorted, or their counts are not what was seen")
                self._layers[place] = _Exact(part.copy(), number.copy())
            else:
                self._layers[place] = _Sketch(self.sketch, self.lg_k, part.tobytes())
            self._seen[place] = int(seen[place])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an ``.npz`` file (arrays only, no pickle) that ``load`` reads; a file at ``path`` is replaced at once or not at all."""
        state = self.__getstate__()

        def fill(part: Path) -> None:
            with open(part, "wb") as file:  # a path would be given the ending .npz
                np.savez(file, allow_pickle=False, **state)  # pyright: ignore[reportArgumentType]

        files.replace(Path(path), fill)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CodeCounter:
        """The counter that ``save`` wrote.

        Raises: ValueError: damaged, or not such a file. OSError: it cannot be opened. ImportError: a sketch without ``datasketches``.
        """
        counter = cls.__new__(cls)
        try:
            counter.__setstate__(weight_files.read_arrays(Path(path), "iuU"))
        except (ImportError, OSError):
            raise
        except Exception as error:  # reading damaged bytes may raise anything
            raise ValueError(f"CodeCounter.load: {path} is damaged or not a saved CodeCounter: {error}") from error
        return counter


def _names(op: str, layers: Any) -> list[str | int]:
    if isinstance(layers := checks.plain(layers), int) and not isinstance(layers, bool):
        return list(range(checks.integer(op, "layers", layers, 1)))
    if not isinstance(layers, Sequence) or isinstance(layers, (str, bytes)):
        raise TypeError(f"{op}: layers must be an int or a sequence of names, got {type(layers).__name__}")
    names = list(layers)
    wrong = next((name for name in names if not isinstance(name, (str, int)) or isinstance(name, bool)), None)
    if wrong is not None:
        raise TypeError(f"{op}: a layer's name must be a str or an int, got {type(wrong).__name__}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{op}: layers must be at least one name, each once, got {_list(names)}")
    return names


def _list(names: Sequence[Any]) -> str:
    shown = ", ".join(map(repr, names[:8]))
    return f"[{shown}{f', .. ({len(names)} in all)' if len(names) > 8 else ''}]"


def _masked(op: str, name: str, hashes: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hashes.flatten()
    checks.tensor(op, "mask", mask, (torch.bool,), hashes)
    if mask.shape != hashes.shape:
        raise ValueError(f"{op}: mask must have the shape of the {name} {list(hashes.shape)}, got {list(mask.shape)}")
    return hashes[mask]
