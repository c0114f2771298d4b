"""BEiT-3 (Wang et al. 2022): torchscale's multiway `Encoder`, or any with the same parts and forward."""

from __future__ import annotations

import torch
from torch import nn

from vlmo_kernels.layout import ModalityLayout
from vlmo_kernels.modules.drop_path import sample_drop_path_scale
from vlmo_kernels.ops import routed_ffn, routed_linear, routed_norm, shared_attention

from . import beit3_check
from .batch_plan import split_layout
from .instance import Swapped, walk

_MODALITIES = ("image", "text")  # torchscale's experts A and B, in this order in every sample


class SwappedBEiT3Encoder(Swapped):
    """A multiway encoder on packed rows. Its embedding and output projection stay its own.

    forward(src_tokens or token_embeddings `[B, N, D]`, encoder_padding_mask `[B, N]`, true for padding, ...)
    to torchscale's dictionary, with zeros in `encoder_out` (before an output projection) and
    `encoder_states` where there is padding. Calls with `attn_mask`, `incremental_state` or without
    `multiway_split_position` go to the original.
    """

    @staticmethod
    def check(encoder: nn.Module) -> str | None:
        return beit3_check.why_not(encoder)

    def forward(
        self,
        src_tokens,
        encoder_padding_mask=None,
        attn_mask=None,
        return_all_hiddens=False,
        token_embeddings=None,
        multiway_split_position=None,
        features_only=False,
        incremental_state=None,
        positions=None,
        **kwargs,
    ):
        kernels_can = attn_mask is None and incremental_state is None and multiway_split_position is not None
        if not kernels_can or self.check(self) is not None:
            # Also where something changed since the swap (a hook, an adapter): the original does as it asks.
            return self.original_forward(
                src_tokens,
                encoder_padding_mask=encoder_padding_mask,
                attn_mask=attn_mask,
                return_all_hiddens=return_all_hiddens,
                token_embeddings=token_embeddings,
                multiway_split_position=multiway_split_position,
                features_only=features_only,
                incremental_state=incremental_state,
                positions=positions,
                **kwargs,
            )
        _set_split_position(self, multiway_split_position)
        padded, embedding = self.forward_embedding(src_tokens, token_embeddings, positions)
        batch, length, _ = padded.shape
        layout = _layout(batch, length, multiway_split_position, encoder_padding_mask, padded.device)
        experts = _experts(multiway_split_position, length)
        x, states = _layers(self, layout.pack_padded(padded), layout, experts, return_all_hiddens)
        if self.layer_norm is not None:
            x = _norm(self.layer_norm, x, layout, experts)
        out = layout.unpack(x)
        if not features_only and self.output_projection is not None:
            out = self.output_projection(out)
        if encoder_padding_mask is None:
            encoder_padding_mask = torch.zeros(batch, length, dtype=torch.bool, device=padded.device)
        return {
            "encoder_out": out,
            "encoder_embedding": embedding,
            "encoder_padding_mask": encoder_padding_mask,
            "encoder_states": states,
            "l_aux": [None] * len(self.layers),
        }


ADAPTERS = (
    (
        beit3_check.recognises,
        SwappedBEiT3Encoder,
        "BEiT-3 encoder, encoder depth: packs once, unpacks once",
    ),
)


def _set_split_position(encoder: nn.Module, position: int) -> None:
    """What torchscale's encoder leaves behind in its multiway modules; those of the embedding read it."""
    for _, module in walk(encoder, "encoder"):
        if vars(module).get("split_position", position) != position:
            module.split_position = position


def _layout(batch: int, length: int, split: int, padding: torch.Tensor | None, device) -> ModalityLayout:
    mask = None if padding is None else padding.logical_not()
    return split_layout(batch, length, length if split == -1 else split, mask, device, _MODALITIES)


def _experts(split: int, length: int) -> str:
    """Names of the experts to hand to the ops.

    Both, although one may have no token: then it gets a zero gradient. Without gradients only the one in
    use, so that autocast does not cast weights for nothing.
    """
    if torch.is_grad_enabled() or 0 < split < length:
        return "AB"
    return "B" if split == 0 else "A"


def _layers(
    encoder: nn.Module, x: torch.Tensor, layout: ModalityLayout, experts: str, keep: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`[T, D]` through all layers, and if asked the hidden states `[B, N, D]` before, between and after."""
    states = [layout.unpack(x)] if keep else []
    for layer in encoder.layers:
        x = _layer(layer, x, layout, experts)
        if keep:
            states.append(layout.unpack(x))
    return x, states


def _layer(layer: nn.Module, x: torch.Tensor, layout: ModalityLayout, experts: str) -> torch.Tensor:
    """torchscale `EncoderLayer.forward`, pre-norm, on `[T, D]`."""
    attn = layer.self_attn
    rate = 0.0 if layer.drop_path is None else float(layer.drop_path.drop_prob or 0.0)

    h = _once_cast(_norm(layer.self_attn_layer_norm, x, layout, experts))
    q, k, v = (
        _linear(p, h, layout, experts).view(-1, attn.num_heads, attn.head_dim)
        for p in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    o = shared_attention(q, k, v, layout, scale=attn.scaling).view(-1, attn.embed_dim)
    if attn.inner_attn_ln is not None:
        o = _norm(attn.inner_attn_ln, o, layout, experts)
    scale = sample_drop_path_scale(layout, rate, layer.training)
    x = _linear(attn.out_proj, o, layout, experts, residual=x, row_scale=scale)

    h = _norm(layer.final_layer_norm, x, layout, experts)
    scale = sample_drop_path_scale(layout, rate, layer.training)
    return _ffn(layer.ffn, h, layout, experts, x, scale)


def _norm(multiway: nn.Module, x: torch.Tensor, layout: ModalityLayout, experts: str) -> torch.Tensor:
    norms = [getattr(multiway, e) for e in experts]
    return routed_norm(x, [n.weight for n in norms], [n.bias for n in norms], layout, eps=norms[0].eps)


def _linear(
    multiway: nn.Module, x: torch.Tensor, layout: ModalityLayout, experts: str, residual=None, row_scale=None
) -> torch.Tensor:
    linears = [getattr(multiway, e) for e in experts]
    weights, biases = [p.weight for p in linears], [p.bias for p in linears]
    return routed_linear(x, weights, biases, layout, residual=residual, row_scale=row_scale)


def _ffn(
    multiway: nn.Module, x: torch.Tensor, layout: ModalityLayout, experts: str, residual, row_scale
) -> torch.Tensor:
    ffns = [getattr(multiway, e) for e in experts]
    norms = [f.ffn_layernorm for f in ffns]
    inner = None if norms[0] is None else ([n.weight for n in norms], [n.bias for n in norms])
    return routed_ffn(
        x, [f.fc1.weight for f in ffns], [f.fc1.bias for f in ffns], [f.fc2.weight for f in ffns],
        [f.fc2.bias for f in ffns], layout, activation=beit3_check.activation(ffns[0]), inner_norm=inner,
        residual=residual, row_scale=row_scale, eps=norms[0].eps if inner else 1e-5,
    )  # fmt: skip


def _once_cast(x: torch.Tensor) -> torch.Tensor:
    """Under autocast the cast of `x`, so that three projections do not make three."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))
