"""Pruning while training: dynamic pruning with feedback, and the methods it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_distopt.callbacks.everywhere import (
    after_teardown,
    average_shown,
    each_replica,
    from_rank_zero,
    replicas_differ,
    replicas_meet,
    round_follows,
    sum_over_ranks,
)
from lightning_distopt.callbacks.fit_callback import FitCallback
from lightning_distopt.callbacks.plain_checkpoints import change_checkpoints
from lightning_distopt.callbacks.pruning_checks import (
    check_moments,
    check_pruning,
    check_sparse_rounds,
    warn_at_the_end,
    warn_of_overshoot,
    without_moments,
)
from lightning_distopt.callbacks.pruning_log import Path, PruningLog
from lightning_distopt.callbacks.pruning_times import RAMP, PruningTimes
from lightning_distopt.callbacks.snapshot import go_back, take_snapshot
from lightning_distopt.callbacks.values import is_logging_step
from lightning_distopt.files import check_file
from lightning_distopt.options import is_number
from lightning_distopt.sparsity.method import PruningMethod
from lightning_distopt.sparsity.methods import make_method
from lightning_distopt.sparsity.packing import pack_bits, unpack_bits
from lightning_distopt.sparsity.pruner import Pruner, default_layers
from lightning_distopt.sparsity.weights import (
    Selection,
    called,
    check_untied,
    original_key,
    plain_state_dict,
    select_layers,
)


class DynamicPruning(FitCallback):
    r"""Train a sparse network from scratch, with masks that change while it trains.

    The network computes with `mask * weight`. By default masks keep the largest weights of all layers together, anew every 16
    optimizer steps, and the gradient at the pruned weights is applied to the dense ones, so that a weight comes back once it
    has grown (DPF):

    $$ x_{t+1} = x_t - \gamma_t \, g(m_t \odot x_t) $$

    The sparsity rises along the cubic schedule, `s_t = s (1 - (1 - progress)^3)`. The LightningModule stays as it is, and so
    do its optimizer and its checkpoints: optimizers see the dense weights; a checkpoint's `state_dict` is that of the plain
    module with its pruned weights at zero, so `load_from_checkpoint` gives the sparse network; and the values behind the masks
    are in the callback's state, so `trainer.fit(ckpt_path=...)` continues exactly. After training the module is the plain,
    sparse network.

    Replicas of a strategy always have the same mask, which changes at rounds. It comes from the average that a round leaves
    them with; where they never agree, that of replica 0 is sent to all as bits. With `sparse_rounds` a round averages the
    weights that are alive, and the values behind the masks stay each replica's own until masks are due.

    Example:
        >>> from lightning_distopt.models import ImageClassifier
        >>> module = ImageClassifier("resnet20")
        >>> trainer = pl.Trainer(callbacks=[DynamicPruning(sparsity=0.95)], accelerator="cpu", logger=False)

    Args:
        sparsity: part of the chosen weights that is zero in the end, in [0, 1).
        method: "dpf" or another method's name, or a `PruningMethod` with options of its own.
        period: optimizer steps between two updates of the masks, or "epoch". None: the method's own, 16 for DPF.
        layers: which weights are pruned: patterns of the layers' names, or a predicate of name and module. None: all
            convolutional and linear layers but the last. Biases and norms are never pruned.
        ramp: when the sparsity rises from zero: a part of training, counted from its start, or a phase such as "epoch:0-225"
            (in whole epochs, as in the thesis) or "step:100-5000". For methods that start at the full sparsity it must be left
            as it is.
        fine_tune: when masks stay fixed: None (never), the part of training after which they do, or "epoch:240-". They change
            for the last time right then.
        sparse_rounds: whether rounds send only what the network computes with: weights that are alive, and parameters that are
            not pruned. Where masks are due rounds send everything. For `LocalSGDStrategy`, and `GossipStrategy` with DSGD.
        figure: a PNG file for the picture of all layers' sparsity. None: `sparsity.png` in the log folder, if there is one.

    Attributes:
        pruner: the masks, while training.
        notes: their history, and what the network costs.
        times: when masks change.
        step: optimizer steps so far.

    Raises:
        ValueError: for options that are unknown or out of range.
        MisconfigurationException: before training starts, if the layers can't be pruned, or the strategy or another callback
            does not go together with pruning.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, chapter 6, appendix 15.
    """

    def __init__(
        self,
        sparsity: float = 0.9,
        method: str | PruningMethod = "dpf",
        period: int | Literal["epoch"] | None = None,
        layers: Selection | None = None,
        ramp: float | str = RAMP,
        fine_tune: float | str | None = None,
        sparse_rounds: bool = False,
        figure: Path | None = None,
    ) -> None:
        super().__init__()
        if not (is_number(sparsity) and 0 <= sparsity < 1):
            raise ValueError(f"`sparsity` is the part of the weights that is pruned, at least 0 and below 1; got {sparsity!r}.")
        self.sparsity, self.method, self.layers = float(sparsity), make_method(method), layers
        self.times = PruningTimes(self.method, self.sparsity, period, ramp, fine_tune)
        if sparse_rounds and self.method.pruned == "train":
            raise ValueError(
                f"{type(self.method).__name__} lets the network compute with pruned weights, too, which therefore all rounds "
                "have to send: leave `sparse_rounds` out."
            )
        self.sparse_rounds, self.figure = sparse_rounds, check_file("figure", figure)
        self.pruner: Pruner | None = None
        self.notes: PruningLog
        self._undo: Callable[[], None] | None = None
        self._state: dict[str, Any] = {}  # when the last fit ended
        self._reset()

    def _reset(self) -> None:
        self.step = 0
        self._loaded: dict[str, Any] | None = None
        self._seen = 0  # Lightning's step
        self._warned = self._recording = self._due = self._together = False
        self._next: list[Tensor] | None = None  # masks that the next step begins with
        self._kept: dict[str, Any] | None = None  # to go back to
        self._seed = 0
        self._first: list[Tensor] = []
        self._hidden: list[Tensor] | None = None  # behind the masks of the average model, in the checkpoint under way
        self._alive: tuple[Tensor, ...] | None = None  # columns that rounds send

    # ------------------------------------------------------------------------------------------------------ life cycle
    def setup_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what can't be pruned, or would be pruned twice."""
        check_pruning(trainer, self.method)
        self._reset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put masks on the layers: after optimizers and replicas were made, which know the weights under their names."""
        if self.sparse_rounds:
            check_sparse_rounds(trainer)
        try:
            layers = default_layers(pl_module) if self.layers is None else select_layers(pl_module, self.layers)
            check_untied(pl_module, layers)
            self.pruner = Pruner(layers, self.method)
            self.notes = PruningLog(self.pruner, self.figure)
        except ValueError as error:
            raise MisconfigurationException(f"DynamicPruning: {error}") from error
        self._undo = change_checkpoints(trainer.strategy, self._plain)
        self._seed = int(trainer.strategy.broadcast(torch.initial_seed())) % 2**62
        if self._loaded is not None:
            self._restore(trainer, self._loaded)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change masks for the last time if they are not sparse enough yet; otherwise what came back could learn no more.

        Those that are due in the middle of a round come from the average that the strategy is about to take.
        """
        masks, self._next = self._next, None
        trained_on = self.method.pruned == "train" and self.sparsity > 0 and self.notes.history.steps[-1:] != [self.step]
        if (self._due and self._lacks) or trained_on:
            with average_shown(trainer.strategy):
                masks = self._masks(trainer, agreed=True)
        if masks is not None and self._lacks:
            self._take(trainer, pl_module, masks, ended=True)
        self.notes.draw(self._summed_up(trainer))
        warn_at_the_end(self._active, self.sparsity, self.step)

    @property
    def _lacks(self) -> bool:
        """Whether masks have fewer zeros than they should by now, or the network computes with the pruned weights, too."""
        return self.method.pruned == "train" or self._active.lacks(self.times.sparsity(self.step))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the plain, sparse module."""
        super().on_fit_end(trainer, pl_module)
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave it after the last checkpoint, too."""
        if self.pruner is not None:
            self.notes.draw(self._summed_up(trainer))
        after_teardown(trainer.strategy, self._leave)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave it also if training was given up."""
        self._leave()

    def _leave(self) -> None:
        if self._undo is not None:
            self._undo()
        self._undo = None
        if self.pruner is not None:
            self._hidden = None
            self.notes.stop_counting()
            self._state = self.state_dict()
            self.pruner.make_permanent()
            self.pruner = None

    def _summed_up(self, trainer: pl.Trainer) -> list[PruningLog]:
        """Return the notes of all such callbacks, if this is the last one, which has their totals; else none."""
        pruning = [c for c in trainer.callbacks if isinstance(c, DynamicPruning)]  # type: ignore[attr-defined]
        return [c.notes for c in pruning if c.pruner is not None] if pruning[-1] is self else []

    @property
    def _active(self) -> Pruner:
        assert self.pruner is not None
        return self.pruner

    # ------------------------------------------------------------------------------------------------------------- time
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle when masks change, and set the first ones."""
        try:
            self.times.begin(trainer)  # not before: what loads the data earlier makes Lightning forget where a resume is in it
        except ValueError as error:
            raise MisconfigurationException(f"DynamicPruning: {error}") from error
        self.notes.find_path(trainer, sums=bool(self._summed_up(trainer)))
        if "moments" in self.method.needs and self.sparsity > 0:
            check_moments(trainer, self.method, self._active.weights)
        self._seen = trainer.global_step
        if self._loaded is None:  # it starts, or goes on from a checkpoint without masks
            self.step = trainer.global_step
        if self.sparsity > 0 and (self.step == 0 or self._loaded is None):
            self.times.check_start(self.step)
            if "first" in self.method.needs:
                self._first = [w.detach().clone() for w in self._active.weights]
            if self.method.rewind_to == self.step:
                self._kept = take_snapshot(trainer, pl_module)
            if self.times.begins(self.step):
                self._take(trainer, pl_module, self._masks(trainer, agreed=self.step == 0))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin with the masks that were made after the last step; ask for gradients where an update that wants them follows.

        So validation and checkpoints between two steps are of a network that was trained with its masks.
        """
        if self._next is not None:
            self._take(trainer, pl_module, self._next)
        self.notes.start_counting(pl_module, batch)
        if "gradients" not in self.method.needs or self._recording:
            return
        soon = self._due or self.times.due(self.step + 1)
        if soon and (round_follows(trainer.strategy) or not self._waits(trainer)):
            self._active.record(True)
            self._recording = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note what the first forward pass has cost."""
        self.notes.stop_counting()

    def on_before_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the round send the weights that are alive, or all where masks are due, so that they come from a true average."""
        if self.sparse_rounds:
            due = self._due or self.times.due(self.step + 1)
            trainer.strategy.replicas.columns = None if due else self._alive  # type: ignore[attr-defined]

    def on_after_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule, group: int) -> None:
        """Note whether the round was one that masks wait for."""
        self._together = self._waits(trainer) and group == trainer.strategy.num_replicas  # type: ignore[attr-defined]

    def _waits(self, trainer: pl.Trainer) -> bool:
        """Return whether updates wait for rounds over all replicas, since between these there are no collectives."""
        return self.method.waits and replicas_differ(trainer.strategy)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the masks when they are due, at a round where there are rounds; then log."""
        self.notes.stop_counting()
        together, self._together = self._together, False
        if trainer.global_step == self._seen:  # gradients accumulate
            return
        self._seen, self._hidden = trainer.global_step, None
        self.step += 1
        if self.method.pruned == "zero":
            for _ in each_replica(trainer.strategy):
                self._active.clear_pruned()
        if self.step == self.method.rewind_to:
            with average_shown(trainer.strategy):
                self._kept = take_snapshot(trainer, pl_module)
        self._due |= self.times.due(self.step)
        if self._due and (together or not self._waits(trainer)):
            self._due, self._next = False, self._masks(trainer, agreed=together and replicas_meet(trainer.strategy))
            if self.method.pruned == "train" or (self.step == self.times.whole and self._lacks):
                self._take(trainer, pl_module, self._next)
        if self._recording:
            self._active.record(False)
            self._active.forget()
            self._recording = False
        if is_logging_step(trainer, self.step):
            self.notes.log(pl_module, self._summed_up(trainer))

    # ---------------------------------------------------------------------------------------------------------- updates
    def _masks(self, trainer: pl.Trainer, agreed: bool) -> list[Tensor]:
        """Return the masks, the same on every rank, whose modules show the same weights if they have `agreed`. Collective."""
        pruner, method, strategy = self._active, self.method, trainer.strategy
        sparsity, total = self.times.sparsity(self.step), self.times.whole
        gradients = [sum_over_ranks(strategy, g) for g in pruner.recorded] if self._recording else []
        moments = self._moments(trainer) if "moments" in method.needs else []
        masks = pruner.compute(sparsity, self.step, total, gradients, moments, self._first, seed=self._seed + self.step)
        if replicas_differ(strategy) and (not agreed or "moments" in method.needs):
            masks = unpack_bits(from_rank_zero(strategy, pack_bits(masks)), [m.shape for m in masks], torch.float32)
        return masks

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: list[Tensor], ended: bool = False) -> None:
        """Apply masks to every replica."""
        pruner = self._active
        self._due, self._next = False, None
        if self.method.pruned == "learn" and not (self.method.limit or self._warned):
            self._warned = warn_of_overshoot(pruner, masks)
        pruner.take(masks)
        self.notes.note(self.step)
        self._find_alive(trainer)
        for _ in each_replica(trainer.strategy):
            if self._kept is not None and not ended:
                go_back(trainer, pl_module, self._kept)
            pruner.fill_regrown(trainer.optimizers)
        if self.times.over(self.step):
            self._first, self._kept = [], None

    def _find_alive(self, trainer: pl.Trainer) -> None:
        """Find the columns that rounds send from now on; all, as long as nothing is pruned."""
        if self.sparse_rounds:
            pruner, replicas = self._active, trainer.strategy.replicas  # type: ignore[attr-defined]
            masks = dict(zip(pruner.weights, pruner.masks, strict=True))
            self._alive = replicas.columns_of(masks) if any(pruner.pruned.values()) else None

    def _moments(self, trainer: pl.Trainer) -> list[Tensor]:
        """Return the optimizers' running means of the gradients."""
        weights = self._active.weights
        states = {id(p): o.state[p] for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        found = [states.get(id(w), {}) for w in weights]
        moments = [state.get("momentum_buffer", state.get("exp_avg")) for state in found]
        if self.step and any(moment is None for moment in moments):
            raise without_moments(self.method)
        return [torch.zeros_like(w) if m is None else m for m, w in zip(moments, weights, strict=True)]

    # ------------------------------------------------------------------------------------------------------- checkpoint
    def _plain(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the plain module's state with its sparse weights, and note what they hide."""
        pruner = self.pruner
        if pruner is None:
            return state
        dense = [state[original_key(name)] for name in pruner.layers]
        self._hidden = pruner.hidden(dense)
        pairs = zip(pruner.layers, dense, pruner.masks, strict=True)
        return plain_state_dict(state, {name: values * mask for name, values, mask in pairs})

    @property
    def state_key(self) -> str:
        """What the callback's state is called in a checkpoint: two of them prune different layers."""
        return super().state_key if self.layers is None else self._generate_state_key(layers=called(self.layers))

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from a checkpoint that was pruned in layers that were chosen in another way."""
        if not self.fitting:
            return
        saved = [key for key in checkpoint.get("callbacks", {}) if str(key).startswith(type(self).__qualname__)]
        if saved and self.state_key not in saved:
            raise MisconfigurationException(
                f"The checkpoint is one of {', '.join(map(str, saved))}, and not of {self.state_key}: choose the same `layers`."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs: masks, and the values behind them."""
        pruner = self.pruner
        if pruner is None:
            return self._state
        hidden = self._hidden if self._hidden is not None else pruner.hidden()
        return {
            "step": self.step,
            "due": self._due,
            "next": None if self._next is None else pack_bits(self._next).cpu(),
            "pruner": pruner.state_dict(),
            "notes": self.notes.state_dict(),
            "hidden": [values.cpu() for values in hidden],
            "first": [t.cpu() for t in self._first],
            "kept": self._kept,
            "seed": self._seed,
        }

    def resume(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, as soon as there are masks."""
        self._loaded = state_dict or None

    def _restore(self, trainer: pl.Trainer, state: dict[str, Any]) -> None:
        pruner = self._active
        try:
            pruner.load_state_dict(state["pruner"])
        except ValueError as error:
            raise MisconfigurationException(f"DynamicPruning: {error}") from error
        self.notes.load_state_dict(state["notes"])
        self.step, self._due = int(state["step"]), bool(state["due"])
        self._first = [t.to(w.device) for t, w in zip(state["first"], pruner.weights, strict=False)]
        self._kept, self._seed = state["kept"], int(state["seed"])
        if state["next"] is not None:
            bits = unpack_bits(state["next"], [w.shape for w in pruner.weights], torch.float32)
            self._next = [mask.to(w.device) for mask, w in zip(bits, pruner.weights, strict=True)]
        self._find_alive(trainer)
        for _ in each_replica(trainer.strategy):
            pruner.restore_hidden(state["hidden"])
