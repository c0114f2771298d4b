"""VLMo (Bao et al. 2022): its blocks, the official class or any with the same parts, and encoders made of them."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from vlmo_kernels.layout import ModalityLayout
from vlmo_kernels.modules.drop_path import drop_path_scale, sample_drop_path_scale
from vlmo_kernels.ops import routed_ffn, routed_linear, routed_norm, shared_attention

from .batch_plan import split_layout
from .instance import Swapped, child_at, has_hooks, plain, untouched

_MODALITIES = ("text", "image")
_NORMS = {"text": "norm2_text", "image": "norm2_imag", "vl": "norm2_vl"}
_MLPS = {"text": "mlp_text", "image": "mlp_imag", "vl": "mlp_vl"}
_ENCODER_ARGUMENTS = ("self", "x", "mask", "modality_type", "relative_position_biases", "start", "stop")


def _is_block(module: nn.Module) -> bool:
    """Whether a module has the parts of a VLMo block, under their names."""
    return all(
        isinstance(getattr(module, name, None), nn.Module)
        for name in ("norm1", "attn", "norm2_text", "norm2_imag", "mlp_text", "mlp_imag")
    ) and hasattr(getattr(module.attn, "qkv", None), "weight")


def _is_encoder(module: nn.Module) -> bool:
    """Whether a module runs its `blocks`, all VLMo blocks, through one forward with the arguments of `vlmo`'s."""
    blocks = getattr(module, "blocks", None)
    return (
        isinstance(blocks, nn.ModuleList)
        and len(blocks) > 0
        and all(_is_block(block) for block in blocks)
        and tuple(inspect.signature(type(module).forward).parameters) == _ENCODER_ARGUMENTS
    )


class SwappedVLMoBlock(Swapped):
    """A VLMo block on packed rows.

    forward(x `[B, N, D]`, mask `[B, N]` or None, modality_type "text" | "image" | "vl", relative_position_bias
    `[H, N, N]` or None) to `[B, N, D]`, zero where the mask is false. Text precedes the image.
    """

    @staticmethod
    def check(block: nn.Module) -> str | None:
        for name, child in block._modules.items():
            why = None if child is None else untouched(child, name)
            if why:
                return why
        return _parts(block)

    def forward(self, x, mask=None, modality_type=None, relative_position_bias=None):
        if torch.is_tensor(mask) and mask.dim() != 2 or self.check(self) is not None:
            # Something changed since the swap (a hook, an adapter, ...): the original does what it asks for.
            return self.original_forward(x, mask, modality_type, relative_position_bias)
        layout = _layout([self], x, mask, modality_type)
        return layout.unpack(_block(self, layout.pack_padded(x), layout, modality_type, relative_position_bias))


class SwappedVLMoEncoder(Swapped):
    """The block loop of a VLMo encoder: packs once, stays packed through the blocks, unpacks once.

    forward(x `[B, N, D]`, mask `[B, N]` or None, modality_type "text" | "image" | "vl", one bias `[H, N, N]` or
    None a layer, first block, end) to `[B, N, D]`, zero where the mask is false. Text precedes the image.
    """

    @staticmethod
    def check(encoder: nn.Module) -> str | None:
        for i, block in enumerate(encoder.blocks):
            if has_hooks(block) or "forward" in vars(block):
                return f"blocks.{i} carries hooks or a patched forward, which a packed loop would not run"
            why = "its class is not a block's" if not _is_block(block) else SwappedVLMoBlock.check(block)
            if why:
                return f"blocks.{i}: {why}"
        return None

    def forward(self, x, mask, modality_type, relative_position_biases, start, stop):
        blocks = self.blocks[start:stop]
        if len(blocks) == 0 or torch.is_tensor(mask) and mask.dim() != 2 or self.check(self) is not None:
            return self.original_forward(x, mask, modality_type, relative_position_biases, start, stop)
        layout = _layout(blocks, x, mask, modality_type)
        x = layout.pack_padded(x)
        for block, bias in zip(blocks, relative_position_biases[start:stop], strict=True):
            x = _block(block, x, layout, modality_type, bias)
        return layout.unpack(x)


# What is recognised, the class it gets, and the words of the report; the deeper one first.
ADAPTERS = (
    (_is_encoder, SwappedVLMoEncoder, "VLMo encoder, encoder depth: packs once, unpacks once"),
    (_is_block, SwappedVLMoBlock, "VLMo block, block depth: packs and unpacks around itself"),
)


def _layout(blocks, x: torch.Tensor, mask: torch.Tensor | None, modality_type: str | None) -> ModalityLayout:
    batch, length, _ = x.shape
    # The block that wants a split, if any does: a 'vl' expert takes the whole sequence.
    block = next((b for b in blocks if getattr(b, "mlp_vl", None) is None), blocks[0])
    split = _text_tokens(block, modality_type, length)
    return split_layout(batch, length, split, mask, x.device, _MODALITIES)


def _text_tokens(block: nn.Module, modality_type: str | None, length: int) -> int:
    if modality_type == "text":
        return length
    if modality_type == "image":
        return 0
    if modality_type not in ("vl", None):
        raise ValueError(
            f"VLMo block: `modality_type` must be 'image', 'text' or 'vl', got {modality_type!r}"
        )
    if getattr(block, "mlp_vl", None) is not None:
        return 0  # one expert takes the whole sequence: any split will do
    if length <= block.max_text_len:
        raise ValueError(
            f"VLMo block: a 'vl' sequence must be longer than max_text_len={block.max_text_len}, got {length}"
        )
    return block.max_text_len


def _block(block, x: torch.Tensor, layout: ModalityLayout, modality_type: str | None, bias) -> torch.Tensor:
    attn, dim = block.attn, x.shape[1]
    rate = float(getattr(block.drop_path, "drop_prob", 0.0) or 0.0)

    h = routed_norm(x, [block.norm1.weight], [block.norm1.bias], layout, eps=block.norm1.eps)
    qkv = routed_linear(h, [attn.qkv.weight], [_qkv_bias(attn)], layout)
    o = shared_attention(
        qkv.view(-1, 3, attn.num_heads, dim // attn.num_heads), None, None, layout, bias=bias
    )
    x = routed_linear(
        o.view(-1, dim), [attn.proj.weight], [attn.proj.bias], layout, gamma=[_gamma(block, "gamma_1")],
        residual=x, row_scale=sample_drop_path_scale(layout, rate, block.training),
    )  # fmt: skip

    parts = list(_MODALITIES)
    if modality_type not in (None, "vl"):
        parts = [modality_type]
    elif getattr(block, "mlp_vl", None) is not None:
        parts = ["vl"]
    norms = [getattr(block, _NORMS[p]) for p in parts]
    mlps = [getattr(block, _MLPS[p]) for p in parts]
    h = routed_norm(x, [n.weight for n in norms], [n.bias for n in norms], layout, eps=norms[0].eps)
    one_draw = len(parts) == 1
    draw = sample_drop_path_scale if one_draw else drop_path_scale
    return routed_ffn(
        h, [m.fc1.weight for m in mlps], [m.fc1.bias for m in mlps], [m.fc2.weight for m in mlps],
        [m.fc2.bias for m in mlps], layout, gamma=[_gamma(block, "gamma_2")] * len(mlps), residual=x,
        row_scale=draw(layout, rate, block.training),
    )  # fmt: skip


def _qkv_bias(attn: nn.Module) -> torch.Tensor | None:
    if attn.qkv.bias is not None:
        return attn.qkv.bias
    if getattr(attn, "q_bias", None) is None:
        return None
    return torch.cat([attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias])


def _gamma(block: nn.Module, name: str) -> torch.Tensor | None:
    gamma = getattr(block, name, None)
    return gamma if isinstance(gamma, torch.Tensor) else None


def _parts(block: nn.Module) -> str | None:
    """Whether every layer is what the kernels compute, and what the block does between them."""
    linears, norms = ["attn.qkv", "attn.proj"], ["norm1"]
    for part, name in _MLPS.items():
        mlp = child_at(block, name)
        if mlp is None:
            continue
        linears += [f"{name}.fc1", f"{name}.fc2"]
        norms.append(_NORMS[part])
        activation = mlp._modules.get("act")
        if activation is not None and (type(activation) is not nn.GELU or activation.approximate != "none"):
            return f"{name}.act is {activation!r}, not an exact GELU"
    for paths, kind in ((linears, nn.Linear), (norms, nn.LayerNorm)):
        for path in paths:
            why = plain(block, path, kind)
            if why:
                return why
    for name in ("gamma_1", "gamma_2"):
        gamma = getattr(block, name, 1.0)
        if not isinstance(gamma, torch.Tensor) and gamma not in (1, None):
            return f"{name} is {gamma!r}, neither a parameter nor 1"
    return None
