"""Compressors: what replicas send instead of their values, packed to its true size."""

from __future__ import annotations

from lightning_distopt.compression.codec import Codec
from lightning_distopt.compression.compressor import Compressor, VectorCompressor
from lightning_distopt.compression.identity import Identity
from lightning_distopt.compression.low_rank import LowRank
from lightning_distopt.compression.qsgd import QSGD
from lightning_distopt.compression.random_k import RandomK
from lightning_distopt.compression.sign import Sign
from lightning_distopt.compression.top_k import TopK
from lightning_distopt.lookup import short_form

__all__ = [
    "COMPRESSORS",
    "QSGD",
    "Codec",
    "Compressor",
    "Identity",
    "LowRank",
    "RandomK",
    "Sign",
    "TopK",
    "VectorCompressor",
    "make",
]

COMPRESSORS: dict[str, type[Compressor]] = {
    "identity": Identity,
    "sign": Sign,
    "top_k": TopK,
    "random_k": RandomK,
    "qsgd": QSGD,
    "low_rank": LowRank,
}
"""The compressors by their names."""

_OPTIONS = {"top_k": "ratio:0.01", "random_k": "ratio:0.1", "qsgd": "bits:4", "low_rank": "rank:2"}


def make(compressor: Compressor | str) -> Compressor:
    """Return the compressor of a name, with its first option after a colon; a compressor is returned as it is.

    Example:
        >>> make("sign"), make("top_k:0.01"), make("qsgd:8"), make("low_rank")
        (Sign(), TopK(ratio=0.01, method='sampled'), QSGD(bits=8, unbiased=False), LowRank(rank=2, iterations=1))

    Args:
        compressor: `"identity"`, `"sign"`, `"top_k:0.01"`, `"random_k:0.1"`, `"qsgd:4"`, `"low_rank:2"`, with numbers of your
            own, or a `Compressor`.

    Raises:
        ValueError: if there is no compressor of that name, or its number is missing or wrong.
    """
    if isinstance(compressor, Compressor):
        return compressor
    if not isinstance(compressor, str):
        raise ValueError(f"A compressor is a name, such as 'top_k:0.01', or an object of a class of them; got {compressor!r}.")
    cls, options = short_form(compressor, COMPRESSORS, "compressor", _OPTIONS)
    return cls(**options)
