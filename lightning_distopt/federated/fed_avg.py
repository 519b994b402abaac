"""FedAvg: the weighted average of what the clients have learned."""

from __future__ import annotations

from lightning_distopt.federated.aggregator import Aggregator


class FedAvg(Aggregator):
    r"""Average the clients' models, weighted by their numbers of samples.

    $$ x_t = \sum_{k \in S_t} \frac{n_k}{\sum_{j \in S_t} n_j} \, \hat x^k_t $$

    Example:
        >>> FedAvg()
        FedAvg()

    Reference: McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-efficient learning of deep networks from
    decentralized data. AISTATS 2017. T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*,
    algorithms 5 (without lines 7-10) and 17.
    """

    takes_prototypes = True
