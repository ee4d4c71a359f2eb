"""SAEs, crosscoders, cross-layer transcoders and stacks whose features lie on several processes."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastsae._core import checks, processes
from fastsae._core.world import ALONE, World
from fastsae.distributed.world import Ranks
from fastsae.gradients import Gradient
from fastsae.latents import Latents, RaggedLatents, Slots, TopKLatents
from fastsae.sae import init, selection
from fastsae.sae.activations import TopK
from fastsae.sae.checkpoints import KINDS, Trained
from fastsae.sae.cross_layer import CrossLayerTranscoder
from fastsae.sae.crosscoder import Crosscoder, of_config
from fastsae.sae.inputs import Inputs
from fastsae.sae.losses import Loss, Metrics, Terms
from fastsae.sae.module import SAE
from fastsae.sae.rows import normalised
from fastsae.sae.stack import SAEs
from fastsae.sae.step import Slots as Chosen
from fastsae.sae.step import encode_slots, step


class ShardedSAE(SAE):
    """What ``shard`` returns: an ``SAE`` whose ``[F, ..]`` parameters and buffers are this process's range of features.

    Every method that takes rows is called by all processes of the group, each with rows of its own, any number of them, also none; results
    are those of its rows. ``encode``, ``decode``, ``forward`` and ``loss`` are not differentiable: training is ``optim.Adam(sae).step(x)``.
    ``W_enc``, ``b_enc``, ``W_dec``, ``silent`` and ``dead_features`` are ``[own features, ..]``, those from ``world.start`` on;
    ``b_dec [D]`` is the same on all. ``d_sae`` and indices of latents are of the whole dictionary.

    Raises: besides the errors of ``SAE``: ``RankError`` where another process failed or was lost, ``SettingsError`` where processes were
    called differently.
    """

    checkpoints: ClassVar[Any]  # what ``Trainer`` writes and reads with: the module of that name, which says so
    world: Ranks  # pyright: ignore[reportIncompatibleVariableOverride]

    def extra_repr(self) -> str:
        world = self.world
        return f"{super().extra_repr()}, features {world.start} .. {world.start + world.cuts[-1]} of virtual={world.virtual}"

    def step_inputs(self, op: str, x: Tensor, target: Tensor | None = None, *rest: Any, **terms: Any) -> Inputs:
        """The rows that count of all processes, and this one's features."""
        own = super().step_inputs(op, x, target, *rest, **terms)
        self.begin(op, own.x, own.terms, target is None)
        wanted, found = self.world.gather(own.target), own.rows
        if found is not None and self.normalise_rows is not None:  # an autoencoder's, whose target is what was normalised
            rows, found = normalised(wanted, self.normalise_rows)
        else:
            rows = wanted if own.target is own.x else self.world.gather(own.x)
        return own._replace(x=rows, target=wanted, cast=(rows, own.weights), rows=found)

    def begin(self, op: str, rows: Tensor, *more: object) -> None:
        """Before the first exchange of an operation; nothing is exchanged where this raises."""
        if self.W_dec.dtype is not torch.float32 or checks.autocasting(rows.device):
            got = "autocast" if self.W_dec.dtype is torch.float32 else self.W_dec.dtype
            raise TypeError(f"{op}: a sharded SAE computes in float32, got {got}")
        self.world.begin(op, rows.shape[0], (self.config(), self.training, *more))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Latents:
        """``[.., D]`` to latents over all F features, of the rows of this process. BatchTopK selects over the rows of all processes in
        training mode. Not differentiable."""
        op, world = "SAE.encode", self.world
        with world.together(op):
            self._check_input(op, x)
            own = self.encoder_rows(x.reshape(-1, self.d_in))
            self.begin(op, own)
            rows, activation = world.gather(own), self.activation
            weights = replace(self._weights(rows), bandwidth=None)
            if isinstance(activation, TopK):
                k = activation.k
                values, features = selection.best(world.share(rows), weights, k, activation.relu, world, activation.absolute)
                return TopKLatents(values.reshape(*x.shape[:-1], k), features.reshape(*x.shape[:-1], k), self.d_sae)
            return self.brought_home(encode_slots(rows, weights, activation, world), x.shape[:-1])

    def brought_home(self, slots: Slots | Chosen, shape: Sequence[int]) -> RaggedLatents:
        """Latents of this process's rows over all F features, from slots of its own features and all rows; within an operation."""
        world, (values, indices, crow, *_) = self.world, slots
        assert crow is not None
        counts = crow.diff()
        each = world.home(counts)  # [processes, own rows]
        sizes = [int(part.sum()) for part in counts.split(world.share_rows)]
        keys = selection.keys(values, indices + world.start).split(sizes)
        got = torch.cat(world.within(keys, each.sum(1).tolist()))
        row = torch.arange(each.shape[1], device=crow.device).repeat(len(each)).repeat_interleave(each.reshape(-1))
        values, col = selection.unkeyed(got[torch.sort(row, stable=True).indices])  # a process's features lie above those before it
        crow = torch.cat([each.new_zeros(1), each.sum(0).cumsum(0)])
        return RaggedLatents(values, crow, col, self.d_sae, tuple(shape))

    @torch.no_grad()
    def decode(self, latents: Latents, x: Tensor | None = None) -> Tensor:
        """Latents of the rows of this process to ``[.., d_out]``; with a skip connection also the input. Not differentiable."""
        op, world = "SAE.decode", self.world
        with world.together(op):
            self._check_needs(op, x)
            checks.instance(op, "latents", latents, (TopKLatents, RaggedLatents), "TopKLatents or RaggedLatents")
            if isinstance(latents, RaggedLatents):
                latents = latents.trim()
            own = latents.slots.safe(self.d_sae).flat()
            assert own.crow is not None
            checks.tensor(op, "latents.values", own.values, (torch.float32,), self.W_dec)
            self.begin(op, own.crow[1:])
            counts = world.back(own.crow.diff())
            sizes = [int(part.sum()) for part in counts.split(world.share_rows)]
            values, features = (torch.cat(world.within([t] * world.shards, sizes)) for t in (own.values, own.indices))
            mine = (features >= world.start) & (features < world.start + world.cuts[-1])
            crow = torch.cat([counts.new_zeros(1), mine.cumsum(0)])[torch.cat([counts.new_zeros(1), counts.cumsum(0)])]
            slots = Slots(values[mine], features[mine] - world.start, crow)
            y = selection.decode_rows(slots, self.W_dec, world)[0] + self.b_dec
            if x is not None and self.W_skip is not None:
                y += selection.skipped(self.encoder_rows(x).reshape(-1, self.d_in), self.W_skip, world)
            y = y.reshape(*latents.batch_shape, self.d_out)
            if x is not None and self.needs_x and not self.skip:
                return self._restored(op, y, x)
            return y / self.scale[1] if self._scaled else y

    @torch.no_grad()
    def loss(self, x: Tensor, target: Tensor | None = None, **terms: Any) -> Loss:
        """As ``SAE.loss``, over the rows of all processes, and the same number on each; detached: gradients are ``step_gradients``'s."""
        with self.world.together("SAE.loss"):
            return Loss(*step(self.step_inputs("SAE.loss", x, target, **terms))[0][:3])

    @torch.no_grad()
    def step_gradients(self, *arguments: Any, **terms: Any) -> tuple[Metrics, dict[str, Gradient]]:
        """As ``SAE.step_gradients``, of the loss over the rows of all processes; gradients are those of this process's features."""
        with self.world.together("SAE.step_gradients"):
            return step(self.step_inputs("SAE.step_gradients", *arguments, **terms))

    def init_from(self, *_: Any, **__: Any) -> Any:
        raise ValueError("SAE.init_from: call it before fastsae.distributed.shard, on every process with the same rows")

    def portable(self) -> Any:
        raise ValueError("SAE.save: this process holds a part of the features: fastsae.distributed.gathered(sae) is the whole one")


class ShardedCrosscoder(Crosscoder, ShardedSAE):
    """What ``shard`` returns for a ``Crosscoder``: as ``ShardedSAE``."""

    def _flat(self, op: str, name: str, t: Tensor) -> Tensor:
        with self.world.together(op):
            return super()._flat(op, name, t)


class ShardedCrossLayerTranscoder(CrossLayerTranscoder):
    """What ``shard`` returns for a ``CrossLayerTranscoder``: its layers are each a ``ShardedSAE``, and it is called as these."""

    checkpoints: ClassVar[Any]  # as of ``ShardedSAE``

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[Any]:
        """``[.., L, d_model]`` to the latents ``[.., F]`` of each layer, of the rows of this process. Not differentiable."""
        op, world = "CrossLayerTranscoder.encode", self.world
        with world.together(op):
            if not self._joint:
                return super().encode(x)
            x = self._rows(op, "x", x, self[0].W_dec)
            own = x.reshape(-1, self.n_layers * self.d_model)
            found, _ = self._encode(self._begun(op, own).unflatten(1, (self.n_layers, -1)))
            return [cast(ShardedSAE, layer).brought_home(latents.slots, x.shape[:-2]) for layer, latents in zip(self, found)]

    @torch.no_grad()
    def decode(self, latents: Sequence[Latents], x: Tensor | None = None) -> Tensor:
        """The latents of each layer to ``[.., L, d_model]``, of the rows of this process. Not differentiable."""
        with self.world.together("CrossLayerTranscoder.decode"):
            return super().decode(latents, x)

    def _begun(self, op: str, rows: Tensor, *more: object) -> Tensor:
        """Of an operation on ``[own rows, n]`` those of all processes."""
        cast(ShardedSAE, self[0]).begin(op, rows, self.config(), *more)
        return self.world.gather(rows)

    def _all(self, op: str, x: Tensor, target: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        return self._begun(op, x.flatten(1), terms).view(-1, *x.shape[1:]), self.world.gather(target)

    @torch.no_grad()
    def loss(self, x: Tensor, target: Tensor | None = None, *, mask: Tensor | None = None, **terms: Any) -> Loss:
        """As ``CrossLayerTranscoder.loss``, over the rows of all processes, and the same number on each; detached."""
        with self.world.together("CrossLayerTranscoder.loss"):
            return Loss(*super().step_gradients(x, target, mask, **terms)[0][:3])

    @torch.no_grad()
    def step_gradients(self, *arguments: Any, **options: Any) -> tuple[Metrics, dict[str, Gradient]]:
        """As ``ShardedSAE.step_gradients``, of ``loss``."""
        with self.world.together("CrossLayerTranscoder.step_gradients"):
            return super().step_gradients(*arguments, **options)


K = TypeVar("K", bound=Trained)


def shard(
    sae: K,
    mesh_or_group: DeviceMesh | dist.ProcessGroup | None = None,
    *,
    virtual: int | None = None,
    timeout: float = 120,
    seed: int | None = None,
) -> K:
    """An SAE like this one whose features lie on the processes of a group, to the same bits on any number of them.

    All processes of the group call it with the same SAE (of the same seed, or of the same file), and then every operation. Features
    are cut into ``virtual`` ranges of ``ceil(F / virtual)``, the last ones shorter or empty; process r holds the r-th ``1 / n`` of
    these virtual shards. Selections, latents, reconstructions, losses, gradients, weights, silent counts and thresholds are bit for bit
    those of any other number of processes, also one, with the same ``virtual`` and the same rows in the order of ranks, however many
    each has; with the backends "cpu" and "triton", not the reference.

    Args:
        sae: an ``SAE``, ``Crosscoder``, ``CrossLayerTranscoder`` or ``SAEs``, float32, with any activation. It stays as it is, and is no
            longer needed. Of a stack each member, and of a cross-layer transcoder each layer, is cut alike; BatchTopK's selection over
            layers is one over layers and processes. One on the "meta" device takes no memory: every process draws its own features on
            torch's default device, with the numbers of ``SAE(.., seed=seed)``: layer l of a ``CrossLayerTranscoder`` those of
            ``seed + l``, as its constructor has it, and all members of ``SAEs`` the same. (It draws all, piece by piece, and keeps its
            own: a second for some 10^8 numbers.)
        mesh_or_group: of torch.distributed. A mesh of n x m, of all processes of the default group, holds m copies of the dictionary, each
            on n processes; a copy scores the rows that its processes own, and all copies take the same step. The order of rows is then
            that of the copies, and in each that of its processes. A mesh of one dimension, or a group: one copy. None: the default group.
        virtual: the number of virtual shards, n times a power of two (for n = 1: any, with copies at least 2). It is part of the result:
            keep it for a run on other numbers of processes. Default n (at least 2 with copies). With 1, on one process, this is a copy of
            ``sae``, and the bits are those of an SAE that was never sharded; they differ in rounding from those of more virtual shards.
        timeout: seconds that a process waits for the others in an exchange.
        seed: for an SAE on the meta device.

    Each process reads all rows (``B * D`` numbers, gathered), scores them against its own features, and sends ``8 k + 8`` bytes a row for
    a selection, ``4 D`` for a reconstruction (of a cross-layer transcoder's step once for all layers, ``D = L * d_model``; of a stack all
    of it for every member). Memory beyond the parameters: ``O(B (D + k))``. Nothing is chosen by what one process holds:
    there is no dense regime (at its start ReLU keeps half of all scores as slots), and the pre-bias's gradient always comes by features.

    Parameters are plain tensors of the process's own range: the fused operations take addresses, which a DTensor would only hide, and a
    DTensor knows no uneven ranges but torch's own. ``dtensors`` gives views of that kind.

    Raises: RuntimeError: no process group. TypeError: no SAE, or not float32. ValueError: ``virtual`` does not go with the processes; what
    is not there yet, by name; processes with different SAEs (``SettingsError``).

    Example:
        >>> torch.distributed.init_process_group()
        >>> sae = fastsae.distributed.shard(fastsae.SAE(4096, 2**20, fastsae.TopK(64), seed=0), virtual=8)
        >>> opt = fastsae.optim.Adam(sae, lr=1e-4, clip=1.0)
        >>> metrics = opt.step(x)  # x: this process's own tokens; metrics: those of all
    """
    op = "shard"
    if not processes.grouped():
        raise RuntimeError(f"{op}: there is no process group: call torch.distributed.init_process_group() first")
    known = isinstance(sae, KINDS)  # pyright: ignore[reportUnnecessaryIsInstance] # callers may have no checker
    members: list[SAE] = [sae] if isinstance(sae, SAE) else [*sae] if known else []
    meta = known and members[0].W_dec.is_meta
    device = torch.get_default_device() if meta or not known else members[0].W_dec.device
    world = _world(op, mesh_or_group, timedelta(seconds=checks.number(op, "timeout", timeout)), device)
    shards, least = world.shards, 2 if world.copies > 1 else 1
    with world.together(op):
        virtual = max(shards, least) if virtual is None else checks.integer(op, "virtual", virtual, least)
        each = virtual // shards
        if virtual % shards or (shards > 1 and each & (each - 1)):
            raise ValueError(f"{op}: virtual must be the {shards} processes that hold a dictionary times a power of two, got {virtual}")
        checks.instance(op, "sae", sae, KINDS, "an SAE, SAEs or a CrossLayerTranscoder")
        for member in members:
            _refuse(op, member)
        if meta is (seed is None):
            raise ValueError(f"{op}: seed must be given for an SAE on the meta device, and only for one, got {seed}")
        seed = None if seed is None else checks.integer(op, "seed", seed, -(2**63), 2**64 - 1)
        tensors = {} if meta else sae.state_dict()
        sums: dict[str, Any] = {name: zlib.crc32(t.detach().cpu().contiguous().numpy()) for name, t in tensors.items()}
        sums |= {"activation": str([m.activation for m in members])} if meta else {}  # its thresholds are not in the configuration
        settings = {"virtual": virtual, "config": sae.config(), "training": sae.training, "seed": seed, "checksums": sums}
        world.begin(op, 0, settings)
    if virtual == 1 and not meta:
        return copy.deepcopy(sae)
    world.cut(members[0].d_sae, virtual)
    layered = isinstance(sae, CrossLayerTranscoder)
    seeds = [None if seed is None else seed + layered * number for number in range(len(members))]
    return _joined(sae, [_part(member, world if virtual > 1 else ALONE, device, own) for member, own in zip(members, seeds)])


def _joined(like: K, parts: Sequence[SAE]) -> K:
    """What is of the kind of ``like``."""
    if isinstance(like, SAE):
        return cast(K, parts[0])
    kind = CrossLayerTranscoder if parts[0].world.virtual == 1 else ShardedCrossLayerTranscoder
    return cast(K, SAEs(parts) if isinstance(like, SAEs) else kind.of(parts))


def _part(sae: SAE, world: World, device: torch.device, seed: int | None) -> SAE:
    """The features of this process; drawn where ``sae`` is on the meta device."""
    meta, layered = sae.W_dec.is_meta, isinstance(sae, Crosscoder)
    kind = type(sae) if world.virtual == 1 else ShardedCrosscoder if layered else ShardedSAE
    made = kind.from_config(sae.config(), device="meta").train(sae.training)
    made.activation, made.dense = sae.activation, sae.dense
    if world.virtual > 1:
        made.world = world
    features = world.cuts[-1] if world.cuts else sae.d_sae
    own = slice(world.start, world.start + features)

    def part(name: str, t: Tensor) -> Tensor:
        return (t.detach() if world.whole(name) else t.detach()[own]).clone()

    drawn: dict[str, Any] = init.parameters(sae, torch.float32, device, seed, own) if meta else {}
    for name, p in sae.named_parameters():
        made.register_parameter(name, nn.Parameter(drawn[name] if meta else part(name, p), p.requires_grad))
    if made.tied:
        made.W_enc = made.W_dec
    for name, buffer in init.buffers(sae, features, device).items():
        made.register_buffer(name, buffer if meta else part(name, sae.get_buffer(name)))
    made.buffers_changed()
    return made


def _world(op: str, mesh: DeviceMesh | dist.ProcessGroup | None, timeout: timedelta, device: torch.device) -> Ranks:
    copies, order = 1, None
    group: Any = dist.group.WORLD if mesh is None else mesh
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim > 2 or (mesh.ndim == 2 and mesh.size() != processes.ranks()):
            raise ValueError(f"{op}: a mesh must have one dimension, or two and all {processes.ranks()} processes, got {mesh}")
        group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
        if mesh.ndim == 2:
            copies, order = mesh.size(1), mesh.mesh.t().flatten().tolist()
    checks.instance(op, "mesh_or_group", group, dist.ProcessGroup, "a DeviceMesh, a ProcessGroup or None")
    return Ranks(group, timeout, device, copies, order)


def _refuse(op: str, sae: SAE) -> None:
    """ValueError where a sharded step is not there yet, by name."""
    if type(sae) not in (SAE, Crosscoder):
        raise ValueError(f"{op}: the class {type(sae).__name__} is not there yet for a sharded SAE")
    if sae.W_dec.dtype is not torch.float32:
        raise TypeError(f"{op}: sae must be float32, got {sae.W_dec.dtype}")


@torch.no_grad()
def gathered(sae: K) -> K | None:
    """The whole SAE on rank 0 of the group, an ordinary one of its kind (``save``, ``save_pretrained``, ``save_checkpoint``), None on the
    others, from ``shard``'s on all processes. One that is not sharded is returned as it is."""
    checks.instance("gathered", "sae", sae, KINDS, "an SAE, SAEs or a CrossLayerTranscoder")
    if sae.world.virtual == 1:
        return sae
    whole = [_gathered(cast(ShardedSAE, member)) for member in ([sae] if isinstance(sae, SAE) else sae)]
    found = [member for member in whole if member is not None]
    return _joined(sae, found) if found else None


def _gathered(sae: ShardedSAE) -> SAE | None:
    world, state = sae.world, {}
    with world.together("gathered"):
        world.begin("gathered", 0, sae.config())
        for name, t in sae.state_dict().items():
            if world.whole(name):
                state[name] = t
                continue
            to_first = [t if world.copy == 0 else t[:0], *[t[:0]] * (world.size - 1)]  # nobody else needs room for a whole dictionary
            sizes = world.sizes if world.rank == 0 else []
            state[name] = torch.cat(world.swap(to_first, sizes + [0] * (world.size - len(sizes))))
    if world.rank:
        return None
    made = of_config(sae.config(), device=sae.W_dec.device).train(sae.training)
    made.load_state_dict(state)
    return made
