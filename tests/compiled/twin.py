"""The host planner token by token in plain Python: its specification. It shares no code with the package."""

from __future__ import annotations

TABLES = ("cu_seqlens", "rows", "positions", "sample_of_row", "group_offsets", "row_of_token")


def plan(
    runs: list[list[tuple[int, int]]], starts: list[int], modalities: int
) -> tuple[int, dict[str, list[int]]] | None:
    """Padded length and tables of a batch, or None where the runs are no plan.

    Args:
        runs: for each sample its `(modality, length)` runs in token order.
        starts: for every modality the position of its first run in each sample, -1 for none.
        modalities: number of them.
    """
    samples: list[dict[int, int]] = []  # position to modality
    for sample in runs:
        token, cursor, started = {}, 0, set()
        for modality, length in sample:
            if not 0 <= modality < modalities or length < 0:
                return None
            if modality not in started and starts[modality] >= 0:
                cursor = starts[modality]
            started.add(modality)
            for position in range(cursor, cursor + length):
                if position in token:
                    return None
                token[position] = modality
            cursor += length
        samples.append(token)

    length = max((max(token) + 1 for token in samples if token), default=0)
    groups: list[list[tuple[int, int]]] = [[] for _ in range(2 * modalities)]
    for b, token in enumerate(samples):
        mixed = len(set(token.values())) > 1
        for position in sorted(token):
            m = token[position]
            groups[2 * m + (mixed if m == 0 else not mixed)].append((b, position))
    packed = [token for group in groups for token in group]
    row = {token: r for r, token in enumerate(packed)}
    sizes = [len(token) for token in samples]
    return length, {
        "cu_seqlens": [sum(sizes[:b]) for b in range(len(sizes) + 1)],
        "rows": [row[token] for token in sorted(packed)],
        "positions": [position for _, position in packed],
        "sample_of_row": [b for b, _ in packed],
        "group_offsets": [sum(map(len, groups[:g])) for g in range(len(groups) + 1)],
        "row_of_token": [row.get((b, p), -1) for b in range(len(samples)) for p in range(length)],
    }
