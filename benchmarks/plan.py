"""Fits the constants of `lightning-distopt plan` on some of the measured steps, and predicts the others.

    python -m benchmarks.plan measurements.json

reads what `benchmarks.scaling` and `benchmarks.time_to_accuracy` have measured. Everything with eight replicas and
everything at one rate is held out: the constants are fitted on the rest (least squares of the logarithms of predicted
over measured times, so that all settings weigh alike), and the bar is on the held-out settings: each within 20 %. The
constants go into the package, predicted over measured times into a picture.

A measurement is a dictionary:

    strategy            "ddp" (or "all_reduce"), "local_sgd", "hierarchical", "dsgd", "dpsgd", "choco" or "ef_sign"; what
                        follows a colon is ignored; others are left out
    replicas            n
    rate_mbit           of a port, in Mbit/s; null: not limited
    across_mbit         between clusters; null: there is one cluster
    parameters          d
    compute_ms          of a step with as many replicas on this machine and without communication
    sync_period         H; 1 if absent, where "local_sgd" averages parameters
    overlap, compressor, topology, block_period     as the strategy has them; absent or null for its own defaults
    step_ms             the measured mean of a step
    bytes_per_step      that `traffic` has counted, or absent
    clusters            2 if absent and there is an `across_mbit`
    latency_ms          of a link; 0 if absent
    cores               of the machine, which all replicas share; absent: each has two or more of its own
    bytes_per_parameter 4 if absent
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Estimate, Report
from lightning_distopt.plan import Cluster, Costs, Method, Workload, bytes_per_step, time_per_step
from lightning_distopt.plan.costs import COSTS

LIMIT = 0.20
"""How far a held-out prediction may be off."""

HELD_OUT_REPLICAS = 8
PRIOR = 0.005  # what an e-fold away from the start costs, as a relative error: for constants that nothing depends on
SHARES = ("efficiency", "backward")  # at most 1
_ALGORITHMS = {"ddp": "local_sgd", "all_reduce": "local_sgd", "hierarchical": "local_sgd"}
_KNOWN = ("local_sgd", "dsgd", "dpsgd", "choco", "ef_sign")
_GRAPHS = {"dsgd": "one_peer_exponential", "dpsgd": "one_peer_exponential", "choco": "ring"}
_OVERLAPS = ("dpsgd", "choco")

Array = NDArray[np.float64]


# -------------------------------------------------------------------------------------------------------- measurements
@dataclass(frozen=True)
class Measurement:
    """A setting and how long a step took.

    Args:
        method, cluster, workload: the setting.
        seconds: measured, of a step.
        sent: bytes that were counted per step, if they were.
    """

    method: Method
    cluster: Cluster
    workload: Workload
    seconds: float
    sent: float | None = None

    @classmethod
    def of(cls, record: dict[str, Any]) -> Measurement | None:
        """Read a record; None if it is of a strategy that has no cost model."""
        name = str(record["strategy"]).partition(":")[0]
        algorithm: Any = _ALGORITHMS.get(name, name)
        if algorithm not in _KNOWN:
            return None
        n, rate, across = record["replicas"], record.get("rate_mbit"), record.get("across_mbit")
        overlap = record.get("overlap")
        method = Method(
            algorithm,
            1 if name in ("ddp", "all_reduce") else record.get("sync_period") or 1,
            record.get("topology") or _GRAPHS.get(algorithm, ""),
            (record.get("compressor") or "sign") if algorithm in ("choco", "ef_sign") else "",
            algorithm in _OVERLAPS if overlap is None and algorithm in _GRAPHS else bool(overlap) and algorithm in _GRAPHS,
            record.get("block_period") or 1,
            "parameters" if name == "local_sgd" and (record.get("sync_period") or 1) == 1 else "auto",
        )
        cores = record.get("cores")
        cluster = Cluster(
            n,
            math.inf if rate is None else 1e6 * rate,
            (record.get("latency_ms") or 0) / 1000,
            record.get("clusters") or (1 if across is None else 2),
            None if across is None else 1e6 * across,
            cores=2.0 if cores is None else cores / n,
        )
        workload = Workload(record["parameters"], record["compute_ms"] / 1000, record.get("bytes_per_parameter") or 4)
        return cls(method, cluster, workload, record["step_ms"] / 1000, record.get("bytes_per_step"))

    @property
    def rate(self) -> float:
        """Mbit/s of the slowest link."""
        return self.cluster.bandwidth_between(self.cluster.clusters > 1) / 1e6

    def predicted(self, costs: Costs) -> float:
        """Return the seconds of a step that the model expects."""
        return time_per_step(self.method, self.cluster, self.workload, costs)

    def __str__(self) -> str:
        method = self.method
        parts = [method.algorithm, method.compressor, method.topology, "overlapped" * method.overlap]
        parts += [f"H = {method.sync_period}" * (method.sync_period > 1), f"blocks of {method.block_period}" * method.blocks]
        where = f"n = {self.cluster.replicas}, {self.rate:g} Mbit/s, d = {self.workload.parameters:.3g}"
        return f"{' '.join(part for part in parts if part)}, {where}"


def read(paths: Sequence[Path]) -> tuple[list[Measurement], list[str]]:
    """Return the measurements of files and what was left out; a file is a list of records, or has one as "records"."""
    found, left_out = [], []
    for path in paths:
        content = json.loads(path.read_text())
        for record in content["records"] if isinstance(content, dict) else content:
            measurement = Measurement.of(record)
            if measurement is None:
                left_out.append(str(record["strategy"]))
            else:
                found.append(measurement)
    return found, left_out


def split(measurements: Sequence[Measurement], rate: float | None) -> tuple[list[Measurement], list[Measurement], float]:
    """Return what to fit on, what to hold out, and the rate that is held out: by default the middle one."""
    rates = sorted({m.rate for m in measurements if math.isfinite(m.rate)})
    if rate is None and rates:
        rate = rates[len(rates) // 2]
    if rate not in rates:
        raise SystemExit(f"Nothing was measured at {rate} Mbit/s: --rate is one of {', '.join(f'{r:g}' for r in rates)}.")
    rest: list[Measurement] = []
    held_out: list[Measurement] = []
    for m in measurements:
        (held_out if m.cluster.replicas == HELD_OUT_REPLICAS or m.rate == rate else rest).append(m)
    if not rest:
        raise SystemExit("Nothing is left to fit on: measure at two rates and more, and with fewer than eight replicas.")
    return rest, held_out, rate


# ------------------------------------------------------------------------------------------------------------------ fit
def to_vector(costs: Costs) -> tuple[list[str], Array]:
    """Return the names of all constants, and their logarithms."""
    values = asdict(costs)
    flat = {name: value for name, value in values.items() if name != "compressing"}
    flat |= {f"compressing {name}": value for name, value in values["compressing"].items()}
    return list(flat), np.log(np.array(list(flat.values())))


def to_costs(names: Sequence[str], vector: Array) -> Costs:
    """Return the constants of a vector."""
    values = {n: min(1.0, float(np.exp(v))) if n in SHARES else float(np.exp(v)) for n, v in zip(names, vector, strict=True)}
    compressing = {n.partition(" ")[2]: v for n, v in values.items() if n.startswith("compressing ")}
    return Costs(**{n: v for n, v in values.items() if " " not in n}, compressing=compressing)


def fit(measurements: Sequence[Measurement], start: Costs) -> tuple[Costs, list[str]]:
    """Fit all constants, by the method of Levenberg and Marquardt.

    $$ min_theta  sum_k (log predicted_k(theta) - log measured_k)^2 + (PRIOR |theta - theta_0|)^2,   theta = log constants $$

    Args:
        measurements: to fit on.
        start: constants to start from; those on which no measurement depends stay as they are.

    Returns:
        The constants, and the names of those that have stayed.
    """
    names, origin = to_vector(start)
    measured = np.log([m.seconds for m in measurements])

    def errors(theta: Array) -> Array:
        costs = to_costs(names, theta)
        return np.append(np.log([m.predicted(costs) for m in measurements]) - measured, PRIOR * (theta - origin))

    theta = minimise(errors, origin)
    slopes = np.abs(jacobian(errors, theta)[: len(measured)]).max(axis=0)
    return to_costs(names, theta), [name for name, slope in zip(names, slopes, strict=True) if slope < 1e-4]


def minimise(errors: Callable[[Array], Array], start: Array, steps: int = 200) -> Array:
    """Return where the sum of squares of `errors` is least, found from `start` on."""
    theta, now, damping = start, errors(start), 1e-2
    for _ in range(steps):
        slopes = jacobian(errors, theta)
        normal = slopes.T @ slopes
        while damping < 1e12:
            step = np.linalg.solve(normal + damping * np.diag(normal.diagonal() + 1e-12), -slopes.T @ now)
            new = errors(theta + step)
            if new @ new < now @ now:
                break
            damping *= 4
        else:
            return theta
        gain, theta, now, damping = now @ now - new @ new, theta + step, new, damping / 4
        if gain <= 1e-12 * (now @ now):
            return theta
    return theta


def jacobian(errors: Callable[[Array], Array], theta: Array, h: float = 1e-5) -> Array:
    """Return the derivatives of `errors` by finite differences."""
    return np.stack([(errors(theta + h * e) - errors(theta - h * e)) / (2 * h) for e in np.eye(len(theta))], axis=1)


# --------------------------------------------------------------------------------------------------------------- report
def run(report: Report, measurements: Sequence[Measurement], rate: float | None, start: Costs) -> tuple[Costs, str]:
    """Fit, check and fill the report; returns the constants and what to print."""
    rest, held_out, rate = split(measurements, rate)
    costs, stayed = fit(rest, start)
    lines = [f"Fitted on {len(rest)} settings; held out {len(held_out)}: n = {HELD_OUT_REPLICAS}, and {rate:g} Mbit/s", ""]
    width = max(len(str(m)) for m in measurements)
    lines.append(f"  {'held out':{width}}  {'measured':>12}  {'predicted':>12}   ratio")
    for m in held_out:
        ratio = m.predicted(costs) / m.seconds
        off = "" if abs(ratio - 1) <= LIMIT else "  OFF"
        lines.append(f"  {m!s:{width}}  {1e3 * m.seconds:9.2f} ms  {1e3 * m.predicted(costs):9.2f} ms  {ratio:6.3f}{off}")
    lines.append("")
    names, values = to_vector(costs)
    for name, value in zip(names, np.exp(values), strict=True):
        lines.append(f"  {name:24} {value:10.4g}{'  (nothing depends on it)' if name in stayed else ''}")

    for name, group in (("fitted", rest), ("held out", held_out)):
        off = np.abs(np.array([m.predicted(costs) / m.seconds for m in group]) - 1)
        if len(off):
            report.figure(f"plan: median error, {name}", _exactly(float(np.median(off))), "")
            if name == "held out":
                report.bar("plan: worst error, held out", _exactly(float(off.max())), LIMIT)
    counted = [m for m in measurements if m.sent]
    if counted:
        ratios = [bytes_per_step(m.method, m.cluster, m.workload) / (m.sent or 1) for m in counted]
        report.figure(
            "plan: bytes over those counted, median and range", Estimate(float(np.median(ratios)), min(ratios), max(ratios))
        )
    return costs, "\n".join(lines)


def _exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def draw(measurements: Sequence[Measurement], rate: float | None, costs: Costs, path: Path) -> None:
    """Draw predicted over measured times of a step."""
    from matplotlib.figure import Figure

    rest, held_out, rate = split(measurements, rate)
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    axes = figure.subplots()
    seconds = [value for m in measurements for value in (m.seconds, m.predicted(costs))]
    ends = np.array([0.7 * min(seconds), 1.4 * max(seconds)])
    axes.fill_between(ends, (1 - LIMIT) * ends, (1 + LIMIT) * ends, color="#dddddd", linewidth=0, label="within 20 %")
    axes.plot(ends, ends, color="#777777", linewidth=1.0)
    for group, color, marker, label in (
        (rest, "#0072B2", "o", "fitted"),
        ([m for m in held_out if m.cluster.replicas != HELD_OUT_REPLICAS], "#E69F00", "s", f"held out: {rate:g} Mbit/s"),
        (
            [m for m in held_out if m.cluster.replicas == HELD_OUT_REPLICAS],
            "#D55E00",
            "^",
            f"held out: n = {HELD_OUT_REPLICAS}",
        ),
    ):
        if group:
            predicted = [m.predicted(costs) for m in group]
            measured = [m.seconds for m in group]
            axes.plot(measured, predicted, marker, color=color, markersize=5, alpha=0.8, linestyle="none", label=label)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set(xlabel="measured time of a step [s]", ylabel="predicted [s]")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description="Fit the cost model, and check it.")
    parser.add_argument("measurements", type=Path, nargs="+", help="JSON files of measured steps")
    parser.add_argument("--rate", type=float, help="Mbit/s that are held out; by default the middle one")
    parser.add_argument("--costs", type=Path, default=COSTS, help="where the constants go; by default into the package")
    parser.add_argument(
        "--figure", type=Path, default=Path("docs/results/plan.png"), help="predicted over measured times, a PNG file"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(argv)
    report = Report("plan")
    measurements, left_out = read(options.measurements)
    if not measurements:
        raise SystemExit("There are no measurements of strategies that have a cost model.")
    costs, text = run(report, measurements, options.rate, Costs.read())
    print(text)
    if left_out:
        print(f"\nLeft out, as there is no cost model: {', '.join(f'{k} of {s}' for s, k in _counts(left_out).items())}")
    print(f"\n{report.table()}")
    costs.write(options.costs)
    draw(measurements, options.rate, costs, options.figure)
    if options.json:
        options.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")


def _counts(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    main()
