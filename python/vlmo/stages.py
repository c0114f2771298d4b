"""The three stages: what trains in each, and how one starts from the checkpoint of the last (paper section 3.3).

vision           image-only. A BEiT as published; here trained by `objectives` on pixels.
language         text-only, on the frozen vision model: attention and image expert stay as they are.
vision-language  everything trains. The vision-language experts appear here, freshly initialised as published.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checkpoint import IGNORED, CheckpointReport, load_checkpoint, read_state
from .config import VLMoConfig
from .model import VLMo
from .objectives import STAGES
from .position import num_extra_rows

HEADS = {"vision": (), "language": ("mlm",), "vision-language": ("mlm", "itm", "itc")}
# Parameter names, or their beginnings or parts, as `re.search` finds them.
_TEXT = r"^text_embeddings\.|^token_type_embeddings\.|\.mlp_text\.|\.norm2_text\.|^mlm_score\."
_FUSION = r"\.mlp_vl\.|\.norm2_vl\.|^itm_score\.|^itc_|^logit_|^pooler\."
# What a checkpoint of an earlier stage need not have.
_NEW = {
    "vision": rf"{_TEXT}|^pooler\.",
    "language": rf"{_TEXT}|^pooler\.",
    "vision-language": rf"{_FUSION}|^mlm_score\.",
}


@dataclass(frozen=True)
class StageReport(CheckpointReport):
    """A `CheckpointReport` with nothing missing and nothing unexpected, and `new`: what the stage adds, parameters
    that keep their fresh initialisation."""

    new: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: one line for each kind of key, the first few by name."""
        lines = []
        for kind in ("converted", "new", "ignored"):
            names = getattr(self, kind)
            if names:
                more = "" if len(names) <= 3 else ", ..."
                lines.append(f"{len(names)} {kind}: {', '.join(names[:3])}{more}")
        return lines


def stage_config(config: VLMoConfig, stage: str) -> VLMoConfig:
    """The configuration of a stage: its heads, and no vision-language expert before the last."""
    if stage not in STAGES:
        raise ValueError(f"stage_config: stage must be one of {STAGES}, got {stage!r}.")
    start = config.vlffn_start if stage == "vision-language" else config.depth
    return replace(config, heads=HEADS[stage], vlffn_start=start)


def trains(stage: str, name: str) -> bool:
    """Whether the stage trains the parameter of this name."""
    if stage == "vision":  # all of the image encoder; a BEiT has no token types
        return re.search(rf"{_TEXT}|{_FUSION}", name) is None
    if stage == "language":
        return re.search(rf"{_TEXT}|^relative_position_bias_table$|^transformer\.norm\.", name) is not None
    return True


def set_trainable(model: VLMo, stage: str) -> list[str]:
    """Freeze what the stage does not train, as published; returns the names of what trains.

    Text position embeddings train only where they are used, that is without a bias table.
    """
    names = []
    for name, parameter in model.named_parameters():
        unused = name == "text_embeddings.position_embeddings.weight" and model.config.relative_position_bias
        parameter.requires_grad_(trains(stage, name) and not unused)
        if parameter.requires_grad:
            names.append(name)
    return names


def start_from(
    model: VLMo, path_or_dict: str | os.PathLike[str] | Mapping[str, object], stage: str
) -> StageReport:
    """Begin a stage with the parameters of an earlier one, or of a BEiT, strictly.

    What the stage adds keeps its initialisation: the text side in "language"; vision-language experts and the
    heads of contrast and matching in "vision-language", as in the published code.

    path_or_dict: see `load_checkpoint`. A BEiT's `mlp` and `norm2` become the image expert, its bias tables, one a
    layer, one table.

    Raises ValueError, before anything is copied, if anything else is missing or a key is foreign.
    """
    state = read_state(path_or_dict)
    renamed: list[str] = []
    if any(re.match(r"blocks\.\d+\.mlp\.", key) for key in state):
        state, renamed = _from_beit(state, model.config)
    expected = model.state_dict()
    sizes = [_size(each) for each in (expected, state)]
    if None not in sizes and sizes[0] != sizes[1]:
        (width, layers), (its_width, its_layers) = sizes
        raise ValueError(
            f"start_from: the checkpoint must be of the model's size, width {width} in {layers} layers, it has "
            f"{its_width} in {its_layers}. Hint: --config of the checkpoint."
        )
    lacking = [name for name in expected if name not in state]
    new = tuple(name for name in lacking if re.search(_NEW[stage], name))
    missing = [name for name in lacking if name not in new]
    foreign = [key for key in state if key not in expected and key not in IGNORED]
    if missing or foreign:
        raise ValueError(
            f"start_from: a checkpoint for the {stage} stage must hold what came before and nothing else; missing: "
            f"{_few(missing)}; foreign: {_few(foreign)}. Hint: stages come in the order {STAGES}."
        )
    report = load_checkpoint(model, state, strict=False)
    return StageReport((), (), (*renamed, *report.converted), report.ignored, new)


def _size(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Width and number of layers."""
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.blocks.")}
    token = state.get("transformer.cls_token")
    return None if token is None else (token.shape[-1], len(layers))


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "none"


def _from_beit(state: dict[str, Tensor], config: VLMoConfig) -> tuple[dict[str, Tensor], list[str]]:
    """A BEiT's parameters under the names of VLMo, and a word on each kind of change."""
    tables: dict[int, Tensor] = {}
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        table = re.fullmatch(r"blocks\.(\d+)\.attn\.relative_position_bias_table", key)
        if key == "rel_pos_bias.relative_position_bias_table":  # before fine-tuning, one table for all layers
            tables = dict.fromkeys(range(config.depth), value)
        elif table:
            tables[int(table[1])] = value
        elif key.endswith("relative_position_index") or re.match(r"(mask_token|lm_head\.|head\.|fc_norm\.)", key):
            continue
        else:
            expert = re.sub(r"^(blocks\.\d+\.)(mlp|norm2)\.", r"\1\2_imag.", key)
            converted["transformer." + expert] = value
    words = ["blocks.*.mlp (to mlp_imag)", "blocks.*.norm2 (to norm2_imag)"]
    if tables:
        merged = torch.cat([tables[layer] for layer in sorted(tables)], dim=1)
        # A BEiT's table ends with the three rows of its [CLS]; the rows of text follow, untrained.
        rest = merged.new_zeros(num_extra_rows(config.text_only_len) - 3, merged.shape[1])
        converted["relative_position_bias_table"] = torch.cat([merged, rest])
        words.append(f"blocks.*.attn.relative_position_bias_table ({len(tables)} tables to one)")
    return converted, words
