"""Which layers of a pretrained encoder are masked, and what the encoder does not have: the head of a task."""

from __future__ import annotations

import re
import sys

from torch import nn

FIRST_BLOCK = 2
"""Blocks below are left as they are (counted from 0): masking from the top is better than from the bottom."""

_BLOCK = re.compile(r"(?:^|\.)(?:encoder|transformer)\.layer\.(\d+)\.")
_POOLER = re.compile(r"(?:^|\.)pooler\.")


def find_encoders(root: nn.Module) -> dict[str, nn.Module]:
    """Return the pretrained encoders inside of a module by name: the base models of `transformers`.

    Nothing is imported: where `transformers` has not been, there is none of its models either.
    """
    known: type | None = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    found: dict[str, nn.Module] = {}
    names = {id(module): name for name, module in root.named_modules()}
    for name, module in root.named_modules():
        if (
            known is not None
            and isinstance(module, known)
            and not any(name.startswith(f"{outer}.") or not outer for outer in found)
        ):
            base = module.base_model  # type: ignore[attr-defined]
            found[names[id(base)]] = base
    return found


def encoder_layers(root: nn.Module) -> list[str]:
    """Return the layers that chapter 7 masks, by name.

    These are the linear layers of the transformer blocks from the third one on, the pooler, and all linear layers outside of
    the encoder: the classifier and what stands before it. Embeddings, biases and norms are no linear layers' weights, and a
    layer that shares its weight with the embedding is left out with it.

    Raises:
        ValueError: if there is no encoder whose blocks are known.
    """
    advice = "say which layers to mask by `layers`, such as ['encoder.layers.[2-9].*', 'classifier']"
    encoders = find_encoders(root)
    if not encoders:
        raise ValueError(
            f"There is no pretrained model of `transformers` inside of {type(root).__name__}, whose layers would be known: "
            f"{advice}."
        )
    owners: dict[int, int] = {}
    for _, parameter in root.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    linear = [n for n, layer in root.named_modules() if isinstance(layer, nn.Linear) and owners[id(layer.weight)] == 1]
    chosen, blocks = [], 0
    for name in linear:
        encoder = next((e for e in encoders if not e or name.startswith(f"{e}.")), None)
        block = _BLOCK.search(name) if encoder is not None else None
        if block is not None and int(block[1]) >= FIRST_BLOCK:
            blocks += 1
            chosen.append(name)
        elif encoder is None or _POOLER.search(name):
            chosen.append(name)
    if not blocks:
        kinds = ", ".join(type(encoder).__name__ for encoder in encoders.values())
        raise ValueError(f"{kinds} has no transformer blocks `encoder.layer.{FIRST_BLOCK}` and up: {advice}.")
    return chosen


def head_parameters(root: nn.Module) -> list[str]:
    """Return the parameters that no pretrained encoder has: a task's head. There are none without an encoder."""
    encoders = find_encoders(root)
    inside = {id(parameter) for encoder in encoders.values() for parameter in encoder.parameters()}
    return [name for name, p in root.named_parameters() if id(p) not in inside] if encoders else []
