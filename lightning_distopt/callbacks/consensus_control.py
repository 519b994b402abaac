"""Consensus control: as many gossip steps in a round as it takes to bring replicas close enough together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distopt.algorithms import DPSGD
from lightning_distopt.algorithms.consensus import consensus_distance, squared_distances
from lightning_distopt.algorithms.gossip import Mode
from lightning_distopt.callbacks.consensus_reference import check_reference, read_reference, write_reference
from lightning_distopt.callbacks.fit_callback import FitCallback
from lightning_distopt.callbacks.lr_decays import LearningRateDecays
from lightning_distopt.callbacks.phases import Phase, parse_phases
from lightning_distopt.callbacks.values import is_logging_step, log_doubles
from lightning_distopt.options import check_choice, is_number, is_whole
from lightning_distopt.strategies import GossipStrategy

_DECAY = 0.9  # of the moving average
_FACTORS = {"constant": 0.25, "adaptive": 1.0, "efficient": 1e-3, "record": None}
_ALWAYS = "always"


class ConsensusControl(FitCallback):
    r"""Gossip in each round until replicas are close enough, in the phases of training that need it.

    After the local steps of a round, gossip steps are repeated until a measure of the distance between replicas is at most its
    target (section 5.4.3):

    $$ \begin{aligned}
    \text{constant:} \quad & \Xi \le \text{factor} \cdot \Xi_{\max} \\
    \text{adaptive:} \quad & \Xi \le \text{factor} \cdot \phi^{\text{ema}} \\
    \text{efficient:} \quad & \Theta \le \text{factor} \cdot \phi^{\text{ema}}
    \end{aligned} $$

    `Xi` is the consensus distance after a gossip step and `Theta` its estimate from how far that step has moved the replicas
    (see `consensus_distance`, `consensus_estimate`). `Xi_max` is the largest distance after the rounds of the same phase where
    nothing controls it. `phi` is the mean over replicas of the norm of their mini-batch gradients, before clipping, and its
    moving average, `phi_ema <- 0.9 phi_ema + 0.1 phi`, starts anew in each phase.

    All ranks decide alike, from what they have reduced together. Measuring `Xi` takes an all-reduce of the parameters after
    each gossip step, so "constant" and "adaptive" serve to study what distance does; "efficient" takes one of a few numbers.
    What is measured is charged to `traffic.evaluation_bytes`, the gossip steps to `traffic.bytes_sent`.

    Example:
        >>> from lightning_distopt import ConsensusControl, GossipStrategy
        >>> control = ConsensusControl(phases="lr_decay:1")  # the guideline of the thesis: until the learning rate decays
        >>> trainer = pl.Trainer(strategy=GossipStrategy(topology="ring"), callbacks=[control], accelerator="cpu", devices=1)

        Fractions of the distance that a run without control has:

        >>> record = ConsensusControl("record", reference="xi_max.json", phases=["lr_decay:1", "lr_decay:2"])
        >>> control = ConsensusControl("constant", 0.5, reference="xi_max.json", phases="lr_decay:1", outside="average")

    Args:
        target: "constant", "adaptive" or "efficient", see above; "record" gossips as without control in its phases, and
            measures `Xi` after every round to find `Xi_max` of every phase.
        factor: of the target, above 0; by default 0.25 ("constant"), 1 ("adaptive") or 0.001 ("efficient").
        reference: for "constant": `Xi_max`, as a number, or the JSON file that a run with "record" wrote; for "record": the
            file to write when training ends.
        phases: when to control (or what to record): "epoch:0-5" (epochs 0 to 4), "step:1000-" (from step 1000 on),
            "lr_decay:1" (phase 1, up to the first decay of the learning rate), or a list of these, each a phase of its own; the
            first one that applies counts, when a round starts. None: always. A decay is a learning rate of at most half of
            the largest since the last decay.
        outside: of these phases: plain "gossip", exact "average" of the parameters, or "nothing".
        min_steps: gossip steps in a controlled round at least; it and `max_steps` stand in place of the strategy's
            `gossip_steps`.
        max_steps: at most; where the target is out of reach training goes on with a warning.

    Attributes:
        steps_spent: gossip steps in all controlled rounds so far.
        rounds: controlled rounds so far.
        rounds_missed: those that ended with `max_steps`, above the target.
        xi_max: with "record", the largest distance so far by phase, and that of all rounds as "always".

    Raises:
        ValueError: for options that are unknown or contradict each other.
        MisconfigurationException: when fitting starts, if the strategy is not `GossipStrategy`, its algorithm can't be
            controlled, or the reference can't be used.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, sections 5.4 to 5.6, appendix
    14.
    """

    def __init__(
        self,
        target: Literal["constant", "adaptive", "efficient", "record"] = "efficient",
        factor: float | None = None,
        reference: float | str | None = None,
        phases: str | Sequence[str] | None = None,
        outside: Literal["gossip", "average", "nothing"] = "gossip",
        min_steps: int = 1,
        max_steps: int = 100,
    ) -> None:
        super().__init__()
        check_choice("target", target, _FACTORS)
        check_choice("outside", outside, ("gossip", "average", "nothing"))
        for name, value in (("min_steps", min_steps), ("max_steps", max_steps)):
            if not is_whole(value, least=1):
                raise ValueError(f"`{name}` must be a whole number of gossip steps, at least 1; got {value!r}.")
        if min_steps > max_steps:
            raise ValueError(f"`min_steps={min_steps}` is more than `max_steps={max_steps}`.")
        if factor is not None and not (is_number(factor) and factor > 0):
            raise ValueError(
                f"`factor` must be a number above 0; got {factor!r}. To average exactly, use "
                "`LocalSGDStrategy(1, average='parameters')`."
            )
        self.target, self.outside = target, outside
        self.factor = _FACTORS[target] if factor is None else float(factor)
        self.reference = check_reference(target, reference)
        self.phases = [Phase(_ALWAYS, "step", 0, math.inf)] if phases is None else parse_phases(phases)
        self.min_steps, self.max_steps = min_steps, max_steps
        if phases is None and outside != "gossip":
            raise ValueError(f"`outside={outside!r}` says what happens outside of `phases`: give them, such as 'lr_decay:1'.")
        if target == "record" and (factor, min_steps, max_steps) != (None, 1, 100):
            raise ValueError(
                "`target='record'` watches rounds without control: leave `factor`, `min_steps` and `max_steps` out."
            )
        self._strategy: GossipStrategy | None = None
        self._alone = False  # whether no other control is known beside it
        self._reset()

    def _reset(self) -> None:
        self.steps_spent = self.rounds = self.rounds_missed = 0
        self.xi_max: dict[str, float] = {}
        self._targets: dict[str, float] = {}  # of "constant", by phase
        self._phase: int | None = None  # that the round under way is in
        self._phi: float | None = None  # its moving average
        self._squares: dict[int, Tensor] = {}  # [m] squared norms of the gradients, by step, in the round under way
        self._decays = LearningRateDecays()
        self._starts = True  # whether the next step starts a round
        self._shown: dict[str, float] = {}  # of the last round; what it has not measured, but an earlier one has, is NaN
        self._shown_at = -1

    @property
    def state_key(self) -> str:
        """Of the class; of this object until `setup` has found no other, of which Lightning's error would say less."""
        return super().state_key if self._alone else self._generate_state_key(id=id(self))

    # ------------------------------------------------------------------------------------------------------ life cycle
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look for a second control."""
        self._alone = sum(isinstance(callback, ConsensusControl) for callback in trainer.callbacks) == 1  # type: ignore[attr-defined]
        super().setup(trainer, pl_module, stage)

    def setup_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take control of the algorithm, unless it can't be controlled."""
        strategy = trainer.strategy
        if not isinstance(strategy, GossipStrategy):
            raise MisconfigurationException(
                f"ConsensusControl decides how often replicas gossip, but the strategy is {type(strategy).__name__}: use "
                "`Trainer(strategy=GossipStrategy(...))`."
            )
        if not self._alone or strategy.algorithm.control is not None:
            raise MisconfigurationException(
                "There are two callbacks that control gossip: use one ConsensusControl; its `phases` may be a list."
            )
        _check_algorithm(strategy.algorithm, self.target)
        self._reset()
        self._strategy = strategy
        if self.target != "record" or self.outside != "gossip":
            strategy.algorithm.control = self
            strategy.algorithm.measures = self.target == "efficient"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the reference, on rank 0."""
        if self.target != "constant":
            return
        strategy, found = self._running, None
        if trainer.is_global_zero:
            found = read_reference(self.reference, self._names, strategy.num_replicas)
        problem, self._targets = strategy.broadcast(found)
        if problem:
            raise MisconfigurationException(problem)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give up control."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give up control."""
        self._release()
        self._strategy = None

    def _release(self) -> None:
        if self._strategy is not None and self._strategy.algorithm.control is self:
            self._strategy.algorithm.control, self._strategy.algorithm.measures = None, False

    @property
    def _names(self) -> list[str]:
        return [phase.name for phase in self.phases]

    @property
    def _running(self) -> GossipStrategy:
        assert self._strategy is not None
        return self._strategy

    # ---------------------------------------------------------------------------------------------------------- phases
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch for decays of the learning rate, and for the start of a round."""
        self._decays.see(trainer)
        if self._starts and self.target == "record":
            self._settle_phase(self._running.steps)
            self._starts = False

    def _settle_phase(self, step: int) -> None:
        assert self._running.lightning_module is not None
        at = {"step": step, "epoch": self._running.lightning_module.current_epoch, "lr_decay": 1 + self._decays.count}
        applies = [k for k, phase in enumerate(self.phases) if phase.start <= at[phase.kind] < phase.end]
        phase = applies[0] if applies else None
        if phase != self._phase:
            self._phase, self._phi = phase, None

    # --------------------------------------------------------------------------------------------------------- control
    def mode(self, step: int) -> Mode:
        """Return what the round that starts at `step` does."""
        self._settle_phase(step)
        if self._phase is not None:
            return "gossip"
        if self.outside != "gossip":
            self._show(gossip_steps=0)
        return self.outside

    def another(self, done: int) -> bool:
        """Return whether a gossip step follows, after `done` in this round. Collective once there were `min_steps`."""
        if self._phase is None or self.target == "record":
            more = done < self._running.algorithm.gossip_steps
            self._show(gossip_steps=done)
            return more
        if done < self.min_steps:
            return True
        measure = self._measure()
        target = self._target(self.phases[self._phase].name)
        far = math.isfinite(measure) and measure > target
        if far and done < self.max_steps:
            return True
        self.rounds += 1
        self.steps_spent += done
        kind = "estimate" if self.target == "efficient" else "distance"
        phi = {} if self._phi is None else {"phi": self._phi}
        self._show(**{"gossip_steps": done, kind: measure, "target": target, **phi})
        if far:
            self._miss(measure, target)
        return False

    def _miss(self, measure: float, target: float) -> None:
        self.rounds_missed += 1
        if self.rounds_missed == 1:
            rank_zero_warn(
                f"ConsensusControl could not bring replicas from {measure:.3g} to {target:.3g} apart within {self.max_steps} "
                f"gossip steps, in the round after step {self._running.steps}. Training goes on, and `rounds_missed` counts "
                "such rounds: raise `max_steps` or `factor`, or use a graph with a larger spectral gap."
            )

    def _measure(self) -> float:
        """Return `Xi` or `Theta`, and bring `phi` up to date, in one reduction of a few numbers. Collective."""
        strategy = self._running
        replicas, communicator = strategy.replicas, strategy.communicator
        assert replicas is not None and communicator is not None
        if self.target == "efficient":
            assert strategy.algorithm.moved is not None
            own = strategy.algorithm.moved
        else:
            own = squared_distances(replicas.parameters, [communicator.average(block) for block in replicas.parameters])
        columns = [own]
        for squares in self._squares.values():  # a step that fp16 skips has gradients that are not finite
            finite = squares.isfinite()
            columns += [finite.double(), squares.where(finite, torch.zeros_like(squares)).sqrt()]
        measure, *norms = communicator.average(torch.stack([c.to(own) for c in columns], dim=1)).tolist()
        self._squares = {}
        for share, total in zip(norms[::2], norms[1::2], strict=True):
            if share > 0:
                phi = total / share
                # phi_ema <- 0.9 phi_ema + 0.1 phi
                self._phi = phi if self._phi is None else _DECAY * self._phi + (1 - _DECAY) * phi
        return math.sqrt(measure)

    def _target(self, phase: str) -> float:
        assert self.factor is not None
        unit = self._targets[phase] if self.target == "constant" else self._phi
        return math.inf if unit is None or self.factor == math.inf else self.factor * unit

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Note how long the active replica's gradient is."""
        strategy = self._running
        if self.target not in ("adaptive", "efficient") or self._phase is None or strategy.num_replicas == 1:
            return
        assert strategy.replicas is not None
        new = torch.zeros(strategy.replicas_per_device, dtype=torch.float64, device=strategy.root_device)
        squares = self._squares.setdefault(strategy.steps, new)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
                    squares[strategy.replicas.active] += norm.square()

    # ------------------------------------------------------------------------------------------------------- recording
    def on_after_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule, group: int) -> None:
        """Measure the distance that a round without control leaves. Collective."""
        if self.target != "record":
            return
        strategy = self._running
        assert strategy.replicas is not None and strategy.communicator is not None
        distance = float(consensus_distance(strategy.replicas.parameters, strategy.communicator))
        names = [_ALWAYS] if self._phase is None else [_ALWAYS, self.phases[self._phase].name]
        self.xi_max |= {name: max(distance, self.xi_max.get(name, 0.0)) for name in names}
        self._shown["distance"], self._starts = distance, True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what was recorded."""
        if self.target == "record" and self.reference is not None and trainer.is_global_zero:
            write_reference(str(self.reference), self.xi_max, self._running.num_replicas)

    # --------------------------------------------------------------------------------------------------------- logging
    def _show(self, **values: float) -> None:
        """Log these values of a round: Lightning would repeat the last of all others to the end of the epoch."""
        self._shown = {**dict.fromkeys(self._shown, math.nan), **values}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at Lightning's interval."""
        steps = self._running.steps
        if not is_logging_step(trainer, steps) or steps == self._shown_at:
            return
        self._shown_at = steps
        values = {f"consensus/{name}": value for name, value in self._shown.items()}
        log_doubles(pl_module, values, on_step=True, on_epoch=False)

    # ------------------------------------------------------------------------------------------------------ checkpoint
    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs. Collective in the middle of a round, unless training has failed."""
        strategy, squares = self._strategy, {}
        if self._squares and strategy is not None and strategy.communicator is not None and not strategy._has_failed():
            ranks = strategy.communicator.gather({step: own.tolist() for step, own in self._squares.items()})
            squares = {step: [value for rank in ranks for value in rank[step]] for step in self._squares}
        return {
            "phase": None if self._phase is None else self.phases[self._phase].name,
            "phi": self._phi,
            "squares": squares,
            "decays": self._decays.state_dict(),
            "starts": self._starts,
            "shown": dict(self._shown),
            "xi_max": dict(self.xi_max),
            "steps_spent": self.steps_spent,
            "rounds": self.rounds,
            "rounds_missed": self.rounds_missed,
        }

    def resume(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; in a phase that there is no more, as outside of all."""
        known = state_dict["phase"] in self._names
        if known:
            self._phase, self._phi = self._names.index(state_dict["phase"]), state_dict["phi"]
        self._decays.load_state_dict(state_dict["decays"])
        self._starts = state_dict["starts"]
        self._shown, self.xi_max = dict(state_dict["shown"]), dict(state_dict["xi_max"])
        self.steps_spent, self.rounds = state_dict["steps_spent"], state_dict["rounds"]
        self.rounds_missed = state_dict["rounds_missed"]
        if not known:
            return
        strategy, m = self._running, self._running.replicas_per_device
        first = strategy.global_rank * m
        self._squares = {
            step: torch.tensor(values[first : first + m], dtype=torch.float64, device=strategy.root_device)
            for step, values in state_dict["squares"].items()
            if len(values) == strategy.num_replicas
        }


def _check_algorithm(algorithm: Any, target: str) -> None:
    name = type(algorithm).__name__
    if not algorithm.gossips_freely:
        raise MisconfigurationException(
            f"{name} makes one gossip step for each gradient step, so there is nothing to control: use DSGD or CHOCO."
        )
    if algorithm.overlap and not algorithm.overlap_is_free:
        raise MisconfigurationException(
            f"{name} with `overlap=True` makes one gossip step in a round, so there is nothing to control: leave `overlap` out."
        )
    if isinstance(algorithm, DPSGD) and target in ("constant", "adaptive"):
        raise MisconfigurationException(
            "DPSGD adds the optimizer's steps after gossip, so no number of gossip steps brings its iterates closer than these "
            f"leave them: `target={target!r}` needs DSGD or CHOCO; 'efficient' looks at gossip alone."
        )
