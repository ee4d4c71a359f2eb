"""What a sharded training run costs: memory, bytes, time, for given rates of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastsae._core import checks


class Rates(NamedTuple):
    """Of one process, as measured: ``flops``, multiplications and additions a second of the encoder's product; ``memory``, bytes a second;
    ``network``, bytes a second that it sends; ``latency``, seconds an exchange."""

    flops: float
    memory: float
    network: float
    latency: float


@dataclass(frozen=True)
class Plan:
    """Of one process, in bytes and seconds.

    Attributes:
        ranks: processes. parameters: of the whole dictionary.
        weights, moments: what it holds of the parameters, and of Adam's moments. rows: what a step needs beside them.
        sent: bytes that it sends to others in a step. exchanges: how often it waits for them.
        product, passes, network: seconds of a step for the encoder's product, for traffic in memory (Adam's pass over the weights and
            moments, the rows of the decoder and of its gradients), and for exchanges. Nothing overlaps.
        steps: of the run.
    """

    ranks: int
    parameters: int
    weights: int
    moments: int
    rows: int
    sent: int
    exchanges: int
    product: float
    passes: float
    network: float
    steps: int

    @property
    def memory(self) -> int:
        return self.weights + self.moments + self.rows

    @property
    def step(self) -> float:
        """Seconds."""
        return self.product + self.passes + self.network

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.step * self.steps


def plan(
    features: int,
    d: int,
    *,
    tokens: int,
    rates: Rates,
    ranks: int = 1,
    copies: int = 1,
    batch: int = 8192,
    k: int = 64,
    k_aux: int = 0,
    d_out: int | None = None,
) -> Plan:
    """The cost of training a sharded TopK dictionary with ``optim.Adam`` in float32.

    Args:
        features, d, d_out: F, D, and D_out of a transcoder, whose targets are gathered too.
        ranks, copies: processes, and copies of the dictionary among them (a mesh of ``ranks / copies`` x ``copies``).
        tokens: of the run. batch: tokens a step, of all processes together, evenly owned.
        rates: of the machine; there are no defaults: measure them (``fastsae bench`` for the product and the copy).
        k, k_aux: latents a token, and of the AuxK term (0: none, or nothing is dead).

    ``sent`` is what ``world.sent`` counts, to the byte where rows are even and without ``clip`` (which adds 4 to each other process of a
    copy); with copies where each process's features also have as many latents.
    ``weights`` and ``moments`` are exact, ``rows`` is an estimate. Times are a model: no overlap, no stragglers.

    Raises: TypeError, ValueError.
    """
    op = "plan"
    given = {"features": features, "d": d, "tokens": tokens, "ranks": ranks, "copies": copies, "batch": batch, "k": k}
    features, d, tokens, ranks, copies, batch, k = (checks.integer(op, name, value, 1) for name, value in given.items())
    if ranks % copies:
        raise ValueError(f"{op}: ranks must be a multiple of copies={copies}, got {ranks}")
    k_aux = checks.integer(op, "k_aux", k_aux, 0)
    out = d if d_out is None else checks.integer(op, "d_out", d_out, 1)
    rates = Rates(*(checks.number(op, f"rates.{name}", value) for name, value in zip(Rates._fields, rates)))
    shards = ranks // copies
    own = -(-features // shards)  # of the largest process
    weights = 4 * (own * (d + out + 1) + out)
    selections = [k, k_aux] if k_aux else [k]
    pre_bias = 4 * d * len(selections) if d_out is None else 0
    others, mine = ranks - 1, -(-batch // ranks)
    to_all = 4 * (d + (0 if d_out is None else out)) + 4 * out * len(selections)
    in_copy = sum(8 * kept + 8 + 4 * out for kept in selections)
    slots_of = sum(13 * kept + 8 * shards for kept in selections)  # value, feature, whether it is active; and how many a row
    sent = others * (mine * to_all + 2 * 16)  # the last: that all are here, and that the step is taken
    sent += (shards - 1) * (mine * in_copy + pre_bias) + (copies - 1) * mine * slots_of
    slots = batch * sum(selections)
    adam = 6 * weights  # weights and two moments, read and written
    gathered = 4 * slots * (2 * out + out + d) // ranks  # decode, its two gradients, the encoder's
    exchanges = (4 * len(selections) + 3 + (d_out is not None) + (d_out is None) * len(selections)) if others else 0
    return Plan(
        ranks=ranks,
        parameters=features * (d + out + 1) + out,
        weights=weights,
        moments=2 * weights,
        rows=4 * batch * (2 * d + 4 * out) + 40 * slots + 8 * own,
        sent=sent,
        exchanges=exchanges,
        product=2 * -(-batch // copies) * own * d / rates.flops,
        passes=(adam + gathered) / rates.memory,
        network=sent / rates.network + exchanges * rates.latency,
        steps=-(-tokens // batch),
    )
