"""Who may import whom, one name in every room, small files, a light import, and pinned op schemas."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlmo_kernels  # noqa: F401  (registers the ops)

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vlmo_kernels"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "python").rglob("*.py")])
OPS = {"mome_block", "routed_ffn", "routed_linear", "routed_norm", "shared_attention"}

# Layer to what it may import, besides itself and the standard library; `|lazy` inside functions only.
PLAIN_DATA = {"runtime.route", "runtime.sequences", "runtime.ffn_weights"}
ALLOWED = {
    "reference": {"torch", *PLAIN_DATA},
    "kernels": {"triton", "torch", "runtime", "tuning.tables"},
    "cpu": {"torch", "runtime", "reference"},  # falls back on the reference, part by part
    "ops": {"torch", "reference", "kernels", "cpu", "layout", "runtime"},
    "modules": {"torch", "ops", "layout", "runtime"},
    "swap": {"torch", "modules", "ops", "layout", "runtime"},
    "runtime": {"torch", "ops|lazy", "kernels|lazy", "triton|lazy", "tuning.tables|lazy"},
    "tuning": {"torch", "layout", "reference|lazy", "runtime", "bench", "kernels|lazy", "triton|lazy"},
    "layout": {"torch", "plan", "host_plan", "rows", "runtime"},
    "host_plan": {"torch", "runtime"},
    "plan": {"torch", "runtime"},
    "rows": {"torch", "runtime", "kernels|lazy"},
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """`(module, lazy)` of every import, relative ones resolved; a package import names the submodules."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef) or is_type_checking(outer)
        for node in ast.walk(outer)
    }
    package = list(path.relative_to(PACKAGE.parent).parent.parts) if path.is_relative_to(PACKAGE) else []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if (PACKAGE.parent / module.replace(".", "/")).is_dir():
                found += [(f"{module}.{alias.name}", id(node) in lazy) for alias in node.names]
            else:
                found.append((module, id(node) in lazy))
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def permitted(layer: str, module: str, lazy: bool) -> bool:
    if module.split(".")[0] in sys.stdlib_module_names:
        return True
    name = module.removeprefix("vlmo_kernels.")
    if name.split(".")[0] == layer:
        return True
    for allowed in ALLOWED[layer]:
        allowed, _, when = allowed.partition("|")
        if (name == allowed or name.startswith(allowed + ".")) and (lazy or not when):
            return True
    return False


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_what_it_may(layer: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if layer_of(path) == layer
        for module, lazy in imports(path)
        # A swap adapter may import the library it swaps, inside a function.
        if not permitted(layer, module, lazy) and not (layer == "swap" and lazy)
    ]
    assert not wrong, wrong


def test_the_rule_finds_a_wrong_import() -> None:
    assert not permitted("reference", "vlmo_kernels.kernels.pack", lazy=False)
    assert not permitted("rows", "vlmo_kernels.kernels", lazy=False)
    assert not permitted("ops", "triton", lazy=False) and not permitted("cpu", "numpy", lazy=True)
    assert permitted("rows", "vlmo_kernels.kernels", lazy=True) and permitted("ops", "math", lazy=False)


def test_nothing_imports_the_model() -> None:
    for path in PACKAGE.rglob("*.py"):
        if layer_of(path) not in ("demo_data", "demo", "cli", "bench"):
            assert not [m for m, _ in imports(path) if m.split(".")[0] == "vlmo"], path


def test_the_model_uses_public_names_only() -> None:
    for path in (ROOT / "python").rglob("*.py"):
        deep = [m for m, _ in imports(path) if m.startswith("vlmo_kernels.") and m.count(".") > 1]
        assert not deep, f"{path}: {deep}"


def stems(folder: str) -> set[str]:
    return {p.stem for p in (PACKAGE / folder).glob("*.py")}


def test_one_name_in_every_room() -> None:
    """An op's name stands in ops and in the references, and nowhere in a folder stands a stray one."""
    assert {s for s in stems("ops") if not s.startswith("_")} - {"common"} == OPS
    composed = {"mome_block"}  # made of the others
    assert stems("reference") - {"__init__", "common", "activations"} == OPS - composed
    pattern = re.compile(r"^(routed|shared|mome)_")
    for folder in ("cpu", "kernels", "modules"):
        named = {s for s in stems(folder) if pattern.match(s)}
        strays = {s for s in named if not any(s == op or s.startswith(op) for op in OPS | {"mome_encoder"})}
        assert not strays, (folder, strays)
    assert stems("cpu") & OPS == OPS - composed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= 500, f"{lines} lines"


def test_import_needs_torch_alone() -> None:
    """In a fresh process, with everything but torch's own needs made unimportable."""
    program = """
import sys
import torch
before = set(sys.modules)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.split(".")[0]
        if root in ("triton", "numpy", "typer", "rich", "tqdm", "matplotlib", "PIL", "xformers", "vlmo"):
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refuse())
import vlmo_kernels
new = {m.split(".")[0] for m in set(sys.modules) - before}
assert "triton" not in new and "numpy" not in new, new
assert not torch.cuda.is_initialized()
layout = vlmo_kernels.ModalityLayout.from_lengths({"text": [2], "image": 3})
vlmo_kernels.routed_linear(torch.ones(5, 4), [torch.ones(3, 4)] * 2, None, layout)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ROUTE = "Tensor offsets, Tensor? host_offsets, int[] segments"
MASKS = (
    "Tensor? bias, Tensor? prefix, Tensor cu_seqlens, Tensor rows, Tensor positions, SymInt max_seqlen, "
    "bool causal, float scale"
)
SCHEMAS = {
    "plan": "(Tensor ids, Tensor? mask, int modalities) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gather_rows": "(Tensor x, Tensor index, Tensor inverse) -> Tensor",
    "routed_linear": (
        f"(Tensor x, Tensor[] weights, int[] at, Tensor? residual, Tensor? row_scale, {ROUTE}, str impl) -> Tensor"
    ),
    "routed_linear_backward": (
        f"(Tensor dy, Tensor x, Tensor[] weights, int[] at, Tensor? row_scale, {ROUTE}, bool need_dx, "
        "bool[] need, str impl) -> (Tensor, Tensor[])"
    ),
    "routed_norm": (
        f"(Tensor x, Tensor? residual, Tensor[] weights, int[] at, {ROUTE}, str kind, float eps, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "routed_norm_backward": (
        f"(Tensor dy, Tensor? dz, Tensor z, Tensor[] weights, int[] at, Tensor mean, Tensor rstd, {ROUTE}, "
        "str kind, bool[] need, str impl) -> (Tensor, Tensor[])"
    ),
    "routed_ffn": (
        f"(Tensor x, Tensor[] weights, int[] at, Tensor? residual, Tensor? row_scale, {ROUTE}, str activation, "
        "float eps, bool save, str impl) -> (Tensor, Tensor, Tensor)"
    ),
    "routed_ffn_backward": (
        f"(Tensor dy, Tensor x, Tensor[] weights, int[] at, Tensor? pre, Tensor? up, Tensor? row_scale, {ROUTE}, "
        "str activation, float eps, bool need_dx, bool[] need, str impl) -> (Tensor, Tensor[])"
    ),
    "shared_attention": f"(Tensor q, Tensor k, Tensor v, {MASKS}, str impl) -> (Tensor, Tensor)",
    "shared_attention_backward": (
        f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {MASKS}, bool need_dbias, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "shared_attention_packed": f"(Tensor qkv, {MASKS}, str impl) -> (Tensor, Tensor)",
    "shared_attention_packed_backward": (
        f"(Tensor do, Tensor qkv, Tensor o, Tensor lse, {MASKS}, bool need_dbias, str impl) -> (Tensor, Tensor)"
    ),
}


def test_schemas() -> None:
    """Saved and exported programs name the ops by these; a change is a new op. No op writes to an argument."""
    names = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("vlmo_kernels::")}
    assert {n.partition(".")[0] for n in names} == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert str(getattr(torch.ops.vlmo_kernels, name).default._schema) == f"vlmo_kernels::{name}{schema}"
        assert not getattr(torch.ops.vlmo_kernels, name).default._schema.is_mutable
