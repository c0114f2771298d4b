"""Tests of the tests: kernels with one expression wrong, in the ways kernels go wrong, and each of them caught.

A mutant is the source of a kernel module with one expression replaced, loaded under another name and put wherever
other modules hold the original. The comparisons are those of the other files here. A reload without a change passes
all of them, so what fails is the change.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.interpreter import test_pack as pack
from tests.interpreter import test_routed_ffn as ffn
from tests.interpreter import test_routed_linear as linear
from tests.interpreter import test_routed_norm as norm
from tests.interpreter import test_shared_attention as attention

PACKAGE = "vlmo_kernels.kernels"
MODULES = ("gemm", "gemm_grad", "bias_grad", "inner_norm", "norm_fwd", "norm_bwd", "attention_fwd", "attention_bwd",
           "pack")  # fmt: skip
FP32, BF16 = torch.float32, torch.bfloat16
LONG = ((9, 90), (70, 0))  # several tiles of queries and keys, the last ones ragged


def check_linear() -> None:
    """Three experts and no dead rows, so that what is written past the end meets the red zone."""
    linear.compare(linear.Case("three experts", 40, 37, FP32, full=True))


def check_residual() -> None:
    linear.compare(linear.Case("dead rows", 34, 50, FP32, full=True, residual=FP32))


def check_split() -> None:
    linear.compare(linear.Case("split rows", 20, 20, FP32, full=True))


def check_ffn() -> None:
    ffn.compare(ffn.Case("dead rows", FP32, "geglu", d=20, f=20, gamma=True, drop=True))


def check_ffn_plain() -> None:
    """Without a row scale, whose zeros past a segment's end would hide what is added up there."""
    ffn.compare(ffn.Case("dead rows", FP32, "gelu", d=20, f=20))


def check_inner_norm() -> None:
    ffn.compare(ffn.Case("dead rows", FP32, "gelu", d=20, f=20, norm=True))


def check_norm() -> None:
    norm.compare(norm.Case("three experts", 37, FP32, "layer", residual=FP32))


def check_norm_dead() -> None:
    norm.compare(norm.Case("dead rows", 37, FP32, "layer"))


def check_attention() -> None:
    """Grouped queries, so that backward takes its two-kernel route."""
    attention.test_against_fp64(attention.Case(LONG, kv_heads=1, dtype=BF16))


def check_masked() -> None:
    attention.test_against_fp64(
        attention.Case(LONG, kv_heads=1, bias="fp32", causal=True, text_room=12, dtype=BF16)
    )


def check_short() -> None:
    attention.test_against_fp64(attention.Case(((9, 60), (30, 0)), heads=1, kv_heads=1, bias="fp32", dtype=BF16))


def check_neighbours() -> None:
    attention.test_another_samples_infinities_stay_there()


def check_pack() -> None:
    pack.test_writes_all_of_its_output_and_nothing_else()
    pack.test_gathers(13, 37, 40, FP32)


# (name, module, expression, what stands in its place, the comparison that must fail)
MUTANTS: list[tuple[str, str, str, str, Callable[[], None]]] = [
    # the routed GEMM
    ("a row past the segment", "gemm", "(row < end - first)", "(row <= end - first)", check_linear),
    ("a column past the end", "gemm", "(cols < N)[None, :]\n    base", "(cols <= N)[None, :]\n    base",
     check_linear),
    ("a column too few", "gemm", "(cols < N)[None, :]\n    base", "(cols < N - 1)[None, :]\n    base",
     check_linear),
    ("a step past the contraction", "gemm", "(k < left)", "(k <= left)", check_residual),
    ("no tail of the contraction", "gemm", "(K + BK - 1) // BK", "K // BK", check_linear),
    ("no last row tile", "gemm", "count += tl.cdiv(rows, BM)", "count += rows // BM", check_linear),
    ("no last column tile", "gemm", "(N + BN - 1) // BN", "N // BN", check_linear),
    ("experts swapped", "gemm", "tl.where(hit, i, segment)", "tl.where(hit, SEGMENTS - 1 - i, segment)", check_linear),
    ("one expert for all", "gemm", "w = select(W, segment, SEGMENTS)", "w = W[0]", check_linear),
    ("no bias", "gemm", "acc += load_vector(BIAS,", "load_vector(BIAS,", check_linear),
    ("a bias where there is none", "gemm", "((mask >> index) & 1) == 1", "(mask >> index) >= 0", check_linear),
    ("no gamma", "gemm", "acc *= load_vector(GAMMA,", "load_vector(GAMMA,", check_linear),
    ("no row scale", "gemm", "acc *= tl.load(ROW_SCALE", "tl.load(ROW_SCALE", check_linear),
    ("no residual", "gemm", "acc += tl.load(residual", "tl.load(residual", check_residual),
    ("halves of a tile exchanged", "gemm", "return left, right", "return right, left", check_linear),
    ("gate without up", "gemm", "acc *= up", "acc *= 1.0", check_ffn),
    ("no bias of up", "gemm", "up += load_vector(BIAS_UP,", "load_vector(BIAS_UP,", check_ffn),
    # its gradients
    ("no slope", "gemm_grad", "acc *= slope", "acc *= 1.0", check_ffn),
    ("up's gradient without the activation", "gemm_grad", "d_up = acc * value", "d_up = acc * pre", check_ffn),
    ("hidden values without row scale", "gemm_grad", "hidden *= scale", "hidden *= 1.0", check_ffn),
    ("no second product", "gemm_grad", "acc = accumulate(acc, DY_UP,", "accumulate(acc, DY_UP,", check_ffn),
    ("db with the next expert's rows", "gemm_grad", "tl.sum(tl.where(inside, acc, 0.0), 0)", "tl.sum(acc, 0)",
     check_ffn_plain),
    ("dead rows left", "gemm_grad", "if ZERO_TAIL:", "if False:", check_residual),
    ("a dead row left", "gemm_grad", "(rows < T)[:, None]", "(rows < T - 1)[:, None]", check_residual),
    ("dw with the next expert's row", "gemm_grad", "(step < count - i", "(step <= count - i", check_linear),
    ("dw without the last rows", "gemm_grad", "tl.cdiv(count, BK), 1)", "count // BK, 1)", check_linear),
    ("dw without its last part", "gemm_grad", "tl.range(first, end):", "tl.range(first, end - 1):", check_split),
    ("dgamma without the bias", "bias_grad", "dgamma += total * bias", "dgamma += 0 * bias", check_linear),
    ("db without gamma", "bias_grad", "db *= tl.load(", "tl.load(", check_linear),
    ("db without the last tile", "bias_grad", "== SLOTS[i], count, 0)", "== SLOTS[i], count - 1, 0)", check_linear),
    ("inner norm of the padded width", "inner_norm", "mean = tl.sum(total, 0) / N", "mean = tl.sum(total, 0) / BN",
     check_inner_norm),
    # the norm
    ("norm: a column past the end", "norm_fwd", "in_row = column < D", "in_row = column <= D", check_norm),
    ("norm: no last row", "norm_fwd", "live = row < tl.load(", "live = row + 1 < tl.load(", check_norm_dead),
    ("norm: experts swapped", "norm_fwd", "tl.load(weights[s] +", "tl.load(weights[len(BOUNDS) - 2 - s] +", check_norm),
    ("norm: no bias", "norm_fwd", "out += tl.load(biases[s]", "tl.load(biases[s]", check_norm),
    ("norm: no residual", "norm_fwd", "value += tl.load(residual", "tl.load(residual", check_norm),
    ("norm: a row past the segment", "norm_bwd", "own = row < end", "own = row <= end", check_norm),
    ("norm: no mean of the gradient", "norm_bwd", "inner -= (tl.sum(grad, 1) / D)", "inner -= (0 * tl.sum(grad, 1))",
     check_norm),
    ("norm: no last slot", "norm_bwd", "(end - 1) // block + s + 1", "(end - 1) // block + s", check_norm),
    # attention
    ("a key past the sample", "attention_fwd", "tl.where(jk < n, 0.0", "tl.where(jk <= n, 0.0", check_attention),
    ("no last key tile", "attention_fwd", "tl.cdiv(end, BN)", "end // BN", check_attention),
    ("sum not rescaled", "attention_fwd", "total * rescale + tl.sum", "total + tl.sum", check_attention),
    ("wrong key head", "attention_fwd", "hk = h // GROUP", "hk = (h + 1) // GROUP", check_attention),
    ("no diagonal", "attention_fwd", "pk[None, :] <= pq[:, None]", "pk[None, :] < pq[:, None]", check_masked),
    ("no attention bias", "attention_fwd", "dot * score_scale + bias", "dot * score_scale", check_masked),
    ("bias by token", "attention_fwd", "bias_h, bias_rows, pk)", "bias_h, bias_rows, jk)", check_masked),
    ("another sample's row", "attention_fwd", "tl.minimum(j, n - 1)", "tl.minimum(j, n)", check_neighbours),
    ("dq without delta", "attention_bwd", "ds = p * (dp - delta[:, None])", "ds = p * dp", check_attention),
    ("dq without the last key tile", "attention_bwd", "tl.cdiv(end, BN)", "end // BN", check_attention),
    ("dk of one query head", "attention_bwd", "steps * GROUP", "steps", check_attention),
    ("dk with dead queries", "attention_bwd", 'tl.where(live, lse, float("inf"))', "lse", check_attention),
    ("dk without the diagonal", "attention_bwd", "pk[:, None] <= pq[None, :]", "pk[:, None] < pq[None, :]",
     check_masked),
    ("short: no last key tile", "attention_bwd", "tl.cdiv(n, BN)", "n // BN", check_short),
    ("short: a dead key stored", "attention_bwd", "key_live = jk < n", "key_live = jk <= n", check_short),
    ("dbias without a sample", "attention_bwd", "tl.maximum(B, 1)", "tl.maximum(B - 1, 1)", check_short),
    # pack
    ("row 0 taken for padding", "pack", "(chosen >= 0)", "(chosen > 0)", check_pack),
    ("a row past the output", "pack", "mask=inside[:, None]", "mask=(row <= rows)[:, None]", check_pack),
]  # fmt: skip
CHECKS = list(dict.fromkeys(entry[-1] for entry in MUTANTS))


def replace_kernels(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, old: str, new: str) -> None:
    """Put the functions of a changed copy of `module` wherever a kernel module or a test here holds its own."""
    original = importlib.import_module(f"{PACKAGE}.{module}")
    source = Path(original.__file__).read_text()
    assert old in source, f"{module} no longer has {old!r}"
    path = folder / f"{module}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.changed_{module}", path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    functions = (FunctionType, InterpretedFunction)
    both = vars(original).keys() & vars(changed).keys()  # the interpreter leaves helpers of its own in a module it ran
    substitutes = {id(vars(original)[n]): vars(changed)[n] for n in both if isinstance(vars(original)[n], functions)}
    for name, holder in list(sys.modules.items()):
        if name.startswith(PACKAGE + "."):
            for attribute, value in list(vars(holder).items()):
                if id(value) in substitutes:
                    monkeypatch.setattr(holder, attribute, substitutes[id(value)])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0].replace(" ", "_"))
def test_is_caught(mutant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, module, old, new, check = mutant
    replace_kernels(monkeypatch, tmp_path, module, old, new)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_unchanged_copies_pass(check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in MODULES:
        replace_kernels(monkeypatch, tmp_path, module, "import triton", "import triton")
    check()
