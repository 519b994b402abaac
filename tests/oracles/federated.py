"""Federated algorithms (thesis chapter 8 and the papers it names), one NumPy transcription each.

`problem` has `samples`, `steps`, `cohorts`, `etas`, `gradient(k, h, x)` and `full_gradient(k, x)`. Every function returns the
server's model after each round, `[rounds, d]`.
"""

from __future__ import annotations

import numpy as np

from tests.oracles.local_sgd import SGD


def shares(problem, S):
    """p_k = n_k / sum_{j in S} n_j."""
    n = np.array([problem.samples[k] for k in S], dtype=float)
    return n / n.sum()


def local_update(problem, k, x, eta, correct=lambda g, y: g, optimizer=None):
    """Algorithm 17: tau_k steps of a new optimizer, from the server's model; `correct` changes the gradient at y."""
    optimizer, y = optimizer or SGD(), x.copy()
    for h in range(problem.steps[k]):
        g = correct(problem.gradient(k, h, y), y)
        y = optimizer.step(y, g, eta)
    return y


def fed_avg(x0, problem, optimizer=SGD, uniform=False):
    """Algorithm 5 without lines 7-10: x_t = sum_k p_k y_k."""
    x, history = x0.copy(), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        p = np.full(len(S), 1 / len(S)) if uniform else shares(problem, S)
        x = sum(p_k * local_update(problem, k, x, eta, optimizer=optimizer()) for p_k, k in zip(p, S, strict=True))
        history.append(x)
    return np.array(history)


def fed_prox(x0, problem, mu):
    """FedAvg with the gradient of mu/2 ||w - w_0||^2 added."""
    x, history = x0.copy(), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        w_0 = x.copy()
        y = [local_update(problem, k, w_0, eta, lambda g, w, w_0=w_0: g + mu * (w - w_0)) for k in S]
        x = sum(p_k * y_k for p_k, y_k in zip(shares(problem, S), y, strict=True))
        history.append(x)
    return np.array(history)


def fed_avg_m(x0, problem, beta):
    """Source line 5321: dv <- beta dv + dx, x <- x - dv, with dx = sent - averaged."""
    x, dv, history = x0.copy(), 0.0, []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        dx = x - sum(p_k * local_update(problem, k, x, eta) for p_k, k in zip(shares(problem, S), S, strict=True))
        dv = beta * dv + dx
        x = x - dv
        history.append(x)
    return np.array(history)


def fed_opt(x0, problem, kind, eta, b1, b2, tau):
    """Reddi et al., algorithm 2: `kind` is "adagrad", "adam" or "yogi"."""
    x, history = x0.copy(), []
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for S, eta_l in zip(problem.cohorts, problem.etas, strict=True):
        D = sum(p_k * (local_update(problem, k, x, eta_l) - x) for p_k, k in zip(shares(problem, S), S, strict=True))
        m = b1 * m + (1 - b1) * D
        if kind == "adagrad":
            v = v + D**2
        elif kind == "adam":
            v = b2 * v + (1 - b2) * D**2
        else:
            v = v - (1 - b2) * D**2 * np.sign(v - D**2)
        x = x + eta * m / (np.sqrt(v) + tau)
        history.append(x)
    return np.array(history)


def fed_nova(x0, problem, rho=0.0, weight_decay=0.0):
    """Wang et al.: x <- x - tau_eff eta sum_k p_k d_k with d_k = G_k a_k / |a_k|_1, tau_eff = sum_k p_k |a_k|_1."""
    x, history = x0.copy(), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        step, tau_eff = 0.0, 0.0
        for p_k, k in zip(shares(problem, S), S, strict=True):
            G, y, u = [], x, 0.0
            for h in range(problem.steps[k]):
                G.append(problem.gradient(k, h, y) + weight_decay * y)
                u = rho * u + G[-1]
                y = y - eta * u
            a = np.array([(1 - rho ** (len(G) - h)) / (1 - rho) for h in range(len(G))])
            step, tau_eff = step + p_k * (np.array(G).T @ a) / a.sum(), tau_eff + p_k * a.sum()
        x = x - tau_eff * eta * step
        history.append(x)
    return np.array(history)


def scaffold(x0, problem, option=2, eta_g=1.0, uniform=False):
    """Karimireddy et al. (ICML 2020), algorithm 1; the mean in the step of x may be weighted."""
    N = len(problem.samples)
    x, c, c_i, history = x0.copy(), np.zeros_like(x0), np.zeros((N, len(x0))), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        p = np.full(len(S), 1 / len(S)) if uniform else shares(problem, S)
        dx, dc = 0.0, 0.0
        for p_i, i in zip(p, S, strict=True):
            y = local_update(problem, i, x, eta, lambda g, y, i=i, c=c: g - c_i[i] + c)
            if option == 1:
                c_plus = problem.full_gradient(i, x)
            else:
                K_eta = problem.steps[i] * np.where(eta, eta, 1)
                c_plus = np.where(eta, c_i[i] - c + (x - y) / K_eta, c_i[i])  # a rate of zero says nothing
            dx, dc = dx + p_i * (y - x), dc + (c_plus - c_i[i]) / len(S)
            c_i[i] = c_plus
        x, c = x + eta_g * dx, c + len(S) / N * dc
        history.append(x)
    return np.array(history)


def mime_lite(x0, problem, beta):
    """Algorithm 21 with SGDm: U(g, s) = V(g, s) = (1 - beta) g + beta s."""
    x, s, history = x0.copy(), np.zeros_like(x0), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        p = shares(problem, S)
        y = [local_update(problem, k, x, eta, lambda g, y, s=s: (1 - beta) * g + beta * s) for k in S]
        full = sum(p_k * problem.full_gradient(k, x) for p_k, k in zip(p, S, strict=True))
        x, s = sum(p_k * y_k for p_k, y_k in zip(p, y, strict=True)), (1 - beta) * full + beta * s
        history.append(x)
    return np.array(history)


def coordinate_wise(x0, problem, combine):
    """Yin et al. (ICML 2018), definitions 1 and 2, of models: x_t[i] = combine of {y_k[i]}."""
    x, history = x0.copy(), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        x = combine(np.array([local_update(problem, k, x, eta) for k in S]))
        history.append(x)
    return np.array(history)


def trimmed_mean(beta):
    """Without the floor(beta m) smallest and largest of the m values of each coordinate, one coordinate at a time."""

    def combine(y):
        b = int(np.floor(round(beta * len(y), 6)))
        return np.array([np.mean(sorted(column)[b : len(y) - b]) for column in y.T])

    return combine


def one_bit(x0, problem, matrix, mu=0.0):
    """Gradients at B(w) = mean|w| sgn(w), steps of w, B(w) goes up; `matrix` selects the values of the only matrix in x."""

    def B(w):
        w = w.copy()
        w[matrix] = np.abs(w[matrix]).mean() * np.where(w[matrix] >= 0, 1.0, -1.0)
        return w

    x, history = x0.copy(), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        sent = []
        for k in S:
            w = x.copy()
            for h in range(problem.steps[k]):
                w = w - eta * (problem.gradient(k, h, B(w)) + mu * (w - x))
            sent.append(B(w))
        x = sum(p_k * y_k for p_k, y_k in zip(shares(problem, S), sent, strict=True))
        history.append(x)
    return np.array(history)


def compressed(x0, problem, up=np.copy, down=np.copy):
    """FedAvg with error feedback both ways: up, Q(y_k - w + e_k) of each client; down, Q(x - w) of the server, to all."""
    x, w, e, history = x0.copy(), x0.copy(), np.zeros((len(problem.samples), len(x0))), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        w = w + down(x - w)
        step = 0.0
        for p_k, k in zip(shares(problem, S), S, strict=True):
            v = local_update(problem, k, w, eta) - w + e[k]
            q = up(v)
            e[k] = v - q
            step = step + p_k * q
        x = x + step
        history.append(x)
    return np.array(history)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def avg_logits_gradient(z, teachers):
    """Of KL(t || softmax(z)), the mean over samples, in z: (softmax(z) - t) / B with t = softmax(1/|S| sum_k z_k)."""
    return (softmax(z) - softmax(np.mean(teachers, axis=0))) / len(z)


def fed_df(x0, problem, batches, N, eta, optimizer=SGD, from_previous=False, of_all=True):
    """Algorithm 18, with one prototype algorithm 5; line 14 has the teachers of S_t (`of_all`), or as printed those of S_t^P.

    `problem` has `prototype[k]`, `logits(P, x, d)` and `pull_back(P, d, g)`, the gradient in x of one in the logits. `x0` is a
    vector for each prototype; so is each entry of what is returned.
    """
    M, history = {P: x.copy() for P, x in x0.items()}, []
    for t, (S, rate) in enumerate(zip(problem.cohorts, problem.etas, strict=True)):
        x_hat = {k: local_update(problem, k, M[problem.prototype[k]], rate) for k in S}
        before = dict(M)
        for P in M:
            S_P = [k for k in S if problem.prototype[k] == P]
            if not S_P:
                continue
            x = sum(p_k * x_hat[k] for p_k, k in zip(shares(problem, S_P), S_P, strict=True))
            if from_previous:
                x = before[P].copy()
            inner = optimizer()
            for j in range(N):
                d = batches(t, j)
                teachers = [problem.logits(problem.prototype[k], x_hat[k], d) for k in (S if of_all else S_P)]
                g = problem.pull_back(P, d, avg_logits_gradient(problem.logits(P, x, d), teachers))
                x = inner.step(x, g, eta * (1 + np.cos(np.pi * j / N)) / 2)
            M[P] = x
        history.append(dict(M))
    return history
