"""Configuration of a VLMo model, and the named sizes."""

from __future__ import annotations

from dataclasses import dataclass

HEADS = ("mlm", "itm", "itc", "irtr")
ATTENTION = ("published", "sdpa")


@dataclass(frozen=True)
class VLMoConfig:
    """Everything that fixes the parameters and the forward pass of a VLMo model.

    dim, depth, num_heads, ffn_ratio: width, layers, attention heads, FFN width over `dim`.
    vlffn_start: the first layer with a vision-language expert; `depth` means none has one (language stage).
    image_size, patch_size: both square; an image gives (image_size / patch_size)^2 + 1 tokens.
    max_text_len: tokens of every text, padding included. Fusion input is [text, image], split here.
    text_only_len: text length of the language stage. It fixes the text rows of the bias table, so that a
        table trained on long texts serves shorter ones.
    layer_scale_init: initial value of gamma_1 and gamma_2, or None for no LayerScale.
    relative_position_bias: True: one bias table for text and image, no absolute text positions.
        False: absolute positions for both (`transformer.pos_embed` and BERT's position embeddings).
    drop_path: DropPath rate of the last layer, growing linearly from 0. The published code uses the same
        number as dropout rate of the text embeddings, and so does this one.
    num_token_types: rows of `token_type_embeddings`: text, image, and for NLVR2 a second image.
    init_std: of freshly initialised matrices and embeddings; 0.02 as published, for a narrow model more.
    heads: which of "mlm", "itm", "itc", "irtr" exist. "irtr" (retrieval fine-tuning) has the two modality
        projections of "itc" alone.
    attention: "published" (score matrices in fp32) or "sdpa" (torch's fused attention).
    """

    dim: int
    depth: int
    num_heads: int
    vlffn_start: int
    ffn_ratio: float = 4.0
    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    max_text_len: int = 40
    text_only_len: int = 196
    vocab_size: int = 30522
    num_token_types: int = 2
    layer_scale_init: float | None = 0.1
    relative_position_bias: bool = True
    drop_path: float = 0.1
    init_std: float = 0.02
    heads: tuple[str, ...] = ("mlm", "itm", "itc")
    attention: str = "published"

    def __post_init__(self) -> None:
        positive = (
            "dim depth num_heads image_size patch_size in_channels max_text_len vocab_size num_token_types"
        )
        for name in positive.split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"VLMoConfig: {name} must be an int, got {type(value).__name__}.")
            if value < 1:
                raise ValueError(f"VLMoConfig: {name} must be at least 1, got {value}.")
        if self.dim % self.num_heads:
            raise ValueError(
                f"VLMoConfig: dim must be a multiple of num_heads, got {self.dim} and {self.num_heads}."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                "VLMoConfig: image_size must be a multiple of patch_size, "
                f"got {self.image_size} and {self.patch_size}."
            )
        if not 0 <= self.vlffn_start <= self.depth:
            raise ValueError(
                f"VLMoConfig: vlffn_start must lie in 0..depth={self.depth}, got {self.vlffn_start}. "
                "Hint: depth itself means no vision-language expert."
            )
        if self.relative_position_bias and not 2 <= self.max_text_len <= self.text_only_len:
            raise ValueError(
                f"VLMoConfig: with a bias table, max_text_len must lie in 2..text_only_len="
                f"{self.text_only_len}, got {self.max_text_len}. Hint: the table has no rows beyond."
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"VLMoConfig: drop_path must lie in [0, 1), got {self.drop_path}.")
        if isinstance(self.heads, str):
            raise TypeError(f"VLMoConfig: heads must be a tuple of names, got the string {self.heads!r}.")
        for head in self.heads:
            if head not in HEADS:
                raise ValueError(f"VLMoConfig: heads must be among {HEADS}, got {head!r}.")
        if self.attention not in ATTENTION:
            raise ValueError(f"VLMoConfig: attention must be one of {ATTENTION}, got {self.attention!r}.")

    @property
    def ffn_dim(self) -> int:
        return int(self.dim * self.ffn_ratio)

    @property
    def window(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Patches and the image's [CLS]."""
        return self.window**2 + 1


CONFIGS: dict[str, VLMoConfig] = {
    "base": VLMoConfig(dim=768, depth=12, num_heads=12, vlffn_start=10),
    "base_plus": VLMoConfig(
        dim=544,
        depth=24,
        num_heads=16,
        vlffn_start=21,
        layer_scale_init=None,
        relative_position_bias=False,
    ),
    "large": VLMoConfig(dim=1024, depth=24, num_heads=16, vlffn_start=21),
    # To be trained on a CPU in minutes, on generated pictures. Absolute positions, because a relative bias does not
    # tell [CLS] where a patch lies, and captions say it.
    "small": VLMoConfig(
        dim=256,
        depth=3,
        num_heads=8,
        vlffn_start=2,
        image_size=60,
        patch_size=12,
        max_text_len=18,
        text_only_len=18,
        layer_scale_init=None,
        relative_position_bias=False,
        drop_path=0.0,
        init_std=0.04,
    ),
    # For tests: two layers of each kind, every dimension different from the others.
    "tiny": VLMoConfig(
        dim=32,
        depth=4,
        num_heads=4,
        vlffn_start=2,
        image_size=32,
        patch_size=8,
        max_text_len=6,
        text_only_len=24,
        vocab_size=101,
        drop_path=0.0,
    ),
}
