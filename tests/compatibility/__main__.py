"""Write the page of the compatibility table: `python -m tests.compatibility`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from tests.compatibility.matrix import LAYOUTS, NOTEBOOKS, PERIODS, ROWS, Row

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
HEAD = """# Compatibility

What of Lightning works with `LocalSGDStrategy`. *One process* hosts several replicas (`replicas_per_device` above 1), *several
processes* one each; both hold for local SGD (`H > 1`) and for averaged gradients (`H = 1`), unless a cell says otherwise.

Every cell is a test, run on CPUs with gloo. *Works* means that:

- several replicas in one process equal as many processes, replica by replica: the same data, parameters, learning rates,
  validations, metrics and checkpoints, up to the rounding of sums;
- rounds come after every `H` optimizer steps, the replicas agree after one and go their own ways before it;
- where all replicas see the same data, the run is that of a single device;
- the feature does what it is for: clipped gradients are bounded, the best checkpoint is the best, ranks stop together.

*Refused* means that an error says so, with the sentence at the number; ours come before training starts,
but for those about what only training shows.

`GossipStrategy` works in the same cells and is refused in the same; that is tested with CHOCO and local steps, for the rows of
`trainer.fit` but `max_time` and time-triggered checkpoints. It takes no `ddp_kwargs`,
and needs none. What a few algorithms refuse besides, such as manual optimization
where they change gradients: [error messages](error_messages.md#options-of-strategies-and-algorithms). `FederatedStrategy` has
[its own table](federated.md#what-lightnings-words-mean-here), and [what it refuses](federated.md#what-is-refused).

This page is written by `python -m tests.compatibility`, from the table in `tests/compatibility/matrix.py`.
"""


def page() -> str:
    """Return the page."""
    sentences: list[str] = []

    def number(sentence: str) -> str:
        if sentence not in sentences:
            sentences.append(sentence)
        return f"[{sentences.index(sentence) + 1}](#refused)"

    def cell(row: Row, layout: str) -> str:
        by_period = {period: row.sentence(layout, period) for period in PERIODS}
        if not any(by_period.values()):
            return "works"
        if len(set(by_period.values())) == 1:
            return f"refused {number(by_period[1])}"
        return "works; " + ", ".join(f"at `H = {period}` refused {number(text)}" for period, text in by_period.items() if text)

    parts = [HEAD]
    for group, rows in groupby([*ROWS, *NOTEBOOKS], key=lambda row: row.group):
        parts.append(f"\n## {group}\n\n| feature | one process | several processes | |\n|---|---|---|---|\n")
        for row in rows:
            cells = [cell(row, layout) for layout in LAYOUTS]
            parts.append(f"| {row.name} | {' | '.join(cells)} | {row.note} |\n")
    parts.append("\n## Refused\n\n")
    parts += [f"{k}. {sentence}\n" for k, sentence in enumerate(sentences, start=1)]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
