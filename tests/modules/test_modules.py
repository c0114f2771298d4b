"""The drop-in modules: parameter names, shapes, training behaviour, and agreement with plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vlmo_kernels import (
    ModalityLayout,
    MoMEBlock,
    MoMEBlockParams,
    MoMEEncoder,
    RoutedFFN,
    RoutedLinear,
    RoutedNorm,
    SharedAttention,
    mome_block,
)
from vlmo_kernels.modules.drop_path import drop_path_scale, modality_of_row, sample_drop_path_scale

LAYOUT = ModalityLayout.from_lengths({"text": [5, 3, 0], "image": [4, 0, 4]})
MODALITY = torch.tensor([0] * 8 + [1] * 8)  # of every packed row


def randomise(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def rows(width: int = 16) -> torch.Tensor:
    return torch.randn(LAYOUT.tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_modality(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return torch.where(MODALITY[:, None] == 0, text, image)


def test_routed_linear():
    m, x = randomise(RoutedLinear(16, 24)), rows()
    assert sorted(m.state_dict()) == ["image.bias", "image.weight", "text.bias", "text.weight"]
    torch.testing.assert_close(m(x, LAYOUT), by_modality(m.text(x), m.image(x)))
    assert "experts" in repr(m)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_routed_norm(kind):
    m, x = randomise(RoutedNorm(16, kind=kind)), rows()
    torch.testing.assert_close(m(x, LAYOUT), by_modality(m.text(x), m.image(x)))
    y, z = m(x, LAYOUT, residual=x)
    torch.testing.assert_close(z, 2 * x)
    torch.testing.assert_close(y, by_modality(m.text(2 * x), m.image(2 * x)))


def test_rms_norm_with_one_plus_w_starts_as_the_identity_scale():
    m = RoutedNorm(16, kind="rms1p").double()
    torch.testing.assert_close(m(rows(), LAYOUT), nn.RMSNorm(16, 1e-6).double()(rows()))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_routed_ffn(activation):
    m, x = randomise(RoutedFFN(16, 32, activation=activation)), rows()

    def expert(mlp):
        z = mlp.fc1(x)
        h = nn.functional.gelu(z) if activation == "gelu" else nn.functional.silu(z) * mlp.fc_up(x)
        return mlp.fc2(h)

    torch.testing.assert_close(m(x, LAYOUT), by_modality(expert(m.text), expert(m.image)))
    assert ("text.fc_up.weight" in m.state_dict()) == (activation == "swiglu")


@pytest.mark.parametrize(
    "module", [RoutedFFN(8, 16), RoutedLinear(8, 4), RoutedNorm(8)], ids=lambda m: type(m).__name__
)
def test_a_modality_has_the_expert_of_its_name(module):
    """In whatever order a layout has them, and where it lacks one; other names are taken by order."""
    for p in module.parameters():
        torch.nn.init.normal_(p)
    text, image = torch.randn(3, 8), torch.randn(4, 8)

    def rows(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
        layout = ModalityLayout.from_lengths({name: len(part) for name, part in parts.items()})
        return layout.unpack_modalities(module(layout.pack(parts), layout))

    usual = rows(text=text, image=image)
    for other in (rows(image=image, text=text), rows(text=text), rows(image=image)):
        for name, part in other.items():
            torch.testing.assert_close(part, usual[name])
    renamed = rows(words=text, picture=image)
    torch.testing.assert_close(renamed["words"], usual["text"])
    torch.testing.assert_close(renamed["picture"], usual["image"])


def test_some_namesakes_are_a_mistake():
    layout = ModalityLayout.from_lengths({"image": 2, "text": 2})
    modules = (RoutedFFN(8, 16, ("txt", "image")), RoutedLinear(8, 4, ("text", "x")), RoutedNorm(8, ("image", "x")))
    for module in modules:
        with pytest.raises(ValueError, match="must have a namesake for each of the layout's modalities .* or for none"):
            module(torch.randn(4, 8), layout)


@pytest.mark.parametrize(
    "names", [("a", "a"), ("", "b"), ("forward", "b"), ("training", "b"), ("a.b", "c"), ()], ids=str
)
def test_names_that_no_expert_can_have(names):
    for build in (lambda n: RoutedFFN(8, 16, n), lambda n: RoutedLinear(8, 4, n), lambda n: RoutedNorm(8, n)):
        with pytest.raises(ValueError, match="`names` must be different, not empty, without dots"):
            build(names)
    with pytest.raises(ValueError, match="MoMEEncoder: `modalities` must be different"):
        MoMEEncoder(1, 8, 2, modalities=names)


def test_one_string_is_no_tuple_of_names():
    with pytest.raises(TypeError, match="`modalities` must be a tuple of strings, got 'text'"):
        MoMEEncoder(1, 8, 2, modalities=("text"))
    with pytest.raises(ValueError, match="no modality can be called 'vl'"):
        MoMEEncoder(1, 8, 2, modalities=("text", "vl"), vl_start=0)


def test_options_are_checked_when_a_module_is_made():
    for build, text in (
        (lambda: MoMEBlock(8, 2, activation="GELU"), "RoutedFFN: `activation` must be one of gelu, .*, got 'GELU'"),
        (lambda: RoutedFFN(8, 16, recompute="ful"), "RoutedFFN: `recompute` must be one of .*, full, got 'ful'"),
        (lambda: RoutedNorm(8, kind="batch"), "RoutedNorm: `kind` must be one of layer, rms, rms1p, got 'batch'"),
    ):
        with pytest.raises(ValueError, match=text):
            build()


def test_dropout_stands_before_the_residual():
    m, x = randomise(RoutedFFN(16, 32, dropout=0.5)).train(), rows()
    branch = m(x, LAYOUT, residual=x) - x
    dropped = branch == 0
    assert 0.2 < dropped.double().mean() < 0.8
    torch.testing.assert_close(branch[~dropped], 2 * m.eval()(x, LAYOUT)[~dropped])


def test_shared_attention_names_and_one_sample_alone():
    m, x = randomise(SharedAttention(16, 2)), rows()
    assert sorted(m.state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight"]
    alone = ModalityLayout.from_lengths({"text": 5, "image": 4})
    y = LAYOUT.unpack(m(x, LAYOUT))[0, :9]
    one = LAYOUT.unpack(x)[0, :9]
    torch.testing.assert_close(m(one, alone), y)  # rows of one sample: text first, then image, in both
    with pytest.raises(ValueError, match="`dim` must be a multiple of `heads` 3, got 16"):
        SharedAttention(16, 3)


def test_block_equals_the_functional_form():
    block, x = randomise(MoMEBlock(16, 2)).eval(), rows()
    norm1, attn, norms = block.norm1.shared, block.attn, (block.norm2.text, block.norm2.image)
    mlps = (block.ffn.text, block.ffn.image)
    params = MoMEBlockParams(
        heads=2,
        norm1=([norm1.weight], [norm1.bias]),
        qkv=([attn.qkv.weight], [attn.qkv.bias]),
        proj=([attn.proj.weight], [attn.proj.bias]),
        norm2=([n.weight for n in norms], [n.bias for n in norms]),
        w1=[m.fc1.weight for m in mlps],
        b1=[m.fc1.bias for m in mlps],
        w2=[m.fc2.weight for m in mlps],
        b2=[m.fc2.bias for m in mlps],
        gamma1=[block.gamma_1],
        gamma2=[block.gamma_2],
    )
    torch.testing.assert_close(block(x, LAYOUT), mome_block(x, params, LAYOUT))


def test_encoder_routes_mixed_samples_to_the_vl_expert():
    encoder, x = randomise(MoMEEncoder(2, 16, 2, vl_start=1)).eval(), rows()
    encoder(x, LAYOUT).square().sum().backward()
    assert encoder.blocks[1].ffn.vl.fc1.weight.grad.abs().sum() > 0
    assert not hasattr(encoder.blocks[0].ffn, "vl")
    single = ModalityLayout.from_lengths({"text": [5], "image": [0]})
    encoder.zero_grad()
    encoder(rows()[:5], single).square().sum().backward()
    grad = encoder.blocks[1].ffn.vl.fc1.weight.grad
    assert torch.equal(grad, torch.zeros_like(grad))  # text alone keeps the text expert


def test_samples_do_not_see_each_other():
    encoder, x = randomise(MoMEEncoder(2, 16, 2)).eval(), rows()
    changed = x.clone()
    changed[LAYOUT.sample_of_row == 0] += 1.0
    before, after = encoder(x, LAYOUT), encoder(changed, LAYOUT)
    others = LAYOUT.sample_of_row != 0
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


def test_drop_path_is_drawn_per_sample_and_modality():
    assert drop_path_scale(LAYOUT, 0.5, training=False) is None
    assert drop_path_scale(LAYOUT, 0.0, training=True) is None
    assert torch.equal(modality_of_row(LAYOUT), MODALITY)
    differing = 0
    for seed in range(20):
        torch.manual_seed(seed)
        scale = drop_path_scale(LAYOUT, 0.5, training=True)
        assert set(scale.tolist()) <= {0.0, 2.0}
        for sample in range(3):
            for modality in range(2):
                part = scale[(LAYOUT.sample_of_row == sample) & (MODALITY == modality)]
                assert part.unique().numel() <= 1
        text, image = (scale[(LAYOUT.sample_of_row == 0) & (MODALITY == m)][0] for m in (0, 1))
        differing += int(text != image)
        shared = sample_drop_path_scale(LAYOUT, 0.5, training=True)
        assert all(shared[LAYOUT.sample_of_row == b].unique().numel() == 1 for b in range(3))
    assert 0 < differing < 20


def test_dropped_branches_leave_the_residual():
    block, x = randomise(MoMEBlock(16, 2, drop_path=1.0)).train(), rows()
    assert torch.equal(block(x, LAYOUT), x)


def test_modules_copy_and_move():
    block, x = randomise(MoMEBlock(16, 2)).eval(), rows()
    twin = copy.deepcopy(block)
    assert torch.equal(twin(x, LAYOUT), block(x, LAYOUT))
    y = block.to(torch.bfloat16)(x.to(torch.bfloat16), LAYOUT)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_autocast_keeps_the_residual_stream():
    block, x = randomise(MoMEBlock(16, 2)).float(), rows().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x, LAYOUT)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and block.ffn.text.fc1.weight.grad.dtype == torch.float32


def test_checkpointing_gives_the_same_gradients():
    block, x = randomise(MoMEBlock(16, 2)), rows().requires_grad_()
    (expected,) = torch.autograd.grad(block(x, LAYOUT).square().sum(), x)
    y = torch.utils.checkpoint.checkpoint(block, x, LAYOUT, use_reentrant=False)
    (actual,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(actual, expected)


def test_encoder_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"`vl_start` must lie in 0..depth=2 or be None, got 9"):
        MoMEEncoder(2, 16, 2, vl_start=9)
    with pytest.raises(ValueError, match=r"MoMEEncoder: `x` must be \[T, 16\], got \[7, 12\]"):
        MoMEEncoder(2, 16, 2)(torch.randn(7, 12), ModalityLayout.from_lengths({"text": 3, "image": 4}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoMEBlock(16, 2, drop_path=2.0), "`drop_path` must be a probability, 0 to 1, got 2.0"),
        (lambda: MoMEBlock(16, 2, dropout=-1.0), "`dropout` must be a probability, 0 to 1, got -1.0"),
        (lambda: MoMEEncoder(0, 16, 2), "`depth` must be at least 1, got 0"),
        (lambda: RoutedLinear(16, 2, impl="cuda"), "RoutedLinear: `impl` must be one of auto, .*, got 'cuda'"),
        (lambda: RoutedNorm(16, impl="cuda"), "RoutedNorm: `impl` must be one of auto, .*, got 'cuda'"),
        (lambda: RoutedFFN(16, 32, impl="cuda"), "RoutedFFN: `impl` must be one of auto, .*, got 'cuda'"),
        (lambda: SharedAttention(16, 2, impl=None), "SharedAttention: `impl` must be one of auto, .*, got None"),
        (lambda: MoMEEncoder(1, 16, 2, impl="cuda"), "`impl` must be one of auto, .*, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
