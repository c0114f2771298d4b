"""The VLMo adapter: the swapped model is the model."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import vlmo
import vlmo_kernels
from tests.common.numerics import assert_close_as_eager
from vlmo_kernels.swap import batch_plan

PASSES = ("infer", "infer_text", "infer_image", "infer_text_ft", "infer_image_ft")


def make_model(dtype: torch.dtype = torch.float64, **overrides) -> vlmo.VLMo:
    torch.manual_seed(0)
    model = vlmo.build(dataclasses.replace(vlmo.CONFIGS["tiny"], **overrides))
    for p in model.parameters():  # biases, gammas and the bias table of order 1, or nothing would show
        if p.dim() == 1 or p is model.relative_position_bias_table:
            nn.init.normal_(p, std=0.5)
    return model.to(dtype).eval()


def make_batch(config, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    batch, length = 3, config.max_text_len
    image = torch.randn(batch, 3, config.image_size, config.image_size, generator=generator, dtype=dtype)
    ids = torch.randint(1, config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - 1 :] = 0
    mask[1, 2:] = 0
    return image, ids, mask


SWAPS = {"encoder": vlmo_kernels.swap, "block": lambda model: vlmo_kernels.swap(model.transformer.blocks)}
depths = pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)


def run(model, name: str, batch) -> dict[str, torch.Tensor]:
    image, ids, mask = batch
    arguments = {"infer": (image, ids, mask), "infer_text": (ids, mask), "infer_image": (image,)}
    out = getattr(model, name)(*arguments[name.removesuffix("_ft")])
    features = {k: v for k, v in out._asdict().items() if torch.is_tensor(v)}
    if "text_feats" in features:
        features["text_feats"] = features["text_feats"] * mask[..., None]  # valid positions
    return features


def outputs_and_grads(model, name: str, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    features = run(model, name, batch)
    torch.manual_seed(1)
    sum((f * torch.randn(f.shape, dtype=torch.float64).to(f.dtype)).sum() for f in features.values()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in features.items()} | {f"d {k}": v for k, v in grads.items()}


@depths
@pytest.mark.parametrize("name", PASSES)
def test_every_pass_and_gradient_in_fp64(name, swap):
    plain = make_model()
    swapped = copy.deepcopy(plain)
    swap(swapped)
    batch = make_batch(plain.config)
    expected, actual = (outputs_and_grads(m, name, batch) for m in (plain, swapped))
    assert "d relative_position_bias_table" in expected
    assert set(expected) <= set(actual)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@depths
def test_forward_is_as_close_as_eager(name, dtype, swap):
    wide, narrow = make_model(), make_model().to(dtype)
    wide.load_state_dict(narrow.state_dict())
    swapped = copy.deepcopy(narrow)
    swap(swapped)
    batch = make_batch(wide.config, dtype)
    exact = run(wide, name, (batch[0].double(), *batch[1:]))
    eager, actual = (run(m, name, batch) for m in (narrow, swapped))
    for key in exact:
        if key.startswith("itc"):
            continue  # unit vectors from a later projection: the features they come from are compared
        assert_close_as_eager(actual[key], exact[key], eager[key], f"{name} {key}")


def test_an_expert_without_tokens_gets_zeros():
    model = make_model()
    vlmo_kernels.swap(model)
    image, ids, mask = make_batch(model.config)
    model.infer(image, ids, torch.zeros_like(mask)).image_feats.square().sum().backward()
    grad = model.transformer.blocks[0].mlp_text.fc1.weight.grad
    assert torch.equal(grad, torch.zeros_like(grad))


@depths
def test_padded_outputs_are_zero(swap):
    model = make_model()
    swap(model)
    config = model.config
    x = torch.randn(2, config.max_text_len, config.dim, dtype=torch.float64)
    mask = torch.tensor([[1] * config.max_text_len, [1, 1] + [0] * (config.max_text_len - 2)])
    out = model.transformer(x, mask, "text", [None] * config.depth, 0, 1)
    assert torch.equal(out[1, 2:], torch.zeros_like(x[1, 2:]))


@pytest.mark.parametrize(("depth", "plans"), [("encoder", 1), ("block", 2)])
def test_plan_is_built_once_per_batch(monkeypatch, depth, plans):
    model = make_model()
    SWAPS[depth](model)
    built = []
    original = vlmo_kernels.ModalityLayout.from_split.__func__
    counting = classmethod(lambda cls, *a, **k: built.append(a) or original(cls, *a, **k))
    monkeypatch.setattr(batch_plan.ModalityLayout, "from_split", counting)
    image, ids, mask = make_batch(model.config)
    with torch.no_grad():
        model.infer(image, ids, mask)
        first = len(built)
        model.infer(image, ids, mask)
    # Block by block: lower layers split text from image, top layers do not. Every call makes its own joint mask.
    assert first == plans and len(built) == 2 * plans


def test_an_edited_mask_plans_anew():
    block = make_model().transformer.blocks[0]
    vlmo_kernels.swap(block)
    x = torch.randn(1, 6, block.norm1.weight.numel(), dtype=torch.float64)
    mask = torch.ones(1, 6, dtype=torch.bool)
    assert block(x, mask, "text")[0, 5].abs().sum() > 0
    mask[0, 5] = False
    assert block(x, mask, "text")[0, 5].abs().sum() == 0


@pytest.mark.parametrize("depth", SWAPS)
def test_state_dict_report_and_undo(depth):
    plain = make_model()
    model = copy.deepcopy(plain)
    parameters = list(model.parameters())
    report = SWAPS[depth](model)
    paths = {"encoder": ["transformer"], "block": [str(i) for i in range(plain.config.depth)]}
    assert list(report.replaced) == paths[depth]
    assert not report.left and f"{depth} depth" in str(report)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert isinstance(model.transformer.blocks[0], type(plain.transformer.blocks[0]))
    report.undo()
    assert type(model.transformer) is type(plain.transformer)
    assert type(model.transformer.blocks[0]) is type(plain.transformer.blocks[0])


def test_other_instances_are_not_touched():
    one, other = make_model(), make_model()
    vlmo_kernels.swap(one)
    assert type(other.transformer).__name__ == "MultiwayTransformer"
    vlmo_kernels.swap(one.transformer.blocks[0])
    assert type(one.transformer.blocks[1]).__name__ == "Block"


@pytest.mark.parametrize(
    "copy_model",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to(torch.float32).to(torch.float64)],
    ids=["deepcopy", "pickle", "to"],
)
def test_copies_stay_swapped(copy_model):
    model = make_model()
    vlmo_kernels.swap(model)
    batch = make_batch(model.config)
    model.to(torch.float32).to(torch.float64)  # what `.to` rounds, all of them round
    expected = run(model, "infer", batch)
    twin = copy_model(model)
    assert type(twin.transformer) is type(model.transformer)
    for key, value in run(twin, "infer", batch).items():
        assert torch.equal(value, expected[key])


def test_ema_copy():
    model = make_model()
    vlmo_kernels.swap(model)
    ema = torch.optim.swa_utils.AveragedModel(model)
    ema.update_parameters(model)
    batch = make_batch(model.config)
    assert torch.equal(run(ema.module, "infer", batch)["cls_feats"], run(model, "infer", batch)["cls_feats"])


def test_half_precision_model_runs():
    model = make_model().half()
    vlmo_kernels.swap(model)
    out = run(model, "infer", make_batch(model.config, torch.float16))
    assert all(v.isfinite().all() and v.dtype == torch.float16 for v in out.values())


def test_compile_and_export_a_swapped_block():
    block = make_model(torch.float32).transformer.blocks[0]
    vlmo_kernels.swap(block)
    x = torch.randn(2, 10, block.norm1.weight.numel())
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 3:6] = False
    expected = block(x, mask, "vl", None)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x, mask, "vl", None), expected)
    exported = torch.export.export(block, (x, mask, "vl", None))
    assert torch.equal(exported.module()(x, mask, "vl", None), expected)


def test_drop_path_drops_whole_branches_per_half():
    block = make_model(drop_path=0.9).transformer.blocks[3].train()
    plain = copy.deepcopy(block)
    vlmo_kernels.swap(block)
    x = torch.randn(64, 10, block.norm1.weight.numel(), dtype=torch.float64)
    torch.manual_seed(0)
    kept = (block(x, None, "vl") != x).any(-1).any(-1).double().mean()
    torch.manual_seed(0)
    expected = (plain(x, None, "vl") != x).any(-1).any(-1).double().mean()
    assert 0 < kept < 1 and 0 < expected < 1


class Adapter(nn.Linear):
    """A linear layer with something added, as LoRA does it."""


def hook(model):
    model.transformer.blocks[1].mlp_text.fc1.register_forward_hook(lambda *a: None)


def adapter(model):
    model.transformer.blocks[1].mlp_text.fc1 = Adapter(32, 128, dtype=torch.float64)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.transformer.blocks[1].mlp_text.fc1)


@pytest.mark.parametrize("change", [hook, adapter, parametrised])
def test_changed_children_are_left_alone_and_named(change):
    model = make_model()
    change(model)
    report = vlmo_kernels.swap(model)
    assert "mlp_text.fc1" in report.left["transformer.blocks.1"]
    assert "blocks.1: mlp_text.fc1" in report.left["transformer"]
    assert "transformer.blocks.1" not in report.replaced and len(report.replaced) == model.config.depth - 1


@depths
def test_a_hook_added_after_the_swap_runs(swap):
    model = make_model()
    swap(model)
    seen = []
    model.transformer.blocks[0].mlp_imag.fc1.register_forward_hook(lambda *a: seen.append(1))
    run(model, "infer", make_batch(model.config))
    assert seen


def test_nothing_to_swap():
    with pytest.raises(ValueError, match="must contain VLMo blocks or a BEiT-3.*found none in Linear"):
        vlmo_kernels.swap(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`model` must be a torch.nn.Module, got int"):
        vlmo_kernels.swap(3)


@depths
def test_swap_twice(swap):
    model = make_model()
    swap(model)
    with pytest.raises(ValueError, match="must not be swapped already"):
        swap(model)


def test_a_hook_on_a_block_runs():
    model = make_model()
    model.transformer.blocks[1].register_forward_hook(lambda *a: seen.append(1))
    seen = []
    report = vlmo_kernels.swap(model)
    assert "blocks.1 carries hooks" in report.left["transformer"] and len(report.replaced) == model.config.depth
    run(model, "infer", make_batch(model.config))
    assert len(seen) == 1


@depths
def test_a_model_with_swapped_parts_compiles_and_exports(swap):
    model = make_model(torch.float32)
    swap(model)
    image, ids, mask = make_batch(model.config, torch.float32)
    arguments = (image, ids, mask)
    expected = model.infer(*arguments).cls_feats
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments).cls_feats, expected)
    exported = torch.export.export(model, arguments).module()
    assert torch.equal(exported(*arguments)[2], expected)


def test_everything_left_alone_says_why():
    block = make_model().transformer.blocks[0]
    block.attn.proj.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="every recognised block was left alone .*attn.proj carries hooks"):
        vlmo_kernels.swap(block)


def test_wrong_mask_shape():
    block = make_model().transformer.blocks[0]
    vlmo_kernels.swap(block)
    x = torch.randn(2, 10, block.norm1.weight.numel(), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mask must be \[2, 10\], got \[2, 4\]"):
        block(x, torch.ones(2, 4), "text")
