"""Masking pretrained weights instead of fine-tuning them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_distopt.callbacks.everywhere import after_teardown
from lightning_distopt.callbacks.fit_callback import FitCallback
from lightning_distopt.callbacks.mask_checks import check_masks
from lightning_distopt.callbacks.plain_checkpoints import change_checkpoints
from lightning_distopt.callbacks.values import is_logging_step, log_doubles
from lightning_distopt.communication.rng import derive_seed
from lightning_distopt.files import check_file
from lightning_distopt.lookup import matching, nearest
from lightning_distopt.options import is_number, is_whole
from lightning_distopt.sparsity.encoder_layers import encoder_layers, head_parameters
from lightning_distopt.sparsity.packed_masks import PackedMasks
from lightning_distopt.sparsity.packing import pack_bits, unpack_bits
from lightning_distopt.sparsity.score_mask import ScoreMask
from lightning_distopt.sparsity.weights import (
    WEIGHT,
    Selection,
    attach,
    check_untied,
    dense_weight,
    mask_prefix,
    original_key,
    plain_state_dict,
    select_layers,
    set_tensor,
    take_off,
    weight_of,
)


class WeightMasking(FitCallback):
    r"""Learn which pretrained weights to use, and leave their values as they are.

    Every chosen layer computes with the weights whose score reaches a threshold. The optimizer moves the scores; all
    parameters of the module are frozen while training runs:

    $$ \hat W = W \odot [\, M \ge \tau \,], \qquad M \leftarrow M - \eta\, \frac{\partial L}{\partial M_{\text{bin}}},
       \qquad \frac{\partial L}{\partial M_{\text{bin}}} = W \odot \frac{\partial L}{\partial \hat W} $$

    What is left of a task are masks, one bit for each weight. When training ends the module is plain again, with masked
    weights. Checkpoints are those of the plain module with masked weights, too, so `load_from_checkpoint` needs nothing of
    this package; to resume from them they hold the scores besides. Learning rates are 10 to 30 times those of fine-tuning.

    It logs `masking/sparsity`, the share of weights that are masked, and `masking/changed`, the share of the masks' bits that
    are others than at first; with several replicas on a device, those of the last one that was trained.

    Example:
        >>> from lightning_distopt.callbacks.weight_masking import WeightMasking
        >>> masking = WeightMasking(path="masks/sentiment.pt")  # a model of `transformers`
        >>> masking = WeightMasking(layers=["encoder.layers.[2-9].linear?", "classifier"], head=["classifier.*"])
        >>> trainer = pl.Trainer(callbacks=[masking], accelerator="cpu")

    Args:
        layers: which to mask: patterns of their names, each of which must match, or a predicate of name and module. None: for
            a model of `transformers` such as BERT, RoBERTa or DistilBERT the linear layers of blocks 2 and up (from 0), the
            pooler, and all linear layers outside of the encoder.
        sparsity: share of the weights that are masked at first, from 0 up to 1.
        threshold: `tau`. With 0, weight decay of the optimizer changes no mask.
        width: of the interval, around the threshold, that scores are drawn from. What matters is the learning rate in
            proportion to it.
        seed: of these scores, together with the layer's name.
        head: parameters that the pretrained model does not have, by patterns of their names; they are kept in full beside the
            masks. None: for a model of `transformers` all outside of the encoder, else none.
        path: file that `masks` are written to when training ends. None: no file.

    Attributes:
        masks: the task's `PackedMasks`, once training has ended.

    Raises:
        ValueError: for options that make no sense, or a `path` that no file can have.
        MisconfigurationException: when fitting starts, if layers can't be masked, the strategy divides them, or another
            callback changes weights as well.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, chapter 7; M. Zhao et al.,
    *Masking as an efficient alternative to finetuning for pretrained language models*, EMNLP 2020.
    """

    def __init__(
        self,
        layers: str | Sequence[str] | Callable[[str, nn.Module], bool] | None = None,
        sparsity: float = 0.05,
        threshold: float = 0.0,
        width: float = 0.02,
        seed: int = 0,
        head: str | Sequence[str] | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("sparsity", sparsity), ("threshold", threshold), ("width", width)):
            if not (is_number(value) and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a number; got {value!r}.")
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"`sparsity` is the share of weights masked at first, from 0 up to 1 (excluded); got {sparsity!r}."
            )
        if width <= 0:
            raise ValueError(f"`width` is that of the interval the scores are drawn from, above 0; got {width!r}.")
        if not is_whole(seed):
            raise ValueError(f"`seed` must be a whole number; got {seed!r}.")
        self.layers: Selection | None = layers
        self.sparsity, self.threshold, self.width, self.seed = float(sparsity), float(threshold), float(width), seed
        self.head, self.path = [head] if isinstance(head, str) else head, check_file("path", path)
        self.masks: PackedMasks | None = None
        self._initial: dict[str, Tensor] = {}  # bits of the masks at first
        self._state: dict[str, Any] = {}  # for a checkpoint
        self._replaced: dict[str, Tensor] = {}  # buffers that training has changed, as they were
        self._release()

    def _release(self) -> None:
        self._module: pl.LightningModule | None = None
        self._layers: dict[str, nn.Module] = {}
        self._scores: dict[str, ScoreMask] = {}
        self._own: list[str] = []
        self._required: list[tuple[nn.Parameter, bool]] = []
        self._buffers: dict[str, Tensor] = {}  # as they were, such as the statistics of batch norm
        self._undo: list[Callable[[], None]] = []
        self._failed = False
        self._shown_at = -1

    @property
    def initial_masks(self) -> PackedMasks:
        """The masks at first, without what would be needed to apply them: to compare others with."""
        shapes = self._shapes() if self._scores else self.masks.shapes if self.masks is not None else {}
        return PackedMasks(self._initial, shapes, {}, {})

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(mask.scores.shape) for name, mask in self._scores.items()}

    # ------------------------------------------------------------------------------------------------------ life cycle
    def setup_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask the layers, before optimizers and replicas are made."""
        check_masks(trainer, "WeightMasking")
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # which Lightning calls once more, and so has to do nothing then
        try:
            layers = self._choose(pl_module)
            own = self._head(pl_module)
            before = [(p, p.requires_grad) for p in pl_module.parameters()]
            scores = attach(layers, self._make)
        except ValueError as error:
            raise MisconfigurationException(
                f"WeightMasking: {error} (Layers are masked when fitting starts: make them in `__init__` or `configure_model`, "
                "not in `setup`.)"
            ) from error
        self._release()
        self._module, self._layers, self._own, self._required = pl_module, layers, own, before
        self._scores = {name: mask for name, mask in scores.items() if isinstance(mask, ScoreMask)}
        self._initial = {name: pack_bits([mask.mask()]).cpu() for name, mask in self._scores.items()}
        self._buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        self.masks, self._state, self._replaced = None, {}, {}
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for name, layer in layers.items():
            self._undo.append(layer.register_load_state_dict_pre_hook(_Plain(self._scores[name])).remove)
        self._undo.append(change_checkpoints(trainer.strategy, self._plain))
        # Callbacks hear of an exception before the last checkpoint is written, and of nothing after it.
        after_teardown(trainer.strategy, lambda: self._end(trainer.is_global_zero))

    def _make(self, name: str, layer: nn.Module) -> ScoreMask:
        seed = derive_seed(self.seed, "scores", name)
        return ScoreMask(weight_of(layer), self.sparsity, self.threshold, self.width, seed)

    def _choose(self, module: nn.Module) -> dict[str, nn.Module]:
        chosen = encoder_layers(module) if self.layers is None else self.layers
        layers = select_layers(module, chosen)
        check_untied(module, layers)
        return layers

    def _head(self, module: nn.Module) -> list[str]:
        if self.head is None:
            return head_parameters(module)
        names = [name for name, _ in module.named_parameters()]
        known = list(dict.fromkeys(f"{name.rpartition('.')[0]}.*" if "." in name else name for name in names))
        last = ", ".join(map(repr, known[-3:]))
        for pattern in self.head:
            meant = nearest(f"{pattern.removesuffix('.*')}.*", known)
            matching(pattern, names, "head", f"no parameter{meant}; the last ones of the module are {last}")
        return matching(self.head, names, "head", "no parameter")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Note that training has failed."""
        self._failed = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note that training was only tried, if the strategy has not ended yet: that is how Lightning's `Tuner` leaves."""
        self._failed = True

    @torch.no_grad()
    def _end(self, is_global_zero: bool) -> None:
        """Make the module plain: with masked weights, or with the pretrained ones where training has failed."""
        module, masks = self._module, {name: mask.mask() for name, mask in self._scores.items()}
        if module is None:
            return
        state = self._snapshot({})
        for undo in self._undo:
            undo()
        for layer in self._layers.values():
            take_off(layer)
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        buffers = dict(module.named_buffers())
        replaced = {n: b for n, b in self._buffers.items() if n in buffers and not torch.equal(b.to(buffers[n]), buffers[n])}
        own, layers, failed = [*self._own, *replaced], self._layers, self._failed
        self._release()
        if failed:
            for name, values in replaced.items():
                set_tensor(module, name, values)
        else:
            self._state, self._replaced, self.masks = state, replaced, PackedMasks.of(module, masks, own)
            for name, layer in layers.items():
                weight_of(layer).mul_(masks[name].to(weight_of(layer)))
            if self.path is not None and is_global_zero:
                self.masks.save(self.path)

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Bring back the weights (and buffers) that a module had before it was masked, exactly.

        Args:
            module: as training has left it, with masked weights.

        Raises:
            RuntimeError: if training has not come to its end.
            ValueError: if the module has no such layers.
        """
        if self.masks is None:
            raise RuntimeError("WeightMasking has no weights to restore: it has them once a `trainer.fit` has come to its end.")
        layers = dict(module.named_modules())
        for name, shape in self.masks.shapes.items():
            if tuple(getattr(getattr(layers.get(name), WEIGHT, None), "shape", ())) != shape:
                raise ValueError(
                    f"The module has no layer `{name}` with a weight of the shape {list(shape)}: it is another one."
                )
        for name, values in self._replaced.items():
            set_tensor(module, name, values)
        for name, hidden in self._state["hidden"].items():
            weight = weight_of(layers[name])
            weight[~self.masks.masks(name).to(weight.device)] = hidden.to(weight)

    # ------------------------------------------------------------------------------------------------------ checkpoints
    def _plain(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the plain module's state, and keep what the callback's own needs: Lightning asks for that one next."""
        self._state = self._snapshot(state)
        computed = {}
        for name in self._layers:
            weight, scores = self._tensors(state, name)
            # W_hat = W * M_bin
            computed[name] = weight * (scores >= self.threshold).to(weight.dtype)
        return plain_state_dict(state, computed)

    def _snapshot(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scores, and the weights that they mask."""
        scores, hidden = {}, {}
        for name in self._layers:
            weight, own = self._tensors(state, name)
            scores[name], hidden[name] = own, weight[own < self.threshold]
        return {"scores": scores, "hidden": hidden, "initial": self._initial}

    def _tensors(self, state: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
        """Return the weight and the scores of a layer from a state dict, or else from the layer."""
        weight = state.get(original_key(name), dense_weight(self._layers[name]))
        scores = state.get(f"{mask_prefix(name)}0.scores", self._scores[name].scores)
        return weight.detach(), scores.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the scores, and the weights that the checkpoint's masked ones lack."""
        return self._state

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Free what has gone into the checkpoint."""
        if self._scores:
            self._state = {}

    @torch.no_grad()
    def resume(self, state_dict: dict[str, Any]) -> None:
        """Continue with the scores of a checkpoint, whose weights are in the module already."""
        if not state_dict:  # a checkpoint without masks
            return
        shapes = {name: tuple(scores.shape) for name, scores in state_dict["scores"].items()}
        if shapes != self._shapes():
            odd = next(name for name in {**shapes, **self._shapes()} if shapes.get(name) != self._shapes().get(name))
            raise MisconfigurationException(
                f"WeightMasking can't resume: the checkpoint masks other layers, of which `{odd}` is the first. Resume with "
                "the same `layers`."
            )
        self._initial = dict(state_dict["initial"])
        for name, mask in self._scores.items():
            mask.scores.copy_(state_dict["scores"][name])
            weight = dense_weight(self._layers[name])
            weight[~mask.mask()] = state_dict["hidden"][name].to(weight)

    # ---------------------------------------------------------------------------------------------------------- logging
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at Lightning's interval."""
        step = trainer.global_step
        if not is_logging_step(trainer, step) or step == self._shown_at:
            return
        self._shown_at = step
        total = sum(mask.scores.numel() for mask in self._scores.values())
        masked = changed = 0
        for name, mask in self._scores.items():
            alive = mask.mask()
            masked += int((~alive).sum())
            (initial,) = unpack_bits(self._initial[name].to(alive.device), [alive.shape])
            changed += int((alive ^ initial).sum())
        shares = {"masking/sparsity": masked / total, "masking/changed": changed / total}
        log_doubles(pl_module, shares, on_step=True, on_epoch=False)


class _Plain:
    """A hook that lets a masked layer load the state dict of the plain one, without new scores."""

    def __init__(self, mask: ScoreMask) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        weight = state.pop(f"{prefix}{WEIGHT}", None)
        if weight is not None:
            state[f"{prefix}parametrizations.{WEIGHT}.original"] = weight
            state[f"{prefix}parametrizations.{WEIGHT}.0.scores"] = self.mask.scores.detach()
