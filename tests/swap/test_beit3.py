"""The swapped BEiT-3 encoder against torchscale's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.common import torchscale_stub
from tests.common.numerics import assert_close_as_eager
from vlmo_kernels.swap import swap

torchscale_stub.install()

from torchscale.architecture.config import EncoderConfig  # noqa: E402
from torchscale.model.BEiT3 import BEiT3  # noqa: E402

MODES = ("image", "text", "text_padded", "both", "both_padded")
BATCH, TEXT, PATCHES = 3, 6, 5  # 4 patches and a class token


def model(seed: int = 0, **settings) -> BEiT3:
    torch.manual_seed(seed)
    defaults = dict(
        encoder_embed_dim=32, encoder_attention_heads=4, encoder_ffn_embed_dim=48, encoder_layers=2,
        multiway=True, vocab_size=50, img_size=8, patch_size=4, max_source_positions=32, no_output_layer=True,
    )  # fmt: skip
    made = BEiT3(EncoderConfig(**(defaults | settings)))
    with torch.no_grad():  # biases and norms start at constants, which hide mistakes
        for p in made.parameters():
            if p.dim() == 1 or p.shape[:2] == (1, 1):
                p.add_(0.3 * torch.randn_like(p))
    return made


def batch(mode: str, dtype: torch.dtype = torch.float32) -> dict:
    seed = torch.Generator().manual_seed(1)
    image = torch.randn(BATCH, 3, 8, 8, generator=seed)
    text = torch.randint(0, 50, (BATCH, TEXT), generator=seed)
    given: dict = {}
    if mode.startswith(("image", "both")):
        given["visual_tokens"] = image.to(dtype)
    if mode.startswith(("text", "both")):
        given["textual_tokens"] = text
    if mode.endswith("padded"):
        given["text_padding_position"] = torch.arange(TEXT) >= torch.tensor([TEXT, 3, 1])[:, None]
    return given


def valid(mode: str) -> torch.Tensor:
    """bool `[B, N]`, true for real tokens."""
    images = 0 if mode.startswith("text") else PATCHES
    texts = 0 if mode == "image" else TEXT
    real = torch.ones(BATCH, images + texts, dtype=torch.bool)
    if mode.endswith("padded"):
        real[:, images:] = torch.arange(TEXT) < torch.tensor([TEXT, 3, 1])[:, None]
    return real


class InFp64(TorchFunctionMode):
    """torchscale takes softmax and activation in fp32 whatever the dtype; the truth in fp64 does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0]
        if func is F.softmax:
            kwargs.pop("dtype", None)
        return func(*args, **kwargs)


def run(net: BEiT3, mode: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The valid rows of the output, and every parameter's gradient (zeros for None)."""
    dtype = next(net.parameters()).dtype
    net.zero_grad()
    out = net(**batch(mode, dtype))["encoder_out"][valid(mode)]
    seed = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, dtype=torch.float64, generator=seed).to(dtype))
    return out.detach(), {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()
    }


def truth(plain: BEiT3, mode: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the plain model makes of it in fp64."""
    with InFp64():
        return run(copy.deepcopy(plain).double(), mode)


def swapped(plain: nn.Module) -> nn.Module:
    ours = copy.deepcopy(plain)
    swap(ours)
    return ours


def layer_of(name: str) -> str:
    return ".".join(name.split(".")[: 3 if ".layers." in name else 2])


def joined(grads: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    return torch.cat([g.flatten() for name, g in grads.items() if layer_of(name) == part])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("subln", [True, False])
def test_fp64_equals_the_plain_model(mode: str, subln: bool) -> None:
    plain = model(subln=subln)
    out, grads = run(swapped(plain.double()), mode)
    expected, expected_grads = truth(plain, mode)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("subln", [True, False])
def test_fp32_is_as_exact_as_eager(mode: str, subln: bool) -> None:
    plain = model(subln=subln)
    out, grads = run(swapped(plain), mode)
    eager, eager_grads = run(plain, mode)
    expected, expected_grads = truth(plain, mode)
    assert_close_as_eager(out, expected, eager, "encoder_out")
    # By layer: two roundings of one bias of 32 numbers may well differ by 2x, of a layer's gradients not.
    # That no parameter is exchanged or forgotten is shown in fp64.
    for part in {layer_of(name) for name in grads}:
        assert_close_as_eager(*(joined(g, part) for g in (grads, expected_grads, eager_grads)), part)


def output(net: nn.Module, mode: str = "both_padded") -> torch.Tensor:
    """`encoder_out` without gradients."""
    with torch.no_grad():
        return net(**batch(mode, next(net.parameters()).dtype))["encoder_out"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings", [dict(no_output_layer=False), dict(layernorm_embedding=True, no_scale_embedding=False),
                 dict(normalize_output=False), dict(activation_fn="relu"), dict(activation_fn="swish")],
    ids=lambda s: ",".join(s),
)  # fmt: skip
def test_settings(mode: str, settings: dict) -> None:
    plain = model(**settings)
    ours, eager = output(swapped(plain), mode), output(plain, mode)
    with InFp64():
        expected = output(copy.deepcopy(plain).double(), mode)
    at = valid(mode)
    assert_close_as_eager(ours[at], expected[at], eager[at])


def test_the_dictionary_is_the_original_one() -> None:
    plain = model()
    given = batch("both_padded")
    x = torch.randn(BATCH, PATCHES + TEXT, 32)
    padding = ~valid("both_padded")
    arguments = dict(src_tokens=None, token_embeddings=x, encoder_padding_mask=padding)
    arguments["multiway_split_position"] = PATCHES
    ours = swapped(plain).encoder(**arguments, return_all_hiddens=True)
    theirs = plain.encoder(**arguments, return_all_hiddens=True)
    assert ours.keys() == theirs.keys()
    assert ours["l_aux"] == theirs["l_aux"]
    assert torch.equal(ours["encoder_embedding"], theirs["encoder_embedding"])
    assert torch.equal(ours["encoder_padding_mask"], theirs["encoder_padding_mask"])
    assert len(ours["encoder_states"]) == len(theirs["encoder_states"]) == 3
    for mine, eager in zip(ours["encoder_states"], theirs["encoder_states"], strict=True):
        torch.testing.assert_close(mine[~padding], eager[~padding])
        assert not mine[padding].any()
    assert not ours["encoder_out"][padding].any()
    assert swapped(plain)(**given)["multiway_split_position"] == PATCHES
    no_mask = swapped(plain)(**batch("both"))["encoder_padding_mask"]
    assert torch.equal(no_mask, plain(**batch("both"))["encoder_padding_mask"])
    assert no_mask.dtype == torch.bool


def test_nothing_of_the_padding_is_read() -> None:
    plain = swapped(model())
    given = batch("both_padded")
    first = plain(**given)["encoder_out"]
    given["textual_tokens"] = given["textual_tokens"].masked_fill(given["text_padding_position"], 7)
    assert torch.equal(plain(**given)["encoder_out"], first)
    given["text_padding_position"] = given["text_padding_position"].long()
    assert torch.equal(plain(**given)["encoder_out"], first)


@pytest.mark.parametrize(("mode", "idle"), [("image", ".B."), ("text", ".A.")])
def test_an_expert_without_tokens_gets_zeros(mode: str, idle: str) -> None:
    ours = swapped(model())
    ours(**batch(mode))["encoder_out"].sum().backward()
    grads = {n: p.grad for n, p in ours.encoder.named_parameters() if idle in n and "embed_" not in n}
    assert len(grads) == 2 * 20 + 2
    assert all(g is not None and not g.any() for g in grads.values())


def test_without_gradients_one_expert_is_enough() -> None:
    ours = swapped(model())
    for mode in ("image", "text", "both"):
        assert torch.equal(output(ours, mode), ours(**batch(mode))["encoder_out"].detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_eager(dtype: torch.dtype) -> None:
    plain = model().to(dtype)
    expected_model = copy.deepcopy(plain).double()
    ours = swapped(plain)
    at = valid("both_padded")
    given = batch("both_padded", dtype)
    with torch.no_grad(), InFp64():
        exact = given | {"visual_tokens": given["visual_tokens"].double()}
        expected = expected_model(**exact)["encoder_out"]
    assert_close_as_eager(output(ours)[at], expected[at], output(plain)[at])


def test_autocast() -> None:
    plain = model()
    ours, at = swapped(plain), valid("both_padded")
    with InFp64():
        expected = output(copy.deepcopy(plain).double())
    with torch.autocast("cpu", torch.bfloat16):
        mine, eager = output(ours), output(plain)
    assert_close_as_eager(mine[at], expected[at], eager[at])
    with torch.autocast("cpu", torch.bfloat16):
        ours(**batch("both_padded"))["encoder_out"].float().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.encoder.layers.parameters())


def test_drop_path_trains_and_drops_whole_samples() -> None:
    plain = model(drop_path_rate=0.9)
    ours = swapped(plain)
    assert not torch.equal(output(ours), output(ours))
    ours(**batch("both_padded"))["encoder_out"].sum().backward()
    ours.eval()
    assert torch.equal(output(ours), output(ours))
    at = valid("both_padded")
    torch.testing.assert_close(output(ours)[at], output(plain.eval())[at])


def test_drop_path_drops_what_the_original_drops() -> None:
    """One layer has two branches, each dropped for a whole sample or doubled: both models give the same four."""
    plain = model(encoder_layers=1, drop_path_rate=0.5)
    plain.encoder.layers[0].drop_path.drop_prob = 0.5
    assert kept_branches(swapped(plain)) == kept_branches(plain)
    assert len(kept_branches(plain)) == 4


def kept_branches(net: BEiT3) -> set[tuple[float, ...]]:
    """What becomes of 64 equal samples, rounded."""
    torch.manual_seed(3)
    x = torch.randn(PATCHES, 32).expand(64, PATCHES, 32)
    with torch.no_grad():
        out = net.encoder(None, token_embeddings=x, multiway_split_position=2)["encoder_out"]
    return {tuple(sample) for sample in out.flatten(1).mul(100).round().add(0.0).tolist()}


# ---------------------------------------------------------------------- life of a swapped model


def test_report_state_dict_and_undo() -> None:
    plain = model()
    ours = copy.deepcopy(plain)
    before = {n: p.data_ptr() for n, p in ours.named_parameters()}
    report = swap(ours)
    assert list(report.replaced) == ["encoder"] and not report.left
    assert "encoder depth" in str(report)
    assert isinstance(ours.encoder, type(plain.encoder))
    assert {n: p.data_ptr() for n, p in ours.named_parameters()} == before
    assert list(ours.state_dict()) == list(plain.state_dict())
    other = model(seed=5)
    ours.load_state_dict(other.state_dict())
    at = valid("both_padded")
    torch.testing.assert_close(output(ours)[at], output(other)[at])
    plain.load_state_dict(ours.state_dict())
    report.undo()
    assert type(ours.encoder) is type(plain.encoder)
    assert torch.equal(output(ours), output(plain))


def test_copies_and_pickles_stay_swapped() -> None:
    ours = swapped(model())
    expected = output(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin.encoder) is type(ours.encoder)
        assert torch.equal(output(twin), expected)
        with torch.no_grad():
            next(twin.encoder.layers.parameters()).add_(1.0)
    assert torch.equal(output(ours), expected)
    assert torch.equal(output(ours.to("cpu", torch.float32)), expected)


def test_compile_and_export() -> None:
    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = swapped(model()).encoder

        def forward(self, x, padding):
            return self.encoder(
                None, token_embeddings=x, encoder_padding_mask=padding, multiway_split_position=PATCHES
            )["encoder_out"]

    core, x, padding = Core(), torch.randn(BATCH, PATCHES + TEXT, 32), ~valid("both_padded")
    with torch.no_grad():
        expected = core(x, padding)
        compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, padding), expected)
        exported = torch.export.export(core, (x, padding)).module()
        torch.testing.assert_close(exported(x, padding), expected)


def test_swapping_twice_or_nothing_raises() -> None:
    with pytest.raises(ValueError, match="swapped already"):
        swap(swapped(model()))
    with pytest.raises(ValueError, match="found none"):
        swap(nn.Sequential(nn.Linear(2, 2)))


# ---------------------------------------------------------------------- what is left alone


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return 2 * self.base(x)


def _hook(m: BEiT3) -> None:
    m.encoder.layers[1].ffn.B.register_forward_hook(lambda *_: None)


def _adapter(m: BEiT3) -> None:
    m.encoder.layers[1].self_attn.q_proj.B = LowRank(m.encoder.layers[1].self_attn.q_proj.B)


def _parametrised(m: BEiT3) -> None:
    nn.utils.parametrizations.weight_norm(m.encoder.layers[0].ffn.A.fc2)


def _patched(m: BEiT3) -> None:
    attn = m.encoder.layers[0].self_attn
    attn.forward = attn.forward


def _subclassed(m: BEiT3) -> None:
    attn = m.encoder.layers[0].self_attn
    dilated = type("DilatedAttention", (type(attn),), {"forward": lambda self, *a, **k: None})
    dilated.forward.__qualname__ = "DilatedAttention.forward"
    attn.__class__ = dilated


def _other_eps(m: BEiT3) -> None:
    m.encoder.layer_norm.B.eps = 1e-3


def _activation(m: BEiT3) -> None:
    m.encoder.layers[0].ffn.A.activation_fn = torch.tanh


def _moe(m: BEiT3) -> None:
    m.encoder.layers[1].is_moe_layer = True


CHANGES = [
    (_hook, "layers.1.ffn.B carries hooks"),
    (_adapter, "layers.1: self_attn.q_proj.B is a LowRank"),
    (_parametrised, "layers.0: ffn.A.fc2 is a ParametrizedLinear"),
    (_patched, "layers.0.self_attn has a patched forward"),
    (_subclassed, "layers.0: DilatedAttention has another forward"),
    (_other_eps, "layer_norm.A and layer_norm.B have different eps"),
    (_activation, "ffn.A: the kernels do not have its activation"),
    (_moe, "mixture-of-experts"),
]
SETTINGS = [
    (dict(dropout=0.1), "dropout 0.1"),
    (dict(attention_dropout=0.1), "dropout 0.1"),
    (dict(activation_dropout=0.1), "dropout 0.1"),
    (dict(subln=False, encoder_normalize_before=False), "post-norm"),
    (dict(subln=False, deepnorm=True), "post-norm"),
    (dict(xpos_rel_pos=True), "xpos"),
    (dict(rel_pos_buckets=8, max_rel_pos=16), "relative_position"),
    (dict(checkpoint_activations=True), "patched forward"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_changed_encoders_are_left_alone_and_named(change, reason: str) -> None:
    changed = model()
    change(changed)
    with pytest.raises(ValueError, match="encoder: ") as error:
        swap(changed)
    assert reason in str(error.value)


@pytest.mark.parametrize(("settings", "reason"), SETTINGS, ids=[",".join(s) for s, _ in SETTINGS])
def test_settings_without_kernels_are_left_alone_and_named(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match="encoder: ") as error:
        swap(model(**settings))
    assert reason in str(error.value)


def test_dropout_runs_on_the_kernels_in_eval_and_on_the_original_in_training() -> None:
    plain = model(dropout=0.5).eval()
    ours = swapped(copy.deepcopy(plain))
    expected = output(swapped(model().eval()))
    assert torch.equal(output(ours), expected)
    ours.train(), plain.train()
    results = []
    for net in (ours, plain):
        torch.manual_seed(0)
        results.append(output(net))
    assert torch.equal(*results) and not torch.equal(results[0], expected)


def test_one_encoder_of_two_is_swapped() -> None:
    pair = nn.ModuleList([model(), model(seed=1)])
    _hook(pair[1])
    report = swap(pair)
    assert list(report.replaced) == ["0.encoder"]
    assert "carries hooks" in report.left["1.encoder"]


@pytest.mark.parametrize("change", [_hook, _adapter, _parametrised], ids=lambda c: c.__name__)
def test_changes_after_the_swap_are_obeyed(change) -> None:
    ours, plain = swapped(model()), model()
    change(ours)
    change(plain)
    assert torch.equal(output(ours), output(plain))


def test_calls_without_kernels_go_to_the_original() -> None:
    plain = model()
    ours = swapped(plain)
    given = batch("both")
    n = PATCHES + TEXT
    causal = torch.triu(torch.ones(n, n), 1)
    cases = (dict(attn_mask=causal), dict(incremental_state={i: {} for i in range(2)}))
    for case in cases:
        with torch.no_grad():
            mine, eager = (net(**given, **copy.deepcopy(case))["encoder_out"] for net in (ours, plain))
        assert torch.equal(mine, eager)
    # Without a position, torchscale goes by the one of the last call.
    arguments = dict(src_tokens=None, token_embeddings=torch.randn(BATCH, n, 32))
    with torch.no_grad():
        mine, eager = (net.encoder(**arguments)["encoder_out"] for net in (ours, plain))
    assert torch.equal(mine, eager)
