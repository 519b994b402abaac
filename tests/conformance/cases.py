"""The table: every algorithm, how users ask for it, and its oracle. A new algorithm is a new row."""

from __future__ import annotations

from tests.conformance import directed_rows, gossip_rows, heterogeneous_rows, local_sgd_rows
from tests.conformance.case import Case

__all__ = ["CASES", "Case"]

CASES: list[Case] = [*local_sgd_rows.ROWS, *gossip_rows.ROWS, *heterogeneous_rows.ROWS, *directed_rows.ROWS]
