"""Counts of bytes, rounds and seconds."""

from __future__ import annotations

import io

import pytest
import torch

from lightning_distopt.communication import Communicator, Traffic, all_reduce_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_formula(replicas: int, itemsize: int) -> None:
    numel = 240
    assert all_reduce_bytes(numel, itemsize, replicas) * replicas == 2 * (replicas - 1) * numel * itemsize


def test_formula_of_large_models_stays_exact() -> None:
    assert all_reduce_bytes(10**12 + 1, 4, 2) == 4 * (10**12 + 1)


def test_alone_nothing_is_sent() -> None:
    c = Communicator()
    block = torch.ones(1, 10)
    c.mean(block)
    c.average(block)
    c.broadcast(block)
    c.mix(block, torch.ones(1, 1))
    assert (c.traffic.bytes_sent, c.traffic.evaluation_bytes, c.traffic.rounds) == (0, 0, 0)


def test_seconds_add_up_also_when_the_body_raises() -> None:
    traffic = Traffic()
    assert traffic.seconds_blocked == 0
    with traffic.blocked(CPU):
        pass
    once = traffic.seconds_blocked
    with pytest.raises(ZeroDivisionError), traffic.blocked(CPU):
        raise ZeroDivisionError
    twice = traffic.seconds_blocked
    traffic.add_interval(0.0, 100.0)
    assert 0 < once < twice
    assert traffic.seconds_blocked == pytest.approx(twice + 100, abs=1e-9)


def test_state_survives_a_strict_checkpoint() -> None:
    traffic = Traffic(rows=2)
    traffic.bytes_sent, traffic.rounds, traffic.evaluation_bytes = 2**60 - 5, 7, 3
    traffic.add_messages(0, 4)
    traffic.add_messages(1, 6)
    traffic.add_interval(0.0, 1.5)
    file = io.BytesIO()
    torch.save(traffic.state_dict(), file)
    file.seek(0)
    other = Traffic(rows=2)
    other.bytes_sent = other.rounds = other.evaluation_bytes = 1
    other.add_messages(0, 99)
    other.add_interval(0.0, 9.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state_dict() == traffic.state_dict()
    assert (other.bytes_sent, other.rounds, other.evaluation_bytes, other.seconds_blocked) == (2**60, 7, 3, 1.5)
    assert isinstance(other.bytes_sent, int)
    assert other.bytes_sent_max == traffic.bytes_sent_max == 2**60 + 1


def test_messages_of_replicas_are_charged_to_them() -> None:
    traffic = Traffic(rows=3)
    traffic.bytes_sent += 100
    for row, sent in ((0, 30), (1, 3), (0, 10)):
        traffic.add_messages(row, sent)
    assert (traffic.bytes_sent, traffic.bytes_sent_max) == (100 + 43 // 3, 140)
