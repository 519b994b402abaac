"""How sparsity rises."""

from __future__ import annotations


def cubic_sparsity(progress: float, final: float, initial: float = 0.0) -> float:
    r"""Return the sparsity of the cubic schedule.

    $$ s_t = s_f + (s_i - s_f) \Big( 1 - \frac{t - t_0}{n \, \Delta t} \Big)^3 $$

    Example:
        >>> [round(cubic_sparsity(t / 225, 0.9), 6) for t in (0, 1, 112, 225, 300)]
        [0.0, 0.011947, 0.785993, 0.9, 0.9]

    Args:
        progress: `(t - t_0) / (n Delta t)`; below 0 and above 1 it counts as 0 and 1.
        final: `s_f`.
        initial: `s_i`.

    Reference: Zhu, Gupta: To prune, or not to prune. 2017; T. Lin, *Optimization for deep learning in distributed and
    heterogeneous systems*, section 15.2.
    """
    left = 1 - min(1.0, max(0.0, progress))
    # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Dt))^3
    return final + (initial - final) * left**3
