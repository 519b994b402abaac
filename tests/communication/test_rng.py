"""Random streams: seeds by path, states that survive a checkpoint, and bodies that leave no trace."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_distopt.communication.rng import (
    derive_seed,
    get_streams,
    isolated_streams,
    pack_streams,
    seed_streams,
    set_streams,
    unpack_streams,
)

CPU = torch.device("cpu")


def draw() -> tuple[Any, ...]:
    """Something from every global stream, of the kinds that keep a half-used value as well as of those that do not."""
    return (
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.normal(),
    )


def test_seeds_differ_by_path_and_stay_what_they_are() -> None:
    paths: list[tuple[object, ...]] = [("replica", k) for k in range(50)] + [("workers", k) for k in range(50)]
    paths += [("batch", e, k, r) for e in range(3) for k in range(3) for r in range(3)]
    paths += [("batch", 11, 1), ("batch", 1, 11), ("batch", "1", 11), ("replica",), ()]
    seeds = [derive_seed(seed, *path) for seed in (0, 1, 2**63) for path in paths]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Checkpoints rely on these: another version of the package must not change them.
    assert derive_seed(0, "replica", 1) == 398787735143310826
    assert derive_seed(1234, "epoch", 7) == 4491937653592658140


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_seeding_repeats(seed: int) -> None:
    seed_streams(seed)
    first = draw()
    seed_streams(seed)
    assert draw() == first
    seed_streams(seed ^ 1)
    second = draw()
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_a_state_continues_where_it_was_taken() -> None:
    draw()
    state = get_streams(CPU)
    following = draw()
    draw()
    set_streams(state, CPU)
    assert draw() == following
    set_streams(state, CPU)  # and may be used again
    assert draw() == following


def test_a_state_is_a_copy() -> None:
    state = get_streams(CPU)
    before = state["torch"].clone()
    draw()
    assert torch.equal(state["torch"], before)


def test_packed_states_survive_a_strict_checkpoint() -> None:
    seed_streams(3)
    np.random.normal()  # keeps the second of a pair
    random.gauss(0, 1)
    state = get_streams(CPU)
    following = draw()
    file = io.BytesIO()
    torch.save(pack_streams(state), file)
    file.seek(0)
    set_streams(unpack_streams(torch.load(file, weights_only=True)), CPU)
    assert draw() == following


def test_isolation_undoes_draws_and_seeds_also_after_an_exception() -> None:
    state = get_streams(CPU)
    following = draw()
    set_streams(state, CPU)
    with isolated_streams(CPU):
        draw()
        seed_streams(5)
    with pytest.raises(ZeroDivisionError), isolated_streams(CPU):
        draw()
        raise ZeroDivisionError
    assert draw() == following


def test_isolation_nests() -> None:
    state = get_streams(CPU)
    following = draw()
    set_streams(state, CPU)
    with isolated_streams(CPU):
        first = draw()
        with isolated_streams(CPU):
            draw()
        second = draw()
    assert first == following
    assert second != first
    assert draw() == following
