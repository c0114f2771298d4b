"""Draws by counter, masks, negatives, and every stage's losses against the published passes written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.common.numerics import assert_close_as_eager
from tests.vlmo.training import CONFIG, batch, objective, step_inputs, tokenizer
from vlmo import counter
from vlmo.data import Batch
from vlmo.masking import mask_patches, mask_words
from vlmo.objectives import Pretraining, contrastive_loss, prepare, sample_negatives
from vlmo.packed import encode, make_plan
from vlmo.stages import stage_config

# ------------------------------------------------------------------ the counter


def test_draws_are_uniform_and_independent_of_their_neighbours() -> None:
    draws = counter.uniform(counter.key(0, 0, "test"), torch.arange(400)[:, None], torch.arange(250)[None])
    assert draws.dtype == torch.float32 and 0.0 <= draws.min() and draws.max() < 1.0
    n = draws.numel()
    # Five standard deviations: mean 1/2 with variance 1/12n, and 20 bins of n/20.
    assert abs(float(draws.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    bins = torch.histc(draws, 20, 0.0, 1.0)
    assert (bins - n / 20).abs().max() < 5 * math.sqrt(n / 20)
    for other in (draws.roll(1, 0), draws.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([draws.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(n)


def test_draws_differ_by_seed_step_and_purpose() -> None:
    keys = [counter.key(0, 0, "a"), counter.key(1, 0, "a"), counter.key(0, 1, "a"), counter.key(0, 0, "b")]
    index = torch.arange(100)
    draws = [counter.uniform(key, index) for key in keys]
    assert all((a == b).sum() < 3 for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(counter.uniform(keys[0], index[50:]), draws[0][50:])


# ------------------------------------------------------------------ masks


def part(given: Batch, rows: slice) -> Batch:
    values = (getattr(given, f.name) for f in fields(Batch))
    return Batch(*(None if v is None else v[rows] for v in values))


def test_whole_words_are_masked() -> None:
    tok = tokenizer()
    ids = torch.full((1, 20), tok.pad_id)
    # Words of 3, 1 and 2 pieces, and one of 6.
    ids[0, :14] = torch.tensor([tok.cls_id, *range(10, 22), tok.sep_id])
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [1, 4, 5, 7]] = True
    words = [{1, 2, 3}, {4}, {5, 6}, {7, 8, 9, 10, 11, 12}]
    index = torch.arange(1000)
    given = Batch(None, ids.repeat(1000, 1), (ids != tok.pad_id).repeat(1000, 1), index, starts.repeat(1000, 1))
    masked = mask_words(given, tok, seed=0, step=0)
    seen = set()
    for b in range(1000):
        hidden = set(masked.position[masked.sample == b].tolist())
        assert hidden and all(word <= hidden or not word & hidden for word in words)
        # 0.15 * 12 tokens allow 2; more only if the first word drawn is longer.
        assert len(hidden) <= 2 or hidden in words
        seen |= hidden
    assert seen == set(range(1, 13))
    assert torch.equal(masked.label, given.text_ids[masked.sample, masked.position])
    untouched = torch.ones_like(given.text_mask)
    untouched[masked.sample, masked.position] = False
    assert torch.equal(masked.ids[untouched], given.text_ids[untouched])


def test_hidden_tokens_become_mask_or_another_or_stay() -> None:
    given = batch(256)
    masked = mask_words(given, tokenizer(), seed=0, step=0)
    new = masked.ids[masked.sample, masked.position]
    n = len(new)
    shares = (new == tokenizer().mask_id).float().mean(), (new == masked.label).float().mean()
    for share, expected in zip(shares, (0.8, 0.1)):
        assert abs(float(share) - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def test_masks_follow_the_sample_not_the_batch() -> None:
    given = batch(8)
    whole = mask_words(given, tokenizer(), seed=1, step=2)
    halves = [mask_words(part(given, rows), tokenizer(), seed=1, step=2) for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat([half.ids for half in halves]), whole.ids)
    assert not torch.equal(mask_words(given, tokenizer(), seed=1, step=3).ids, whole.ids)
    patches = mask_patches(given.index, 16, seed=1, step=2)
    assert patches.shape == (8, 6) and all(len(set(row)) == 6 for row in patches.tolist())
    assert torch.equal(mask_patches(given.index[4:], 16, seed=1, step=2), patches[4:])


# ------------------------------------------------------------------ negatives and contrast


def test_negatives_are_drawn_from_the_softmax_and_never_the_sample_itself() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 3.0])
    n = 20_000
    index = torch.full((n,), 4)  # candidate 4 is the sample itself
    # Another key for every row, by its step: the draw depends on the two sample numbers alone.
    drawn = torch.stack(
        [
            sample_negatives(logits[None], index[:1], torch.arange(5), counter.key(0, step, "negative"))[0]
            for step in range(2000)
        ]
    )
    n = len(drawn)
    assert not (drawn == 4).any()
    expected = (logits.softmax(0) + 1e-5)[:4]
    expected = expected / expected.sum()
    share = torch.bincount(drawn, minlength=5)[:4] / n
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_negatives_are_sampled_without_asking_the_host() -> None:
    """On meta there are no values: whoever wants one on the host fails."""
    index = torch.arange(4, device="meta")
    assert sample_negatives(torch.zeros(4, 4, device="meta"), index, index, 1).shape == (4,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        index[0].item()


def test_negatives_do_not_depend_on_the_order_of_the_candidates() -> None:
    logits, index = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(100, 116)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    key = counter.key(3, 4, "negative")
    there = sample_negatives(logits, index, index, key)
    moved = sample_negatives(logits[:, order], index, index[order], key)
    assert torch.equal(order[moved], there)
    assert torch.equal(sample_negatives(logits[8:], index[8:], index, key), there[8:])


# ------------------------------------------------------------------ losses as published


def published(module: Pretraining, stage: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stage's losses by the separate passes of the model in plain torch, sample order and all."""
    inputs, model = step_inputs(stage, dtype), module.model
    given, masked, norm = inputs.batch, inputs.masked, model.transformer.norm
    if stage == "vision":
        grid = model.config.patch_size
        hide = torch.zeros(len(given), model.config.window**2, dtype=torch.bool)
        for b, hidden in enumerate(inputs.patches):
            hide[b, hidden] = True
        x = model.embed_image(given.image, hide=hide, mask_token=module.pixels.mask_token)
        biases = model.position_biases(model.relative_position_index)
        for block, bias in zip(model.transformer.blocks, biases):
            x = block(x, modality_type="image", relative_position_bias=bias)
        x = norm(x)
        patches = given.image.unfold(2, grid, grid).unfold(3, grid, grid).permute(0, 2, 3, 1, 4, 5)
        target = patches.reshape(len(given), -1, 3 * grid * grid)
        return {"mim": (module.pixels(x[:, 1:][hide]) - target[hide]).abs().mean()}
    labels = torch.full_like(given.text_ids, -100)
    labels[masked.sample, masked.position] = masked.label
    if stage == "language":
        logits = model.mlm_score(model.infer_text_mlm(masked.ids, given.text_mask).text_feats)
        return {"mlm": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    logits = model.mlm_score(model.infer(given.image, masked.ids, given.text_mask).text_feats)
    losses = {"mlm": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}
    image, text = model.infer_image(given.image), model.infer_text(given.text_ids, given.text_mask)
    own = torch.arange(len(given))
    to_text = model.logit_scale.exp() * image.itc_feats @ text.itc_feats.T
    vl = model.logit_vl_scale.exp() * image.itc_vl_feats @ text.itc_vl_feats.T
    both = [F.cross_entropy(t, own) for t in (to_text, to_text.T, vl, vl.T)]
    losses["itc"] = sum(both) / 4
    keys = [counter.key(inputs.seed, inputs.step, f"negative {m}") for m in ("image", "text")]
    other_image = sample_negatives(to_text.T, given.index, given.index, keys[0])
    other_text = sample_negatives(to_text, given.index, given.index, keys[1])
    ids, mask = given.text_ids, given.text_mask
    passes = [
        model.infer(given.image, ids, mask),
        model.infer(given.image[other_image], ids, mask),
        model.infer(given.image, ids[other_text], mask[other_text]),
    ]
    logits = model.itm_score(torch.cat([out.cls_feats for out in passes]))
    losses["itm"] = F.cross_entropy(logits, torch.tensor([1] * len(own) + [0] * 2 * len(own)))
    return losses


WEIGHTS = {"vision": {"mim": 1.0}, "language": {"mlm": 1.0}, "vision-language": {"mlm": 0.25, "itc": 1.0, "itm": 1.0}}


def values_and_grads(
    run: Callable[[Pretraining], dict[str, Tensor]], stage: str, dtype: torch.dtype, impl: str
) -> dict[str, Tensor]:
    """Losses; and the gradients of the stage's loss in one vector, each parameter's at magnitude 1."""
    module = objective(stage, dtype, impl)
    losses = run(module)
    sum(weight * losses[name] for name, weight in WEIGHTS[stage].items()).backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, missing
    return {name: losses[name].detach() for name in WEIGHTS[stage]} | {f"d {n}": g for n, g in grads.items()}


@pytest.mark.parametrize("stage, impl", [("vision", "auto"), ("language", "reference"), ("vision-language", "auto")])
def test_losses_and_gradients_are_those_of_the_separate_passes(stage: str, impl: str) -> None:
    want = values_and_grads(lambda m: published(m, stage, torch.float64), stage, torch.float64, "auto")
    eager = values_and_grads(lambda m: published(m, stage, torch.float32), stage, torch.float32, "auto")
    ours = values_and_grads(lambda m: m(step_inputs(stage)), stage, torch.float32, impl)
    assert want.keys() == ours.keys()
    scale = {name: 1.0 / max(float(t.square().mean().sqrt()), 1e-30) for name, t in want.items()}
    for prefix in ("", "d "):
        names = [name for name in want if name.startswith("d ") == bool(prefix)]
        pooled = (torch.cat([(got[n] * scale[n]).flatten() for n in names]) for got in (ours, want, eager))
        assert_close_as_eager(*pooled, f"{stage}: {prefix}losses")


def test_loss_weights() -> None:
    losses = objective("vision-language")(step_inputs("vision-language"))
    total = losses["itc"] + losses["itm"] + 0.25 * losses["mlm"]
    torch.testing.assert_close(losses["loss"], total)
    assert {"mlm_accuracy", "itm_accuracy", "itc_accuracy"} <= losses.keys()


def test_contrast_of_perfect_and_useless_features() -> None:
    own = torch.arange(4)
    for features, logit_scale, of_one_row in (
        (torch.eye(4), 5.0, math.log1p(3 * math.exp(-math.exp(5.0)))),
        (torch.ones(4, 4) / 2, 0.0, math.log(4)),
    ):
        loss, to_text, _ = contrastive_loss(features, features, torch.tensor(logit_scale))
        eager = F.cross_entropy(math.exp(logit_scale) * features @ features.T, own)
        assert_close_as_eager(loss, torch.tensor(of_one_row, dtype=torch.float64), eager, "contrast")
        assert logit_scale == 0.0 or torch.equal(to_text.argmax(1), own)


# ------------------------------------------------------------------ DropPath


def test_drop_path_of_everything_leaves_the_embeddings() -> None:
    config = replace(CONFIG, drop_path=0.5)
    model = objective("vision-language").model
    for i, block in enumerate(model.transformer.blocks):
        block.drop_path.drop_prob = 0.5 if i else 0.0
    given = batch(3)
    plan = make_plan(config, given.text_mask, pairs=3)
    text, image = model.embed_text(given.text_ids), model.embed_image(given.image)
    drops = torch.zeros(3, config.depth, 3), torch.zeros(3, config.depth, 3)
    x = encode(model, plan, text, image, drops=drops)
    model.transformer.blocks[0].drop_path.drop_prob = 0.0
    first = encode_first_layer(model, plan, text, image)
    torch.testing.assert_close(x, first)


def encode_first_layer(model, plan, text: Tensor, image: Tensor) -> Tensor:
    rows = torch.cat([text.flatten(0, 1), image.flatten(0, 1)])[plan.source]
    bias = model.position_biases(model.text_imag_relative_position_index)[0]
    return model.transformer.blocks[0].forward_packed(rows, plan.lower, plan.lower_experts, bias)


def test_drop_path_falls_on_halves_below_and_on_whole_samples_above() -> None:
    """One branch dropped at a time changes exactly the rows it should."""
    model = objective("vision-language").model.double()
    for block in model.transformer.blocks:
        block.drop_path.drop_prob = 0.25
    given = batch(2)
    plan = make_plan(CONFIG, given.text_mask, pairs=2)
    keep = torch.ones(2, CONFIG.depth, 3)
    positions, sample = plan.lower.positions, plan.lower.sample_of_row
    is_image = positions >= CONFIG.max_text_len
    from vlmo.packed import _row_scales

    for top, branch, expected in (
        (False, 0, sample == 1), (False, 1, (sample == 1) & ~is_image), (False, 2, (sample == 1) & is_image),
        (True, 0, sample == 1), (True, 1, sample == 1), (True, 2, torch.zeros_like(is_image)),
    ):  # fmt: skip
        draws = keep[:, 0].clone()
        draws[1, branch] = 0.0
        scales = torch.stack(_row_scales(draws, 0.25, plan.lower, plan, top))
        assert torch.equal((scales == 0.0).any(0), expected), (top, branch)
        assert set(scales.flatten().tolist()) <= {0.0, float(torch.tensor(1.0) / 0.75)}


@pytest.mark.parametrize("stage", ["vision", "language", "vision-language"])
def test_a_batch_goes_to_a_gpu_from_pinned_memory_and_nothing_waits(stage: str, monkeypatch) -> None:
    """Without a GPU: what would be pinned and copied is recorded, and stays where it is."""
    pinned, copied, waiting, to = set(), set(), [], torch.Tensor.to

    def pin_memory(t: torch.Tensor) -> torch.Tensor:
        pinned.add(id(t))
        return t

    def record(t: torch.Tensor, *args, non_blocking: bool = False, **options) -> torch.Tensor:
        if args != ("cuda",):
            return to(t, *args, non_blocking=non_blocking, **options)
        copied.add(id(t))
        waiting.extend([] if non_blocking else [t.shape])
        return t

    given, config = batch(4, stage), stage_config(CONFIG, stage)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", record)
    inputs = prepare(stage, given, config, tokenizer(), 0, 0, "cuda")
    assert not waiting and copied == pinned
    used = [inputs.batch.index, inputs.plan.source, inputs.plan.lower.rows, inputs.plan.last.row_of_token]
    used += [inputs.patches] if stage == "vision" else [inputs.masked.position, inputs.batch.text_mask]
    assert {id(t) for t in used} <= copied
    offsets = inputs.plan.lower.host_offsets
    assert offsets is None or offsets is inputs.plan.lower.group_offsets or id(offsets) not in copied
