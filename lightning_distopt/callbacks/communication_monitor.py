"""What communication costs: bytes, time, how far replicas drift apart, and whether it is worth communicating less."""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_distopt.algorithms import GossipAlgorithm
from lightning_distopt.algorithms.consensus import consensus_distance, consensus_estimate
from lightning_distopt.callbacks.communication_advice import median_seconds, time_all_reduce, whether_less_is_worth_it
from lightning_distopt.callbacks.fit_callback import FitCallback
from lightning_distopt.callbacks.values import is_logging_step, log_doubles, readable_size
from lightning_distopt.communication import Communicator, all_reduce_bytes
from lightning_distopt.communication.traffic import now
from lightning_distopt.options import is_whole
from lightning_distopt.strategies.base import ReplicaStrategy

_ROUNDS_TO_ADVICE = 20
_BACKWARDS = 100  # that are timed


class CommunicationMonitor(FitCallback):
    r"""Log what communication costs, sum it up after training, and say whether communicating less is worth it.

    At Lightning's logging interval it logs, from rank 0:

    - `comm/bytes_sent`: bytes that a replica has sent to train (the mean of those on the rank), and `comm/rounds`, so far;
    - `comm/seconds_blocked`: time that the rank has waited for communication so far;
    - `comm/share_blocked`: the part of the time since the last log that it has waited (in the progress bar);
    - `comm/replica_steps_per_second`: optimizer steps of all replicas together, since the last log;
    - `comm/consensus_estimate`: with gossip, `Theta` of the last gossip step of the last round that was measured, see
      `consensus_estimate`;
    - `comm/consensus_distance`: how far replicas were apart in that round, right before it if it brought all of them to their
      mean, and right after it with gossip (in the progress bar),

    $$ \Xi = \Bigl( \frac{1}{n} \sum_i \| x_i - \bar x \|^2 \Bigr)^{1/2}, \qquad \bar x = \frac{1}{n} \sum_i x_i. $$

    Validation counts as no time. After 20 rounds with local steps, or at the end of training, a few all-reduces are timed,
    and the advice follows. With gradients averaged at every step, overlapped with the backward pass, a step spends
    `max(T_backward, T_allreduce)` on both; with `H` steps between rounds, `T_backward + T_allreduce / H`. The latter is less
    if

    $$ T_\text{allreduce} \, (1 - 1/H) > T_\text{backward}. $$

    Rounds of gossip are no all-reduce and are not timed: the advice then names what they may take to be less than that.

    Training is bit-identical to training without it, and it communicates at rounds only. What it sends is charged to
    `traffic.evaluation_bytes`.

    Example:
        >>> from lightning_distopt import CommunicationMonitor, LocalSGDStrategy
        >>> monitor = CommunicationMonitor(consensus_every=5)
        >>> trainer = pl.Trainer(strategy=LocalSGDStrategy(8), callbacks=[monitor], accelerator="cpu", devices=1)

    Args:
        consensus_every: rounds over all replicas from one measurement of the consensus distance to the next; 0: never. One
            takes a copy of the parameters for the time of the round, and reading both; with gossip, an all-reduce.

    Attributes:
        summary: after training, on every rank: `steps`, `replicas`, `rounds`, `bytes_sent` (mean over all replicas),
            `bytes_sent_max` (of the busiest), `bytes_every_step` (what averaging at every step would have sent), `seconds` of
            training in this fit, `seconds_blocked` of it (mean over ranks), `seconds_blocked_max`, `share_blocked`,
            `replica_steps_per_second`, `consensus_distance` and `consensus_estimate` (the last ones, or None).
        advice: the sentence about communicating less, once it has been given.

    Raises:
        ValueError: if `consensus_every` is no whole number, at least 0.
        MisconfigurationException: when fitting starts, if the strategy is none of this package.

    Reference: the condition is that of the documentation of fairscale's SlowMo; it follows from the costs above.
    """

    def __init__(self, consensus_every: int = 10) -> None:
        super().__init__()
        if not is_whole(consensus_every, least=0):
            raise ValueError(
                f"`consensus_every` must be a whole number of rounds, or 0 for never to measure; got {consensus_every!r}."
            )
        self.consensus_every = consensus_every
        self._reset()

    def _reset(self) -> None:
        self.summary: dict[str, Any] = {}
        self.advice: str | None = None
        self._validating = 0.0  # seconds so far
        self._distance: Tensor | None = None
        self._estimate: Tensor | None = None
        self._measured: bool | None = None  # what the algorithm's `measures` was before this round, if it is measured
        self._before: list[Tensor] = []  # the blocks before the round under way, while it is measured
        self._rounds = 0  # over all replicas
        self._rounds_of_local_steps = 0  # of these, since this fit began
        self._last_round = self._period = 0  # the step after the last round over all replicas; steps from the one before
        self._backwards: list[tuple[Any, Any]] = []  # when they began and ended
        self._backward_start: Any = None

    def setup_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse strategies that have no replicas."""
        if not isinstance(trainer.strategy, ReplicaStrategy):
            raise MisconfigurationException(
                f"CommunicationMonitor reads what strategies of this package count, but the strategy is "
                f"{type(trainer.strategy).__name__}: use one of them, such as `Trainer(strategy=LocalSGDStrategy(...))`."
            )
        self._reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        strategy = _strategy(trainer)
        self._validating = 0.0
        self._start = self._last = (self._seconds(), strategy.traffic.seconds_blocked, strategy.steps)
        self._last_round = strategy.steps

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock go on."""
        self._validating += time.perf_counter() - self._validation_start

    def _seconds(self) -> float:
        return time.perf_counter() - self._validating

    # ------------------------------------------------------------------------------------------------ the backward pass
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Time some backward passes, on CUDA with events, but none that averages gradients: it would wait for them."""
        if len(self._backwards) == _BACKWARDS:
            return
        strategy = _strategy(trainer)
        if strategy.replicas_per_device > 1 or strategy.algorithm.gradient_group(strategy.steps) == 1:
            self._backward_start = now(pl_module.device)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note when the backward pass has ended."""
        if self._backward_start is not None:
            self._backwards.append((self._backward_start, now(pl_module.device)))
            self._backward_start = None

    # ------------------------------------------------------------------------------------------------------------ rounds
    def on_before_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the iterates, or let the algorithm measure how far it moves them, if this round is measured."""
        strategy = _strategy(trainer)
        self._stop_measuring(strategy)  # the round before may have been none, where a control has said so
        if self.consensus_every == 0 or self._rounds % self.consensus_every:
            return
        algorithm = strategy.algorithm
        if algorithm.gradient_group(strategy.steps) == strategy.num_replicas:  # they are equal
            self._distance = torch.zeros((), dtype=torch.float64)
        elif algorithm.takes_mean:  # the round will bring the mean
            self._before = [block.clone() for block in _blocks(strategy)]
        elif isinstance(algorithm, GossipAlgorithm):
            self._measured = algorithm.measures
            algorithm.measures, algorithm.moved = True, None
        else:
            self._measured = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the algorithm as it was."""
        if isinstance(trainer.strategy, ReplicaStrategy):
            self._stop_measuring(trainer.strategy)

    def _stop_measuring(self, strategy: ReplicaStrategy) -> bool:
        """Let the algorithm measure as it did, and return whether this round was measured."""
        measured, self._measured = self._measured, None
        if measured is not None and isinstance(strategy.algorithm, GossipAlgorithm):
            strategy.algorithm.measures = measured
        return measured is not None

    def on_after_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule, group: int) -> None:
        """Measure how far replicas were from the mean that they have agreed on, or are; give the advice when it is time."""
        before, self._before = self._before, []
        strategy = _strategy(trainer)
        measured = self._stop_measuring(strategy)
        if group < strategy.num_replicas:
            return
        blocks, communicator = _blocks(strategy), _communicator(strategy)
        if before:
            self._distance = consensus_distance(before, communicator, [block[0] for block in blocks])
        elif measured:
            self._distance = consensus_distance(blocks, communicator)
            moved = getattr(strategy.algorithm, "moved", None)
            if moved is not None:
                self._estimate = consensus_estimate(moved, communicator)
        self._period, self._last_round = strategy.steps + 1 - self._last_round, strategy.steps + 1
        self._rounds += 1
        # What ranks do together depends on what they count together, never on their own clocks.
        self._rounds_of_local_steps += int(strategy.algorithm.gradient_group(strategy.steps) == 1)
        if self.advice is None and self._rounds_of_local_steps == _ROUNDS_TO_ADVICE:
            self._advise(strategy)

    def _advise(self, strategy: ReplicaStrategy) -> None:
        """Time all-reduces and say what follows. Collective."""
        communicator = _communicator(strategy)
        if communicator.distributed:
            all_reduce = time_all_reduce(_blocks(strategy), communicator)
            times = communicator.gather((all_reduce, median_seconds(self._backwards)))
            backwards = [backward for _, backward in times if backward is not None]
            backward = statistics.median(backwards) if backwards else None
            period = max(1, self._period) if strategy.algorithm.takes_mean else None
            self.advice = whether_less_is_worth_it(statistics.median(time for time, _ in times), backward, period)
        else:
            self.advice = (
                "All replicas are in one process, where nothing crosses a wire: whether communicating less is worth it shows "
                "on several devices."
            )
        rank_zero_info(f"CommunicationMonitor: {self.advice}")

    # ----------------------------------------------------------------------------------------------------------- logging
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at Lightning's interval."""
        strategy = _strategy(trainer)
        if not is_logging_step(trainer, strategy.steps) or strategy.steps == self._last[2]:
            return
        values = self._since(self._last, strategy)
        self._last = (self._seconds(), strategy.traffic.seconds_blocked, strategy.steps)
        bar: dict[str, Any] = {"share_blocked": values["share_blocked"]}
        if self._distance is not None:
            bar["consensus_distance"] = self._distance
        rest: dict[str, Any] = {
            "bytes_sent": strategy.traffic.bytes_sent,
            "rounds": strategy.traffic.rounds,
            "seconds_blocked": strategy.traffic.seconds_blocked,
            "replica_steps_per_second": values["replica_steps_per_second"],
        }
        if self._estimate is not None:
            rest["consensus_estimate"] = self._estimate
        for some, in_bar in ((bar, True), (rest, False)):
            named = {f"comm/{name}": value for name, value in some.items()}
            log_doubles(pl_module, named, prog_bar=in_bar, on_step=True, on_epoch=False)

    def _since(self, start: tuple[float, float, int], strategy: ReplicaStrategy) -> dict[str, float]:
        """Return times and rates of this rank since `start`."""
        seconds = max(self._seconds() - start[0], 1e-9)
        blocked = strategy.traffic.seconds_blocked - start[1]
        return {
            "seconds": seconds,
            "seconds_blocked": blocked,
            "share_blocked": blocked / seconds,
            "replica_steps_per_second": (strategy.steps - start[2]) * strategy.num_replicas / seconds,
        }

    # ----------------------------------------------------------------------------------------------------------- summary
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum up; all ranks are here, before the strategy forms the average model."""
        strategy = _strategy(trainer)
        own = self._since(self._start, strategy)
        self._stop_measuring(strategy)
        sent = {"bytes_sent": strategy.traffic.bytes_sent, "bytes_sent_max": strategy.traffic.bytes_sent_max}
        ranks = _communicator(strategy).gather({**own, **sent})
        means = {name: statistics.fmean(values[name] for values in ranks) for name in own}
        replicas = strategy.replicas
        assert replicas is not None
        step = sum(
            all_reduce_bytes(numel, block.element_size(), strategy.num_replicas)
            for numel, block in zip(replicas.numel, replicas.parameters, strict=True)
        )
        self.summary = {
            "steps": strategy.steps,
            "replicas": strategy.num_replicas,
            "rounds": strategy.traffic.rounds,
            "bytes_sent": sum(values["bytes_sent"] for values in ranks) // len(ranks),
            "bytes_sent_max": max(values["bytes_sent_max"] for values in ranks),
            "bytes_every_step": strategy.steps * step,
            **means,
            "seconds_blocked_max": max(values["seconds_blocked"] for values in ranks),
            "consensus_distance": _number(self._distance),
            "consensus_estimate": _number(self._estimate),
        }
        rank_zero_info(_table(self.summary))
        if self.advice is None:
            self._advise(strategy)

    def state_dict(self) -> dict[str, Any]:
        """Return what continues where it was: the advice given, the last distance, and the rounds between measurements."""
        last = {"consensus_distance": _number(self._distance), "consensus_estimate": _number(self._estimate)}
        return {"advice": self.advice, "rounds": self._rounds, **last}

    def resume(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.advice, self._rounds = state_dict["advice"], state_dict["rounds"]
        distance, estimate = state_dict["consensus_distance"], state_dict.get("consensus_estimate")
        self._distance = None if distance is None else torch.tensor(distance, dtype=torch.float64)
        self._estimate = None if estimate is None else torch.tensor(estimate, dtype=torch.float64)


def _strategy(trainer: pl.Trainer) -> ReplicaStrategy:
    assert isinstance(trainer.strategy, ReplicaStrategy)
    return trainer.strategy


def _blocks(strategy: ReplicaStrategy) -> tuple[Tensor, ...]:
    assert strategy.replicas is not None
    return strategy.replicas.parameters


def _communicator(strategy: ReplicaStrategy) -> Communicator:
    assert strategy.communicator is not None
    return strategy.communicator


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def _table(summary: dict[str, Any]) -> str:
    distance = summary["consensus_distance"]
    sent, busiest, every_step = (readable_size(summary[name]) for name in ("bytes_sent", "bytes_sent_max", "bytes_every_step"))
    most = f", the busiest {busiest}" * (summary["bytes_sent_max"] > summary["bytes_sent"])
    rows = {
        "rounds": f"{summary['rounds']:,}",
        "sent by each replica": f"{sent}{most} (averaging at every step: {every_step})",
        "blocked": f"{summary['seconds_blocked']:.3g} s, at most {summary['seconds_blocked_max']:.3g} s on one rank "
        f"({summary['share_blocked']:.1%} of {summary['seconds']:.3g} s)",
        "replica steps per second": f"{summary['replica_steps_per_second']:.4g}",
        "consensus distance": "not measured" if distance is None else f"{distance:.4g} in the last round measured",
    }
    lines = [f"  {name:<26}{value}" for name, value in rows.items()]
    return "\n".join([f"Communication of {summary['replicas']:,} replica(s) in {summary['steps']:,} steps:", *lines])
