"""What each compressor is by its formula: contraction, bias, bytes, and what happens at the edges."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_distopt.compression import COMPRESSORS, QSGD, Compressor, Identity, LowRank, RandomK, Sign, TopK, make
from lightning_distopt.compression.randomness import positions
from lightning_distopt.compression.vectors import PIECE

ALL: list[Compressor] = [
    Identity(),
    Sign(),
    TopK(0.3),
    TopK(0.3, method="exact"),
    RandomK(0.3),
    RandomK(0.3, unbiased=True),
    *(QSGD(bits) for bits in (2, 3, 4, 5, 6, 7, 8, 16)),
    QSGD(4, unbiased=True),
    LowRank(2),
    LowRank(1, iterations=3),
]
CONTRACTIONS = [compressor for compressor in ALL if not compressor.unbiased or isinstance(compressor, Identity)]
BIASED_RANDOM = [c for c in CONTRACTIONS if isinstance(c, RandomK | QSGD)]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def q(compressor: Compressor, x: Tensor, seeds: list[int] | None = None) -> Tensor:
    """Return Q(x) by way of the wire, whose bytes are those announced."""
    payload = compressor.compress(x, list(range(len(x))) if seeds is None else seeds)
    assert payload.dtype == torch.uint8 and payload.shape == (len(x), compressor.nbytes(x.shape[1:], x.dtype))
    result = compressor.decompress(payload, x.shape[1:], x.dtype)
    assert result.shape == x.shape and result.dtype == x.dtype
    return result


def square(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).sum(1)


# --------------------------------------------------------------------------------------------------------- contractions
@pytest.mark.parametrize("d", [1, 7, 64, 1000, PIECE + 5])
def test_sign_loses_exactly_what_its_formula_says(d: int) -> None:
    x = gaussian(3, d)
    lost = square(x) - x.abs().sum(1) ** 2 / d
    # The magnitude is sent as float32.
    torch.testing.assert_close(square(q(Sign(), x) - x), lost, rtol=1e-6, atol=1e-6 * d)
    for row, error in zip(x, square(q(Sign(), x) - x), strict=True):
        assert float(error) == pytest.approx((1 - Sign.contraction(row)) * float(row.square().sum()), rel=1e-6, abs=1e-6 * d)
        assert Sign.contraction(row) >= Sign().delta(d) - 1e-12


def test_sign_attains_its_worst_case_at_one_hot_vectors() -> None:
    x = torch.eye(8, dtype=torch.float64)[2:3] * -3
    assert float(square(q(Sign(), x) - x)) == pytest.approx((1 - Sign().delta(8)) * 9)


@pytest.mark.parametrize("method", ["exact", "sampled"])
@pytest.mark.parametrize(("d", "ratio"), [(10, 0.35), (1000, 0.01), (3, 0.1), (PIECE + 77, 0.01), (2 * PIECE + 3, 0.4)])
def test_top_k_keeps_the_largest(method: Any, d: int, ratio: float) -> None:
    x = gaussian(2, d)
    k = max(1, math.floor(ratio * d))
    expected = np.zeros((2, d))
    for row, values in zip(expected, x.numpy(), strict=True):
        largest = np.argsort(-np.abs(values), kind="stable")[:k]
        row[largest] = values[largest]
    compressed = q(TopK(ratio, method), x)
    np.testing.assert_array_equal(compressed.numpy(), expected)
    assert (square(compressed - x) <= (1 - TopK(ratio).delta(d)) * square(x)).all()


@pytest.mark.parametrize("method", ["exact", "sampled"])
@pytest.mark.parametrize("d", [100, PIECE + 1000])
def test_top_k_takes_the_first_of_equals(method: Any, d: int) -> None:
    x = torch.ones(1, d)
    x[0, d // 2] = -2.0
    k = d // 10
    expected = torch.zeros(1, d)
    expected[0, : k - 1], expected[0, d // 2] = 1.0, -2.0
    assert torch.equal(q(TopK(0.1, method), x), expected)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(3.0 * PIECE)[None],  # every value is larger than what came before
        torch.cat([torch.zeros(3 * PIECE), torch.ones(20)])[None],  # far fewer than k differ from zero
        torch.zeros(1, 2 * PIECE),
    ],
    ids=["rising", "few", "zeros"],
)
def test_top_k_where_a_sample_says_little(x: Tensor) -> None:
    assert torch.equal(q(TopK(0.05), x), q(TopK(0.05, method="exact"), x))


def test_sample_with_a_threshold_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(1, PIECE + 10)
    monkeypatch.setattr(torch, "randint", lambda d, size, **_: x.abs().argmax().expand(size))  # sees the largest only
    assert torch.equal(q(TopK(0.01), x), q(TopK(0.01, method="exact"), x))


@pytest.mark.parametrize("d", [20, 33, 1000])
def test_random_k_keeps_its_share_in_the_mean(d: int) -> None:
    compressor, x = RandomK(0.25), gaussian(1, d).expand(4000, d)
    k = max(1, math.floor(0.25 * d))
    compressed = q(compressor, x)
    assert ((compressed == 0) | (compressed == x)).all() and (compressed.count_nonzero(1) == k).all()
    # One run's error has a standard deviation below ||x||^2 / 2: 4000 of them make 0.008.
    share = square(compressed - x).mean() / square(x[:1])
    assert float(share) == pytest.approx(1 - k / d, abs=0.03)
    assert compressor.delta(d) == k / d


@pytest.mark.parametrize("d", [20, 33])
def test_unbiased_random_k_has_its_variance(d: int) -> None:
    x = gaussian(1, d).expand(20_000, d)
    k = math.floor(0.25 * d)
    share = square(q(RandomK(0.25, unbiased=True), x) - x).mean() / square(x[:1])
    assert float(share) == pytest.approx(d / k - 1, rel=0.03)


def test_random_k_of_long_vectors_draws_all_places_alike() -> None:
    d, k = 2 * PIECE + 10_000, math.floor(0.3 * (2 * PIECE + 10_000))
    counts = torch.zeros(d)
    for seed in range(20):
        compressed = q(RandomK(0.3), torch.ones(1, d), [seed])
        assert int(compressed.count_nonzero()) == k
        counts += compressed[0]
    for part in counts.split(PIECE):
        assert float(part.mean()) == pytest.approx(20 * k / d, rel=0.02)
    # Binomial: 20 draws of probability 0.3 have the variance 4.2.
    assert float(counts.var()) == pytest.approx(4.2, rel=0.05)


@pytest.mark.parametrize(("n", "k"), [(5, 2), (6, 3), (4, 1), (8, 2)])
def test_every_set_of_places_is_drawn_about_as_often(n: int, k: int) -> None:
    drawn = positions(np.arange(20_000, dtype=np.uint64)[:, None], [n], [k], torch.device("cpu")).sort(dim=1).values
    sets = list(itertools.combinations(range(n), k))
    counts = np.array([int((drawn == torch.tensor(chosen)).all(1).sum()) for chosen in sets])
    assert counts.sum() == 20_000
    np.testing.assert_allclose(counts * len(sets) / 20_000, 1, atol=0.2)
    shares = torch.bincount(drawn.flatten(), minlength=n) / 20_000
    torch.testing.assert_close(shares, torch.full((n,), k / n), atol=0.015, rtol=0)  # four standard deviations


def test_places_in_several_vectors_are_those_in_each() -> None:
    n, k = [5, 16, 1000, 1, 300, 64], [2, 1, 100, 1, 300, 0]
    seeds = np.random.default_rng(0).integers(2**64, size=(3, 6), dtype=np.uint64)
    cpu = torch.device("cpu")
    alone = [positions(seeds[:, i : i + 1], n[i : i + 1], k[i : i + 1], cpu) for i in range(6)]
    assert torch.equal(positions(seeds, n, k, cpu), torch.cat(alone, dim=1))
    for places, size, count in zip(alone, n, k, strict=True):
        assert places.shape == (3, count) and all(len(set(row)) == count for row in places.tolist())
        assert ((places >= 0) & (places < size)).all()


@pytest.mark.parametrize("compressor", BIASED_RANDOM, ids=repr)
@pytest.mark.parametrize("kind", ["gaussian", "one hot", "few"])
def test_random_contractions_hold_in_the_mean(compressor: Compressor, kind: str) -> None:
    d = 200
    x = {"gaussian": gaussian(1, d), "one hot": torch.eye(d)[:1].double(), "few": gaussian(1, d) * (torch.arange(d) < 10)}[kind]
    x = x.expand(2000, d)
    delta = compressor.delta(d)
    assert delta is not None
    shares = square(q(compressor, x) - x) / square(x)
    assert float(shares.mean()) <= 1 - delta + 4 * float(shares.std()) / 2000**0.5 + 1e-6


@pytest.mark.parametrize("d", [1, 10, 1000])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_tau_is_that_of_the_levels_there_are(bits: int, d: int) -> None:
    s = 2 ** (bits - 1) - 1
    tau = 1 + min(d / s**2, d**0.5 / s)
    assert QSGD(bits).delta(d) == pytest.approx(1 / tau)
    unbiased, biased = q(QSGD(bits, unbiased=True), gaussian(3, d)), q(QSGD(bits), gaussian(3, d))
    torch.testing.assert_close(biased * tau, unbiased, rtol=1e-12, atol=0)


@pytest.mark.parametrize("compressor", [QSGD(b, unbiased=True) for b in (2, 3, 4, 8)] + [RandomK(0.3, unbiased=True)], ids=repr)
def test_unbiased(compressor: Compressor) -> None:
    runs, d = 40_000, 16
    x = gaussian(1, d)
    compressed = q(compressor, x.expand(runs, d))
    # Five standard deviations of the mean, for each of the sixteen values.
    assert ((compressed.mean(0) - x[0]).abs() <= 5 * compressed.std(0) / runs**0.5 + 1e-6).all()
    assert compressor.delta(d) is None and compressor.tuned_gamma is None


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_unbiased_below_the_resolution_of_its_random_bytes(bits: int) -> None:
    # A value of 1/1000 of a level: with 8 random bits alone it would never be rounded up, or too often.
    s = 2 ** (bits - 1) - 1
    x = torch.tensor([[1.0, 0.001 / s]])
    runs = 100_000
    up = q(QSGD(bits, unbiased=True), x.expand(runs, 2))[:, 1] > 0
    assert int(up.sum()) == pytest.approx(100, abs=40)  # four standard deviations


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_qsgd_has_few_levels_next_to_the_value(bits: int) -> None:
    s, x = 2 ** (bits - 1) - 1, gaussian(4, 500, dtype=torch.float32)
    norm = x.norm(dim=1, keepdim=True)
    levels = q(QSGD(bits, unbiased=True), x) / norm * s
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-2 if bits == 16 else 1e-4)
    assert ((levels - x / norm * s).abs() <= 1 + 1e-2).all() and levels.abs().max() <= s * (1 + 1e-6)


def test_low_rank_is_a_projection() -> None:
    x = gaussian(3, 12, 4, 5)
    for compressor in (LowRank(2), LowRank(3, iterations=2)):
        compressed = q(compressor, x)
        assert (torch.linalg.matrix_rank(compressed.flatten(2)) == compressor.rank).all()
        inner = ((x - compressed) * compressed).flatten(1).sum(1)
        torch.testing.assert_close(inner, torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
        assert (square(x - compressed) < square(x)).all()
    assert compressor.delta(100) is None  # type: ignore[possibly-undefined]


def test_low_rank_comes_to_the_best_approximation() -> None:
    x = gaussian(1, 20, 30)
    u, s, vh = torch.linalg.svd(x[0])
    best = u[:, :2] @ s[:2].diag() @ vh[:2]
    once, often = (q(LowRank(2, iterations=i), x)[0] for i in (1, 200))
    torch.testing.assert_close(often, best, atol=1e-6, rtol=0)
    assert (once - x[0]).norm() > (best - x[0]).norm()


def test_low_rank_sends_what_it_cannot_shorten_as_it_is() -> None:
    for shape in [(7,), (3, 3), (1, 9), (9, 1), (), (4, 1, 3)]:
        x = gaussian(2, *shape)
        assert torch.equal(q(LowRank(2), x), x)
    assert LowRank(2).nbytes((4, 5)) == 4 * 2 * (4 + 5)
    assert LowRank(2).nbytes((4, 4)) == 4 * 16


# ------------------------------------------------------------------------------------------------------------- the wire
@pytest.mark.parametrize("d", [1, 7, 8, 9, 1000, 1001])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2), (torch.float16, 2)])
def test_bytes(d: int, dtype: torch.dtype, size: int) -> None:
    def k(ratio: float) -> int:
        return max(1, math.floor(ratio * d))

    formulas: dict[Compressor, int] = {
        Identity(): d * size,
        Sign(): math.ceil(d / 8) + max(4, size),
        TopK(0.1): k(0.1) * (4 + size),
        RandomK(0.1): k(0.1) * size + 8,
        **{QSGD(b): math.ceil(d * b / 8) + 4 for b in (2, 3, 4, 5, 6, 7, 8, 16)},
        LowRank(2): d * size,
    }
    for compressor, nbytes in formulas.items():
        assert compressor.nbytes((d,), dtype) == nbytes
        q(compressor, gaussian(2, d, dtype=dtype))  # compares with what is sent
        if dtype == torch.float32:
            assert compressor.bits(d) == 8 * nbytes


def test_bits_are_those_of_the_papers_but_for_the_last_byte() -> None:
    d = 272_474  # ResNet-20
    assert (Identity().bits(d), QSGD(8).bits(d), TopK(0.1).bits(d)) == (32 * d, 8 * d + 32, 64 * 27_247)
    assert 0 <= Sign().bits(d) - (d + 32) < 8
    assert 0 <= QSGD(3).bits(d) - (3 * d + 32) < 8
    # Table 4.1 in MiB: 1.039 uncompressed, .52 / .26 / .13 / .065, .032
    mib = [c.bits(d) / 8 / 2**20 for c in (Identity(), QSGD(16), QSGD(8), QSGD(4), QSGD(2), Sign())]
    assert mib == pytest.approx([1.039, 0.52, 0.26, 0.13, 0.065, 0.0325], abs=5e-4)


@pytest.mark.parametrize("compressor", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(1,), (13,), (6, 3, 2), (700, 40)])
def test_what_arrives_and_the_error_make_all_that_was_sent(compressor: Compressor, shape: tuple[int, ...]) -> None:
    error, total, arrived = (torch.zeros(2, *shape, dtype=torch.float64) for _ in range(3))
    for round_ in range(5):
        gradient = gaussian(2, *shape, seed=round_)
        total += gradient
        v = gradient + error
        payload = compressor.compress(v, [round_, round_ + 100])
        error = v - compressor.decompress(payload, shape, v.dtype)
        arrived += compressor.decompress(payload.clone(), shape, v.dtype)
        if compressor.delta(1) and not isinstance(compressor, QSGD):  # that of QSGD holds in the mean
            assert (square(error) <= square(v) * (1 + 1e-6)).all()
    torch.testing.assert_close(arrived + error, total, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("d", [50, 5000, 100_000, PIECE + 13])
@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_a_row_does_not_depend_on_those_beside_it(compressor: Compressor, d: int, threads: int) -> None:
    x, seeds = gaussian(4, d // 25, 25, dtype=torch.float32), [3, 2**64 - 1, 0, 12345]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = compressor.compress(x, seeds)
        for row in range(4):
            assert torch.equal(compressor.compress(x[row : row + 1], seeds[row : row + 1])[0], together[row])
        values = compressor.decompress(together, x.shape[1:], x.dtype)
        assert torch.equal(compressor.decompress(together[2:3], x.shape[1:], x.dtype)[0], values[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compressor", [c for c in ALL if isinstance(c, RandomK | QSGD | LowRank)], ids=repr)
def test_seeds(compressor: Compressor) -> None:
    x = gaussian(1, 30, 20).expand(3, 30, 20)
    first, second, third = compressor.compress(x, [1, 2, 1])
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert torch.equal(compressor.compress(x, [1, 2, 1])[1], second)


# --------------------------------------------------------------------------------------------------------------- edges
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_zeros_and_single_values(compressor: Compressor, dtype: torch.dtype) -> None:
    assert torch.equal(q(compressor, torch.zeros(2, 5, 4, dtype=dtype)), torch.zeros(2, 5, 4, dtype=dtype))
    x = torch.tensor([[1.5], [-2.5]], dtype=dtype)
    compressed = q(compressor, x)
    tau = compressor.tau(1) if isinstance(compressor, QSGD) else 1.0
    torch.testing.assert_close(compressed.double() * tau, x.double(), rtol=1e-2, atol=0)


def test_one_hot_vector_takes_the_highest_level() -> None:
    x = torch.zeros(1, 100)
    x[0, 3] = -7.0
    for bits in (2, 3, 4, 5, 6, 7, 8, 16):
        torch.testing.assert_close(q(QSGD(bits, unbiased=True), x), x)


def test_zero_has_a_positive_sign() -> None:
    x = torch.tensor([[0.0, -0.0, -3.0, 1.0]])
    assert torch.equal(q(Sign(), x), torch.tensor([[1.0, 1.0, -1.0, 1.0]]))


@pytest.mark.parametrize("compressor", [TopK(0.2), TopK(0.2, "exact"), RandomK(0.2), Identity()], ids=repr)
def test_values_come_through_as_they_are(compressor: Compressor) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = gaussian(2, 500, dtype=dtype)
        compressed = q(compressor, x)
        assert torch.equal(compressed, torch.where(compressed != 0, x, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compressor", [Sign(), QSGD(4), QSGD(16), LowRank(2)], ids=repr)
def test_half_precision_is_that_of_the_values_alone(compressor: Compressor, dtype: torch.dtype) -> None:
    x = gaussian(2, 60, 70, dtype=dtype)
    wide = q(compressor, x.float())
    torch.testing.assert_close(q(compressor, x).float(), wide, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("compressor", ALL, ids=repr)
@pytest.mark.parametrize("d", [200, PIECE + 40])
def test_what_is_not_finite_stays_visible(compressor: Compressor, bad: float, d: int) -> None:
    x = gaussian(1, d // 20, 20, dtype=torch.float32)
    x[0, 1, 1] = bad
    seeds = (
        range(100) if isinstance(compressor, RandomK) and d == 200 else range(20) if isinstance(compressor, RandomK) else [0]
    )
    seen = [not q(compressor, x, [seed]).isfinite().all() for seed in seeds]
    assert any(seen)
    if not isinstance(compressor, RandomK):
        assert all(seen)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("compressor", [Sign(), QSGD(4), QSGD(16), LowRank(2)], ids=repr)
def test_what_is_not_finite_makes_all_of_its_tensor_so(compressor: Compressor, bad: float) -> None:
    x = gaussian(2, 10, 12)
    x[0, 3, 4] = bad
    compressed = q(compressor, x)
    if isinstance(compressor, Sign) and bad == float("inf"):
        assert compressed[0].isinf().all()
    else:
        assert compressed[0].isnan().all()
    assert compressed[1].isfinite().all()


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_parameters_are_values_like_others(compressor: Compressor) -> None:
    x = gaussian(1, 6, 7).requires_grad_()
    assert torch.equal(q(compressor, x), q(compressor, x.detach()))


# --------------------------------------------------------------------------------------------------------------- devices
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("d", [1000, PIECE + 13])
@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_other_device(compressor: Compressor, d: int) -> None:
    x = gaussian(2, d // 20, 20, dtype=torch.float32)
    payload = compressor.compress(x.cuda(), [1, 2])
    assert payload.is_cuda and payload.shape == (2, compressor.nbytes(x.shape[1:]))
    there = compressor.decompress(payload, x.shape[1:], x.dtype)
    here = compressor.decompress(payload.cpu(), x.shape[1:], x.dtype)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-6)
    if isinstance(compressor, Identity | TopK | RandomK):
        assert torch.equal(payload.cpu(), compressor.compress(x, [1, 2]))
    if isinstance(compressor, Sign):  # sums of floats differ in the last bits
        assert torch.equal(payload.cpu()[:, 4:], compressor.compress(x, [1, 2])[:, 4:])


# --------------------------------------------------------------------------------------------------------------- names
def test_make() -> None:
    expected = {
        "identity": "Identity()",
        "sign": "Sign()",
        "top_k:0.01": "TopK(ratio=0.01, method='sampled')",
        "random_k:0.1": "RandomK(ratio=0.1, unbiased=False)",
        "qsgd:8": "QSGD(bits=8, unbiased=False)",
        "qsgd": "QSGD(bits=4, unbiased=False)",
        "low_rank:3": "LowRank(rank=3, iterations=1)",
        "low_rank": "LowRank(rank=2, iterations=1)",
    }
    assert {name: repr(make(name)) for name in expected} == expected
    for text in expected.values():
        assert repr(eval(text)) == text
    compressor = TopK(0.5)
    assert make(compressor) is compressor
    assert {name.partition(":")[0] for name in expected} == set(COMPRESSORS)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("topk:0.1", "There is no compressor 'topk' (did you mean 'top_k'?); the names are identity, sign, top_k"),
        ("zip", "There is no compressor 'zip'; the names are"),
        (None, "A compressor is a name, such as 'top_k:0.01', or an object of a class of them; got None."),
        ("top_k", "After the colon of 'top_k' stands its `ratio`, as in 'top_k:0.01'; got 'top_k'."),
        ("qsgd:four", "After the colon of 'qsgd' stands its `bits`, as in 'qsgd:4'; got 'qsgd:four'."),
        ("sign:1", "The compressor 'sign' takes nothing after a colon; got 'sign:1'."),
        ("top_k:0", "`ratio` must be above 0 and at most 1; got 0.0."),
        ("random_k:1.5", "`ratio` must be above 0 and at most 1; got 1.5."),
        ("top_k:nan", "`ratio` must be above 0 and at most 1; got nan."),
        ("qsgd:1", "`qsgd` packs a value into 2 to 8 or into 16 `bits`; got 1."),
        ("qsgd:12", "`qsgd` packs a value into 2 to 8 or into 16 `bits`; got 12."),
        ("low_rank:0", "`rank` must be a whole number, at least 1; got 0."),
    ],
)
def test_mistakes(wrong: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        make(wrong)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_mistakes_in_options() -> None:
    with pytest.raises(ValueError, match="`method` must be one of 'exact', 'sampled'; got 'quick'"):
        TopK(0.1, method="quick")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`iterations` must be a whole number, at least 1; got 0"):
        LowRank(2, iterations=0)


def test_step_sizes_of_table_13_1() -> None:
    table = {
        "qsgd:16": 0.2, "qsgd:8": 0.2, "qsgd:4": 0.075, "qsgd:2": 0.025,
        "random_k:0.5": 0.45, "random_k:0.1": 0.075, "random_k:0.01": 0.00625,
        "top_k:0.5": 0.45, "top_k:0.1": 0.15, "top_k:0.01": 0.0375,
        "sign": 0.45, "identity": 1.0,
    }  # fmt: skip
    for name, gamma in table.items():
        assert make(name).tuned_gamma == pytest.approx(gamma, rel=1e-12)
    assert make("low_rank").tuned_gamma is None
    assert make("top_k:0.9").tuned_gamma == 0.45 and make("top_k:1e-5").tuned_gamma == pytest.approx(0.0375)
    # Half-way between 1 % and 10 % in the logarithm: the geometric mean.
    assert TopK(0.1**1.5).tuned_gamma == pytest.approx((0.0375 * 0.15) ** 0.5)
    assert 0.025 < make("qsgd:3").tuned_gamma < 0.075 < make("qsgd:6").tuned_gamma < 0.2  # type: ignore[operator]


@pytest.mark.parametrize("compressor", ["identity", "sign", "top_k:0.3", "random_k:0.3", "qsgd:4", "low_rank:1"])
def test_a_call_is_what_the_receiver_gets(compressor: str) -> None:
    made, x = make(compressor), gaussian(3, 4)
    payload = made.compress(x[None], [7])
    assert torch.equal(made(x, seed=7), made.decompress(payload, (3, 4), x.dtype)[0])
