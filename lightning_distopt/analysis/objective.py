"""A loss over fixed data as a function of a module's parameters, which all probes measure."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from lightning_distopt.analysis.parameters import Parameters, select_parameters
from lightning_distopt.analysis.undisturbed import Mode, undisturbed
from lightning_distopt.communication.rng import seed_streams

LossFn = Callable[[nn.Module, Any], Tensor]
"""The mean loss of a module over the samples of a batch: `loss_fn(module, batch) -> Tensor` with one element."""

Metrics = Callable[[nn.Module, Any], Mapping[str, Tensor]]
"""Means over the samples of a batch by name, such as an accuracy."""


class Objective:
    r"""The mean loss over fixed batches, as a function of the parameters of a module.

    $$ f(w) = \frac{1}{\sum_b n_b} \sum_b n_b \, \ell_b(w) $$

    `ell_b` is the mean over the `n_b` samples of batch `b`, so the last batch may be smaller. Over several ranks the sums run
    over the batches of all of them, by one message. Nothing of the module is changed, see `undisturbed`; other points than its
    own weights are evaluated without writing to them.

    Example:
        >>> net = nn.Linear(3, 1).double()
        >>> data = [(torch.randn(4, 3).double(), torch.randn(4, 1).double()) for _ in range(2)]
        >>> f = Objective(net, lambda net, batch: ((net(batch[0]) - batch[1]) ** 2).mean(), data)
        >>> w = f.vector()
        >>> bool(f.loss(w - 0.01 * f.gradient()) < f.loss())
        True

    Args:
        module: whose parameters are the variables.
        loss_fn: `loss_fn(module, batch)`, the mean loss over a batch's samples.
        batches: of this rank, on the module's device. They are kept and gone through again and again, in the same order.
        parameters: those that are variables, by patterns or a predicate; None: all that are trainable.
        metrics: what else is measured by `measure`, as means over the samples of a batch.
        size_of: number of samples of a batch; by default the length of the first tensor in it.
        mode: "eval", or "train" for batch norm with the statistics of each batch.
        seed: of the random streams at every evaluation.
        reduce: sums a tensor over all ranks in place; None where there is one.
        check: whether to evaluate twice at first, and to refuse what comes out differently each time.

    Raises:
        ValueError: if no parameter is chosen, there is no batch on any rank, the loss is not one number, not finite or not the
            same twice.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        batches: Sequence[Any],
        parameters: Parameters | None = None,
        metrics: Metrics | None = None,
        size_of: Callable[[Any], int] | None = None,
        mode: Mode = "eval",
        seed: int = 0,
        reduce: Callable[[Tensor], Any] | None = None,
        check: bool = True,
    ) -> None:
        if mode not in ("eval", "train"):
            raise ValueError(f"`mode` must be 'eval' or 'train'; got {mode!r}.")
        self.module, self.loss_fn, self.metrics, self.mode, self.seed = module, loss_fn, metrics, mode, seed
        self.parameters = select_parameters(module, parameters)
        self.dim = sum(parameter.numel() for parameter in self.parameters.values())
        self.device = next(iter(self.parameters.values())).device
        self.dtype = functools.reduce(torch.promote_types, (parameter.dtype for parameter in self.parameters.values()))
        self.wide = torch.promote_types(self.dtype, torch.float32)  # of sums over batches
        self._reduce, self._open = reduce, False
        self._call = _Call(module, loss_fn)
        self._names: list[str] | None = None
        self.batches, self.sizes = [], []
        problem: Exception | None = None
        try:
            for batch in batches:
                if (size := (size_of or batch_size)(batch)) > 0:
                    self.batches.append(_differentiable(batch))
                    self.sizes.append(size)
        except Exception as error:
            problem = error
        self.samples = int(self.total(torch.tensor([float(sum(self.sizes))], dtype=torch.float64), problem).item())
        if self.samples == 0:
            raise ValueError("There is no sample to measure on: the data is empty.")
        if check:
            self._check()

    def restricted(self, parameters: Parameters) -> Objective:
        """Return the same function of fewer parameters."""
        twin = object.__new__(Objective)
        twin.__dict__.update(self.__dict__)
        twin._open = False
        twin.parameters = select_parameters(self.module, parameters, among=self.parameters)
        twin.dim = sum(parameter.numel() for parameter in twin.parameters.values())
        return twin

    # -------------------------------------------------------------------------------------------------------- points
    def vector(self) -> Tensor:
        """Return a copy of the weights as they are, `[d]`."""
        with torch.inference_mode(False), torch.no_grad():
            return self.flatten([parameter.detach() for parameter in self.parameters.values()])

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return tensors, one for each parameter, as a vector `[d]`; None is zero."""
        pairs = zip(tensors, self.parameters.values(), strict=True)
        pieces = [torch.zeros_like(parameter) if tensor is None else tensor for tensor, parameter in pairs]
        return torch.cat([piece.reshape(-1).to(self.dtype) for piece in pieces])

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector `[d]` in the shapes and dtypes of the parameters, by name: views where the dtype is the same."""
        pieces = vector.split([parameter.numel() for parameter in self.parameters.values()])
        pairs = zip(self.parameters.items(), pieces, strict=True)
        return {name: piece.view(parameter.shape).to(parameter.dtype) for (name, parameter), piece in pairs}

    # ---------------------------------------------------------------------------------------------------- evaluation
    @contextmanager
    def session(self) -> Iterator[None]:
        """Leave the module undisturbed by the body. Every evaluation opens one by itself; one around many saves their time."""
        if self._open:
            seed_streams(self.seed, self.device)
            yield
            return
        self._open = True
        try:
            with undisturbed(self.module, self.mode, self.seed):
                yield
        finally:
            self._open = False

    def batch_loss(self, batch: Any, at: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of a batch with its graph, inside a session.

        Args:
            batch: one of `batches`.
            at: parameters and buffers by name that stand in for the module's own; None: its own.
        """
        if at is None:
            return scalar(self.loss_fn(self.module, batch))
        loss: Tensor = functional_call(self._call, {f"module.{name}": value for name, value in at.items()}, (batch,))
        return scalar(loss)

    def loss(self, at: Tensor | None = None, buffers: Mapping[str, Tensor] | None = None) -> float:
        """Return `f(at)`.

        Args:
            at: `[d]`; None: the weights as they are.
            buffers: by name, that stand in for the module's own, see `batch_norm_statistics`.
        """
        return self.measure(at, buffers, metrics=False)["loss"]

    def measure(
        self, at: Tensor | None = None, buffers: Mapping[str, Tensor] | None = None, metrics: bool = True
    ) -> dict[str, float]:
        """Return the loss and all metrics at a point, by name. Arguments are those of `loss`."""
        sums: dict[str, Tensor] = {"loss": torch.zeros((), dtype=torch.float64)}
        problem: Exception | None = None
        with self.session(), torch.no_grad():
            try:
                place = self.place(at, buffers)
                for size, batch in zip(self.sizes, self.batches, strict=True):
                    values = {"loss": self.batch_loss(batch, place)}
                    if metrics and self.metrics is not None:
                        values |= self._metrics_of(batch, place)
                    for name, value in values.items():
                        sums[name] = sums.get(name, 0) + size * value.detach().to("cpu", torch.float64)
            except Exception as error:
                problem = error
        names, good = list(sums), problem is None and bool(self.batches)
        if metrics and self.metrics is not None and self._reduce is not None:
            names = self._agree_on_names(names if good else [])
            if good and names != list(sums):
                problem = ValueError(f"All ranks must measure the same: this one has {list(sums)}, others {names}.")
        zero = torch.zeros((), dtype=torch.float64)
        total = self.total(torch.stack([sums.get(name, zero) for name in names]), problem) / self.samples
        return dict(zip(names, total.tolist(), strict=True))

    def gradient(self, at: Tensor | None = None, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the gradient of `f` at a point, `[d]`, in single precision at least. Arguments are those of `loss`."""
        return self.loss_and_gradient(at, buffers)[1]

    def loss_and_gradient(self, at: Tensor | None = None, buffers: Mapping[str, Tensor] | None = None) -> tuple[float, Tensor]:
        """Return `f` and its gradient `[d]` at a point. Arguments are those of `loss`."""
        problem: Exception | None = None
        with self.session():
            sums = torch.zeros(self.dim + 1, dtype=self.wide, device=self.device)
            try:
                for size, loss, gradient in self.batch_gradients(at, buffers):
                    sums[:-1].add_(gradient, alpha=size)
                    sums[-1].add_(loss, alpha=size)
            except Exception as error:
                problem = error
        sums = self.total(sums, problem) / self.samples
        return float(sums[-1]), sums[:-1]

    def batch_gradients(
        self, at: Tensor | None = None, buffers: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Give size, loss and gradient `[d]` of each batch of this rank, inside a session. Arguments are those of `loss`."""
        place = self.place(at, buffers, differentiable=True)
        variables = [(place or self.parameters)[name] for name in self.parameters]
        for size, batch in zip(self.sizes, self.batches, strict=True):
            loss = self.batch_loss(batch, place)
            yield size, loss.detach(), self.flatten(gradients(loss, variables))

    def total(self, values: Tensor, problem: Exception | None = None) -> Tensor:
        """Return `values`, `[n]`, summed over all ranks by one message, or raise on all of them an error that one has.

        Args:
            values: of this rank.
            problem: what went wrong on this rank, so that it has no values.
        """
        if self._reduce is None:
            if problem is not None:
                raise problem
            return values
        message = torch.cat([values, values.new_zeros(1)])
        if problem is not None:
            message.zero_()[-1] = 1
        self.sum_over_ranks(message)
        if problem is not None:
            raise problem
        if message[-1] > 0:
            raise ValueError("Another rank can't measure its part of the data; its own error says why.")
        return message[:-1]

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return `values`, summed over all ranks."""
        if self._reduce is None:
            return values
        there = values.to(self.device)
        self._reduce(there)
        if there is not values:
            values.copy_(there)
        return values

    def agreed(self, condition: bool) -> bool:
        """Return whether the condition holds on any rank, so that all take the same way."""
        return bool(self.sum_over_ranks(torch.tensor([float(condition)], dtype=torch.float64)).item() > 0)

    def place(
        self, at: Tensor | None, buffers: Mapping[str, Tensor] | None, differentiable: bool = False
    ) -> dict[str, Tensor] | None:
        """Return parameters and buffers by name, for `batch_loss`; None for the module's own. Inside a session."""
        if at is None and buffers is None:
            return None
        vector = self.vector() if at is None else at.to(self.device, self.dtype)
        point = self.tensors(vector.clone() if vector.is_inference() else vector)
        if differentiable:
            point = {name: tensor.detach().requires_grad_() for name, tensor in point.items()}
        return {**point, **(buffers or {})}

    def _metrics_of(self, batch: Any, place: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        call = _Call(self.module, self.metrics)
        at = {f"module.{name}": value for name, value in (place or {}).items()}
        values = {name: torch.as_tensor(value) for name, value in functional_call(call, at, (batch,)).items()}
        if "loss" in values:
            raise ValueError("`metrics` returns 'loss', which is the name of what `loss_fn` returns: give it another name.")
        return values

    def _agree_on_names(self, names: list[str]) -> list[str]:
        """Return the names that ranks with batches measure, also where there is none: the mean over ranks of their letters."""
        if self._names is not None:
            return self._names
        text = "\n".join(names).encode()
        length, ranks = self.sum_over_ranks(torch.tensor([len(text), bool(text)], dtype=torch.float64)).tolist()
        letters = torch.zeros(round(length / max(ranks, 1)), dtype=torch.float64)
        letters[: len(text)] = torch.tensor(list(text[: len(letters)]), dtype=torch.float64)
        codes = self.sum_over_ranks(letters) / max(ranks, 1)
        agreed = bytes(codes.round().byte().tolist()).decode(errors="replace").split("\n")
        self._names = agreed if ranks else None
        return agreed

    def _check(self) -> None:
        problem: Exception | None = None
        try:
            if self.batches:
                self._check_batch(self.batches[0])
        except Exception as error:
            problem = error
        self.total(torch.zeros(1, dtype=torch.float64), problem)

    def _check_batch(self, batch: Any) -> None:
        losses = []
        with self.session(), torch.no_grad():
            for seed in (self.seed, self.seed + 1):
                seed_streams(seed, self.device)
                losses.append(self.batch_loss(batch).double().item())
        if not math.isfinite(losses[0]):
            raise ValueError(f"The loss is {losses[0]} at the weights as they are: there is nothing to analyse.")
        if not abs(losses[0] - losses[1]) <= 1e-4 * max(abs(losses[0]), 1e-12):
            raise ValueError(
                f"The same batch has the loss {losses[0]:.6g} and then {losses[1]:.6g}: something in the module is random, "
                "such as dropout in `mode='train'`; switch it off, or pass `check=False` to keep one draw."
            )


class _Call(nn.Module):
    """Calls a function with a module, so that `functional_call` can exchange the module's parameters meanwhile."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Any], Any] | None) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, batch: Any) -> Any:
        assert self.function is not None
        return self.function(self.module, batch)


def scalar(loss: Any) -> Tensor:
    """Return a loss as a tensor without dimensions, or raise a `ValueError` if it is not one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"`loss_fn` must return the mean loss over the batch as a tensor with one element; got {shape}.")
    return loss.reshape(())


def _differentiable(batch: Any) -> Any:
    """Return a batch without tensors of inference mode, which no graph may hold."""
    with torch.inference_mode(False):
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, batch)


def gradients(
    value: Tensor, variables: Sequence[Tensor], weights: Tensor | None = None, create_graph: bool = False, keep: bool = False
) -> list[Tensor | None]:
    """Return derivatives of `value` by variables, None where it does not depend on one; `.grad` is not touched.

    Args:
        value: a loss, or any tensor.
        variables: by which to differentiate.
        weights: of the elements of `value`, like it; needed if it has several.
        create_graph: whether derivatives are to be differentiated again.
        keep: whether the graph of `value` is needed again.
    """
    if not value.requires_grad:
        return [None] * len(variables)
    return list(
        torch.autograd.grad(
            value, list(variables), weights, create_graph=create_graph, retain_graph=create_graph or keep, allow_unused=True
        )
    )


def batch_size(batch: Any) -> int:
    """Return the number of samples of a batch: the length of the first tensor in it.

    Example:
        >>> batch_size({"images": torch.zeros(5, 1, 8, 8), "labels": torch.zeros(5)})
        5

    Raises:
        ValueError: if it has none with a dimension.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError("The batch has no tensor that says how many samples it has: pass `size_of=lambda batch: ...`.")
