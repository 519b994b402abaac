"""The thesis's figures: table 16.5, figure 7.5 and the memory of table 7.2."""

from __future__ import annotations

import pytest
import torch

from lightning_distopt.sparsity.encoder_layers import encoder_layers
from lightning_distopt.sparsity.memory import EncoderSize, cumulative_megabytes, masked_weights, task_rows

BERT = EncoderSize(109_482_240, 71_368_704, 768)
OUTPUTS = {"MRPC": 2, "SST2": 2, "CoLA": 2, "RTE": 2, "QNLI": 2, "SEM": 2, "TREC": 6, "AG": 4, "POS": 49, "NER": 9, "SWAG": 1}
# (classifier, charged with masking, kilobytes of the classifier, kilobytes of its mask), as printed
PRINTED = {
    "MRPC": (1_536, True, 6.144, 0.192),
    "SST2": (1_536, False, 6.144, 0.192),
    "CoLA": (1_536, False, 6.144, 0.192),
    "RTE": (1_536, False, 6.144, 0.192),
    "QNLI": (1_536, False, 6.144, 0.192),
    "SEM": (1_536, False, 6.144, 0.192),
    "TREC": (4_608, True, 18.432, 0.576),
    "AG": (3_072, True, 12.288, 0.384),
    "POS": (37_632, True, 150.528, 4.704),
    "NER": (6_912, True, 27.648, 0.864),
    "SWAG": (768, True, 3.072, 0.096),
}


def test_mask_bits_of_bert() -> None:
    assert masked_weights() == 10 * (4 * 768**2 + 2 * 768 * 3072) + 768**2 == 71_368_704
    assert masked_weights() / 8 / 1000 == 8_921.088


def test_every_row_of_table_16_5() -> None:
    pretrained, *rows = task_rows(BERT, OUTPUTS)
    assert pretrained.fine_tuning_kb == pretrained.masking_kb == 437_928.96
    assert [row.task for row in rows] == list(PRINTED)
    for k, row in enumerate(rows):
        classifier, charged, floats_kb, mask_kb = PRINTED[row.task]
        assert row.fine_tuning == ((classifier, 109_482_240) if k else (classifier,))
        assert (row.floats, row.bits) == (classifier if charged else 0, (71_368_704, classifier))
        assert row.fine_tuning_kb == pytest.approx(floats_kb + 437_928.96 * (k > 0), abs=1e-9)
        assert row.masking_kb == pytest.approx(floats_kb * charged + 8_921.088 + mask_kb, abs=1e-9)


def test_totals() -> None:
    rows = task_rows(BERT, OUTPUTS)
    fine_tuning, masking = sum(row.fine_tuning_kb for row in rows), sum(row.masking_kb for row in rows)
    assert fine_tuning == pytest.approx(4_817_467.392, abs=1e-6)
    assert masking == pytest.approx(536_286.816, abs=1e-6)
    assert round(fine_tuning / masking, 2) == 8.98


def test_the_curve_and_the_ensembles() -> None:
    curve = cumulative_megabytes(BERT, 11)
    assert [round(mask, 1) for _, mask in curve[:2]] == [446.9, 455.8] and round(curve[-1][1], 1) == 536.1
    assert round(curve[0][1], 2) == 446.85 and round(curve[0][0], 1) == 437.9  # one model
    assert (round(curve[3][1], 1), round(curve[3][0], 1)) == (473.6, 1751.7)  # an ensemble of four
    assert [mask > fine for fine, mask in curve] == [True] + [False] * 10


def test_numbers_of_models() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
        classifier = transformers.BertForSequenceClassification(transformers.BertConfig())
    assert EncoderSize.of(bert) == EncoderSize.of(classifier) == BERT
    assert EncoderSize.of(bert, encoder_layers(bert)[:1]).masked == 768**2
    with pytest.raises(ValueError, match="one pretrained model of `transformers`, and Linear holds 0"):
        EncoderSize.of(torch.nn.Linear(2, 2), [""])
