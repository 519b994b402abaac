"""What a step of each strategy costs on a cluster, before there is a run: a cost model, and the command that shows it."""

from lightning_distopt.plan.costs import Costs
from lightning_distopt.plan.model import Round, bytes_per_step, communication, enough, time_per_round, time_per_step
from lightning_distopt.plan.settings import Cluster, Method, Workload

__all__ = [
    "Cluster",
    "Costs",
    "Method",
    "Round",
    "Workload",
    "bytes_per_step",
    "communication",
    "enough",
    "time_per_round",
    "time_per_step",
]
