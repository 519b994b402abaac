"""Where pytest looks for no examples: in the files of a new project, and in what needs an optional package that is missing."""

from __future__ import annotations

import importlib.util

collect_ignore = ["lightning_distopt/templates"]
if importlib.util.find_spec("flwr") is None:
    collect_ignore.append("lightning_distopt/bridges/flower.py")
