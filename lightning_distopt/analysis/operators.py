"""Products of curvature matrices with vectors, without the matrices."""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from lightning_distopt.analysis.objective import Objective, gradients
from lightning_distopt.options import check_choice

Kind = Literal["hessian", "gauss_newton"]
Derivatives = Literal["double_backward", "finite_differences"]

_NO_SECOND_DERIVATIVE = (
    "not implemented",
    "differentiate twice",
    "does not currently support double backward",  # a compiled module
    "not compatible with .grad()",  # reentrant checkpointing
)
"""What torch says."""


class SymmetricOperator(Protocol):
    """Products with a symmetric matrix, which is all that solvers see of it."""

    @property
    def dim(self) -> int:
        """Length of the vectors."""

    @property
    def dtype(self) -> torch.dtype:
        """Numbers in the vectors."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector `[d]`."""

    def agreed(self, condition: bool) -> bool:
        """Return whether the condition holds on any rank."""


class CurvatureOperator:
    r"""The Hessian of an objective, or its Gauss-Newton matrix, as a function of vectors.

    $$ H v = \frac{1}{\sum_b n_b} \sum_b n_b \, \nabla \big( \nabla \ell_b(w)^\top v \big), \qquad
       G v = \frac{1}{\sum_b n_b} \sum_b n_b \, J_b^\top \, \nabla_z^2 \ell_b \, J_b v $$

    `z` are the outputs of the network, `J_b` their derivatives by the parameters. Over several ranks each goes through its own
    batches, and one message `[sum n_b H_b v]` sums them.

    Example:
        >>> net = nn.Linear(3, 1, bias=False).double()
        >>> x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
        >>> f = Objective(net, lambda net, batch: ((net(batch[0]) - batch[1]) ** 2).mean() / 2, [(x, y)])
        >>> v = torch.randn(3).double()
        >>> torch.allclose(CurvatureOperator(f).matvec(v), x.T @ (x @ v) / 8)
        True

    Args:
        objective: whose second derivatives they are, at the weights as they are.
        kind: "hessian" or "gauss_newton".
        derivatives: "double_backward", or "finite_differences" of gradients, where a layer has no second derivative:
            `(g(w + e v) - g(w - e v)) / 2e` with `e = eps^(1/3) (1 + |w|) / |v|`, `eps` that of the numbers. Two gradients a
            product, and an error of about `eps^(2/3)`; not for Gauss-Newton.
        keep_graph: whether the graphs of all gradients are kept until `release`, which saves a third of the time of a product
            and holds the activations of all batches.
        outputs: the submodule whose output `z` is, for Gauss-Newton: its name, "" the module itself. It is called once a loss.

    Attributes:
        products: made so far.

    Raises:
        ValueError: for options that are unknown or contradict each other.
    """

    def __init__(
        self,
        objective: Objective,
        kind: Kind = "hessian",
        derivatives: Derivatives = "double_backward",
        keep_graph: bool = False,
        outputs: str = "",
    ) -> None:
        check_curvature(kind, derivatives, keep_graph)
        modules = dict(objective.module.named_modules())
        if outputs not in modules:
            raise ValueError(f"`outputs` names the submodule {outputs!r}, which there is not; try one of {list(modules)[1:6]}.")
        self.objective, self.kind, self.derivatives, self.keep_graph = objective, kind, derivatives, keep_graph
        self._outputs = modules[outputs]
        self._kept: dict[int, _Graph] = {}
        self._known = False  # whether all layers have second derivatives
        self.products = 0

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.objective.dim

    @property
    def dtype(self) -> torch.dtype:
        """Numbers in the vectors."""
        return self.objective.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.objective.device

    def agreed(self, condition: bool) -> bool:
        """Return whether the condition holds on any rank."""
        return self.objective.agreed(condition)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector.

        Args:
            vector: `[d]`, the same on every rank.

        Returns:
            `[d]`, in single precision at least, the same on every rank. Collective over several.

        Raises:
            ValueError: if there is no second derivative, or the product is not finite.
        """
        with torch.inference_mode(False):
            vector = vector.detach().to(self.device, self.dtype)
            vector = vector.clone() if vector.is_inference() else vector
        product = self._differences(vector) if self.derivatives == "finite_differences" else self._double_backward(vector)
        self.products += 1
        if not bool(torch.isfinite(product).all()):  # the same on every rank
            raise ValueError("A product with the curvature is not finite: the loss overflows at these weights, or near them.")
        return product

    def release(self) -> None:
        """Let go of the graphs that are kept."""
        self._kept.clear()

    def _double_backward(self, vector: Tensor) -> Tensor:
        f = self.objective
        problem: Exception | None = None
        with f.session():
            total = torch.zeros(f.dim, dtype=f.wide, device=f.device)
            pieces = list(f.tensors(vector).values())
            try:
                for k, (size, batch) in enumerate(zip(f.sizes, f.batches, strict=True)):
                    graph = self._kept.get(k) or self._graph(batch)
                    if self.keep_graph:
                        self._kept[k] = graph
                    total.add_(f.flatten(graph.product(pieces, self.keep_graph)), alpha=size)
            except Exception as error:
                self.release()
                problem = _explained(error)
        return f.total(total, problem) / f.samples

    def _graph(self, batch: Any) -> _Graph:
        variables = list(self.objective.parameters.values())
        if self.kind == "hessian":
            loss = self.objective.batch_loss(batch)
            one = torch.ones_like(loss, requires_grad=True)  # so that layers see that they are to be differentiated twice
            return self._checked(_Hessian(variables, gradients(loss, variables, one, create_graph=True)))
        found: list[Tensor] = []
        handle = self._outputs.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            loss = self.objective.batch_loss(batch)
        finally:
            handle.remove()
        if len(found) != 1 or not isinstance(found[0], Tensor) or not found[0].requires_grad:
            raise ValueError(
                "Gauss-Newton needs the module whose output the loss is a function of: one tensor, once a loss. Name it by "
                "`outputs`, such as `outputs='model'`."
            )
        one = torch.ones_like(loss, requires_grad=True)
        return self._checked(_GaussNewton(variables, found[0], gradients(loss, [found[0]], one, create_graph=True)[0]))

    def _checked(self, graph: _Graph) -> _Graph:
        """Return a graph; raise an error, for the first, if it goes through a layer that can't be differentiated twice.

        Such a layer (`once_differentiable`) leaves a node behind that raises, but only where autograd comes along: it passes
        by on its way to the parameters, and the product would silently lack a term.
        """
        if not self._known:
            if any("Error" in node.name() for node in _nodes(graph.first_derivatives())):
                raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
            self._known = True
        return graph

    def _differences(self, vector: Tensor) -> Tensor:
        f = self.objective
        norm = float(vector.norm())
        if norm == 0:
            return torch.zeros_like(vector, dtype=f.wide)
        w = f.vector()
        e = torch.finfo(f.dtype).eps ** (1 / 3) * (1 + float(w.norm())) / norm
        with f.session():
            # (g(w + e v) - g(w - e v)) / 2e
            return (f.gradient(w + e * vector) - f.gradient(w - e * vector)) / (2 * e)


def check_curvature(kind: str, derivatives: str, keep_graph: bool = False) -> None:
    """Raise a `ValueError` for options of `CurvatureOperator` that are unknown or contradict each other."""
    check_choice("kind", kind, get_args(Kind))
    check_choice("derivatives", derivatives, get_args(Derivatives))
    if derivatives == "finite_differences" and (kind == "gauss_newton" or keep_graph):
        raise ValueError(
            "Finite differences have no graph to keep and give products with the Hessian only: use "
            "`derivatives='double_backward'`."
        )


def _nodes(tensors: list[Tensor | None]) -> set[Any]:
    """Return all nodes of the graphs of tensors."""
    seen: set[Any] = set()
    left = [tensor.grad_fn for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left.extend(following for following, _ in node.next_functions if following is not None)
    return seen


def _explained(error: Exception) -> Exception:
    """Return an error that says what to do, where torch's says that there is no second derivative."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not any(words in text for words in _NO_SECOND_DERIVATIVE):
        return error
    explained = ValueError(
        "The loss has no second derivative in some layer: use `derivatives='finite_differences'`. torch says: "
        + text.splitlines()[0]
    )
    explained.__cause__ = error
    return explained


class _Graph:
    """What one batch adds to products."""

    def first_derivatives(self) -> list[Tensor | None]:
        """Return what is differentiated for products."""
        raise NotImplementedError

    def product(self, vector: list[Tensor], keep: bool) -> list[Tensor | None]:
        """Return the product with a vector, a piece for each parameter."""
        raise NotImplementedError


class _Hessian(_Graph):
    def __init__(self, variables: list[nn.Parameter], gradient: list[Tensor | None]) -> None:
        self._variables, self._gradient = variables, gradient

    def first_derivatives(self) -> list[Tensor | None]:
        """Return the gradient."""
        return self._gradient

    def product(self, vector: list[Tensor], keep: bool) -> list[Tensor | None]:
        pairs = [(g, v) for g, v in zip(self._gradient, vector, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [None] * len(self._variables)
        found = torch.autograd.grad(
            [g for g, _ in pairs], self._variables, [v for _, v in pairs], retain_graph=keep, allow_unused=True
        )
        return list(found)


class _GaussNewton(_Graph):
    def __init__(self, variables: list[nn.Parameter], outputs: Tensor, by_outputs: Tensor | None) -> None:
        self._variables, self._outputs, self._by_outputs = variables, outputs, by_outputs
        self._dummy = torch.zeros_like(outputs, requires_grad=True)
        # J^T u, which is linear in u: its derivative by u in the direction of v is J v.
        self._transposed = gradients(outputs, variables, self._dummy, create_graph=True)

    def first_derivatives(self) -> list[Tensor | None]:
        """Return those by outputs, and of them."""
        return [*self._transposed, self._by_outputs]

    def product(self, vector: list[Tensor], keep: bool) -> list[Tensor | None]:
        pairs = [(t, v) for t, v in zip(self._transposed, vector, strict=True) if t is not None and t.requires_grad]
        if not pairs or self._by_outputs is None or not self._by_outputs.requires_grad:
            return [None] * len(self._variables)
        (forward,) = torch.autograd.grad([t for t, _ in pairs], [self._dummy], [v for _, v in pairs], retain_graph=True)
        (curved,) = torch.autograd.grad(self._by_outputs, [self._outputs], forward, retain_graph=True, allow_unused=True)
        return gradients(self._outputs, self._variables, curved, keep=keep) if curved is not None else [None] * len(vector)
