"""What several processes would get wrong in silence: gradients that nothing averages, statistics that are each process's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastsae._core import processes


class Wrapped(nn.Module):
    """A module that knows whether DistributedDataParallel has wrapped it, which averages gradients only of its own forward."""

    _wrapped = False

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> tuple[str, ...]:
        """DistributedDataParallel reads this of what it wraps, and of nothing else: how ``loss`` knows that it ought to be called by it."""
        self._wrapped = True
        return self.__dict__.get("_ignored", ())

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Sequence[str]) -> None:
        self.__dict__["_ignored"] = names

    def _refuse_past_wrapper(self, op: str, forwarding: bool) -> None:
        """RuntimeError in a group of several where this is wrapped and called past the wrapper; ``forwarding``: its forward may call."""
        if self._wrapped and not (forwarding and _running() is not None):
            processes.refuse(
                op,
                "it was called past DistributedDataParallel(sae), which averages gradients only of its own forward: wrap a module whose "
                "forward returns sae.loss(x).loss",
            )

    def _refuse_loss(self, op: str, statistics: str | None) -> None:
        """RuntimeError in a group of several for a training mode's loss that counts ``statistics``, or that nothing averages."""
        if self.training and processes.ranks() > 1:
            if statistics is not None:
                refuse_statistics(op, statistics)
            if torch.is_grad_enabled():
                self._refuse_past_wrapper(op, forwarding=True)


def _running() -> object:
    """The wrapper whose forward is running, or None; torch says so nowhere else."""
    return torch.nn.parallel.DistributedDataParallel._active_ddp_module  # pyright: ignore[reportPrivateUsage] # torch's own


def refuse_statistics(op: str, what: str) -> None:
    """RuntimeError in a group of several, where ``what`` a loss uses would be counted in each process for itself."""
    processes.refuse(
        op,
        f"{what} would be those of each process's rows: train in one process (aux=False leaves AuxK out); where each process is to "
        "train a model of its own, by optimiser.apply(sae.step_gradients(x)[1])",
    )
