"""Pruning methods (thesis chapter 6 and the papers it names), one NumPy transcription each.

All weights are one vector; `sizes` are the shapes of the layers in it. `gradient(t, x)` is that of the `t`-th batch at the
weights `x` that the network computes with, `etas` are learning rates. Every function returns these weights after each step,
`[T, d]`. Where papers remove weights, they are removed here: their values and their momentum are zero. `chance(t)` are
uniform random numbers, one for each weight.
"""

from __future__ import annotations

import numpy as np

MOMENTUM, DECAY = 0.9, 0.01


class Run:
    """SGD with momentum and weight decay: u <- 0.9 u + g + 0.01 x, x <- x - eta u."""

    def __init__(self, x0, gradient, etas):
        self.x0, self.x, self.u, self.gradient, self.etas = x0.copy(), x0.copy(), np.zeros_like(x0), gradient, etas
        self.clock = 0  # of the learning rate

    def step(self, t, at, gradients_of=1.0):
        """One step on `x` with the gradient at `at`, of which a part counts."""
        self.u = MOMENTUM * self.u + gradients_of * self.gradient(t, at) + DECAY * self.x
        self.x = self.x - self.etas[self.clock] * self.u
        self.clock += 1

    def remove(self, m):
        """Let pruned weights not exist."""
        self.x, self.u = m * self.x, m * self.u

    def go_back(self, x, clock):
        self.x, self.u, self.clock = x.copy(), np.zeros_like(x), clock


def nearest(value):
    return int(np.floor(value + 0.5))


def top(scores, k):
    """Ones at the `k` largest; of equal ones the last."""
    m = np.zeros(len(scores))
    m[np.argsort(scores, kind="stable")[len(scores) - k :]] = 1
    return m


def parts(sizes):
    ends = np.cumsum([np.prod(size) for size in sizes])
    return [slice(end - np.prod(size), end) for size, end in zip(sizes, ends, strict=True)]


def whole_numbers(wanted, total):
    """The largest remainders are rounded up."""
    low = np.floor(wanted).astype(int)
    for k in np.argsort(low - np.asarray(wanted), kind="stable")[: total - low.sum()]:
        low[k] += 1
    return low


def erk(sizes, s):
    """Evci et al., appendix: 1 - s_l = eps sum(n_l) / prod(n_l), where no layer is full. Returns weights to prune."""
    n = np.array([np.prod(size) for size in sizes])
    pruned = nearest(s * n.sum())
    eps = (n.sum() - pruned) / sum(sum(size) for size in sizes)
    assert all(eps * sum(size) <= np.prod(size) for size in sizes)
    return whole_numbers([k - eps * sum(size) for k, size in zip(n, sizes, strict=True)], pruned)


def uniform(sizes, s):
    n = np.array([np.prod(size) for size in sizes])
    return whole_numbers(nearest(s * n.sum()) * n / n.sum(), nearest(s * n.sum()))


def at_first(sizes, counts, scores):
    """A random mask."""
    return np.concatenate([top(scores[p], p.stop - p.start - k) for p, k in zip(parts(sizes), counts, strict=True)])


def zhu_gupta(t, end, s):
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Dt))^3, s_i = 0."""
    return s - s * (1 - min(1, t / end)) ** 3


def dpf(x0, sizes, gradient, etas, s, p, ramp):
    """Section 6.2: x_{t+1} = x_t - gamma_t g(m_t * x_t), masks every p steps from the dense weights.

    Not after the last step, unless masks are not sparse enough yet.
    """
    run, m, history = Run(x0, gradient, etas), np.ones_like(x0), []
    T = len(etas)
    late = nearest(zhu_gupta((T - 1) // p * p, ramp * T, s) * len(x0)) < nearest(s * len(x0))
    for t in range(T + 1):
        if (t % p == 0 and t < T) or (t == T and late):
            m = top(abs(run.x), len(x0) - nearest(zhu_gupta(t, ramp * T, s) * len(x0)))
        if t > 0:
            history.append(m * run.x)
        if t < T:
            run.step(t, m * run.x)
    return np.array(history)


def incremental(x0, sizes, gradient, etas, s, p, ramp):
    """Zhu, Gupta: weights that are masked get no gradient and stay so."""
    run, m, history = Run(x0, gradient, etas), np.ones_like(x0), []
    T = len(etas)
    late = nearest(zhu_gupta((T - 1) // p * p, ramp * T, s) * len(x0)) < nearest(s * len(x0))
    for t in range(T + 1):
        if (t % p == 0 and t < T) or (t == T and late):
            m = top(np.where(m == 1, abs(run.x), -1), len(x0) - nearest(zhu_gupta(t, ramp * T, s) * len(x0)))
            run.remove(m)
        if t > 0:
            history.append(run.x)
        if t < T:
            run.step(t, run.x, m)
            run.remove(m)
    return np.array(history)


def one_shot(x0, sizes, gradient, etas, s, at):
    """Han et al.: train, prune, train what is left."""
    run, m, history = Run(x0, gradient, etas), np.ones_like(x0), []
    for t in range(len(etas)):
        run.step(t, run.x, m)
        if t + 1 == nearest(at * len(etas)):
            m = top(abs(run.x), len(x0) - nearest(s * len(x0)))
        run.remove(m)
        history.append(run.x)
    return np.array(history)


def snip(x0, sizes, gradient, etas, s):
    """Lee et al., algorithm 1: s_j = |g_j(c; D)|, g(c; D) = dL(c * w)/dc = g(w) w, of one batch; then training."""
    m = top(abs(gradient(0, x0) * x0), len(x0) - nearest(s * len(x0)))
    run, history = Run(x0, gradient, etas), [m * x0]
    run.remove(m)
    for t in range(1, len(etas)):
        run.step(t, run.x, m)
        run.remove(m)
        history.append(run.x)
    return np.array(history)


def lottery_ticket(x0, sizes, gradient, etas, s, rounds, rewind_to):
    """Frankle, Carbin, section 2: each round prunes s^(1/n) (of what survives, as a density) and resets what is left."""
    run, m, history, start = Run(x0, gradient, etas), np.ones_like(x0), [], x0
    ends = {r * len(etas) // (rounds + 1): r for r in range(1, rounds + 1)}
    for t in range(len(etas)):
        run.step(t, run.x, m)
        run.remove(m)
        if t + 1 == rewind_to:
            start = run.x.copy()
        if t + 1 in ends:
            density = (1 - s) ** (ends[t + 1] / rounds)
            m = top(np.where(m == 1, abs(run.x), -1), len(x0) - nearest((1 - density) * len(x0)))
            run.go_back(start, rewind_to)
            run.remove(m)
        history.append(run.x)
    return np.array(history)


def set_(x0, sizes, gradient, etas, s, p, zeta, chance):
    """Mocanu et al., algorithm 1: remove zeta of the smallest positive and of the largest negative weights, add random ones."""
    run, m, history = Run(x0, gradient, etas), at_first(sizes, erk(sizes, s), chance(0)), []
    run.remove(m)
    for t in range(len(etas)):
        run.step(t, run.x, m)
        run.remove(m)
        if (t + 1) % p == 0 and t + 1 < len(etas):
            new, scores = m.copy(), chance(t + 1)
            for of in parts(sizes):
                for sign in (run.x[of] >= 0, run.x[of] < 0):
                    alive = np.flatnonzero(sign & (m[of] == 1))
                    order = alive[np.argsort(abs(run.x[of][alive]), kind="stable")]
                    new[of][order[: nearest(zeta * len(alive))]] = 0
                missing = int(m[of].sum() - new[of].sum())
                new[of] += top(np.where(new[of] == 0, scores[of], -1), missing)
            m, before = new, m
            run.remove(m * before)
        history.append(run.x)
    return np.array(history)


def rigl(x0, sizes, gradient, etas, s, p, alpha, T_end, chance):
    """Evci et al., algorithm 1, with the update of the masks after a step."""
    run, m, history = Run(x0, gradient, etas), at_first(sizes, erk(sizes, s), chance(0)), []
    run.remove(m)
    for t in range(1, len(etas) + 1):
        g = gradient(t - 1, run.x)
        run.step(t - 1, run.x, m)
        run.remove(m)
        if t % p == 0 and t < T_end:
            new = m.copy()
            for of in parts(sizes):
                n = int(m[of].sum())
                k = nearest(alpha / 2 * (1 + np.cos(t * np.pi / T_end)) * n)
                new[of] = top(np.where(m[of] == 1, abs(run.x[of]), -1), n - k)
                new[of] += top(np.where(new[of] == 0, abs(g[of]), -1), k)
            m, before = new, m
            run.remove(m * before)
        history.append(run.x)
    return np.array(history)


def share_out(fractions, total, room):
    """Dettmers, Zettlemoyer, section 3: what a layer has no room for is divided equally among the others."""
    wanted = total * np.asarray(fractions) / sum(fractions)
    while (wanted > room + 1e-9).any():
        free = wanted < room
        excess = np.maximum(wanted - room, 0).sum()
        wanted = np.minimum(wanted, room) + free * excess / free.sum()
    return whole_numbers(wanted, total)


def sparse_momentum(x0, sizes, gradient, etas, s, p, prune_rate, chance):
    """Dettmers, Zettlemoyer, algorithm 1: the momentum is that of all weights, and decides who grows where."""
    run, m, history = Run(x0, gradient, etas), at_first(sizes, uniform(sizes, s), chance(0)), []
    run.x = m * run.x
    T = len(etas)
    for t in range(1, T + 1):
        run.step(t - 1, run.x)
        run.x = m * run.x
        if t % p == 0 and t < T:
            rate = prune_rate / 2 * (1 + np.cos(t * np.pi / T))
            new, means = m.copy(), []
            for of in parts(sizes):
                n = int(m[of].sum())
                means.append(abs(run.u[of])[m[of] == 1].mean())
                new[of] = top(np.where(m[of] == 1, abs(run.x[of]), -1), n - nearest(min(rate, 1 - n / len(m[of])) * n))
            room = np.array([(new[of] == 0).sum() for of in parts(sizes)])
            counts = share_out(means, int(m.sum() - new.sum()), room)
            for of, k in zip(parts(sizes), counts, strict=True):
                new[of] += top(np.where(new[of] == 0, abs(run.u[of]), -1), k)
            run.x, m = new * m * run.x, new
        history.append(run.x)
    return np.array(history)


def dsr(x0, sizes, gradient, etas, s, p, target, H, delta, chance):
    """Mostafa, Wang, algorithm 1; `target` is N_p."""
    run, m, history = Run(x0, gradient, etas), at_first(sizes, uniform(sizes, s), chance(0)), []
    run.remove(m)
    for t in range(1, len(etas) + 1):
        run.step(t - 1, run.x, m)
        run.remove(m)
        if t % p == 0 and t < len(etas):
            new, scores = m * (abs(run.x) >= H), chance(t)
            K = int(m.sum() - new.sum())
            if (1 - delta) * target > K:
                H = 2 * H
            elif (1 + delta) * target < K:
                H = H / 2
            room = np.array([(new[of] == 0).sum() for of in parts(sizes)])
            counts = share_out([new[of].sum() for of in parts(sizes)], K, room)
            for of, k in zip(parts(sizes), counts, strict=True):
                new[of] += top(np.where(new[of] == 0, scores[of], -1), k)
            m, before = new, m
            run.remove(m * before)
        history.append(run.x)
    return np.array(history)


def soft_filter(x0, sizes, gradient, etas, s, p):
    """He et al., algorithm 1: after each epoch the filters with the smallest norms are zeroed, and then trained on."""
    run, history, filters = Run(x0, gradient, etas), [], [size[0] for size in sizes]
    counts = whole_numbers(nearest(s * sum(filters)) * np.array(filters) / sum(filters), nearest(s * sum(filters)))
    for t in range(1, len(etas) + 1):
        run.step(t - 1, run.x)
        if t % p == 0 or t == len(etas):
            for of, size, k in zip(parts(sizes), sizes, counts, strict=True):
                rows = run.x[of].reshape(size[0], -1)
                rows[np.argsort(np.linalg.norm(rows, axis=1), kind="stable")[:k]] = 0
        history.append(run.x.copy())
    return np.array(history)
