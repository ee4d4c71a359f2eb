"""What is drawn for the oracle, and each operation's call of both sides."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from typing import Any

import numpy as np
import torch

import fastsae
from fastsae.native import loader

CC = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
PATHS = {"dense": 1, "screen": 2, "rows": 3, "blocks": 4, "auto": 0}
F32, BF16, F16 = 0, 1, 2
inf, nan = np.float32(np.inf), np.float32(np.nan)
Array = np.ndarray[Any, Any]


SIZE = 1 << 16


def _pools() -> dict[str, Array]:
    """Numbers of several kinds, of which arrays are slices: drawing costs a copy."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(SIZE).astype(np.float32)
    special = np.array([nan, inf, -inf, 3e38, -3e38, 1e-42, -1e-42, 0.0, -0.0, 2.0**-126, 65504, 65520, 1e-7], np.float32)
    special = np.concatenate([special, np.array([0xFFC00001, 0x7F800001], np.uint32).view(np.float32)])  # a negative and a signalling NaN
    wild = np.where(rng.random(SIZE) < 0.01, rng.choice(special, SIZE), normal)
    half_way = (rng.integers(-127, 127, SIZE) + 0.5) / 127
    pools = {
        "normal": normal,
        "integers": rng.integers(-3, 4, SIZE),
        "signs": rng.choice([-1, 1], SIZE),
        "bytes": rng.choice([-127, -126, -1, 0, 1, 126, 127], SIZE),
        "half way": np.where(rng.random(SIZE) < 0.1, 1, half_way),
        "sparse": np.where(rng.random(SIZE) < 0.05, normal, 0),
        "zeros": np.where(rng.random(SIZE) < 0.5, 0.0, -0.0),
        "peaked": np.where(rng.random(SIZE) < 0.03, normal * 1000, normal),
        "wild": wild,
        "tiny": normal * np.float32(2.0**-75),
        "denormal": normal * np.float32(2.0**-130),
        "huge": normal * np.float32(2.0**62),
        "wide": normal * np.exp2(rng.integers(-140, 100, SIZE)),
        "positive": np.abs(normal),
        "largest": rng.choice([-3.4e38, 3.4e38, 1e19, -1e19], SIZE),
        "units": np.repeat(np.exp2(rng.integers(-60, 40, SIZE // 64)), 64),
    }
    return {name: np.ascontiguousarray(pool, np.float32) for name, pool in pools.items()}


POOLS = _pools()
RULES = (True, False), (False, False), (False, True)  # relu and absolute of a top-k
KINDS = list(POOLS)
with np.errstate(all="ignore"):
    AS = {(name, F32): pool for name, pool in POOLS.items()}
    AS |= {(name, BF16): (pool.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, pool in POOLS.items()}
    AS |= {(name, F16): pool.astype(np.float16).astype(np.float32) for name, pool in POOLS.items()}


def address(array: Array | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]


def p(array: Array | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(address(array))


def stored(values: Array, t: int) -> Array:
    """fp32 numbers, exact in type t, as the kernels read them."""
    if t == F32:
        return values
    with np.errstate(all="ignore"):
        return values.astype(np.float16) if t == F16 else (values.view(np.uint32) >> 16).astype(np.uint16)


class Draw(random.Random):
    usual = 0.3  # the share of normal numbers

    def size(self, *, most: int, edges: tuple[int, ...]) -> int:
        return self.choice(edges) if self.random() < 0.3 else self.randint(1, most)

    def kind(self) -> str:
        return "normal" if self.random() < self.usual else self.choice(KINDS)

    def array(self, n: int, kind: str | None = None, t: int = F32) -> Array:
        pool = AS[kind or self.kind(), t]
        at = self.randrange(SIZE - 1)
        return np.resize(pool[at:], n) if n > SIZE - at else pool[at : at + n].copy()

    def maybe(self, n: int, chance: float = 0.5) -> Array | None:
        return self.array(n) if self.random() < chance else None

    def matrix(self, rows: int, d: int, t: int) -> Array:
        """[rows, d]: some rows equal, some zero, some of another size."""
        m = self.array(rows * d, t=t).reshape(rows, d)
        how = self.random()
        if how < 0.15:
            m = m[[self.randrange(min(rows, 3)) for _ in range(rows)]]
        elif how < 0.25:
            m[self.randrange(rows)] = 0
        elif how < 0.35 and t != F16:
            with np.errstate(all="ignore"):
                m *= np.exp2(self.randint(-60, 40))
            m = (m.view(np.uint32) & (0xFFFF0000 if t == BF16 else 0xFFFFFFFF)).view(np.float32)
        elif how < 0.45:
            m[:, 0] = AS["wild", t][: len(m)]
        elif how < 0.5 and rows > 1:  # neighbours by one unit in the last place
            m[1] = m[0]
            m[1, -1] = np.nextafter(m[0, -1], inf) if t == F32 else m[0, -1]
        return np.ascontiguousarray(m)

    def laid(self, m: Array, t: int) -> tuple[Array, int, int]:
        """The matrix somewhere in memory, with its strides: rows, columns, or neither."""
        rows, d = m.shape
        how = self.random()
        if how < 0.4:
            return stored(m, t), d, 1
        if how < 0.6:
            wide = stored(np.full((rows, d + self.randint(1, 20)), nan, np.float32), t)
            wide[:, :d] = stored(m, t)
            return wide, wide.shape[1], 1
        if how < 0.9:
            pad = self.randint(0, 3)
            tall = stored(np.full((d, rows + pad), nan, np.float32), t)
            tall[:, :rows] = stored(m, t).T
            return tall, 1, rows + pad
        every = stored(np.full((rows, 2 * d), nan, np.float32), t)
        every[:, ::2] = stored(m, t)
        return every, 2 * d, 2


class Problem:
    """One problem, and the kernels' answers to it beside the oracle's."""

    now: Array  # the products of the present level

    def __init__(self, oracle: ctypes.CDLL, number: int):
        self.oracle, self.number, self.cases, self.kernels = oracle, number, 0, loader.load()
        self.draw = Draw(number)
        self.levels = loader.isa_levels()
        self.said = ""
        self.kept: list[Any] = []

    def level(self) -> bool:
        """Chooses a level; whether it fuses."""
        name = self.draw.choice(self.levels)
        self.kernels.set_level(name)
        fuses = name != "portable" or os.uname().machine not in ("x86_64", "i686")
        ctypes.c_int.in_dll(self.oracle, "fused").value = int(fuses)
        self.said = name
        return fuses

    def same(self, operation: str, said: str, **pairs: tuple[Any, Any]) -> None:
        self.cases += 1
        for name, (got, want) in pairs.items():
            got, want = np.asarray(got), np.asarray(want)
            where = f"check({self.number}): {operation}.{name} at {self.said}, {said}"
            assert got.shape == want.shape, f"{where}: {got.shape}, the oracle says {want.shape}"
            if got.dtype.kind == "f":
                bits = {2: np.uint16, 4: np.uint32}[got.dtype.itemsize]
                wrong = (got.view(bits) != want.view(bits)) & ~(np.isnan(got) & np.isnan(want))
            else:
                wrong = got != want
            if wrong.any():
                at = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(wrong)))
                first = np.atleast_1d(got)[at], np.atleast_1d(want)[at]
                raise AssertionError(f"{where}: {wrong.sum()} differ, first {at}: {first[0]!r}, the oracle says {first[1]!r}")

    # ---- encoders, codes, matches

    def engine(self) -> None:
        # Longer than 80 lines: one problem goes through every entry of the engine, and what is drawn for it is drawn once.
        draw, C, kernels = self.draw, self.oracle, self.kernels
        t = draw.choice((F32, F32, BF16, F16))
        rows = draw.size(most=14, edges=(1, 12, 13, 25, 26))
        d = draw.size(most=70, edges=(1, 2, 15, 16, 17, 31, 32, 33, 64, 130, 250, 256, 257))
        n = draw.size(most=90, edges=(1, 2, 31, 32, 33, 64, 65, 129, 257, 300))
        if draw.random() < 0.1:  # several blocks: what the first of them shows decides what the next leave open
            rows, d, n, draw.usual = draw.randint(1, 4), draw.randint(1, 40), draw.randint(257, 800), 0.8
        elif draw.random() < 0.01:
            rows, d, n = draw.choice(((2, 4095, 40), (3, 4097, 33), (1, 8200, 20), (1030, 5, 40), (2, 20, 2100)))
        match = draw.random() < 0.25
        x, w = draw.matrix(rows, d, t), draw.matrix(n, d, t)
        if draw.random() < 0.1:
            w[draw.randrange(n)] = x[0]
        (x_at, x_r, x_d), (w_at, w_f, w_d) = draw.laid(x, t), draw.laid(w, t)
        centre = None if match else draw.maybe(d, 0.4)
        chosen = None
        if not match and draw.random() < 0.3:
            chosen = np.array([f for f in range(n) if draw.random() < 0.7] or [n - 1], np.int32)
        count = n if chosen is None else len(chosen)
        eps = draw.choice((1e-8, 1e-37, 1.0)) if match else 0.0
        scale, bias = (None, None) if match else (draw.maybe(n, 0.4), draw.maybe(n))
        packed = np.zeros(0, np.uint32)
        if not match and "avx2" in self.levels and draw.random() < 0.5:
            self.kernels.set_level(draw.choice([level for level in self.levels if level.startswith("avx")]))
            words = kernels.packed_words(n, d)
            raw = np.empty(words + 16, np.uint32)
            packed = raw[(-address(raw) % 64) // 4 :][:words]  # whole cache lines, as every torch tensor begins
            assert kernels.pack((address(w_at), t, w_f, w_d, d, n, 0, 0.0, 0), address(packed), 1) == -1
        made: dict[bool, Array] = {}
        said = f"x {x.shape}, w {w.shape}, type {t}, strides {(x_r, x_d)}, {(w_f, w_d)}, of {count}"

        def begin(paths: tuple[str, ...] = tuple(PATHS)) -> tuple[Any, Any, str]:
            """(arguments; path, statistics and threads) of the next call, its name, with the products of its level in `now`."""
            fuses = self.level()
            if fuses not in made:
                made[fuses] = np.empty((rows, count), np.float32)
                C.products(p(x), i64(rows), p(w), p(chosen), i64(count), i64(d), p(centre), ctypes.c_float(eps), p(made[fuses]))
            self.now = made[fuses]
            path = draw.choice(paths)
            blob = address(packed) if len(packed) and draw.random() < 0.6 else 0
            arguments = (
                (address(x_at), t, rows, x_r, x_d, address(centre), eps),
                (address(w_at), t, w_f, w_d, d, count, address(chosen), eps, blob),
            )  # fmt: skip
            return arguments, (PATHS[path], 0, draw.choice((1, 1, 1, 2, 3))), f"{path}{' packed' if blob else ''}, {said}"

        def ragged(operation: str, name: str, status: int, m: int, *want: Array) -> None:
            assert status == -1
            where, count = f"check({self.number}): {operation} at {self.said}, {name}", kernels.entries_count(entries.address)
            assert count == m, f"{where}: {count} entries, the oracle says {m}"
            got = np.empty(m, np.float32), np.empty(m, np.int64), np.empty(rows + 1, np.int64), np.zeros(m, np.uint8)
            kernels.copy_entries(entries.address, *(address(a) for a in got[:3]), address(got[3]) if len(want) > 3 else 0, 1)
            self.same(operation, name, **{
                key: (a, b if key == "crow" else b[:m]) for key, a, b in zip(("values", "col", "crow", "flags"), got, want, strict=False)
            })  # fmt: skip

        dense = ("dense", "screen", "auto")
        if match:
            for _ in range(3):
                absolute, self_out = draw.random() < 0.4, draw.random() < 0.3 and n > 1
                k = draw.choice((1, draw.randint(1, n), n)) - self_out
                k = max(1, k)
                arguments, tail, name = begin(dense)
                want, got = [(np.empty((rows, k), np.float32), np.empty((rows, k), np.int64)) for _ in range(2)]
                C.topk(p(self.now), i64(rows), i64(n), None, None, None, i64(k), 0, int(absolute), int(self_out), p(want[0]), p(want[1]))
                status = kernels.match_cosine(*arguments, k, absolute, self_out, address(got[0]), address(got[1]), *tail)
                assert status == -1
                self.same(f"match_cosine(k={k}, absolute={absolute}, exclude_self={self_out})", name,
                          values=(got[0], want[0]), indices=(got[1], want[1]))  # fmt: skip
            self.pair(begin, rows, n)
            return

        m = rows * count
        out = np.empty(m, np.float32), np.empty(m, np.int64), np.empty(rows + 1, np.int64), np.empty(m, np.uint8)
        for _ in range(2):
            k, rule = draw.choice((1, draw.randint(1, count), count)), draw.choice(RULES)
            arguments, tail, name = begin()
            want, got = [(np.empty((rows, k), np.float32), np.empty((rows, k), np.int64)) for _ in range(2)]
            C.topk(p(self.now), i64(rows), i64(count), p(chosen), p(scale), p(bias), i64(k), *map(int, rule), 0, p(want[0]), p(want[1]))
            status = kernels.encode_topk(
                *arguments, address(scale), address(bias), k, *rule, address(got[0]), address(got[1]), *tail
            )  # fmt: skip
            assert status == -1
            self.same(f"encode_topk(k={k}, relu, absolute={rule})", name, values=(got[0], want[0]), indices=(got[1], want[1]))

        theta, band = draw.array(n), draw.choice((-1.0, -1.0, 0.25, 2.0, 0.0))
        arguments, tail, name = begin(dense)
        found = C.threshold(p(self.now), i64(rows), i64(count), p(chosen), p(scale), p(bias), p(theta), ctypes.c_float(band), *map(p, out))
        entries = kernels.Entries()
        status = kernels.encode_threshold(*arguments, address(scale), address(bias), address(theta), band, entries.address, *tail)
        ragged(f"encode_threshold(half_band={band})", name, status, found, *out)

        total, (least, kept) = draw.choice((1, rows, draw.randint(1, m), m)), np.empty((2, 1), np.float32)
        arguments, tail, name = begin(dense)
        found = C.batch_topk(p(self.now), i64(rows), i64(count), p(chosen), p(scale), p(bias), i64(total), *map(p, out[:3]), p(least))
        entries = kernels.Entries()
        status = kernels.encode_batch_topk(*arguments, address(scale), address(bias), total, address(kept), entries.address, *tail)
        ragged(f"encode_batch_topk({total})", name, status, found, *out[:3])
        self.same("encode_batch_topk", name, min_kept=(kept[0], least[0]))

        if chosen is None:
            gate, magnitude = draw.array(n), draw.array(n)
            with np.errstate(all="ignore"):
                stretch = np.exp(draw.array(n))
            arguments, tail, name = begin(dense)
            found = C.gated(p(self.now), i64(rows), i64(n), p(gate), p(stretch), p(magnitude), *map(p, out[:3]))
            entries = kernels.Entries()
            status = kernels.encode_gated(*arguments, address(gate), address(stretch), address(magnitude), entries.address, *tail)
            ragged("encode_gated", name, status, found, *out[:3])

            arguments, tail, name = begin(dense)
            want, got = np.empty((2, rows, (n + 63) // 64), np.int64)
            C.signs(p(self.now), i64(rows), i64(n), p(bias), None, p(want))
            assert kernels.spline_code(*arguments, address(bias), address(got), *tail) == -1
            self.same("spline_code", name, words=(got, want))
            self.enclosed(begin, rows, n, scale, bias)

    def pair(self, begin: Any, rows: int, n: int) -> None:
        draw, C = self.draw, self.oracle
        arguments, (_, _, threads), name = begin(("screen",))
        k_ab, k_ba = draw.randint(1, n), draw.randint(1, min(rows, 8))
        shapes = ((rows, k_ab), (n, k_ba), (rows, 1))
        got = [np.empty(s, t) for s in shapes for t in (np.float32, np.int64)]
        want = [np.empty(s, t) for s in shapes for t in (np.float32, np.int64)]
        if self.kernels.match_pair(*arguments, k_ab, k_ba, *map(address, got), 0, threads) == self.kernels.UNSUPPORTED:
            return
        back, negated = np.ascontiguousarray(self.now.T), -self.now
        C.topk(p(self.now), i64(rows), i64(n), None, None, None, i64(k_ab), 0, 0, 0, p(want[0]), p(want[1]))
        C.topk(p(back), i64(n), i64(rows), None, None, None, i64(k_ba), 0, 0, 0, p(want[2]), p(want[3]))
        C.topk(p(negated), i64(rows), i64(n), None, None, None, i64(1), 0, 0, 0, p(want[4]), p(want[5]))
        names = ("ab", "ab_index", "ba", "ba_index", "low", "low_index")
        want[4] = -want[4]
        self.same(f"match_pair({k_ab}, {k_ba})", name, **{key: (a, b) for key, a, b in zip(names, got, want, strict=True)})

    def enclosed(self, begin: Any, rows: int, n: int, scale: Array | None, bias: Array | None) -> None:
        """Every score lies in the interval that the screen claims for it."""
        arguments, (_, _, threads), name = begin(("screen",))
        lo, hi = np.empty((2, rows, n), np.float32)
        bf16 = self.draw.random() < 0.5
        status = self.kernels.screen_bounds(*arguments, address(scale), address(bias), bf16, address(lo), address(hi), threads)
        if status == self.kernels.UNSUPPORTED:
            return
        with np.errstate(all="ignore"):
            score = self.now if scale is None else self.now * scale
            score = score if bias is None else score + bias
            wrong = (score > hi) | (score < lo) | (np.isnan(score) & (hi < inf))
        self.cases += 1
        if wrong.any():
            at = tuple(int(i[0]) for i in np.nonzero(wrong))
            raise AssertionError(f"check({self.number}): {name}, bf16 {bf16}: score {score[at]} of {at} outside {lo[at]} .. {hi[at]}")

    # ---- decode, its gradients, the optimisers

    def slots(self, features: int, t: int) -> tuple[tuple[Any, ...], Array, Array, Array]:
        draw = self.draw
        rows, k = draw.size(most=9, edges=(1,)), draw.size(most=20, edges=(1, 15, 16, 17, 33))
        dense = draw.random() < 0.5
        if dense:
            crow = np.arange(0, rows * k + 1, k, dtype=np.int64)
        else:
            crow = np.cumsum([0, *(draw.choice((0, draw.randint(0, 35))) for _ in range(rows))]).astype(np.int64)
        n = int(crow[-1])
        few = draw.choice((1, features, features))
        indices = np.array([draw.randrange(few) for _ in range(n)], np.int64)
        given = indices.astype(np.int32) if draw.random() < 0.5 else indices
        self.kept.append(given)
        where = (address(given), 0 if dense else address(crow), rows, k if dense else 0, n, features, int(given is indices))
        return where, crow, indices, draw.array(n, t=t)

    def sparse(self) -> None:
        draw, C, kernels = self.draw, self.oracle, self.kernels
        t = draw.choice((F32, F32, BF16, F16))
        features = draw.size(most=40, edges=(1, 64, 65, 130))
        d = draw.size(most=70, edges=(1, 15, 16, 17, 63, 64, 65, 128, 255, 256, 257, 300, 520))
        where, crow, indices, values = self.slots(features, t)
        rows, n = where[2], where[4]
        w, grad, bias = draw.matrix(features, d, t), draw.matrix(rows, d, t), draw.maybe(d)
        w_at, w_f, w_d = draw.laid(w, t)
        values_at, grad_at = stored(values, t), stored(grad, t)
        said = f"{where[2:5]}, w {w.shape}, type {t}, strides {(w_f, w_d)}"
        read = {F32: np.float32, BF16: np.uint16, F16: np.float16}[t]

        def seen(a: Array) -> Array:
            return (a.astype(np.uint32) << 16).view(np.float32) if t == BF16 else a.astype(np.float32)

        self.level()
        got, want = np.empty((rows, d), read), np.empty((rows, d), np.float32)
        C.decode(p(values), p(indices), p(crow), i64(rows), p(w), i64(d), p(bias), t, p(want))
        status = kernels.decode(
            where, t, address(values_at), (address(w_at), w_f, w_d, d), address(bias), address(got), draw.choice((1, 2))
        )
        assert status == -1
        self.same("decode", said, y=(seen(got), want))

        self.level()
        got, want = np.empty(n, read), np.empty(n, np.float32)
        C.dvalues(p(grad), p(indices), p(crow), i64(rows), p(w), i64(d), int(w_d != 1 and d > 1), t, p(want))
        status = kernels.decode_dvalues(where, t, address(grad_at), (address(w_at), w_f, w_d, d), address(got), draw.choice((1, 2)))
        assert status == -1
        self.same("decode_dvalues", said, dvalues=(seen(got), want))

        self.level()
        want = np.empty((features, d), np.float32)
        C.dweight(p(values), p(indices), p(crow), i64(rows), p(grad), i64(d), i64(features), t, p(want))
        transposed = draw.random() < 0.5
        got = np.full((d, features) if transposed else (features, d), 7, read)
        strides = (1, features) if transposed else (d, 1)
        status = kernels.decode_dweight(where, t, address(values_at), address(grad_at), (address(got), *strides, d), draw.choice((1, 2)))
        assert status == -1
        self.same("decode_dweight", said, out=(seen(np.ascontiguousarray(got.T if transposed else got)), want))

    def step(self) -> None:
        draw, C, kernels = self.draw, self.oracle, self.kernels
        features = draw.size(most=40, edges=(1, 127, 128, 129, 150))
        d = draw.size(most=70, edges=(1, 15, 16, 17, 64, 65, 255, 256, 257, 300))
        where, crow, indices, values = self.slots(features, F32)
        rows = where[2]
        sparse = draw.random() < 0.6
        has = np.bincount(indices, minlength=features) > 0 if sparse else np.ones(features, bool)
        given = draw.matrix(rows, d, F32) if sparse else draw.matrix(features, d, F32)
        transposed = draw.random() < 0.5
        kinds = ("normal", "normal", "sparse", "tiny", "integers", "wild")
        matrices = [draw.array(features * d, draw.choice(kinds)).reshape(features, d) for _ in range(3)]
        if draw.random() < 0.8:
            matrices[2] = np.abs(matrices[2])

        def there(a: Array) -> Array:
            return np.ascontiguousarray(a.T if transposed else a)

        strides = (1, features) if transposed else (d, 1)
        gradient_strides = (d, 1)
        given_at = given
        if not sparse and draw.random() < 0.5 and transposed:
            given_at, gradient_strides = np.ascontiguousarray(given.T), (1, features)
        source = (sparse, where, address(values), address(given_at), *gradient_strides)
        factor = np.array([draw.choice((1.0, 0.37, 0.0, np.inf))], np.float32) if draw.random() < 0.5 else None
        project, normalise, threads = draw.random() < 0.5, draw.random() < 0.5, draw.choice((1, 2))
        said = f"{'slots' if sparse else 'dense'}, w {(features, d)}, transposed {transposed}, project {project}, normalise {normalise}"

        def gradient() -> Array:
            if not sparse:
                return given
            grad = np.empty((features, d), np.float32)
            C.dweight(p(values), p(indices), p(crow), i64(rows), p(given), i64(d), i64(features), F32, p(grad))
            return grad

        self.level()
        lr, beta1, beta2, eps, decay = 1e-3, draw.choice((0.9, 0.0, 0.5, 0.3)), draw.choice((0.999, 0.9)), draw.choice((1e-8, 0.0)), 0.1
        options = (lr, beta1, beta2, eps, draw.choice((0.0, decay)), draw.choice((1, 2, 1000)), project, normalise)
        got, want = [there(a) for a in matrices], [a.copy() for a in matrices]
        has_at = has.astype(np.uint8)
        grad = gradient()
        C.adam(p(grad), p(has_at), i64(features), i64(d), ctypes.c_float(1.0 if factor is None else float(factor[0])), *map(p, want),
               *(ctypes.c_double(o) for o in options[:5]), i64(options[5]), int(project), int(normalise))  # fmt: skip
        status = kernels.adam(source, address(factor), (*map(address, got), features, d, *strides), options, threads)
        assert status == -1
        self.same(f"adam{options}", said, **{name: (there_back, w) for name, there_back, w in zip(
            "wmv", [a.T if transposed else a for a in got], want, strict=True)})  # fmt: skip

        self.level()
        lr, momentum, share = 1e-2, draw.choice((0.9, 0.5, 0.7)), draw.choice((0.01, 0.5, 1.0, 0.3))
        got, want = [there(a) for a in matrices[:2]], [a.copy() for a in matrices[:2]]
        grad = gradient()
        C.signum(p(grad), p(has_at), i64(features), i64(d), *map(p, want), *(ctypes.c_double(o) for o in (lr, momentum, share)),
                 int(project), int(normalise))  # fmt: skip
        given_to = (*map(address, got), 0, features, d, *strides)
        status = kernels.signum(source, given_to, (lr, momentum, share, project, normalise), threads)
        assert status == -1
        self.same("signum", said, **{name: (a.T if transposed else a, w) for name, a, w in zip("yz", got, want, strict=True)})

        self.level()
        w = there(matrices[0])
        got = np.empty(1, np.float32)
        grad = gradient()
        want = C.grad_squares(p(grad), p(has_at), i64(features), i64(d), p(matrices[0]), int(project))
        assert kernels.grad_squares(source, (address(w), 0, 0, features, d, *strides), project, address(got), threads) == -1
        self.same("grad_squares", said, total=(got[0], np.float32(want)))

    # ---- codes

    def codes(self) -> None:
        draw, C, kernels = self.draw, self.oracle, self.kernels
        t = draw.choice((F32, BF16, F16, 3))
        rows, n = draw.size(most=9, edges=(1, 4, 5)), draw.size(most=200, edges=(1, 63, 64, 65, 127, 128, 129, 640))
        gap = draw.choice((0, 3))
        z = draw.array(rows * n, t=F32 if t == 3 else t).reshape(rows, n)
        z_at = np.zeros((rows, n + gap), np.uint8 if t == 3 else stored(z[:1], t).dtype)
        z_at[:, :n] = z > 0 if t == 3 else stored(z, t)
        part = np.array([draw.random() < 0.7 for _ in range(n)], np.uint8) if draw.random() < 0.5 else None
        n_words, bits, layer, seed = (n + 63) // 64, draw.choice((64, 128)), draw.randrange(2**32), draw.randrange(2**64)
        said = f"type {t}, z {z.shape}, bits {bits}"
        want, got = np.zeros((2, rows, n_words), np.int64)
        C.signs(p(z), i64(rows), i64(n), None, p(part), p(want))
        self.level()
        assert kernels.pack_signs(address(z_at), t, rows, n + gap, n, address(part), address(got), draw.choice((1, 2))) == -1
        self.same("pack_signs", said, words=(got, want))
        hashes, hashed = np.empty((2, rows, bits // 64), np.int64)
        C.hash(p(want), i64(rows), i64(n_words), None, ctypes.c_uint32(layer), ctypes.c_uint64(seed), bits, p(hashes))
        self.level()
        assert kernels.hash_signs(address(z_at), t, rows, n + gap, n, address(part), (layer, seed, bits), address(hashed), 1) == -1
        self.same("hash_signs", said, hashes=(hashed, hashes))
        self.level()
        assert kernels.hash_code(address(want), rows, n_words, n_words, 0, (layer, seed, bits), address(hashed), 1) == -1
        self.same("hash_code", said, hashes=(hashed, hashes))

        m, words = draw.size(most=70, edges=(1, 15, 16, 17, 64, 65, 150)), draw.size(most=5, edges=(1, 14, 15, 16, 17, 31))
        # Few distinct bytes, so that distances tie; all ones against zeros, so that counts are the largest.
        pool = np.frombuffer(draw.randbytes(2 * 8 * words), np.int64).reshape(2, words)
        pool = np.concatenate([pool, np.zeros((1, words), np.int64), np.full((1, words), -1, np.int64)])
        a = pool[[draw.randrange(4) for _ in range(rows)]].copy()
        b = pool[[draw.randrange(4) for _ in range(m)]] ^ np.array([draw.choice((0, 0, 1, 3 << 60)) for _ in range(m)], np.int64)[:, None]
        k = draw.choice((1, draw.randint(1, m), m))
        want, distance, index = np.empty((rows, m), np.int32), np.empty((rows, k), np.int32), np.empty((rows, k), np.int64)
        C.hamming(p(a), i64(rows), p(b), i64(m), i64(words), i64(k), p(want), p(distance), p(index))
        count = draw.random() < 0.5
        self.level()
        out = np.empty((m, rows), np.int32).T if draw.random() < 0.5 else np.empty((rows, m), np.int32)
        strides = [s // 4 for s in out.strides]
        sides = (address(a), rows, words, words), (address(b), m, words, words)
        assert kernels.hamming(*sides, address(out), *strides, count, 1) == -1
        self.same("hamming", f"{a.shape}, {b.shape}, vpopcnt {count}", out=(out, want))
        self.level()
        near, at = np.empty_like(distance), np.empty_like(index)
        assert kernels.hamming_topk(*sides, k, address(near), address(at), count, 1) == -1
        self.same(f"hamming_topk(k={k})", f"{a.shape}, {b.shape}, vpopcnt {count}", distance=(near, distance), index=(at, index))

        # count_codes is torch's sort: against a set.
        codes = torch.from_numpy(b[:, : draw.randint(1, min(words, 2))].copy())
        unique, inverse, counts = fastsae.codes.count_codes(codes)
        rank = sorted({tuple(row) for row in codes.tolist()})
        self.same("count_codes", str(tuple(codes.shape)), unique=(unique, np.array(rank)),
                  inverse=(inverse, [rank.index(tuple(row)) for row in codes.tolist()]),
                  counts=(counts, [codes.tolist().count(list(row)) for row in rank]))  # fmt: skip

    def run(self) -> None:
        before = self.kernels.level()
        try:
            self.draw.choice((self.engine, self.engine, self.engine, self.sparse, self.step, self.codes))()
        finally:
            self.kernels.set_level(before)


i64 = ctypes.c_int64
