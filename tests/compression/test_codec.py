"""The codec against loops over tensors, with the formulas written down a second time in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.communication.layout import lay_out
from lightning_distopt.compression import (
    QSGD,
    Codec,
    Compressor,
    Identity,
    LowRank,
    RandomK,
    Sign,
    TopK,
    VectorCompressor,
    qsgd,
)
from lightning_distopt.compression.compressor import values_of
from lightning_distopt.compression.randomness import hash64
from lightning_distopt.compression.vectors import PIECE, Segments, Vectors
from tests.test_docs import blocks

COMPRESSORS = [
    Identity(),
    Sign(),
    TopK(0.2),
    RandomK(0.2),
    RandomK(0.2, unbiased=True),
    QSGD(4),
    QSGD(3, unbiased=True),
    QSGD(16),
    LowRank(2),
]
ROWS = 3


class Dense(Compressor):
    """A compressor as a user writes it: halves everything, and stands for no vector."""

    def compress(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        return (x / 2).reshape(len(x), -1).contiguous().view(torch.uint8)

    def decompress(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return payload.clone().view(dtype).view(-1, *shape)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return math.prod(shape) * dtype.itemsize


SCOPES = [(c, scope) for c in [*COMPRESSORS, Dense()] for scope in ("tensor", "row") if not c.matrices or scope == "tensor"]


def model() -> nn.Module:
    """Tensors of one and several dimensions, one of a single value, one channels_last, none a multiple of the alignment."""
    net = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Linear(13, 7), nn.PReLU(), nn.Linear(30, 41))
    return net.to(memory_format=torch.channels_last)


def layout(dtype: torch.dtype = torch.float64, net: nn.Module | None = None) -> tuple[list[Any], int]:
    """Return the pieces and the width of a row of what `Replicas` makes of a model."""
    slots, blocks = lay_out([*(net or model()).to(dtype).named_parameters()], 1)
    return [(slot.offset, slot.shape, slot.stride) for slot in slots], blocks[0].shape[1]


def block(pieces: list[Any], width: int, rows: int = ROWS, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random rows with zeros in the gaps."""
    values = torch.zeros(rows, width, dtype=dtype)
    random = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    for offset, shape, _ in pieces:
        values[:, offset : offset + math.prod(shape)] = random[:, offset : offset + math.prod(shape)]
    return values


def gaps(pieces: list[Any], width: int) -> Tensor:
    mask = torch.ones(width, dtype=torch.bool)
    for offset, shape, _ in pieces:
        mask[offset : offset + math.prod(shape)] = False
    return mask


# ------------------------------------------------------------------------------------- the formulas, written down again
def np_sign(x: np.ndarray) -> np.ndarray:
    return np.float32(np.abs(x).sum() / x.size) * np.where(x >= 0, 1.0, -1.0)


def np_top_k(x: np.ndarray) -> np.ndarray:
    k = max(1, math.floor(0.2 * x.size))
    out = np.zeros_like(x)
    largest = np.argsort(-np.abs(x), kind="stable")[:k]
    out[largest] = x[largest]
    return out


def np_identity(x: np.ndarray) -> np.ndarray:
    return x


FORMULAS = [(Identity(), np_identity), (Sign(), np_sign), (TopK(0.2), np_top_k), (TopK(0.2, method="exact"), np_top_k)]


def test_the_layout_has_what_makes_it_hard() -> None:
    pieces, width = layout()
    assert gaps(pieces, width).any() and any(math.prod(shape) == 1 for _, shape, _ in pieces)
    assert pieces[0][2] == torch.empty(10, 3, 3, 3).to(memory_format=torch.channels_last).stride()
    assert pieces[0][2] != torch.empty(10, 3, 3, 3).stride()


@pytest.mark.parametrize("min_numel", [0, 20])
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize(("compressor", "formula"), FORMULAS, ids=lambda x: getattr(x, "__name__", repr(x)))
def test_equals_the_formula_for_each_part(compressor: Compressor, formula: Any, scope: Any, min_numel: int) -> None:
    pieces, width = layout()
    x = block(pieces, width)
    sizes = [math.prod(shape) for _, shape, _ in pieces]
    expected = np.zeros((ROWS, width))
    for row in range(ROWS):
        parts = {}
        for (offset, _, _), size in zip(pieces, sizes, strict=True):
            values = x[row, offset : offset + size].numpy()
            if size < min_numel:
                expected[row, offset : offset + size] = values
            else:
                parts[offset] = values
        if scope == "tensor":
            results = {offset: formula(values) for offset, values in parts.items()}
        else:
            ends = np.cumsum([len(values) for values in parts.values()])[:-1]
            results = dict(zip(parts, np.split(formula(np.concatenate([*parts.values()])), ends), strict=True))
        for offset, values in results.items():
            expected[row, offset : offset + len(values)] = values

    codec = Codec(compressor, pieces, torch.float64, scope, min_numel)
    payload = codec.encode(x, seeds=range(ROWS))
    decoded = codec.decode(payload, torch.full_like(x, 7.0) * ~gaps(pieces, width))
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=1e-6 if isinstance(compressor, Sign) else 0, atol=0)

    large = [size for size in sizes if size >= min_numel]
    small = sum(size for size in sizes if size < min_numel)
    per_part = [sum(large)] if scope == "row" else large
    assert payload.shape == (ROWS, codec.nbytes)
    assert codec.nbytes == sum(compressor.nbytes((size,), torch.float64) for size in per_part) + 8 * small


def short(sizes: Sequence[int], gap: int = 0) -> tuple[list[Any], int]:
    """Return the pieces and the width of a row of vectors of these sizes, with gaps of up to `gap` values between them."""
    pieces, offset = [], 0
    for number, size in enumerate(sizes):
        pieces.append((offset, (size,), (1,)))
        offset += size + number % (gap + 1)
    return pieces, offset + gap


SHORT = [
    short([1]),
    short([3, 1, 8, 0, 7, 16, 9, 1, 1, 0, 1230], gap=5),
    short([16, 32, 8, 64, 400, 24, 40]),  # one run
    short([PIECE - 3, 5, 7, PIECE + 1, 64, PIECE, 1, 8], gap=3),  # several groups, and one that is alone
    layout(),
]


def exact(values: Tensor) -> Tensor:
    """Round so that sums of these values and of their squares are exact in double precision, whatever their order."""
    return values.mul(64).round().div(64)


@pytest.mark.parametrize(("pieces", "width"), SHORT, ids=["one", "gaps", "run", "groups", "model"])
@pytest.mark.parametrize("compressor", [*COMPRESSORS, Dense()], ids=repr)
def test_equals_a_loop_over_tensors(
    compressor: Compressor, pieces: list[Any], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Vectors that are compressed together share random numbers: fixed ones show that nothing else differs.
    monkeypatch.setattr(qsgd, "random_bytes", lambda sources, n, _: torch.full((len(sources), n), 100, dtype=torch.uint8))
    monkeypatch.setattr(qsgd, "hash64", lambda *_: 2**63)
    x, seeds = exact(block(pieces, width)), [5, 6, 2**63 + 11]
    codec = Codec(compressor, pieces, torch.float64)
    payload = codec.encode(x, seeds)
    decoded = codec.decode(payload, torch.zeros_like(x))
    expected = torch.zeros_like(x)
    nbytes = 0
    for number, (offset, shape, stride) in enumerate(pieces):
        if not math.prod(shape):
            continue
        own = [seed_of(compressor, pieces, seed, number) for seed in seeds]
        # A vector's values count in the order in which they lie in memory; a matrix has its shape.
        if isinstance(compressor, VectorCompressor):
            tensor, target = (rows[:, offset : offset + math.prod(shape)] for rows in (x, expected))
        else:
            tensor, target = (rows.as_strided((ROWS, *shape), (width, *stride), offset) for rows in (x, expected))
        data = compressor.compress(tensor, own)
        nbytes += data.shape[1]
        target.copy_(compressor.decompress(data, tensor.shape[1:], x.dtype))
    assert torch.equal(decoded, expected)
    assert payload.shape == (ROWS, codec.nbytes) and codec.nbytes == nbytes


def seed_of(compressor: Compressor, pieces: list[Any], seed: int, number: int) -> int:
    """Return the seed of a tensor: its place in the group of those compressed together, which has the seed of the first."""
    group: list[int] = []
    room = 0
    for k, (_, shape, _) in enumerate(pieces):
        size = math.prod(shape)
        if not 0 < size <= PIECE:
            continue
        if room + size > PIECE:
            if number in group:
                break
            group, room = [], 0
        group.append(k)
        room += size
    if not isinstance(compressor, RandomK) or number not in group or len(group) == 1:
        return hash64(seed, number)
    return hash64(hash64(seed, group[0]), group.index(number))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("compressor", "scope"), SCOPES, ids=repr)
def test_difference(compressor: Compressor, scope: Any, dtype: torch.dtype) -> None:
    pieces, width = layout(dtype)
    x, x_hat = block(pieces, width, dtype=dtype), block(pieces, width, seed=1, dtype=dtype)
    codec, seeds = Codec(compressor, pieces, dtype, scope, min_numel=8), [1, 2, 3]
    payload = codec.encode(x - x_hat, seeds)
    q = codec.decode(payload, torch.zeros_like(x))
    moved, before = x_hat.clone(), x.clone()
    assert torch.equal(codec.encode_difference(x, moved, seeds), payload)
    assert torch.equal(moved, x_hat + q)
    assert torch.equal(x, before) and not moved[:, gaps(pieces, width)].any()


@pytest.mark.parametrize(("compressor", "scope"), SCOPES, ids=repr)
def test_weighted_sum(compressor: Compressor, scope: Any) -> None:
    pieces, width = layout()
    codec = Codec(compressor, pieces, torch.float64, scope)
    payload = codec.encode(block(pieces, width, rows=5), seeds=range(5))
    dense = torch.stack([codec.decode(row[None], torch.zeros(1, width, dtype=torch.float64))[0] for row in payload])
    weights = torch.tensor([[0.5, 0.0, 0.25, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 2.0], [0.0] * 5], dtype=torch.float64)
    out = block(pieces, width, seed=2)
    expected = out + weights @ dense
    assert codec.decode_add(payload, weights, out) is out
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert not out[:, gaps(pieces, width)].any()


@pytest.mark.parametrize("compressor", [*COMPRESSORS, Dense()], ids=repr)
def test_gaps_are_neither_sent_nor_changed(compressor: Compressor) -> None:
    pieces, width = SHORT[1]
    gap = gaps(pieces, width)
    x, x_hat, out = block(pieces, width), block(pieces, width, seed=1), block(pieces, width, seed=2)
    codec, weights = Codec(compressor, pieces, torch.float64, min_numel=3), torch.eye(ROWS)
    payload = codec.encode_difference(x, x_hat, [1, 2, 3])
    codec.decode_add(payload, weights, out)
    others = [torch.where(gap, bad, block(pieces, width, seed=seed)) for seed, bad in enumerate([math.nan, 3.0, 5.0])]
    same = codec.encode_difference(others[0], others[1], [1, 2, 3])
    codec.decode_add(same, weights, others[2])
    decoded = codec.decode(same, torch.full_like(x, 7.0))
    assert torch.equal(same, payload)
    for values, ours, bad in [(others[1], x_hat, 3.0), (others[2], out, 5.0)]:
        assert torch.equal(values[:, ~gap], ours[:, ~gap]) and (values[:, gap] == bad).all()
    assert torch.equal(decoded[:, ~gap], codec.decode(same, torch.zeros_like(x))[:, ~gap]) and (decoded[:, gap] == 7).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("compressor", [*COMPRESSORS, Dense()], ids=repr)
def test_what_is_not_finite_stays_in_its_tensor(compressor: Compressor, bad: float) -> None:
    pieces, width = SHORT[1]
    x = block(pieces, width)
    codec, seeds = Codec(compressor, pieces, torch.float64), [4, 5, 6]
    fine = codec.decode(codec.encode(x, seeds), torch.zeros_like(x))
    for offset, (size,), _ in pieces:
        where = slice(offset, offset + size)
        broken = x.clone()
        broken[1, where] = bad
        decoded = codec.decode(codec.encode(broken, seeds), torch.zeros_like(x))
        assert not size or not decoded[1, where].isfinite().all()
        decoded[1, where] = fine[1, where]
        assert torch.equal(decoded, fine)


@pytest.mark.parametrize("compressor", [QSGD(2, unbiased=True), QSGD(4, unbiased=True), RandomK(0.3, unbiased=True)], ids=repr)
def test_tensors_that_are_compressed_together_are_unbiased(compressor: Compressor) -> None:
    pieces, width = short([1, 9, 4, 3, 7], gap=1)
    runs, x = 20_000, block(pieces, width, rows=1)
    compressed = Codec(compressor, pieces, torch.float64).encode(x.expand(runs, width).contiguous(), range(runs))
    compressed = Codec(compressor, pieces, torch.float64).decode(compressed, torch.zeros(runs, width, dtype=torch.float64))
    # Five standard deviations of the mean, for each of the values.
    assert ((compressed.mean(0) - x[0]).abs() <= 5 * compressed.std(0) / runs**0.5 + 1e-6).all()


@pytest.mark.parametrize("compressor", [*COMPRESSORS, Dense()], ids=repr)
def test_weight_zero_leaves_out_what_is_no_number(compressor: Compressor) -> None:
    pieces, width = layout()
    x = block(pieces, width, rows=2)
    x[0] = x[0].masked_fill(~gaps(pieces, width), float("nan"))
    codec = Codec(compressor, pieces, torch.float64)
    out = torch.zeros(2, width, dtype=torch.float64)
    codec.decode_add(codec.encode(x, [0, 1]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), out)
    assert out[0].isfinite().all() and out[1].isnan().any()


LONG = layout(torch.float32, nn.Linear(600, 450))  # one that is longer than a piece, and one that is short


@pytest.mark.parametrize(("pieces", "width"), [LONG, *SHORT[1:4]], ids=["long", "gaps", "run", "groups"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_rows_may_be_encoded_together_or_alone(compressor: Compressor, pieces: list[Any], width: int) -> None:
    x = block(pieces, width, dtype=torch.float32)
    codec, seeds = Codec(compressor, pieces, torch.float32), [9, 8, 7]
    together, x_hat = codec.encode(x, seeds), torch.zeros_like(x)
    assert torch.equal(codec.encode_difference(x, x_hat, seeds), together)
    for row in range(ROWS):
        alone = torch.zeros(1, width)
        assert torch.equal(codec.encode_difference(x[row : row + 1], alone, seeds[row : row + 1])[0], together[row])
        assert torch.equal(alone[0], x_hat[row])
    out = [torch.zeros(2, width), torch.zeros(2, width)]
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    codec.decode_add(together, weights, out[0])
    for k in range(ROWS):
        codec.decode_add(together[k : k + 1], weights[:, k : k + 1], out[1])
    assert torch.equal(*out)


def test_tensors_and_rows_have_random_numbers_of_their_own() -> None:
    pieces = [(0, (64,), (1,)), (64, (64,), (1,))]
    x = torch.ones(2, 128)
    codec = Codec(RandomK(0.5), pieces, torch.float32)
    decoded = codec.decode(codec.encode(x, [1, 2]), torch.zeros_like(x)).view(4, 64)
    assert len({tuple(part.tolist()) for part in decoded}) == 4
    assert torch.equal(codec.encode(x, [1, 2]), codec.encode(x, [1, 2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if not isinstance(c, QSGD | LowRank)], ids=repr)
def test_other_device(compressor: Compressor) -> None:
    pieces, width = SHORT[1]
    x, codec = exact(block(pieces, width)), Codec(compressor, pieces, torch.float64)
    here, there = torch.zeros_like(x), torch.zeros_like(x).cuda()
    payload = codec.encode_difference(x, here, [1, 2, 3])
    assert torch.equal(codec.encode_difference(x.cuda(), there, [1, 2, 3]).cpu(), payload)
    codec.decode_add(payload, torch.eye(ROWS), here)
    codec.decode_add(payload.cuda(), torch.eye(ROWS), there)
    assert torch.equal(there.cpu(), here)


def test_empty_tensors_and_single_rows() -> None:
    pieces = [(0, (0, 3), (3, 1)), (0, (2,), (1,))]
    codec = Codec(Sign(), pieces, torch.float32)
    assert codec.nbytes == 5
    assert torch.equal(codec.decode(codec.encode(torch.ones(1, 2), [0]), torch.zeros(1, 2)), torch.ones(1, 2))


def test_rows_of_a_larger_block() -> None:
    pieces, width = layout()
    x = block(pieces, width, rows=4)
    for compressor in COMPRESSORS:
        codec = Codec(compressor, pieces, torch.float64)
        out = torch.zeros_like(x)
        codec.decode(codec.encode(x[1:3], [1, 2]), out[2:4])
        assert torch.equal(out[2:4], codec.decode(codec.encode(x[1:3].clone(), [1, 2]), torch.zeros(2, width).double()))
        assert not out[:2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_segments(dtype: torch.dtype) -> None:
    lengths = [1, 5, 100_000, 8, 4097, 3]
    pieces, width = short(lengths, gap=2)
    segments = Segments([(offset, size) for offset, (size,), _ in pieces], unit=8)
    # Equal values, whose sums one after the other would be wrong by a thousandth in single precision.
    x = torch.full((3, width), 0.1, dtype=dtype)
    sums = segments.sums(Vectors(x, segments).read(0, segments.d))
    expected = x[0, 0].double() * torch.tensor(lengths)
    torch.testing.assert_close(sums.double(), expected.expand(3, -1), rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(sums[:1], segments.sums(Vectors(x[:1], segments).read(0, segments.d)))


def test_vectors_over_several_slices_are_their_concatenation() -> None:
    values = torch.randn(2, 50)
    slices = [(3, 4), (10, 1), (20, 17)]
    joined = torch.cat([values[:, offset : offset + length] for offset, length in slices], dim=1)
    vectors = Vectors(values, Segments(slices))
    assert vectors.d == 22
    for start, stop in [(0, 22), (0, 4), (2, 9), (4, 5), (7, 22), (5, 5)]:
        assert torch.equal(vectors.read(start, stop), joined[:, start:stop])
    index = torch.tensor([[0, 3, 4, 5, 21], [21, 4, 3, 0, 9]])
    assert torch.equal(vectors.gather(index), joined.gather(1, index))
    copy = values.clone()
    Vectors(copy, Segments(slices)).add_at(1, index[0], torch.ones(5), 2.0)
    joined[1, index[0]] += 2
    assert torch.equal(Vectors(copy, Segments(slices)).read(0, 22), joined)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scope": "block"}, "`scope` must be one of 'tensor', 'row'; got 'block'."),
        ({"min_numel": -1}, "`min_numel` must be a whole number, at least 0; got -1."),
        (
            {"compressor": LowRank(2), "scope": "row"},
            'LowRank(rank=2, iterations=1) compresses matrices, and a whole row is none: use `scope="tensor"`.',
        ),
    ],
)
def test_mistakes(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        Codec(**{"compressor": Sign(), "pieces": [(0, (2,), (1,))], "dtype": torch.float32, **options})
    assert str(error.value) == sentence


def test_block_of_another_dtype() -> None:
    codec = Codec(Sign(), [(0, (2,), (1,))], torch.float32)
    with pytest.raises(ValueError, match=r"made for blocks of torch.float32, but the block is of torch.float64"):
        codec.encode(torch.ones(1, 2, dtype=torch.float64), [0])


class Half(Dense):
    """What each of those below would be without its mistake: float16."""

    def compress(self, x: Tensor, seeds: Sequence[int]) -> Any:
        return x.half().reshape(len(x), -1).view(torch.uint8)

    def decompress(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Any:
        return values_of(payload, torch.half).to(dtype).view(-1, *shape)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Any:
        return 2 * math.prod(shape)


class OneMore(Half):
    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return 2 * math.prod(shape) + 1


class Fraction(Half):
    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        return 0.5 * math.prod(shape)


class NoBytes(Half):
    def compress(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        return x.half().reshape(len(x), -1)


class NoBytesOfThatSize(Half):
    """Whose values would be rounded to bytes without a word."""

    def compress(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        return x.repeat(1, 1, 2).reshape(len(x), -1)


class NoRows(Half):
    def compress(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        return super().compress(x, seeds).reshape(-1)


class Nothing(Half):
    def compress(self, x: Tensor, seeds: Sequence[int]) -> None:
        return None


class Flat(Half):
    def decompress(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return super().decompress(payload, (math.prod(shape),), dtype)


class Squeezed(Half):
    """Right for several rows, and wrong for one."""

    def decompress(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return super().decompress(payload, shape, dtype).squeeze(0)


@pytest.mark.parametrize(
    ("compressor", "sentence"),
    [
        (
            OneMore(),
            r"OneMore.compress must return bytes .* of the shape \[2, 13\], a row for each replica .* of the shape \[2, 12\]\.",
        ),
        (Fraction(), r"Fraction.nbytes must return a whole number of bytes .* of the shape \[2, 3\]; it has returned 3.0\."),
        (NoBytes(), r"NoBytes.compress must return bytes .* \[2, 12\], .* returned torch.float16 of the shape \[2, 6\]\."),
        (NoBytesOfThatSize(), r"must return bytes .* \[2, 12\], .* returned torch.float32 of the shape \[2, 12\]\."),
        (NoRows(), r"NoRows.compress must return bytes .* \[2, 12\], .* returned torch.uint8 of the shape \[24\]\."),
        (Nothing(), r"Nothing.compress must return bytes .* returned None\."),
        (
            Flat(),
            r"Flat.decompress must return values of the shape \[2, 2, 3\], .* returned torch.float32 of the shape \[2, 6\]\.",
        ),
        (Squeezed(), r"Squeezed.decompress must return values of the shape \[1, 2, 3\], .* of the shape \[2, 3\]\."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Compressor) else "",
)
def test_what_a_compressor_of_ones_own_returns_is_checked(compressor: Compressor, sentence: str) -> None:
    pieces, x = [(0, (2, 3), (3, 1))], torch.randn(2, 8)
    fine = Codec(Half(), pieces, torch.float32)
    with pytest.raises(ValueError, match=sentence):
        codec = Codec(compressor, pieces, torch.float32)
        payload = codec.encode_difference(x, torch.zeros_like(x), [0, 1])
        assert torch.equal(payload, fine.encode(x, [0, 1]))
        codec.decode_add(payload, torch.ones(1, 2), torch.zeros(1, 8))


def test_the_compressor_on_the_page() -> None:
    (example,) = (text for text in blocks("docs/compression.md", "python") if "(Compressor):" in text)
    names: dict[str, Any] = {}
    exec(example, names)  # which ends with checks of its own
    pieces, width = layout()
    for scope, rows in (("tensor", 1), ("tensor", 3), ("row", 1), ("row", 3)):
        x = torch.rand(rows, width, dtype=torch.float64) * ~gaps(pieces, width)
        codec = Codec(names["EightBits"](), pieces, torch.float64, scope)
        payload = codec.encode(x, range(rows))
        decoded = codec.decode(payload, torch.zeros_like(x))
        assert (decoded - x).abs().max() < 1 / 255
        for row in range(rows):
            alone = codec.decode_add(payload[row : row + 1], torch.ones(1, 1), torch.zeros(1, width, dtype=torch.float64))
            assert torch.equal(alone[0], decoded[row])
