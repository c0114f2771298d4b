"""The pages of docs: their Python runs, their worked examples are what is computed and measured, and they are short."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vlmo_kernels as vk
from vlmo_kernels.bench.cases import CASES
from vlmo_kernels.bench.flops import useful
from vlmo_kernels.bench.harness import saved_bytes

ROOT = Path(__file__).resolve().parents[2]
OPS = ("routed_linear", "routed_norm", "routed_ffn", "shared_attention", "mome_block")
SHORT = (*OPS, "layout", "environment", "versions")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Pages whose examples need the reader's own files: only their imports are run.
EXCERPTS = {"vlmo.md", "vlmo_data.md"}


def examples() -> list:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
            line = text[: match.start()].count("\n") + 1
            code = "\n" * line + match.group(1)  # a traceback names the line of the page
            found.append(pytest.param(page, code, id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize(("page", "code"), examples())
def test_examples_run(page: Path, code: str) -> None:
    tree = ast.parse(code, str(page))
    if page.name in EXCERPTS:
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert tree.body
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(tree, str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("op", [*OPS, "layout"])
def test_a_page_an_op_with_an_example(op: str) -> None:
    assert any(p.values[0].stem == op for p in examples())


@pytest.mark.parametrize("name", SHORT)
def test_pages_are_short(name: str) -> None:
    assert len((ROOT / "docs" / f"{name}.md").read_text().splitlines()) <= 90


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([\w./-]+\.md)\)", page.read_text()) + re.findall(r"`?\b(docs/\w+\.md)", page.read_text())
    for link in links:
        base = ROOT if link.startswith("docs/") else page.parent
        assert (base / link).exists(), link


# ---------------------------------------------------------------------------- worked examples: VLMo-Base, a pair of 237

D, HIDDEN, HEADS, TEXT, IMAGE = 768, 3072, 12, 40, 197
PAIR = replace(CASES["vlmo_base_pairs16"], text=(TEXT,), image=(IMAGE,))


def flops(suite: str, pass_: str) -> str:
    return f"{useful(suite, PAIR, pass_) / PAIR.tokens / 1e6:.2f}"


def product(n: int, k: int) -> str:
    return f"{2 * n * k / 1e6:.2f}"


def parameters(*shape: int) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape)) for _ in range(2)]


def kept(dtype: torch.dtype, op: str, **options) -> str:
    """Bytes a token that an op keeps for backward, without weights and the layout's tables, which all layers share."""
    layout = PAIR.layout("cpu")
    x = torch.randn(layout.tokens, D, dtype=dtype, requires_grad=True)
    vector, gamma = parameters(D), parameters(D)
    if op == "routed_linear":
        weights = [torch.nn.Parameter(p.to(dtype)) for p in parameters(D, D)]
        run = lambda: vk.routed_linear(x, weights, None, layout, gamma=gamma, residual=x)  # noqa: E731
    elif op == "routed_norm":
        run = lambda: vk.routed_norm(x, vector, gamma, layout)  # noqa: E731
    elif op == "routed_ffn":
        w1, w2 = ([torch.nn.Parameter(p.to(dtype)) for p in parameters(*s)] for s in ((HIDDEN, D), (D, HIDDEN)))
        run = lambda: vk.routed_ffn(x, w1, None, w2, None, layout, gamma=gamma, residual=x, **options)  # noqa: E731
    elif op == "shared_attention":
        qkv = torch.randn(layout.tokens, 3, HEADS, D // HEADS, dtype=dtype, requires_grad=True)
        run = lambda: vk.shared_attention(qkv, None, None, layout)  # noqa: E731
    else:
        block = vk.MoMEBlock(D, HEADS, **options).to(dtype)
        run = lambda: block(x, layout)  # noqa: E731
    of_samples = (layout.cu_seqlens, layout.rows, layout.positions)
    tables = of_samples if op == "shared_attention" else (layout.group_offsets,)  # host_offsets are the same tensor
    tables = (*of_samples, *tables) if op == "mome_block" else tables
    each, rest = divmod(saved_bytes(run) - sum(t.nbytes for t in tables), layout.tokens)
    assert rest == 0
    return f"{each:,}"


def expected(op: str) -> list[str]:
    fp32, bf16, full = torch.float32, torch.bfloat16, {"recompute": "full"}
    if op == "routed_linear":
        return [f"{product(3 * D, D)} MFLOP forward", f"output projection {product(D, D)};",
                f"{kept(fp32, op)} bytes in fp32", f"{kept(bf16, op)} in bf16"]  # fmt: skip
    if op == "routed_norm":
        moved = [f"{2 * D * size:,}" for size in (4, 2)]
        return [f"moves {moved[0]} bytes in fp32 and {moved[1]} in bf16",
                f"kept are {kept(fp32, op)} and {kept(bf16, op)} bytes"]  # fmt: skip
    if op == "routed_ffn":
        return [f"{flops('ffn', 'forward')} MFLOP forward, {flops('ffn', 'training')} in training",
                f"{kept(fp32, op)} bytes kept in fp32 and {kept(bf16, op)} in bf16",
                f"`: {kept(fp32, op, **full)} and {kept(bf16, op, **full)})"]  # fmt: skip
    if op == "shared_attention":
        return [f"{flops('attention', 'forward')} MFLOP forward, {flops('attention', 'training')} in training",
                f"{kept(fp32, op)} bytes in fp32, {kept(bf16, op)} in bf16",
                f"{HEADS * PAIR.tokens * 4:,} bytes a token"]  # fmt: skip
    share = useful("attention", PAIR, "forward") / useful("block", PAIR, "forward")
    return [f"{flops('block', 'forward')} MFLOP forward, of them {share:.1%} attention, and "
            f"{flops('block', 'training')} in training",
            f"{kept(fp32, op)} bytes in fp32 and {kept(bf16, op)} in bf16",
            f"{kept(fp32, op, **full)} and {kept(bf16, op, **full)} with"]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_worked_examples(op: str) -> None:
    page = " ".join((ROOT / "docs" / f"{op}.md").read_text().split())
    missing = [words for words in expected(op) if words not in page]
    assert not missing, missing
