"""Relative positions of VLMo: one bias table for image, text and their pairs.

Rows of the table, for an image of w x w patches and a text-only stage of T tokens:

    (2w-1)^2          image patches, by (row, column) difference
    3                 image [CLS] to token, token to [CLS], [CLS] to itself
    1, 1              any text token to any image token, any image token to any text token
    2T-3              text tokens, by distance -(T-2) .. T-2
    3                 text [CLS] to token, token to [CLS], [CLS] to itself

Together R = (2w-1)^2 + 3 + 2T + 2. Columns: layer-major, [layer 0's heads, layer 1's heads, ...].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_CLS_ROWS = 3


def num_extra_rows(text_only_len: int) -> int:
    """Rows behind the patch differences: they do not depend on the image size."""
    return NUM_CLS_ROWS + 2 * text_only_len + 2


def num_relative_positions(window: int, text_only_len: int) -> int:
    """R, the number of rows of the bias table."""
    return (2 * window - 1) ** 2 + num_extra_rows(text_only_len)


def _with_cls(inner: Tensor, first_cls_row: int) -> Tensor:
    """Put a [CLS] row and column around `inner` [n, n]; its three entries are consecutive table rows."""
    index = F.pad(inner, (1, 0, 1, 0))
    index[0, :] = first_cls_row
    index[:, 0] = first_cls_row + 1
    index[0, 0] = first_cls_row + 2
    return index


def image_position_index(window: int, device: torch.device | str | None = None) -> Tensor:
    """Table row for every (query, key) pair of an image: int64 [w*w + 1, w*w + 1], [CLS] first."""
    side = 2 * window - 1
    patch = torch.arange(window * window, device=device)
    row, column = patch // window, patch % window
    row_difference = row[:, None] - row[None, :] + window - 1
    column_difference = column[:, None] - column[None, :] + window - 1
    return _with_cls(row_difference * side + column_difference, side * side)


def text_position_index(
    window: int, max_text_len: int, text_only_len: int, device: torch.device | str | None = None
) -> Tensor:
    """Table row for every (query, key) pair of a text: int64 [max_text_len, max_text_len], [CLS] first."""
    first_text_row = (2 * window - 1) ** 2 + NUM_CLS_ROWS + 2
    token = torch.arange(max_text_len - 1, device=device)
    # Key minus query, where the image part takes query minus key: the trained tables fix both signs.
    distance = token[None, :] - token[:, None] + text_only_len - 2
    return _with_cls(first_text_row + distance, num_relative_positions(window, text_only_len) - NUM_CLS_ROWS)


def text_image_position_index(
    window: int, max_text_len: int, text_only_len: int, device: torch.device | str | None = None
) -> Tensor:
    """Table row for every pair of the fusion sequence [text, image]: int64 [N, N], N tokens in all."""
    text = text_position_index(window, max_text_len, text_only_len, device)
    image = image_position_index(window, device)
    text_to_image = (2 * window - 1) ** 2 + NUM_CLS_ROWS
    text_rows = F.pad(text, (0, image.shape[0]), value=text_to_image)
    image_rows = F.pad(image, (text.shape[0], 0), value=text_to_image + 1)
    return torch.cat([text_rows, image_rows])


def layer_position_biases(table: Tensor, index: Tensor, depth: int) -> tuple[Tensor, ...]:
    """Biases of all layers by one embedding look-up.

    table: [R, depth * heads], differentiable. index: int64 [N, N]. Returns `depth` tensors [heads, N, N] in
    the table's dtype, views of one contiguous buffer.
    """
    bias = F.embedding(index, table).permute(2, 0, 1).contiguous()
    return bias.chunk(depth)
