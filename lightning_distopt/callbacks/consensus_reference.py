"""The largest consensus distances of a run without control, which another one is measured against."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_distopt.files import check_file, replacing
from lightning_distopt.options import is_number


def check_reference(target: str, reference: Any) -> float | str | None:
    """Return a reference as a number or a path, if it is one that goes with the target; else raise a `ValueError`."""
    number = is_number(reference)
    path = isinstance(reference, str | os.PathLike)
    if target == "constant" and not ((number and 0 < reference < math.inf) or path):
        raise ValueError(
            "`target='constant'` needs `reference`: `Xi_max` as a number above 0, or the file that a run with "
            f"`ConsensusControl('record', reference='xi_max.json')` wrote; got {reference!r}."
        )
    if target == "record" and not (reference is None or path):
        raise ValueError(f"With `target='record'`, `reference` is the file to write, such as 'xi_max.json'; got {reference!r}.")
    if target in ("adaptive", "efficient") and reference is not None:
        raise ValueError(f"`target={target!r}` measures against gradients: leave `reference` out, or use 'constant'.")
    if target == "record":
        check_file("reference", reference)
    return str(reference) if path else reference


def write_reference(path: str, xi_max: Mapping[str, float], replicas: int) -> None:
    """Write the largest distance of each phase; a file of that name stays whole until the new one is."""
    with replacing(path) as aside:
        aside.write_text(json.dumps({"replicas": replicas, "xi_max": dict(xi_max)}, indent=2))


def read_reference(reference: Any, phases: Sequence[str], replicas: int) -> tuple[str, dict[str, float]]:
    """Return `Xi_max` by phase, or a sentence on why there is none."""
    if not isinstance(reference, str):
        return "", dict.fromkeys(phases, float(reference))
    try:
        with open(reference) as file:
            content = json.load(file)
        recorded, of = {name: float(value) for name, value in content["xi_max"].items()}, content["replicas"]
    except FileNotFoundError:
        how = "train once with `ConsensusControl('record', reference=...)` and the same `phases`, or give a number"
        return f"There is no reference {reference!r}: {how}.", {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"The reference {reference!r} is no file that `ConsensusControl('record', reference=...)` has written.", {}
    if of != replicas:
        return f"The reference {reference!r} was recorded with {of} replicas, not {replicas}: record it anew.", {}
    missing = [name for name in phases if not recorded.get(name, 0) > 0]
    if missing:
        has = ", ".join(map(repr, recorded)) or "nothing"
        problem = f"The reference {reference!r} has no distance for {missing[0]!r}, only for {has}"
        return f"{problem}: record it with these `phases`.", {}
    return "", {name: recorded[name] for name in phases}
