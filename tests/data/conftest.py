"""Fixtures of the data tests."""

from pathlib import Path

import pytest
import torch

from lightning_distopt.data import ImageArrays, load_deformed_digits

torch.set_num_threads(1)
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="session")
def deformed_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the deformed digits are made once per session."""
    return tmp_path_factory.mktemp("deformed_digits")


@pytest.fixture(scope="session")
def deformed(deformed_cache: Path) -> ImageArrays:
    """The deformed digits; the first use writes them into `deformed_cache`."""
    return load_deformed_digits(deformed_cache)
