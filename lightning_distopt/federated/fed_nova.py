"""FedNova: clients that have made more steps don't count for more."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import SGD, Optimizer

from lightning_distopt.federated.aggregator import Aggregator


class FedNova(Aggregator):
    r"""Average the clients' steps normalised, so that who makes more of them does not pull the model to its own optimum.

    $$ x_t = x_{t-1} + \tau_\text{eff} \sum_{k \in S_t} p_k \, \frac{\hat x^k_t - x_{t-1}}{\| a_k \|_1}, \qquad
       \tau_\text{eff} = \sum_{k \in S_t} p_k \, \| a_k \|_1 $$

    A client that makes `tau` steps with learning rate `eta` moves by `-eta G a`, with its gradients as columns of `G`. For
    plain SGD `a = (1, ..., 1)`, for heavy-ball momentum `rho`

    $$ a = \frac{1}{1 - \rho} \, (1 - \rho^\tau, \, 1 - \rho^{\tau - 1}, \, \dots, \, 1 - \rho), \qquad
       \| a \|_1 = \frac{1}{1 - \rho} \Big( \tau - \frac{\rho \, (1 - \rho^\tau)}{1 - \rho} \Big) $$

    The momentum is that of the module's SGD, and begins each round with zero. Where all clients make the same number of steps,
    this is FedAvg.

    Example:
        >>> FedNova()
        FedNova()
        >>> norm_of_steps(3), round(norm_of_steps(3, momentum=0.5), 4)  # 1 + 1.5 + 1.75
        (3.0, 4.25)

    Raises:
        ValueError: when fitting starts, for an optimizer that is not SGD, plain or with heavy-ball momentum, or whose momentum
            is kept from round to round.

    Reference: Wang, Liu, Liang, Joshi, Poor: Tackling the objective inconsistency problem in heterogeneous federated
    optimization. NeurIPS 2020, sections 4 and 5.
    """

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse optimizers whose `a` is not known."""
        for optimizer in optimizers:
            if not isinstance(optimizer, SGD):
                raise ValueError(
                    f"FedNova has to know how gradients add up to a client's step, which for {type(optimizer).__name__} no "
                    "formula says: use `torch.optim.SGD`, or FedAvg."
                )
            for option in ("nesterov", "dampening"):
                if any(group.get(option) for group in optimizer.param_groups):
                    raise ValueError(f"FedNova knows plain SGD and heavy-ball momentum: leave `{option}` out of the optimizer.")
        if _momentum(optimizers) and self.server.keep_optimizers:
            raise ValueError(
                "FedNova's normalisation is for momentum that begins each round with zero: use `optimizer_state='reset'`, or "
                "`momentum=0` in the optimizer."
            )

    def weights(self, shares: Sequence[float], steps: Sequence[int]) -> list[float]:
        """Return `c_k = p_k tau_eff / |a_k|`."""
        momentum = _momentum(self.server.replicas.optimizers)
        norms = [norm_of_steps(tau, momentum) for tau in steps]
        # tau_eff = sum_k p_k |a_k|
        effective = math.fsum(p * a for p, a in zip(shares, norms, strict=True))
        return [p * effective / a for p, a in zip(shares, norms, strict=True)]


def norm_of_steps(steps: int, momentum: float = 0.0) -> float:
    """Return the sum of `a`: how far so many steps lead with a learning rate and gradients of 1."""
    # |a| = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho)
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def _momentum(optimizers: Sequence[Optimizer]) -> float:
    """Return the momentum that all parameters have."""
    found = sorted({float(group["momentum"]) for optimizer in optimizers for group in optimizer.param_groups})
    if len(found) != 1 or not 0 <= found[0] < 1:
        raise ValueError(
            "FedNova normalises a client's step by one number: give all parameters the same `momentum`, at least 0 and below "
            f"1; got {', '.join(map(str, found))}."
        )
    return found[0]
