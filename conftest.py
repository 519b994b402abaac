"""What pytest leaves out where an optional package is missing."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("flwr") else ["lightning_distopt/bridges/flower.py"]
