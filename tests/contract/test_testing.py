"""Checkers must catch wrong results: every operation's reference result passes, and damaged copies of it do not.

The damages are those a broken kernel makes: swapped slots, a rejected entry kept, a value off by more than its rounding, a missing or
repeated entry, a flipped bit, another dtype or shape, NaN. A damage that does not change a sample (a swap of equal values) does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import testing
from fastsae.dispatch import OPS, Op
from fastsae.testing import Mismatch
from fastsae.verify import call

CPU = torch.device("cpu")


def run(op: Op, args: tuple[Any, ...]) -> Any:
    return call(op, op.rows[-1], args)


def sample(op: str, **wanted: Any) -> tuple[Any, ...]:
    """Arguments of ``op`` in float32 by hand, large enough for every damage."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    integers = wanted.get("integers", False)
    x, W, b = (normal(6, 40), normal(50, 40), normal(50)) if not integers else tuple(
        torch.randint(-2, 3, shape, generator=generator).float() for shape in ((6, 4), (50, 4), (50,))
    )  # fmt: skip
    indices = torch.randint(0, 50, (6, 5), generator=generator)
    words = torch.randint(-(2**63), 2**63 - 1, (9, 2), generator=generator)
    return {
        "encode_topk": (x, W, b, None, None, None, None, 5, wanted.get("relu", False)),
        "encode_threshold": (x, W, b, None, None, None, None, torch.full((50,), 2.0), wanted.get("bandwidth")),
        "encode_batch_topk": (x, W, b, None, None, None, None, wanted.get("k", 4.0)),
        "encode_gated": (x, W, b, b / 8 if not integers else b * 0, b.flip(0), None, None),
        "decode": (normal(6, 5), indices, None, W, normal(W.shape[1])),
        "decode_dvalues": (normal(6, W.shape[1]), indices, None, W),
        "decode_dweight": (normal(6, 5), indices, None, normal(6, 8), torch.empty(50, 8)),
        "adam": (W, W / 9, W.square(), normal(6, 40), normal(6, 5), indices, None, None, 1e-3, 0.9, 0.999, 1e-8, 0.1, 3, True, True),
        "signum": (W, W + W / 9, normal(6, 40), normal(6, 5), indices, None, 1e-3, 0.95, 0.5, True, True),
        "grad_squares": (W, normal(6, 40), normal(6, 5), indices, None, True),
        "select_topk": (x @ W.T, 5, wanted.get("relu", False)),
        "match_cosine": (x, W, 5, wanted.get("absolute", False), False, 1e-8),
        "match_pair": (x, W, 5, 3, 1e-8),
        "spline_code": (x, W, b, None),
        "spline_hash": (x, W, b, None, 3, 5, 128),
        "pack_signs": (x @ W.T, None),
        "hash_signs": (x @ W.T, None, 3, 5, 128),
        "hash_code": (words, None, 3, 5, 128),
        "hamming": (words, words.flip(0), torch.empty(9, 9, dtype=torch.int32)),
        "hamming_topk": (words, words.flip(0), 4),
        "count_codes": (words[torch.randint(0, 9, (20,), generator=generator)],),
        "topk_changes": (W, b, None, None, *normal(2, 3, W.shape[1]).double(), 5, False, False),
    }[op]


Damage = Callable[[tuple[Any, ...], list[Tensor]], None]


def results(op: str, **wanted: Any) -> tuple[tuple[Any, ...], list[Tensor]]:
    args = sample(op, **wanted)
    result = run(OPS[op], args)
    return args, [t.clone() for t in ((result,) if isinstance(result, Tensor) else result)]


def verdict(op: str, args: tuple[Any, ...], tensors: list[Tensor]) -> float:
    return OPS[op].check(args, tensors[0] if len(tensors) == 1 else tuple(tensors))


def caught(op: str, damage: Damage, **wanted: Any) -> None:
    args, tensors = results(op, **wanted)
    verdict(op, args, tensors)
    before = [t.clone() for t in tensors]
    damage(args, tensors)
    changed = any(a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b) for a, b in zip(before, tensors))
    assert changed or len(before) != len(tensors), "the damage changed nothing"
    with pytest.raises(Mismatch):
        verdict(op, args, tensors)


@pytest.mark.parametrize("name", OPS)
def test_every_operation_is_covered_and_its_result_passes(name: str) -> None:
    args, tensors = results(name)
    assert 0 <= verdict(name, args, tensors) <= 1


# ---------------------------------------------------------------- damages that every operation knows


def every_result() -> Iterator[Any]:
    for name in OPS:
        for position in range(len(results(name)[1])):
            if results(name)[1][position].numel():
                yield pytest.param(name, position, id=f"{name}-{position}")


RESULTS = list(every_result())


@pytest.mark.parametrize(("name", "position"), RESULTS)
def test_another_dtype(name: str, position: int) -> None:
    def damage(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        t = tensors[position]
        others = {torch.float64: torch.float32, torch.int64: torch.int32}
        tensors[position] = t.to(others.get(t.dtype, torch.float64 if t.is_floating_point() else torch.int64))

    caught(name, damage)


@pytest.mark.parametrize(("name", "position"), RESULTS)
def test_another_shape(name: str, position: int) -> None:
    def shorter(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[position] = tensors[position][:-1] if tensors[position].dim() else tensors[position].reshape(1)

    def deeper(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[position] = tensors[position].unsqueeze(0)

    for damage in (shorter, deeper):
        caught(name, damage)


@pytest.mark.parametrize(("name", "position"), RESULTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_garbage_in_one_element(name: str, position: int, value: float) -> None:
    def damage(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        flat = tensors[position].reshape(-1)
        # An integer's garbage: beyond every size, or negative.
        flat[flat.shape[0] // 2] = value if flat.is_floating_point() else (2**31 - 1 if value > 0 else -5)
        tensors[position] = flat.reshape(tensors[position].shape)

    caught(name, damage)


# ---------------------------------------------------------------- values


def magnitudes(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> Tensor:
    """``sum |terms|`` of each value."""
    if name.startswith("decode"):
        reference = OPS[name].reference
        sizes = tuple(a.abs() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        if name != "decode_dweight":
            return reference(*sizes)
        out = torch.empty_like(args[4])
        reference(*sizes[:4], out)
        return out
    if name in ("match_cosine", "match_pair"):
        unit = [v.abs() / v.norm(dim=1, keepdim=True) for v in args[:2]]
        return (unit[0] @ unit[1].T).gather(1, tensors[1])
    x, W, b = args[0], args[1], (args[4] if name == "encode_gated" else args[2])
    scores = (x.abs() @ W.abs().T) * (args[3].exp() if name == "encode_gated" else 1) + b.abs()
    if name == "encode_topk":
        return scores.gather(1, tensors[1])
    row = torch.arange(6).repeat_interleave(tensors[2].diff())
    return scores[row, tensors[1]]


FLOATING = [name for name in OPS if name.startswith(("encode", "decode", "match"))]


@pytest.mark.parametrize("name", FLOATING)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_off_by_more_than_rounding(name: str, sign: int) -> None:
    """20 ulp of the sum of magnitudes: over twice any error of the plain computation here, plus two."""

    def damage(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        size = magnitudes(name, args, tensors).reshape(-1)
        at = int(size.argmax())
        tensors[0].reshape(-1)[at] += sign * 20 * torch.finfo(torch.float32).eps * size[at]

    caught(name, damage)


@pytest.mark.parametrize("name", FLOATING)
def test_a_rounding_is_allowed(name: str) -> None:
    args, tensors = results(name)
    size = magnitudes(name, args, tensors).reshape(tensors[0].shape)
    # One ulp of the sum of magnitudes at the largest value of each row keeps every order.
    flat = tensors[0].reshape(-1)
    flat[0] += torch.finfo(torch.float32).eps * size.reshape(-1)[0]
    assert verdict(name, args, tensors) <= 1


# ---------------------------------------------------------------- top-k


def swap_slots(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    for t in tensors[:2]:
        t[2, [0, 3]] = t[2, [3, 0]]


def swap_indices(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    tensors[1][2, [0, 3]] = tensors[1][2, [3, 0]]


def keep_a_rejected(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """The best rejected entry in place of the worst kept one, with its own right value."""
    score = args[0] @ args[1].T + args[2]
    order = score[3].argsort(descending=True)
    tensors[0][3, 4], tensors[1][3, 4] = score[3, order[5]], order[5]


def repeat_an_index(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    tensors[0][1, 1], tensors[1][1, 1] = tensors[0][1, 0].clone(), tensors[1][1, 0].clone()


@pytest.mark.parametrize("damage", [swap_slots, swap_indices, keep_a_rejected, repeat_an_index])
def test_topk(damage: Damage) -> None:
    caught("encode_topk", damage)


def test_topk_does_not_clamp_without_relu_nor_the_reverse() -> None:
    args = (*sample("encode_topk")[:6], None, 50, True)
    result = OPS["encode_topk"].reference(*args)
    OPS["encode_topk"].check(args, result)
    with pytest.raises(Mismatch):
        OPS["encode_topk"].check((*args[:8], False), result)
    with pytest.raises(Mismatch):
        OPS["encode_topk"].check(args, OPS["encode_topk"].reference(*args[:8], False))


def test_topk_ties() -> None:
    """Among equal scores the lower index stands first, and is kept first at the boundary."""
    x, W = torch.ones(1, 1), torch.tensor([[3.0], [5.0], [3.0], [5.0], [3.0]])
    args = (x, W, None, None, None, None, None, 3, False)
    check = OPS["encode_topk"].check
    check(args, (torch.tensor([[5.0, 5, 3]]), torch.tensor([[1, 3, 0]])))
    for indices in ([3, 1, 0], [1, 3, 2], [1, 3, 4], [0, 1, 3]):
        with pytest.raises(Mismatch):
            check(args, (W.T[:, indices], torch.tensor([indices])))
    # With relu equal clamped values hide different scores; equal scores stay ordered.
    args = (x, -W, None, None, None, None, None, 3, True)
    check(args, (torch.zeros(1, 3), torch.tensor([[0, 2, 4]])))
    for indices in ([2, 0, 4], [0, 2, 1]):
        with pytest.raises(Mismatch):
            check(args, (torch.zeros(1, 3), torch.tensor([indices])))


def test_topk_nan_and_infinity() -> None:
    scores = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), float("nan"), 2.0])
    args = (torch.zeros(1, 0), torch.zeros(6, 0), scores, None, None, None, None, 4, False)
    check = OPS["encode_topk"].check
    check(args, (scores[[1, 4, 2, 5]][None], torch.tensor([[1, 4, 2, 5]])))
    for indices in ([4, 1, 2, 5], [2, 1, 4, 5], [1, 2, 5, 0], [1, 4, 5, 0], [1, 4, 2, 3]):
        with pytest.raises(Mismatch):
            check(args, (scores[indices][None], torch.tensor([indices])))
    with pytest.raises(Mismatch):  # the sign of an infinity
        check(args, (torch.tensor([[float("nan"), float("nan"), -float("inf"), 2.0]]), torch.tensor([[1, 4, 2, 5]])))


def test_topk_of_a_subset() -> None:
    args = (*sample("encode_topk")[:5], torch.arange(0, 50, 2), None, 5, False)
    values, indices = OPS["encode_topk"].reference(*args)
    OPS["encode_topk"].check(args, (values, indices))
    with pytest.raises(Mismatch, match="not chosen"):
        OPS["encode_topk"].check(args, (values, indices + 1))


# ---------------------------------------------------------------- ragged

RAGGED = ["encode_threshold", "encode_batch_topk", "encode_gated"]


def drop(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """The smallest entry of its row, cleanly: values, column, row pointers (and flags)."""
    at = int(tensors[0].argmax())
    row = int(torch.searchsorted(tensors[2], at, right=True)) - 1
    for i in (0, 1, 3):
        if len(tensors) > i and tensors[i].shape[:1] == tensors[1].shape:
            tensors[i] = torch.cat([tensors[i][:at], tensors[i][at + 1 :]])
    tensors[2] = tensors[2] - (torch.arange(7) > row).long()


def add(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """An entry that is not there, cleanly, with value 1, as feature 0 .. of a row that lacks it."""
    row = 1
    start, stop = tensors[2][1:3].tolist()
    column = next(c for c in range(50) if c not in tensors[1][start:stop].tolist())
    at = start + int((tensors[1][start:stop] < column).sum())
    score = (args[0] @ args[1].T)[row, column]
    if args[2] is not None and args[2].shape == (50,):
        score = score + args[2][column]
    new = (score.reshape(1), torch.tensor([column]), None, torch.ones(1, dtype=torch.uint8))
    for i in (0, 1, 3):
        if len(tensors) > i and tensors[i].dim() and tensors[i].numel():
            tensors[i] = torch.cat([tensors[i][:at], new[i], tensors[i][at:]])  # type: ignore[list-item]
    tensors[2] = tensors[2] + (torch.arange(7) > row).long()


def move_between_rows(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    tensors[2][2] += 1


def descending_columns(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    start = int(tensors[2][1])
    for t in tensors[:2]:
        t[[start, start + 1]] = t[[start + 1, start]]


def repeated_column(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    start = int(tensors[2][1])
    tensors[1][start + 1] = tensors[1][start]


def falling_pointers(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    tensors[2][[2, 3]] = tensors[2][[3, 2]]


def pointers_that_end_early(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    tensors[2][-1] -= 1


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize(
    "damage", [drop, add, move_between_rows, descending_columns, repeated_column, falling_pointers, pointers_that_end_early]
)
def test_ragged(name: str, damage: Damage) -> None:
    caught(name, damage)


@pytest.mark.parametrize("damage", [drop, add])
@pytest.mark.parametrize("k", [1.5, 100.0])
def test_batch_topk_full_and_not_full(damage: Damage, k: float) -> None:
    caught("encode_batch_topk", damage, k=k)


def test_batch_topk_swaps_a_kept_entry_for_a_smaller_one() -> None:
    def damage(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        drop(args, tensors)
        add(args, tensors)

    caught("encode_batch_topk", damage)


def test_min_kept() -> None:
    for wrong in (float("nan"), float("inf"), 0.0):

        def damage(args: tuple[Any, ...], tensors: list[Tensor], wrong: float = wrong) -> None:
            tensors[3] = torch.tensor(wrong)

        caught("encode_batch_topk", damage)

    def larger(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[3] = tensors[3] * 1.01

    caught("encode_batch_topk", larger)


def test_batch_topk_ties() -> None:
    """Equal scores: the lower row, then the lower feature."""
    x, W = torch.ones(2, 1), torch.tensor([[2.0], [1.0], [2.0]])
    args = (x, W, None, None, None, None, None, 1.5)  # three of the four twos
    check = OPS["encode_batch_topk"].check
    check(args, (torch.full((3,), 2.0), torch.tensor([0, 2, 0]), torch.tensor([0, 2, 3]), torch.tensor(2.0)))
    for col, crow in (([0, 2, 2], [0, 2, 3]), ([0, 0, 2], [0, 1, 3]), ([2, 0, 2], [0, 1, 3])):
        with pytest.raises(Mismatch):
            check(args, (torch.full((3,), 2.0), torch.tensor(col), torch.tensor(crow), torch.tensor(2.0)))


def flag_of_an_active_slot(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    tensors[3][int(tensors[0].argmax())] ^= 1


def flag_of_the_band(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    tensors[3][int(tensors[0].argmax())] ^= 2


def an_unknown_flag(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    tensors[3][0] |= 4


def a_value_in_an_inactive_slot(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    tensors[0][(tensors[3] == 2).nonzero()[0]] = 1e-9


@pytest.mark.parametrize("damage", [flag_of_an_active_slot, flag_of_the_band, an_unknown_flag, a_value_in_an_inactive_slot, drop, add])
def test_straight_through_band(damage: Damage) -> None:
    caught("encode_threshold", damage, bandwidth=2.0)


def test_a_threshold_is_strict_on_integers() -> None:
    args = (torch.ones(1, 1), torch.tensor([[1.0], [2.0], [3.0]]), None, None, None, None, None, torch.tensor(2.0), None)
    check, flags = OPS["encode_threshold"].check, torch.zeros(0, dtype=torch.uint8)
    check(args, (torch.tensor([3.0]), torch.tensor([2]), torch.tensor([0, 1]), flags))
    with pytest.raises(Mismatch, match="active entries differ"):
        check(args, (torch.tensor([2.0, 3.0]), torch.tensor([1, 2]), torch.tensor([0, 2]), flags))


def test_a_gate_is_strict_on_integers() -> None:
    zero = torch.zeros(2)
    args = (torch.ones(1, 1), torch.tensor([[1.0], [2.0]]), torch.tensor([-1.0, -1.0]), zero, zero, None, None)
    check = OPS["encode_gated"].check
    check(args, (torch.tensor([2.0]), torch.tensor([1]), torch.tensor([0, 1])))
    with pytest.raises(Mismatch):
        check(args, (torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), torch.tensor([0, 2])))


# ---------------------------------------------------------------- decode


def test_decode_of_nothing_is_exactly_the_bias() -> None:
    args = (torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64), None, torch.randn(3, 4), None)
    check = OPS["decode"].check
    check(args, torch.zeros(2, 4))
    with pytest.raises(Mismatch):
        check(args, torch.full((2, 4), 1e-30))


@pytest.mark.parametrize("name", ["decode", "decode_dvalues", "decode_dweight"])
def test_decode_drops_or_repeats_a_slot(name: str) -> None:
    args = results(name)[0]
    wrong = [a.clone() if isinstance(a, Tensor) else a for a in args]
    wrong[1][2, 1] = (wrong[1][2, 1] + 1) % 50
    with pytest.raises(Mismatch):
        OPS[name].check(args, run(OPS[name], tuple(wrong)))


def test_uninitialised_rows_of_a_weight_gradient() -> None:
    def damage(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        untouched = next(f for f in range(50) if f not in args[1].tolist()[0] and not bool((args[1] == f).any()))
        tensors[0][untouched, 3] = 1e-20

    caught("decode_dweight", damage)


# ---------------------------------------------------------------- match


def match_swap(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    swap_slots(args, tensors)


def match_rejected(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    unit = [v / v.norm(dim=1, keepdim=True) for v in args[:2]]
    score = unit[0] @ unit[1].T
    order = score[3].argsort(descending=True)
    tensors[0][3, 4], tensors[1][3, 4] = score[3, order[5]], order[5]


@pytest.mark.parametrize("name", ["match_cosine", "match_pair"])
@pytest.mark.parametrize("damage", [match_swap, swap_indices, match_rejected, repeat_an_index])
def test_match(name: str, damage: Damage) -> None:
    caught(name, damage)


def test_match_by_magnitude_keeps_the_sign() -> None:
    def damage(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[0][2, 1] *= -1

    caught("match_cosine", damage, absolute=True)


def test_most_negative_match() -> None:
    def another(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[5][0] = (tensors[5][0] + 1) % 50

    def least(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[4], tensors[5] = tensors[0][:, 0].clone(), tensors[1][:, 0].clone()

    for damage in (another, least):
        caught("match_pair", damage)


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize("name", ["spline_code", "spline_hash", "pack_signs", "hash_signs", "hash_code", "hamming"])
@pytest.mark.parametrize("bit", [0, 17, 63])
def test_one_flipped_bit(name: str, bit: int) -> None:
    if name == "hamming":
        bit %= 32

    def damage(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        t = tensors[0]
        # A sure bit: the row whose score is farthest from 0.
        place = (2, 0) if name != "spline_code" else ((args[0] @ args[1].T + args[2])[:, bit % 50].abs().argmax(), 0)
        shift = bit if name != "spline_code" or bit >= 50 else bit % 50
        t[place] ^= torch.tensor(-(2**63) if shift == 63 else -(2**31) if name == "hamming" and shift == 31 else 1 << shift).to(t.dtype)

    caught(name, damage)


def test_neighbours() -> None:
    def swap(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        for t in tensors:
            t[2, [0, 3]] = t[2, [3, 0]]

    def off_by_one(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[0][1, 1] += 1

    for damage in (swap, off_by_one):
        caught("hamming_topk", damage)
    words = torch.zeros(4, 1, dtype=torch.int64)  # all distances equal: the index alone decides
    with pytest.raises(Mismatch):
        OPS["hamming_topk"].check((words, words, 2), (torch.zeros(4, 2, dtype=torch.int32), torch.tensor([[1, 0]] * 4)))


def test_counts() -> None:
    def descending(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[0], tensors[1], tensors[2] = tensors[0].flip(0), tensors[0].shape[0] - 1 - tensors[1], tensors[2].flip(0)

    def moved(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[2][0] += 1
        tensors[2][1] -= 1

    for damage in (descending, moved):
        caught("count_codes", damage)


def test_changes_of_the_best() -> None:
    def later(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[0][0] += 1e-3 * (tensors[0][1] - tensors[0][0])

    def twice(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[1][1], tensors[2][1] = tensors[1][0], tensors[2][0]

    def backwards(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[1], tensors[2] = tensors[2], tensors[1]

    def missing(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[:3] = [values[1:] for values in tensors[:3]]
        tensors[3][0] -= 1

    def moved(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[3][0] += 1
        tensors[3][1] -= 1

    for damage in (later, twice, backwards, missing, moved):
        caught("topk_changes", damage)


# ---------------------------------------------------------------- the helpers themselves


def test_a_mismatch_names_the_first_element() -> None:
    with pytest.raises(Mismatch, match=r"words: 1 of 4 differ, first at \[1, 0\]: got 9, expected 3"):
        testing.check_equal(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [9, 4]]), "words")
    args, (y,) = results("decode")
    y[2, 3] += 1
    with pytest.raises(Mismatch, match=r"first at \[2, 3\]: got .*, expected"):
        OPS["decode"].check(args, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_have_no_band(dtype: torch.dtype) -> None:
    x, W = torch.randint(-2, 3, (4, 30)).to(dtype), torch.randint(-2, 3, (9, 30)).to(dtype)
    assert not testing.score_band(x, W, None).band.any()
    assert not testing.score_band(x, W, torch.ones(9), torch.ones(30).to(dtype), torch.full((9,), 2.0)).band.any()
    assert testing.score_band(x + 0.5, W + 0.25, None).band.all()
    huge = torch.full((1, 30), 2.0**14)
    assert testing.score_band(huge, huge, None).band.all()  # sums beyond the mantissa


@pytest.mark.parametrize("name", [name for name in OPS if name.startswith("encode")])
def test_integer_samples_pass_and_their_damage_does_not(name: str) -> None:
    args, tensors = results(name, integers=True)
    assert verdict(name, args, tensors) == 0

    def damage(args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        tensors[0].reshape(-1)[0] = torch.nextafter(tensors[0].reshape(-1)[0], torch.tensor(1e9))

    caught(name, damage, integers=True)
