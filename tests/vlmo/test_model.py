"""VLMo in plain torch: published names and shapes, and the forward passes against a token-by-token oracle."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from vlmo import CONFIGS, CheckpointReport, VLMo, VLMoConfig, build, load_checkpoint
from vlmo.position import image_position_index, text_image_position_index, text_position_index

TINY = CONFIGS["tiny"]
TINY_ABSOLUTE = replace(TINY, relative_position_bias=False, layer_scale_init=None)
BOTH = pytest.mark.parametrize("config", [TINY, TINY_ABSOLUTE], ids=["bias_table", "absolute"])


def meta(config: VLMoConfig) -> VLMo:
    with torch.device("meta"):
        return VLMo(config)


def tiny(config: VLMoConfig = TINY, seed: int = 0) -> VLMo:
    """A tiny fp64 model in eval mode, every parameter random: a zero bias or table would hide mistakes."""
    torch.manual_seed(seed)
    model = VLMo(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def batch(config: VLMoConfig = TINY, size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, ids and mask; text lengths full, 2 and 1 (the [CLS] alone)."""
    generator = torch.Generator().manual_seed(1)
    shape = (size, config.in_channels, config.image_size, config.image_size)
    image = torch.randn(shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(config.vocab_size, (size, config.max_text_len), generator=generator)
    lengths = torch.tensor([config.max_text_len, 2, 1])[:size]
    return image, ids, torch.arange(config.max_text_len) < lengths[:, None]


def expected_shapes(config: VLMoConfig) -> dict[str, tuple[int, ...]]:
    """The state dict as published, written out apart from the model."""
    d, f = config.dim, 4 * config.dim
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inp: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, inp)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (d,)

    for i in range(config.depth):
        block = f"transformer.blocks.{i}"
        if config.layer_scale_init is not None:
            shapes[f"{block}.gamma_1"] = shapes[f"{block}.gamma_2"] = (d,)
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * d, d, bias=False)
        shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (d,)
        linear(f"{block}.attn.proj", d, d)
        for expert in ("text", "imag") + (("vl",) if i >= config.vlffn_start else ()):
            norm(f"{block}.norm2_{expert}")
            linear(f"{block}.mlp_{expert}.fc1", f, d)
            linear(f"{block}.mlp_{expert}.fc2", d, f)
    norm("transformer.norm")
    shapes["transformer.cls_token"] = (1, 1, d)
    patch = config.patch_size
    shapes["transformer.patch_embed.proj.weight"] = (d, 3, patch, patch)
    shapes["transformer.patch_embed.proj.bias"] = (d,)
    if config.relative_position_bias:
        w = config.image_size // patch
        rows = (2 * w - 1) ** 2 + 3 + 2 * config.text_only_len + 2
        shapes["relative_position_bias_table"] = (rows, config.num_heads * config.depth)
    else:
        shapes["transformer.pos_embed"] = (1, (config.image_size // patch) ** 2 + 1, d)
    shapes["text_embeddings.word_embeddings.weight"] = (config.vocab_size, d)
    shapes["text_embeddings.position_embeddings.weight"] = (config.max_text_len, d)
    shapes["text_embeddings.token_type_embeddings.weight"] = (2, d)
    norm("text_embeddings.LayerNorm")
    shapes["token_type_embeddings.weight"] = (2, d)
    linear("pooler.dense", d, d)
    linear("mlm_score.transform.dense", d, d)
    norm("mlm_score.transform.LayerNorm")
    shapes["mlm_score.decoder.weight"] = (config.vocab_size, d)
    shapes["mlm_score.bias"] = (config.vocab_size,)
    linear("itm_score.fc", 2, d)
    for modality in ("text", "image"):
        linear(f"itc_{modality}_proj.fc", d, d, bias=False)
        linear(f"itc_vl_{modality}_proj.fc", d, d, bias=False)
    shapes["logit_scale"] = shapes["logit_vl_scale"] = ()
    return shapes


@pytest.mark.parametrize("name, millions", [("base", 202.4), ("base_plus", 185.0), ("large", 599.1)])
def test_parameter_count(name: str, millions: float) -> None:
    count = sum(parameter.numel() for parameter in meta(CONFIGS[name]).parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_state_dict_has_the_published_names_and_shapes(name: str) -> None:
    state = meta(CONFIGS[name]).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected_shapes(CONFIGS[name])


def test_published_bias_table_rows_and_sequence_lengths() -> None:
    assert meta(CONFIGS["base"]).relative_position_bias_table.shape == (1126, 144)
    for image_size, tokens in ((224, 237), (384, 617), (480, 941)):
        model = meta(replace(CONFIGS["base"], image_size=image_size))
        assert model.text_imag_relative_position_index.shape == (tokens, tokens)


def test_position_indices_by_their_definition() -> None:
    window, text_len, text_only_len = 3, 4, 7
    image = image_position_index(window)
    text = text_position_index(window, text_len, text_only_len)
    joint = text_image_position_index(window, text_len, text_only_len)
    side = 2 * window - 1
    rows = side * side + 3 + 2 * text_only_len + 2
    for q in range(window**2):
        for k in range(window**2):
            dy, dx = q // window - k // window, q % window - k % window
            assert image[q + 1, k + 1] == (dy + window - 1) * side + dx + window - 1
    for q in range(text_len - 1):
        for k in range(text_len - 1):
            assert text[q + 1, k + 1] == side * side + 5 + (k - q) + text_only_len - 2
    for index, first in ((image, side * side), (text, rows - 3)):
        assert (index[0, 1:] == first).all() and (index[1:, 0] == first + 1).all()
        assert index[0, 0] == first + 2
    assert torch.equal(joint[:text_len, :text_len], text)
    assert torch.equal(joint[text_len:, text_len:], image)
    assert (joint[:text_len, text_len:] == side * side + 3).all()
    assert (joint[text_len:, :text_len] == side * side + 4).all()


def test_full_length_text_uses_every_text_row_once_defined() -> None:
    text = text_position_index(3, 7, 7)
    # 2 * 7 - 3 distances and three [CLS] rows, of the 2 * 7 rows behind the two constants.
    assert text.unique().tolist() == list(range(30, 41)) + [41, 42, 43]


def layer_norm(x: torch.Tensor, norm: torch.nn.LayerNorm, eps: float) -> torch.Tensor:
    """With the published eps, whatever the module has."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def oracle(model: VLMo, x: torch.Tensor, mask: torch.Tensor, index, experts: list[list[str]]) -> torch.Tensor:
    """The layers token by token, on valid tokens (NaN elsewhere). experts[layer][token] names the FFN."""
    table, heads = model.relative_position_bias_table, model.config.num_heads
    rows = []
    for sample, valid in zip(x, mask, strict=True):
        keep = valid.nonzero().flatten().tolist()
        hidden = {t: sample[t] for t in keep}
        for layer, block in enumerate(model.transformer.blocks):
            attn = block.attn
            normed = torch.stack([layer_norm(hidden[t], block.norm1, 1e-6) for t in keep])
            weight_q, weight_k, weight_v = attn.qkv.weight.chunk(3)
            q = normed @ weight_q.T + attn.q_bias
            k = normed @ weight_k.T
            v = normed @ weight_v.T + attn.v_bias
            outs = []
            for head in range(heads):
                cols = slice(head * q.shape[1] // heads, (head + 1) * q.shape[1] // heads)
                scores = q[:, cols] @ k[:, cols].T / math.sqrt(q.shape[1] // heads)
                if table is not None:
                    scores = scores + table[index[keep][:, keep], layer * heads + head]
                outs.append(scores.softmax(-1) @ v[:, cols])
            attended = block.gamma_1 * attn.proj(torch.cat(outs, dim=1))
            for i, t in enumerate(keep):
                h = hidden[t] + attended[i]
                expert = experts[layer][t]
                mlp, norm = getattr(block, f"mlp_{expert}"), getattr(block, f"norm2_{expert}")
                fc1 = mlp.fc1(layer_norm(h, norm, 1e-6))
                gelu = fc1 * (1 + torch.erf(fc1 / math.sqrt(2))) / 2
                hidden[t] = h + block.gamma_2 * mlp.fc2(gelu)
        out = torch.full_like(sample, float("nan"))
        for t in keep:
            out[t] = layer_norm(hidden[t], model.transformer.norm, 1e-6)
        rows.append(out)
    return torch.stack(rows)


@BOTH
@torch.no_grad()
def test_fusion_pass(config: VLMoConfig) -> None:
    model = tiny(config)
    image, ids, mask = batch(config)
    x = torch.cat([model.embed_text(ids), model.embed_image(image)], dim=1)
    valid = torch.cat([mask, torch.ones(3, config.num_image_tokens, dtype=torch.bool)], dim=1)
    split = ["text"] * config.max_text_len + ["imag"] * config.num_image_tokens
    layers = [split if i < config.vlffn_start else ["vl"] * len(split) for i in range(config.depth)]
    want = oracle(model, x, valid, model.text_imag_relative_position_index, layers)
    out = model(image, ids, mask)
    text_len = config.max_text_len
    assert_close(out.text_feats[mask], want[:, :text_len][mask])
    assert_close(out.image_feats, want[:, text_len:])
    assert_close(
        out.cls_feats, torch.tanh(want[:, 0] @ model.pooler.dense.weight.T + model.pooler.dense.bias)
    )
    assert out.itc_feats is None and out.itc_vl_feats is None
    assert model.itm_score(out.cls_feats).shape == (3, 2)
    assert model.mlm_score(out.text_feats).shape == (3, text_len, config.vocab_size)


@BOTH
@pytest.mark.parametrize("modality", ["text", "image"])
@torch.no_grad()
def test_single_modality_pass(config: VLMoConfig, modality: str) -> None:
    model = tiny(config)
    image, ids, mask = batch(config)
    if modality == "text":
        x, valid, index = model.embed_text(ids), mask, model.text_relative_position_index
        out, out_ft = model.infer_text(ids, mask), model.infer_text_ft(ids, mask)
        feats, feats_ft, none = out.text_feats, out_ft.text_feats, out.image_feats
        proj, proj_vl = model.itc_text_proj, model.itc_vl_text_proj
        assert torch.equal(model.infer_text_mlm(ids, mask).text_feats, feats)
    else:
        x, index = model.embed_image(image), model.relative_position_index
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
        out, out_ft = model.infer_image(image), model.infer_image_ft(image)
        feats, feats_ft, none = out.image_feats, out_ft.image_feats, out.text_feats
        proj, proj_vl = model.itc_image_proj, model.itc_vl_image_proj
    own = [["text" if modality == "text" else "imag"] * x.shape[1]] * config.depth
    top_vl = own[: config.vlffn_start] + [["vl"] * x.shape[1]] * (config.depth - config.vlffn_start)
    want, want_vl = oracle(model, x, valid, index, own), oracle(model, x, valid, index, top_vl)
    assert_close(feats[valid], want[valid])
    for got, cls, head in ((out.itc_feats, want[:, 0], proj), (out.itc_vl_feats, want_vl[:, 0], proj_vl)):
        projected = cls @ head.fc.weight.T
        assert_close(got, projected / projected.norm(dim=-1, keepdim=True))
    assert none is None and out.cls_feats is None and out_ft.itc_vl_feats is None
    assert torch.equal(feats_ft, feats) and torch.equal(out_ft.itc_feats, out.itc_feats)


@torch.no_grad()
def test_text_embeddings_add_absolute_positions_only_without_a_bias_table() -> None:
    _, ids, _ = batch()
    for config in (TINY, TINY_ABSOLUTE):
        embeddings = tiny(config).text_embeddings
        x = embeddings.word_embeddings.weight[ids] + embeddings.token_type_embeddings.weight[0]
        if config is TINY_ABSOLUTE:
            x = x + embeddings.position_embeddings.weight
        assert_close(embeddings(ids), layer_norm(x, embeddings.LayerNorm, 1e-12))


@BOTH
@pytest.mark.parametrize("attention", ["published", "sdpa"])
@torch.no_grad()
def test_masked_text_tokens_do_not_matter(config: VLMoConfig, attention: str) -> None:
    model = tiny(config)
    model.set_attention(attention)
    image, ids, mask = batch(config)
    other = torch.where(mask, ids, (ids + 1) % config.vocab_size)
    assert not torch.equal(ids, other)
    for a, b in zip(model(image, ids, mask), model(image, other, mask), strict=True):
        if a is not None:
            keep = mask if a.shape[:2] == mask.shape else ...
            assert_close(a[keep], b[keep])
    for a, b in zip(model.infer_text(ids, mask), model.infer_text(other, mask), strict=True):
        if a is not None:
            keep = mask if a.shape[:2] == mask.shape else ...
            assert_close(a[keep], b[keep])
    # The pass does look at the ids: an unmasked one matters.
    full = torch.ones_like(mask)
    assert not torch.equal(model(image, ids, full).cls_feats, model(image, other, full).cls_feats)


@BOTH
@pytest.mark.parametrize("masked", [True, False])
def test_published_and_sdpa_agree(config: VLMoConfig, masked: bool) -> None:
    model = tiny(config)
    image, ids, mask = batch(config)
    mask = mask.long() if masked else None
    results = []
    for attention in ("published", "sdpa"):
        model.set_attention(attention)
        model.zero_grad()
        fusion, text, pictures = (
            model(image, ids, mask),
            model.infer_text(ids, mask),
            model.infer_image(image),
        )
        outputs = [t for out in (fusion, text, pictures) for t in out if t is not None]
        sum(t[:, 0].square().sum() if t.ndim == 3 else t.sum() for t in outputs).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append(([t.detach() for t in outputs], gradients))
    assert_close(results[0], results[1])


def test_gradient_reaches_the_bias_rows_in_use_and_no_other() -> None:
    model = tiny()
    image, ids, _ = batch()
    model(image, ids, torch.ones_like(ids)).cls_feats.sum().backward()
    gradient = model.relative_position_bias_table.grad
    used = torch.zeros(gradient.shape[0], dtype=torch.bool)
    used[model.text_imag_relative_position_index.unique()] = True
    assert gradient[~used].count_nonzero() == 0 and not used.all()
    # All heads of all layers; the last layer only through the [CLS] query, whose rows are few.
    heads = TINY.num_heads
    assert (gradient[used][:, :-heads] != 0).all()
    assert (gradient[model.text_imag_relative_position_index[0].unique(), -heads:] != 0).all()


def test_fusion_draws_drop_path_for_each_half() -> None:
    torch.manual_seed(0)
    config = replace(TINY, drop_path=0.5, vlffn_start=4)
    model = tiny(config).train()
    block = model.transformer.blocks[-1]
    assert [b.drop_path.drop_prob for b in model.transformer.blocks] == [0.0, 0.5 / 3, 1 / 3, 0.5]
    with torch.no_grad():
        block.gamma_1.zero_()  # silence attention: what moves is the FFN branch
        x = torch.randn(64, config.max_text_len + 5, config.dim, dtype=torch.float64)
        block.eval()
        branch = block(x, modality_type="vl") - x
        block.train()
        delta = block(x, modality_type="vl") - x
    text, image = delta[:, : config.max_text_len], delta[:, config.max_text_len :]
    kept = torch.stack([half.abs().amax((1, 2)) > 0 for half in (text, image)], dim=1)
    assert len(kept.unique(dim=0)) == 4
    assert_close(text[kept[:, 0]], 2 * branch[kept[:, 0], : config.max_text_len])
    assert_close(image[kept[:, 1]], 2 * branch[kept[:, 1], config.max_text_len :])


def test_scores_stay_fp32_under_autocast() -> None:
    # Without a bias table: adding an fp32 bias would promote scores that had already been rounded.
    model = tiny(TINY_ABSOLUTE).float()
    image, ids, mask = batch()
    seen = []
    softmax = torch.Tensor.softmax

    def spy(self, dim):
        seen.append(self.dtype)
        return softmax(self, dim=dim)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(torch.Tensor, "softmax", spy)
        model(image.float(), ids, mask)
    assert seen == [torch.float32] * TINY.depth


def test_meta_model_materialises() -> None:
    torch.manual_seed(0)
    model = meta(TINY).to_empty(device="cpu")
    model.init_weights()
    fresh = build("tiny")
    assert torch.equal(model.text_imag_relative_position_index, fresh.text_imag_relative_position_index)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert_close(model.logit_scale.detach(), torch.tensor(math.log(1 / 0.07)))
    assert (model.transformer.blocks[0].gamma_1 == 0.1).all()


def test_heads_follow_the_configuration() -> None:
    language = meta(replace(TINY, heads=("mlm",), vlffn_start=TINY.depth))
    retrieval = meta(replace(TINY, heads=("irtr",)))
    assert not [k for k in language.state_dict() if "_vl" in k or k.startswith(("itc", "itm", "logit"))]
    assert "itc_text_proj.fc.weight" in retrieval.state_dict()
    assert "logit_vl_scale" not in retrieval.state_dict()
    with pytest.raises(ValueError, match="infer_text: config.heads must have one of"):
        retrieval.infer_text(torch.zeros(1, 6, dtype=torch.int64))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "module", "model"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "dict"])
def test_checkpoint_round_trip(tmp_path, wrapper: str | None, suffix: str) -> None:
    source, target = tiny(seed=0), tiny(seed=1)
    content = {f"module.{key}" if wrapper == "module" else key: v for key, v in source.state_dict().items()}
    content["relative_position_index"] = torch.zeros(2, 2)
    content["text_embeddings.position_ids"] = torch.zeros(1, 6, dtype=torch.int64)
    if wrapper is not None and suffix != "safetensors":
        content = {wrapper: content, "epoch": 3}
    path = tmp_path / f"checkpoint.{suffix}"
    if suffix == "safetensors":
        from safetensors.torch import save_file

        save_file(content, path)
    elif suffix == "pt":
        torch.save(content, path)
    report = load_checkpoint(target, content if suffix == "dict" else path)
    ignored = ("relative_position_index", "text_embeddings.position_ids")
    assert report == CheckpointReport(missing=(), unexpected=(), converted=(), ignored=ignored)
    assert_close(target.state_dict(), source.state_dict())
    image, ids, mask = batch()
    assert torch.equal(source(image, ids, mask).cls_feats, target(image, ids, mask).cls_feats)


def test_checkpoint_names_must_fit() -> None:
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = dict(tiny(seed=1).state_dict())
    del state["pooler.dense.weight"]
    with pytest.raises(ValueError, match="missing in the checkpoint: pooler.dense.weight; foreign .*: none"):
        load_checkpoint(model, state)
    state["mlp.fc1.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="foreign to the model: mlp.fc1.weight. Hint"):
        load_checkpoint(model, state)
    assert_close(model.state_dict(), before)
    report = load_checkpoint(model, state, strict=False)
    assert report.missing == ("pooler.dense.weight",) and report.unexpected == ("mlp.fc1.weight",)
    assert torch.equal(model.pooler.dense.weight, before["pooler.dense.weight"])
    assert torch.equal(model.transformer.norm.weight, state["transformer.norm.weight"])


def test_checkpoint_content_must_fit(tmp_path) -> None:
    model, state = tiny(), dict(tiny(seed=1).state_dict())
    with pytest.raises(ValueError, match=r"itm_score.fc.bias: \[2\] wanted, \[3\] given"):
        load_checkpoint(model, state | {"itm_score.fc.bias": torch.zeros(3)}, strict=False)
    with pytest.raises(TypeError, match="values must be tensors, 'epoch' is int"):
        load_checkpoint(model, state | {"epoch": 3})
    with pytest.raises(TypeError, match="must be a path or a dict, got list"):
        load_checkpoint(model, [])
    with pytest.raises(ValueError, match="'logit_scale' occurs twice"):
        load_checkpoint(model, state | {"module.logit_scale": torch.zeros(())})
    with pytest.raises(ValueError, match="meta device"):
        load_checkpoint(meta(TINY), state)
    torch.save({"state_dict": state, "hyper_parameters": pytest.approx(1)}, tmp_path / "pickled.ckpt")
    with pytest.raises(ValueError, match="must hold tensors and plain containers only"):
        load_checkpoint(model, tmp_path / "pickled.ckpt")
    with pytest.raises(FileNotFoundError, match="the file must exist, got .*none.pt"):
        load_checkpoint(model, tmp_path / "none.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_was_cut_off_is_named(suffix: str, tmp_path) -> None:
    path = tmp_path / f"half.{suffix}"
    (torch.save if suffix == "pt" else save_file)({"weight": torch.ones(9999)}, path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match="a whole torch or safetensors file must be there, .*half.* cannot be read"):
        load_checkpoint(tiny(), path)
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match="half.* cannot be read: .*copy or download it again") as error:
        load_checkpoint(tiny(), path)
    assert "weights_only" not in str(error.value)  # that advice is for checkpoints that hold more than tensors


def test_checkpoint_of_longer_text_and_of_two_token_types() -> None:
    source = tiny(replace(TINY, max_text_len=10))
    target = tiny(replace(TINY, num_token_types=3), seed=1)
    report = load_checkpoint(target, source.state_dict())
    assert len(report.converted) == 2
    positions = source.text_embeddings.position_embeddings.weight
    assert torch.equal(target.text_embeddings.position_embeddings.weight, positions[:6])
    types = source.token_type_embeddings.weight
    assert torch.equal(target.token_type_embeddings.weight, types[[0, 1, 1]])


@pytest.mark.parametrize("patches", [6, 3])
def test_checkpoint_of_another_image_size_keeps_a_cubic_surface(patches: int) -> None:
    """A not-a-knot spline reproduces a cubic exactly, on whatever grid; so the grid itself is tested too."""
    source = tiny(replace(TINY, image_size=40))  # 5 patches a side, 9 differences
    target = tiny(replace(TINY, image_size=8 * patches), seed=1)
    steps, reach = 4, patches - 1
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**i for i in range(steps)) > reach else (ratio, high)
    half = torch.tensor([sum(ratio**i for i in range(n)) for n in range(1, steps + 1)], dtype=torch.float64)
    grid = torch.cat([-half.flip(0), torch.zeros(1, dtype=torch.float64), half])

    def surface(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y, x = y[:, None] / reach, x[None, :] / reach
        return (1 + 2 * y - y**2 + 3 * y**3) * (2 - x + 4 * x**2 - x**3)

    points = torch.arange(-reach, reach + 1, dtype=torch.float64).clamp(grid[0], grid[-1])
    with torch.no_grad():
        source.relative_position_bias_table[:81] = surface(grid, grid).reshape(-1, 1)
    state = source.state_dict()
    before = state["relative_position_bias_table"].clone()
    report = load_checkpoint(target, state)
    table = target.relative_position_bias_table.detach()
    rows = (2 * patches - 1) ** 2
    assert_close(table[:rows], surface(points, points).reshape(-1, 1).expand(-1, 16))
    assert torch.equal(table[rows:], before[81:])
    assert torch.equal(source.relative_position_bias_table, before)
    assert [name.split()[0] for name in report.converted] == ["relative_position_bias_table"]


def test_checkpoint_of_another_image_size_with_absolute_positions() -> None:
    source = tiny(replace(TINY_ABSOLUTE, image_size=64))
    target = tiny(TINY_ABSOLUTE, seed=1)
    with torch.no_grad():
        source.transformer.pos_embed[:, 1:] = 0.5
    load_checkpoint(target, source.state_dict())
    got = target.transformer.pos_embed
    assert torch.equal(got[:, 0], source.transformer.pos_embed[:, 0])
    assert_close(got[:, 1:], torch.full_like(got[:, 1:], 0.5))


def test_calls_say_what_must_hold() -> None:
    model = tiny()
    image, ids, mask = batch()
    with pytest.raises(
        ValueError, match=r"infer: text_ids must be \[B, max_text_len=6\], got \[3, 5\]. Hint"
    ):
        model(image, ids[:, :5])
    with pytest.raises(TypeError, match="text_ids must be int64 or int32, got torch.float32"):
        model.infer_text(ids.float())
    with pytest.raises(ValueError, match="text_mask must have the shape of text_ids"):
        model.infer_text(ids, mask[:2])
    with pytest.raises(ValueError, match="one batch size, got 2 and 3"):
        model(image[:2], ids, mask)
    with pytest.raises(ValueError, match=r"image must be \[B, 3, 32, 32\], got \[3, 3, 16, 16\]"):
        model.infer_image(image[:, :, :16, :16])
    with pytest.raises(ValueError, match="image_token_type must lie in 1..1, got 2. Hint: NLVR2"):
        model(image, ids, mask, image_token_type=2)
    block = model.transformer.blocks[0]
    with pytest.raises(ValueError, match="modality_type must be 'image', 'text' or 'vl', got 'audio'"):
        block(torch.zeros(1, 8, 32, dtype=torch.float64), modality_type="audio")
    with pytest.raises(ValueError, match="must be longer than max_text_len=6, got 6 tokens"):
        block(torch.zeros(1, 6, 32, dtype=torch.float64), modality_type="vl")
    with pytest.raises(ValueError, match="attention must be one of"):
        model.set_attention("flash")
    with pytest.raises(ValueError, match="the name must be one of"):
        build("huge")


@pytest.mark.parametrize(
    "change, error",
    [
        ({"dim": 33}, ValueError),
        ({"image_size": 33}, ValueError),
        ({"vlffn_start": 5}, ValueError),
        ({"max_text_len": 25}, ValueError),
        ({"drop_path": 1.0}, ValueError),
        ({"heads": "mlm"}, TypeError),
        ({"heads": ("vqa",)}, ValueError),
        ({"attention": "flash"}, ValueError),
        ({"depth": 0}, ValueError),
        ({"depth": 2.0}, TypeError),
    ],
)
def test_configuration_is_checked(change: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match="^VLMoConfig: "):
        replace(TINY, **change)
