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
        ranks: processes. parameters: of the whole dictionary, or of all members.
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
    layers: int = 1,
    cross_layer: bool = False,
    members: int = 1,
    skip: bool = False,
) -> Plan:
    """The cost of training sharded TopK dictionaries with ``optim.Adam`` in float32.

    Args:
        features, d, d_out: F, D, and D_out of a transcoder, whose targets are gathered too.
        ranks, copies: processes, and copies of the dictionary among them (a mesh of ``ranks / copies`` x ``copies``).
        tokens: of the run. batch: tokens a step, of all processes together, evenly owned.
        rates: of the machine; there are no defaults: measure them (``fastsae bench`` for the product and the copy).
        k, k_aux: latents a token, and of the AuxK term (0: none, or nothing is dead); of each layer and member.
        layers, cross_layer: of a ``Crosscoder``, or of a ``CrossLayerTranscoder``, whose ``d`` is ``d_model`` and F those of each layer.
        members: dictionaries of ``SAEs``. skip: a transcoder's linear paths past the dictionary, which every process holds whole.

    ``sent`` is what ``world.sent`` counts, to the byte where rows are even and without ``clip`` (which adds 4 to each other process of a
    copy and member); with copies where each process's features also have as many latents.
    ``weights`` and ``moments`` are exact, ``rows`` is an estimate. Times are a model: no overlap, no stragglers.

    Raises: TypeError, ValueError.
    """
    op = "plan"
    given = {"features": features, "d": d, "tokens": tokens, "ranks": ranks, "copies": copies, "batch": batch, "k": k}
    features, d, tokens, ranks, copies, batch, k = (checks.integer(op, name, value, 1) for name, value in given.items())
    layers, members = checks.integer(op, "layers", layers, 1), checks.integer(op, "members", members, 1)
    if ranks % copies:
        raise ValueError(f"{op}: ranks must be a multiple of copies={copies}, got {ranks}")
    if d_out is not None and (layers > 1 or cross_layer):
        raise ValueError(f"{op}: d_out must be None with several layers, got {d_out}")
    kept = [k, k_aux] if (k_aux := checks.integer(op, "k_aux", k_aux, 0)) else [k]
    whole = layers * d if d_out is None else checks.integer(op, "d_out", d_out, 1)
    rates = Rates(*(checks.number(op, f"rates.{name}", value) for name, value in zip(Rates._fields, rates)))
    widths = [(d, (layers - n) * d) for n in range(layers)] if cross_layer else [(layers * d, whole)]  # what each encoder reads, and writes
    targets, pre_bias, aux = cross_layer or d_out is not None, layers == 1 and not cross_layer and d_out is None, len(kept) - 1
    if skip and not targets:
        raise ValueError(f"{op}: skip needs d_out or cross_layer")
    read, written, encoders = sum(r for r, _ in widths), sum(w for _, w in widths), len(widths)
    paths = skip * sum(r * w for r, w in widths)
    shards, others, mine = ranks // copies, ranks - 1, -(-batch // ranks)
    own = -(-features // shards)  # of the largest process
    weights = 4 * members * (own * (read + written + encoders) + written + paths)
    to_all = 4 * (read + (1 + targets) * whole + aux * written)
    in_copy = encoders * sum(8 * n + 8 for n in kept) + 4 * (whole + aux * written)
    slots_of = encoders * sum(13 * n + 8 * shards for n in kept)  # value, feature, whether it is active; and how many a row
    sent = others * (mine * to_all + 16) + (shards - 1) * (mine * in_copy + pre_bias * 4 * d * len(kept)) + (copies - 1) * mine * slots_of
    moments = 2 * (weights - 4 * members * (written - whole))  # the biases of later layers are frozen
    slots = members * encoders * batch * sum(kept)
    gathered = 4 * members * batch * sum(kept) * (3 * written + read) // ranks  # decode, its two gradients, the encoder's
    waits = members * (4 + targets + pre_bias * len(kept) + encoders * (2 + 4 * aux)) + 1
    return Plan(
        ranks=ranks,
        parameters=members * (features * (read + written + encoders) + written + paths),
        weights=weights,
        moments=moments,
        rows=4 * members * batch * (2 * read + 4 * whole) + 40 * slots + 8 * own * members * encoders,
        sent=members * sent + 16 * others,  # the 16: that all are here, and once that the step is taken
        exchanges=waits if others else 0,
        product=members * (2 * -(-batch // copies) * own * read + 4 * batch * paths) / rates.flops,
        passes=(2 * (weights + moments) + gathered) / rates.memory,
        network=(members * sent + 16 * others) / rates.network + (waits if others else 0) * rates.latency,
        steps=-(-tokens // batch),
    )
