"""The encoder on packed rows: image-only, text-only and paired samples of one step in one pass.

Rows lie in the order `[text of text-only | text of pairs | image of pairs | image of image-only]`. Below
`vlffn_start` the text expert takes the first two groups and the image expert the last two. From there on the pairs
are the vision-language expert's, while text-only and image-only rows keep their own expert; for the second
contrastive branch (paper section 3.3) those rows are copied once at `vlffn_start`, and the copies go on with the
vision-language expert. The last layer gives out only the tokens that are read. Result and gradients are those of
`VLMo.infer`, `infer_text` and `infer_image`, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmo_kernels import ModalityLayout

from .config import VLMoConfig
from .devices import move
from .model import VLMo


@dataclass(frozen=True)
class Plan:
    """Where the tokens of one pass lie. Build it with `make_plan`.

    Samples are numbered text-only, pairs, image-only; above `vlffn_start`, with copies, text-only, pairs, copies
    of text-only, copies of image-only, image-only.

    Attributes:
        texts, pairs, images: numbers of samples of each kind.
        copies: whether text-only and image-only samples also take the vision-language branch.
        image_start: position of the image's [CLS]; text begins at 0.
        lower, top, last: layouts below and from `vlffn_start` on, and of what the last layer gives out.
        lower_experts, top_experts, last_experts: modality or group to the name of its expert.
        source: int64 [T], row of the embeddings (all texts, then all images, flattened) behind every lower row.
        branch: int64 [T'], lower row behind every top row; None where nothing is copied.
        read: int64 [R], top row behind every row of the last layout; None where they are the same.
    """

    texts: int
    pairs: int
    images: int
    copies: bool
    image_start: int
    lower: ModalityLayout
    top: ModalityLayout
    last: ModalityLayout
    lower_experts: dict[str, str]
    top_experts: dict[str, str]
    last_experts: dict[str, str]
    source: Tensor
    branch: Tensor | None
    read: Tensor | None

    def to(self, device: torch.device | str) -> Plan:
        layouts: dict[int, ModalityLayout] = {}
        for layout in (self.lower, self.top, self.last):
            if id(layout) not in layouts:
                layouts[id(layout)] = _move(layout, device)
        lower, top, last = (layouts[id(layout)] for layout in (self.lower, self.top, self.last))
        indices = (self.source, self.branch, self.read)
        source, branch, read = (None if index is None else move(index, device) for index in indices)
        return replace(self, lower=lower, top=top, last=last, source=source, branch=branch, read=read)

    def rows(self, samples: Tensor, positions: Tensor | int = 0) -> Tensor:
        """int64 rows of the result that hold these tokens, which must be there."""
        return self.last.row_of_token[samples * self.last.max_seqlen + positions].long()

    def _cls(self, first: int, count: int, position: int) -> Tensor:
        return self.rows(torch.arange(first, first + count, device=self.source.device), position)

    def text_cls(self) -> Tensor:
        """Rows of [CLS] of the text-only samples."""
        return self._cls(0, self.texts, 0)

    def pair_cls(self) -> Tensor:
        """Rows of [CLS] of the pairs: the text's."""
        return self._cls(self.texts, self.pairs, 0)

    def image_cls(self) -> Tensor:
        """Rows of [CLS] of the image-only samples."""
        return self._cls(self.top.batch - self.images, self.images, self.image_start)

    def text_vl_cls(self) -> Tensor:
        """Rows of [CLS] of the text-only samples in the vision-language branch."""
        return self._cls(self.texts + self.pairs, self.texts, 0)

    def image_vl_cls(self) -> Tensor:
        """Rows of [CLS] of the image-only samples in the vision-language branch."""
        return self._cls(2 * self.texts + self.pairs, self.images, self.image_start)


def make_plan(
    config: VLMoConfig,
    text_mask: Tensor | None,
    *,
    pairs: int = 0,
    images: int = 0,
    copies: bool = False,
    text_of: Tensor | None = None,
    image_of: Tensor | None = None,
    num_texts: int | None = None,
    read: tuple[Tensor, Tensor] | None = None,
) -> Plan:
    """Plan one pass. No host synchronisation; from a mask on the host the layouts have no dead rows.

    Args:
        config: of the model.
        text_mask: bool [texts + pairs, max_text_len], true for real tokens, or None without any text.
        pairs, images: numbers of paired and of image-only samples; all other texts are text-only.
        copies: give text-only and image-only samples the second, vision-language branch as well.
        text_of: int64 [texts + pairs], which embedded text each is; by default one after the other.
        image_of: int64 [pairs + images], which embedded image each is; by default one after the other.
        num_texts: number of embedded texts, where `text_of` uses some several times.
        read: int64 samples (as the plan numbers them from `vlffn_start` on) and positions of the tokens that will be
            read, besides the [CLS] of every sample; None: all.

    Raises:
        ValueError: no sample, or a mask of another shape.
    """
    length, tokens = config.max_text_len, config.num_image_tokens
    if text_mask is not None and (text_mask.ndim != 2 or text_mask.shape[1] != length):
        raise ValueError(f"make_plan: text_mask must be [texts, {length}], got {list(text_mask.shape)}.")
    rows = 0 if text_mask is None else text_mask.shape[0]
    texts = rows - pairs
    if texts < 0 or rows + images == 0:
        raise ValueError(
            f"make_plan: there must be a sample, and a text for every pair; got {rows} texts, {pairs} pairs and "
            f"{images} images."
        )
    num_texts = rows if num_texts is None else num_texts
    device = next((t.device for t in (text_mask, text_of, image_of) if t is not None), torch.device("cpu"))
    with_text, with_image = rows > 0, pairs + images > 0
    start = length if with_text else 0
    size = length * with_text + tokens * with_image
    names = ("text",) * with_text + ("image",) * with_image
    ids = torch.full((rows + images, size), -1, dtype=torch.int64, device=device)
    if with_text:
        ids[:rows, :length] = torch.where(text_mask.bool(), 0, -1)
    if with_image:
        ids[texts:, start:] = len(names) - 1
    lower = _layout(ids, names)
    lower_experts = {name: name for name in names}

    # From `vlffn_start` on: the samples, and by its place in `present` the expert of every token.
    fused = config.vlffn_start < config.depth and (pairs > 0 or copies)
    top, top_experts, branch, top_ids = lower, lower_experts, None, ids
    if not fused:
        present = names
        expert_of = (torch.arange(size, device=device) >= start).long() * (len(names) - 1)
    else:
        present = ("text",) * (texts > 0) + ("vl",) + ("image",) * (images > 0)
        order = torch.arange(rows + images, device=device)
        if copies:
            order = torch.cat([order[:rows], order[:texts], order[rows:], order[rows:]])
        expert_of = torch.full((len(order), 1), present.index("vl"), device=device)
        expert_of[:texts], expert_of[len(order) - images :] = 0, len(present) - 1
        top_ids = ids[order]
        if copies:
            top = _layout(torch.where(top_ids >= 0, expert_of, -1), present)
            top_experts = {name: name for name in present}
            token = order[top.sample_of_row.clamp(min=0).long()] * size + top.positions
            branch = lower.row_of_token[token].long().clamp(min=0)
        else:
            # With a group no sample is in, fewer experts: neighbours with the same one are a single GEMM.
            top_experts = {"text.mixed": "vl", "image.mixed": "vl"}
            top_experts |= {"text.alone": "text" if texts else "vl", "image.alone": "image" if images else "vl"}

    last, last_experts, read_rows = top, top_experts, None
    if read is not None:
        wanted = torch.zeros_like(top_ids, dtype=torch.bool)
        text_first = rows + texts * copies
        wanted[:text_first, 0] = True
        if images:
            wanted[text_first:, start] = True
        wanted[read] = True
        last = _layout(torch.where(wanted & (top_ids >= 0), expert_of, -1), present)
        last_experts = {name: name for name in present}
        read_rows = top.row_of_token[last.token_of_row().clamp(min=0).long()].long().clamp(min=0)

    text_of = torch.arange(rows, device=device) if text_of is None else text_of
    image_of = torch.arange(pairs + images, device=device) if image_of is None else image_of
    text_base = torch.cat([text_of * length, text_of.new_zeros(images)])
    image_base = torch.cat([image_of.new_zeros(texts), num_texts * length + image_of * tokens - start])
    sample, position = lower.sample_of_row.long(), lower.positions.long()
    source = torch.where(position < start, text_base[sample], image_base[sample]) + position
    source = torch.where(sample >= 0, source, 0)
    return Plan(
        texts, pairs, images, copies, start, lower, top, last, lower_experts, top_experts, last_experts,
        source, branch, read_rows,
    )  # fmt: skip


def _move(layout: ModalityLayout, device: torch.device | str) -> ModalityLayout:
    """`layout.to(device)`, but without waiting for the device."""
    tables = {f.name: getattr(layout, f.name) for f in fields(layout) if f.name != "host_offsets"}
    return replace(layout, **{name: move(t, device) for name, t in tables.items() if isinstance(t, Tensor)})


def _layout(ids: Tensor, names: tuple[str, ...]) -> ModalityLayout:
    layout = ModalityLayout.from_modality_ids(ids, modalities=names)
    return layout.exact() if ids.device.type == "cpu" else layout


def encode(
    model: VLMo,
    plan: Plan,
    text: Tensor | None,
    image: Tensor | None,
    *,
    drops: tuple[Tensor, Tensor] | None = None,
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor:
    """All layers over one packed buffer, before the final norm.

    Args:
        model: its blocks and bias table are used; swapped or not makes no difference.
        plan: of this pass.
        text: [number of texts, max_text_len, dim] from `model.embed_text`, or None.
        image: [number of images, w*w + 1, dim] from `model.embed_image`, or None.
        drops: numbers in [0, 1) that decide DropPath, fp32 [samples below vlffn_start, depth, 3] and [samples
            from there on, depth, 3]; by layer, for attention, text FFN and image FFN. None: nothing is dropped.
        recompute: save only the input of every block and run it again in backward.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        [rows of plan.last, dim]; `plan.rows` finds a token's row.
    """
    parts = [part.flatten(0, 1) for part in (text, image) if part is not None]
    x = (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, plan.source)
    biases = model.position_biases(_bias_index(model, plan))
    start, depth = model.config.vlffn_start, model.config.depth
    for i, block in enumerate(model.transformer.blocks):
        top = i >= start
        if i == start and plan.branch is not None:
            x = x.index_select(0, plan.branch)
        layout, experts = (plan.top, plan.top_experts) if top else (plan.lower, plan.lower_experts)
        given_out, read = layout, None
        if i == depth - 1 and plan.read is not None:
            given_out, experts, read = plan.last, plan.last_experts, (plan.read, plan.last)
        scales = None, None
        if drops is not None and block.drop_path.drop_prob > 0.0:
            scales = _row_scales(drops[top][:, i], block.drop_path.drop_prob, given_out, plan, top)
        args = (x, layout, experts, biases[i], *scales, read, impl)
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block.forward_packed, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block.forward_packed(*args)
    return x


def _bias_index(model: VLMo, plan: Plan) -> Tensor | None:
    if plan.pairs or (plan.texts and plan.images):
        return model.text_imag_relative_position_index
    return model.text_relative_position_index if plan.texts else model.relative_position_index


def _row_scales(draws: Tensor, rate: float, layout: ModalityLayout, plan: Plan, top: bool) -> tuple[Tensor, Tensor]:
    """DropPath's factors of every row for attention and FFN, as published: below `vlffn_start` the text and the
    image half of a sample are dropped apart in the FFN branch, from there on together."""
    factor = (draws >= rate).float() / (1.0 - rate)
    sample = layout.sample_of_row.clamp(min=0).long()
    half = 1 if top else 1 + (layout.positions >= plan.image_start).long()
    return factor[sample, 0], factor[sample, half]
