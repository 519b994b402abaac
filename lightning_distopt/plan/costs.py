"""The constants of the cost model, which measurements give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["COSTS", "Costs"]

COSTS = Path(__file__).with_name("costs.json")
"""Where the fitted constants are."""


@dataclass(frozen=True)
class Costs:
    """What sending and computing take, apart from the nominal rate of a link; measured with gloo over TCP.

    Example:
        >>> costs = Costs(compressing={"sign": 2e-10, "qsgd": 5e-10})
        >>> costs.per_byte("qsgd:4"), costs.per_byte("low_rank")  # for an unknown one: the dearest that is known
        (5e-10, 5e-10)

    Args:
        efficiency: share of the nominal rate that is left for what is sent, after the headers of packets.
        overhead: seconds of a processor for each round, whatever it sends.
        message: seconds that a message takes besides the latency of the link and its bytes.
        sending: seconds of a processor for each byte that a replica sends and receives; no link is faster than that.
        mixing: seconds for each byte of a pass over a row, such as adding another row to it.
        backward: share of a step's computation in which gradients come, so that their all-reduce can run beside it.
        compressing: seconds for each byte of a row, by the compressor's name, in a pass that compresses or adds what a payload
            stands for.
    """

    efficiency: float = 0.955
    overhead: float = 2e-4
    message: float = 1.5e-4
    sending: float = 1e-9
    mixing: float = 1.5e-10
    backward: float = 0.667
    compressing: Mapping[str, float] = field(default_factory=dict)

    def per_byte(self, compressor: str) -> float:
        """Return the seconds of a pass of a compressor, given by its name or short form, for each byte of a row."""
        unknown = max(self.compressing.values(), default=0.0)
        return self.compressing.get(compressor.partition(":")[0], unknown)

    @classmethod
    def read(cls, path: Path = COSTS) -> Costs:
        """Read constants from a file; by default those that come with the package."""
        values: dict[str, Any] = json.loads(path.read_text())
        return cls(**values)

    def write(self, path: Path = COSTS) -> None:
        """Write the constants to a file, with four digits."""

        def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: float(f"{v:.4g}") if isinstance(v, float) else rounded(v) for name, v in values.items()}

        path.write_text(json.dumps(rounded(asdict(self)), indent=2) + "\n")
