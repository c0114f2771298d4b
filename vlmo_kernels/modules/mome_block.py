"""`MoMEBlock` and `MoMEEncoder`: transformer blocks with modality experts, on packed rows."""

from __future__ import annotations

import torch
from torch import nn

from vlmo_kernels.layout import Experts, ModalityLayout
from vlmo_kernels.ops import RelativePositionBias

from .drop_path import drop_path_scale, sample_drop_path_scale
from .experts import check_names
from .routed_ffn import RoutedFFN
from .routed_norm import RoutedNorm
from .shared_attention import SharedAttention


class MoMEBlock(nn.Module):
    """Pre-norm block: shared attention, then the feed-forward network of the token's modality.

    Bao et al. 2022, "VLMo", section 3.1. Parameters: `norm1.*`, `attn.*`, `norm2.<expert>.*`,
    `ffn.<expert>.fc1|fc2.*`, `gamma_1`, `gamma_2`.

    Args:
        dim, heads: width and number of heads.
        hidden: width of the feed-forward networks, `4 * dim` by default.
        names: name of every expert.
        experts: modality or group to expert; by default a modality has the expert of its name, or, where one has
            none, the i-th modality has expert i.
        layer_scale: initial value of gamma (Touvron et al. 2021), or None for no LayerScale.
        drop_path: probability of dropping a branch, drawn per sample (attention) and per sample and
            modality (feed-forward).
        dropout: probability, on both branches' outputs.

    Shape:
        `[T, dim]` to `[T, dim]`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int | None = None,
        names: tuple[str, ...] = ("text", "image"),
        experts: Experts | None = None,
        activation: str = "gelu",
        layer_scale: float | None = 0.1,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        eps: float = 1e-6,
        recompute: str = "activation",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        for name, rate in (("drop_path", drop_path), ("dropout", dropout)):
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"MoMEBlock: `{name}` must be a probability, 0 to 1, got {rate}")
        self.drop_path = drop_path
        self.norm1 = RoutedNorm(dim, ("shared",), eps=eps, impl=impl)
        self.attn = SharedAttention(dim, heads, dropout=dropout, impl=impl)
        self.norm2 = RoutedNorm(dim, names, experts, eps=eps, impl=impl)
        self.ffn = RoutedFFN(dim, hidden or 4 * dim, names, experts, activation, dropout, recompute, impl)
        for name in ("gamma_1", "gamma_2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, gamma)

    def forward(
        self,
        x: torch.Tensor,
        layout: ModalityLayout,
        bias: torch.Tensor | RelativePositionBias | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """See `vlmo_kernels.mome_block`."""
        shared = sample_drop_path_scale(layout, self.drop_path, self.training)
        x = self.attn(
            self.norm1(x, layout), layout, bias=bias, causal=causal,
            gamma=self.gamma_1, residual=x, row_scale=shared,
        )  # fmt: skip
        routed = drop_path_scale(layout, self.drop_path, self.training)
        return self.ffn(self.norm2(x, layout), layout, gamma=self.gamma_2, residual=x, row_scale=routed)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}"


class MoMEEncoder(nn.Module):
    """Blocks over one packed buffer: packed once before, unpacked once after.

    The first `vl_start` blocks choose the expert by modality; from there on tokens of samples that mix
    modalities go to a further expert, and tokens of samples with a single one keep theirs.

    Args:
        depth: number of blocks.
        dim, heads, hidden, layer_scale, dropout: of every block, see `MoMEBlock`.
        modalities: names of modalities and of their experts.
        vl_start: first block with the expert for mixed samples, None for no such block.
        drop_path: probability in the last block; it grows linearly from 0.

    Shape:
        `[T, dim]` to `[T, dim]`.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        heads: int,
        hidden: int | None = None,
        modalities: tuple[str, ...] = ("text", "image"),
        vl_start: int | None = None,
        layer_scale: float | None = 0.1,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"MoMEEncoder: `depth` must be at least 1, got {depth}")
        modalities = check_names("MoMEEncoder", modalities, "modalities")
        if vl_start is not None and "vl" in modalities:
            raise ValueError(
                f"MoMEEncoder: with `vl_start` no modality can be called 'vl' like the expert, got {modalities}"
            )
        if vl_start is not None and not 0 <= vl_start <= depth:
            raise ValueError(f"MoMEEncoder: `vl_start` must lie in 0..depth={depth} or be None, got {vl_start}")
        self.dim = dim
        by_modality = {m: i for i, m in enumerate(modalities)}
        with_vl = by_modality | {f"{m}.mixed": len(modalities) for m in modalities}
        self.blocks = nn.ModuleList()
        for i in range(depth):
            top = vl_start is not None and i >= vl_start
            names = (*modalities, "vl") if top else modalities
            experts = with_vl if top else by_modality
            rate = drop_path * i / max(depth - 1, 1)
            self.blocks.append(
                MoMEBlock(
                    dim,
                    heads,
                    hidden,
                    names,
                    experts,
                    layer_scale=layer_scale,
                    drop_path=rate,
                    dropout=dropout,
                    impl=impl,
                )  # fmt: skip
            )
        self.norm = RoutedNorm(dim, ("shared",), impl=impl)

    def forward(
        self,
        x: torch.Tensor,
        layout: ModalityLayout,
        biases: list[torch.Tensor | RelativePositionBias] | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """`biases`: one per block, or None."""
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"MoMEEncoder: `x` must be [T, {self.dim}], got {list(x.shape)}")
        for i, block in enumerate(self.blocks):
            x = block(x, layout, None if biases is None else biases[i], causal)
        return self.norm(x, layout)
