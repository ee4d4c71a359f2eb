"""Several processes, the same bits: SAEs whose features are sharded over a process group of torch.distributed.

shard, gathered                     an SAE's features onto the processes of a group, and back
save_checkpoint, load_checkpoint    what training goes on from, each process its part; async_save_checkpoint in the background
convert_checkpoint                  such a folder to one file of fastsae.save_checkpoint, and back
dtensors                            a sharded SAE's parameters as DTensors on the same memory
part, Part                          a dictionary's rows on several processes, for match, mmcs and mmcs_matrix
plan, Plan, Rates                   memory, bytes and time of a run, for given rates of the machine
RankError                           what the others raise where one process fails
SettingsError                       what all raise where they are called differently
"""

from fastsae.distributed.checkpoints import async_save_checkpoint, convert_checkpoint, load_checkpoint, save_checkpoint
from fastsae.distributed.costs import Plan, Rates, plan
from fastsae.distributed.module import ShardedSAE, gathered, shard
from fastsae.distributed.parts import Part, dtensors, part
from fastsae.distributed.world import RankError, SettingsError

__all__ = [
    "Part", "Plan", "RankError", "Rates", "SettingsError", "ShardedSAE",
    "async_save_checkpoint", "convert_checkpoint", "dtensors", "gathered", "load_checkpoint", "part", "plan", "save_checkpoint", "shard",
]  # fmt: skip
