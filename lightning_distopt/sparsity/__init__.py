"""Pruning methods, masks, and what they are worth."""

from lightning_distopt.sparsity.dpf import DPF
from lightning_distopt.sparsity.dsr import DSR
from lightning_distopt.sparsity.ensembles import combine_predictions, mask_dissimilarity
from lightning_distopt.sparsity.incremental import Incremental
from lightning_distopt.sparsity.lottery_ticket import LotteryTicket
from lightning_distopt.sparsity.masked_tasks import MaskedTasks, TaskMemory
from lightning_distopt.sparsity.memory import EncoderSize, cumulative_megabytes, masked_weights, task_rows
from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.methods import METHODS, make_method
from lightning_distopt.sparsity.one_shot import OneShot
from lightning_distopt.sparsity.packed_masks import PackedMasks
from lightning_distopt.sparsity.pruner import Pruner
from lightning_distopt.sparsity.rigl import RigL
from lightning_distopt.sparsity.schedule import cubic_sparsity
from lightning_distopt.sparsity.score_mask import ScoreMask
from lightning_distopt.sparsity.selection import largest
from lightning_distopt.sparsity.set import SET
from lightning_distopt.sparsity.snip import SNIP
from lightning_distopt.sparsity.soft_filter import SoftFilterPruning
from lightning_distopt.sparsity.sparse_momentum import SparseMomentum
from lightning_distopt.sparsity.weights import make_permanent

__all__ = [
    "DPF",
    "DSR",
    "METHODS",
    "SET",
    "SNIP",
    "EncoderSize",
    "Incremental",
    "Layers",
    "LotteryTicket",
    "MaskedTasks",
    "OneShot",
    "PackedMasks",
    "Pruner",
    "PruningMethod",
    "RigL",
    "ScoreMask",
    "SoftFilterPruning",
    "SparseMomentum",
    "TaskMemory",
    "combine_predictions",
    "cubic_sparsity",
    "cumulative_megabytes",
    "largest",
    "make_method",
    "make_permanent",
    "mask_dissimilarity",
    "masked_weights",
    "task_rows",
]
