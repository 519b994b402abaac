"""Whether it is worth communicating less, from what an all-reduce and a backward pass take here."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distopt.communication import Communicator

SCRATCH = 2**24
"""Values in the all-reduce that is timed; a longer one is extrapolated."""


def time_all_reduce(blocks: Sequence[Tensor], communicator: Communicator) -> float:
    """Return the seconds that an all-reduce of one replica's parameters takes. Collective."""
    largest = max(blocks, key=lambda block: block[0].nbytes)
    scratch = largest.new_zeros(1, min(largest.shape[1], SCRATCH))
    traffic = communicator.traffic
    counts, seconds = traffic.state_dict(), []
    for _ in range(4):
        _synchronize(scratch.device)
        begin = time.perf_counter()
        communicator.mean(scratch)
        _synchronize(scratch.device)
        seconds.append(time.perf_counter() - begin)
    sent = traffic.bytes_sent - counts["bytes_sent"]  # for no training, and nobody waits for the time that it took
    traffic.load_state_dict({**counts, "evaluation_bytes": counts["evaluation_bytes"] + sent})
    # The first one warms up, and ranks leave it together.
    return statistics.median(seconds[1:]) * sum(block[0].nbytes for block in blocks) / scratch.nbytes


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(intervals: Sequence[tuple[Any, Any]]) -> float | None:
    """Return the median length of intervals between two results of `now`; None if there is none."""
    if not intervals:
        return None
    if isinstance(intervals[0][0], float):
        return statistics.median(end - start for start, end in intervals)
    intervals[-1][1].synchronize()
    return statistics.median(start.elapsed_time(end) / 1000 for start, end in intervals)


def whether_less_is_worth_it(all_reduce: float, backward: float | None, period: int | None) -> str:
    r"""Return whether `H` steps between rounds cost less than averaging gradients at every step, and why.

    $$ T_\text{allreduce} \, (1 - 1/H) > T_\text{backward} $$

    Rounds that are no all-reduce of the parameters, such as those of gossip, take another time `T_round`, which is not known
    here. They cost less if

    $$ T_\text{round} / H < T_\text{allreduce} - T_\text{backward}. $$

    Example:
        >>> whether_less_is_worth_it(all_reduce=0.03, backward=0.01, period=8).rpartition(". ")[2]
        'Communicating less is worth it on this machine.'
        >>> whether_less_is_worth_it(all_reduce=0.03, backward=0.01, period=None).rpartition(": ")[0].partition(". Rounds ")[2]
        'that send something else, as here, take less where a rank waits for less than 20 ms for each optimizer step'

    Args:
        all_reduce: seconds of an all-reduce of the parameters.
        backward: seconds of a backward pass; None: not known.
        period: `H`. None: rounds are no all-reduce of the parameters.
    """
    t_reduce = 1000 * all_reduce
    if backward is None and period is None:
        return (
            f"An all-reduce of the parameters takes {t_reduce:.3g} ms here. No backward pass could be timed to compare it with."
        )
    if backward is None:
        return (
            f"An all-reduce of the parameters takes {t_reduce:.3g} ms here. All backward passes averaged gradients, so none "
            "could be timed for itself: to learn whether communicating less is worth it, train with `sync_period` > 1."
        )
    t_back = 1000 * backward
    local_steps = "" if period is None else f"; with H = {period}, {t_back + t_reduce / period:.3g} ms"
    figures = (
        f"An all-reduce of the parameters takes {t_reduce:.3g} ms here and a backward pass {t_back:.3g} ms. With gradients "
        f"averaged over all replicas at every step the two take {max(t_reduce, t_back):.3g} ms of a step, as they overlap"
        f"{local_steps}. "
    )
    if period is not None and all_reduce * (1 - 1 / period) > backward:
        return figures + "Communicating less is worth it on this machine."
    if all_reduce <= backward:
        return figures + "Communicating less is not worth it on this machine: the all-reduce hides behind the backward pass."
    if period is None:  # T_backward + T_round / H < T_allreduce
        return (
            f"{figures}Rounds that send something else, as here, take less where a rank waits for less than "
            f"{t_reduce - t_back:.3g} ms for each optimizer step: see `comm/seconds_blocked`."
        )
    # T_allreduce (1 - 1/H) > T_backward  <=>  H > T_allreduce / (T_allreduce - T_backward)
    enough = math.floor(all_reduce / (all_reduce - backward)) + 1
    return figures + f"Communicating less is worth it on this machine from H = {enough} on."
