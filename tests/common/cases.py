"""Named batches, each with the reason why it is worth a test.

A case is plain Python: its tables are made here token by token, without the package, so they can check it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

import vlmo_kernels as vk

MODALITIES = ("text", "image")
# Three experts, chosen by modality and kind of sample. In most batches at least one of them has no token.
EXPERTS = {"text": 0, "image.mixed": 1, "image.alone": 2}
EXPERT_COUNT = 3

Run = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Case:
    """A batch given by the runs of its samples.

    Attributes:
        name: of the test parameter.
        why: what breaks if this case is wrong.
        runs: for each sample its runs `(modality, length)` in token order.
        starts: position of a modality's first run, see `ModalityLayout.from_lengths`.
    """

    name: str
    why: str
    runs: tuple[tuple[Run, ...], ...]
    starts: Mapping[str, int] = field(default_factory=dict)

    def token_ids(self) -> list[list[int]]:
        """Modality of every position of every sample, -1 for padding; rows of equal length."""
        samples = []
        for sample in self.runs:
            ids: dict[int, int] = {}
            cursor, started = 0, set()
            for modality, length in sample:
                if modality in self.starts and modality not in started:
                    cursor = self.starts[modality]
                started.add(modality)
                for position in range(cursor, cursor + length):
                    ids[position] = MODALITIES.index(modality)
                cursor += length
            samples.append(ids)
        length = max((max(ids) + 1 for ids in samples if ids), default=0)
        return [[ids.get(position, -1) for position in range(length)] for ids in samples]

    def ids(self) -> torch.Tensor:
        """int64 `[B, N]`, `token_ids` in a tensor."""
        rows = self.token_ids()
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(rows[0]) if rows else 0)

    def expert_ids(self) -> torch.Tensor:
        """int64 `[B, N]`, the expert of every token by `EXPERTS`, -1 for padding."""
        ids = self.token_ids()
        experts = []
        for row in ids:
            kind = "mixed" if len(set(row) - {-1}) > 1 else "alone"
            named = [f"{MODALITIES[i]}.{kind}" if i >= 0 else None for i in row]
            experts.append(
                [-1 if n is None else EXPERTS.get(n, EXPERTS.get(n.partition(".")[0])) for n in named]
            )
        return torch.tensor(experts, dtype=torch.int64).reshape(self.ids().shape)

    def layout(self, static: bool = False) -> vk.ModalityLayout:
        """The package's plan of the batch; `static`: with dead rows, as made from ids on a device."""
        if static:
            return vk.ModalityLayout.from_modality_ids(self.ids(), modalities=MODALITIES)
        return vk.ModalityLayout.from_runs(self.runs, modalities=MODALITIES, starts=self.starts)


def _pairs(text: list[int], image: int) -> tuple[tuple[Run, ...], ...]:
    return tuple((("text", n), ("image", image)) for n in text)


CASES = {
    case.name: case
    for case in (
        Case("no_samples", "an empty batch must not divide, reshape or launch anything", ()),
        Case("no_tokens", "samples without tokens: T = 0 although B is 2", ((), (("text", 0),))),
        Case("one_token", "T = 1, softmax of one score, GEMMs of one row", ((("text", 1),),)),
        Case("odd", "63 tokens: one less than every tile", _pairs([7, 5], 25) + ((("text", 1),),)),
        Case("pair", "237 tokens: one pair of VLMo at 224 px", ((("text", 40), ("image", 197)),)),
        Case("text_only", "one modality: two experts have no rows", ((("text", 9),), (("text", 4),))),
        Case("image_only", "the first group is empty, all rows go to the last expert", ((("image", 17),),) * 2),
        Case("all_to_one", "all tokens to the expert of paired images but one", _pairs([1, 0, 1], 12)),
        Case("alternating", "one-token runs: neighbours in a sample are never neighbours in rows",
             ((("text", 1), ("image", 1)) * 9,)),
        Case("several_runs", "a modality returns later in the sample; its rows are not one run",
             ((("text", 3), ("image", 8), ("text", 2), ("image", 5)), (("image", 4), ("text", 6)))),
        Case("mid_padding", "positions are not row numbers: text is padded in mid-sample",
             _pairs([3, 10, 6], 16), {"text": 0, "image": 10}),
        Case("mixed_kinds", "text-only, image-only, paired and empty samples in one batch",
             ((("text", 5), ("image", 11)), (("text", 8),), (), (("image", 11),), (("text", 2), ("image", 11)))),
    )
}  # fmt: skip
