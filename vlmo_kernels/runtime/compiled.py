"""The compiled parts (csrc), loaded when first asked for and never needed: each caller has another way."""

from __future__ import annotations

import importlib
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).resolve().parents[1] / "lib"
SOURCES = FOLDER.parents[1] / "csrc"
MEND = "python setup.py build_ext --inplace"
# What Python calls; a library of an earlier version may lack some.
OPS = {
    "vlmo_kernels_cpu": (
        "isa", "plan", "attention_forward", "attention_backward", "attention_dbias_groups", "norm_forward",
        "norm_backward", "column_sums", "pack_weight", "dense", "dense_backward", "weight_grad",
    ),
    "vlmo_kernels_cuda": ("plan",),
}  # fmt: skip
INSTRUCTIONS = ("portable", "AVX2", "AVX-512", "AVX-512 BF16", "AMX")


def cpu_ops():
    """The namespace `torch.ops.vlmo_kernels_cpu`, or None where it is not built or does not load."""
    return _ops("vlmo_kernels_cpu")[0]


def cuda_ops():
    """The namespace `torch.ops.vlmo_kernels_cuda`, or None where it is not built or does not load."""
    return _ops("vlmo_kernels_cuda")[0]


def host_planner() -> ModuleType | None:
    """The module that plans lengths known on the host, or None where it is not built or does not load."""
    return _host_planner()[0]


def why_not(part: str) -> str | None:
    """Why a part ("vlmo_kernels_cpu", "vlmo_kernels_cuda", "host_planner") is not there; None if it is."""
    return (_host_planner() if part == "host_planner" else _ops(part))[1]


def instructions() -> str | None:
    """The instruction set the compiled CPU kernels use now, or None where they are not there."""
    return INSTRUCTIONS[cpu_ops().isa()] if cpu_ops() else None


@cache
def _ops(name: str):
    path = FOLDER / f"{name}.so"
    if name == "vlmo_kernels_cuda" and not torch.version.cuda:
        return None, "they need a CUDA build of torch"
    if why := _switched_off_or_missing(path.exists()):
        return None, why
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # made for another system, or for a newer torch
        return None, f"{path.name} does not load: {error.__cause__ or error}. Hint: {MEND}"
    found = getattr(torch.ops, name)
    if missing := [op for op in OPS[name] if not hasattr(found, op)]:
        return None, f"{path.name} was built from older sources, without {', '.join(missing)}. Hint: {MEND}"
    return found, None


@cache
def _host_planner():
    if why := _switched_off_or_missing(any(FOLDER.glob("host_planner.*"))):
        return None, why
    try:
        return importlib.import_module("vlmo_kernels.lib.host_planner"), None
    except ImportError as error:  # made for another Python
        return None, f"host_planner does not load: {error}. Hint: {MEND}"


def _switched_off_or_missing(exists: bool) -> str | None:
    if os.environ.get("VLMO_KERNELS_COMPILED") == "0":
        return "switched off by VLMO_KERNELS_COMPILED=0"
    if exists:
        return None
    if SOURCES.is_dir():
        return f"not built. Hint: {MEND}"
    return f"not in this wheel. Hint: {MEND} in the source tree, then pip install --no-build-isolation ."


def report() -> list[tuple[str, str]]:
    """(part, what it is or why it is not there) lines of `vlmo-kernels info`."""
    cpu, planner, cuda = cpu_ops(), host_planner(), cuda_ops()
    return [
        ("compiled CPU ops", f"loaded, {instructions()}" if cpu else why_not("vlmo_kernels_cpu")),
        ("host planner", "loaded" if planner else why_not("host_planner")),
        ("compiled CUDA ops", "loaded" if cuda else why_not("vlmo_kernels_cuda")),
        *_stale(),
    ]


def _stale() -> list[tuple[str, str]]:
    # the newest: a build leaves those as they are whose sources have not changed
    built = max((path.stat().st_mtime for path in FOLDER.glob("*.so")), default=float("inf"))
    newer = [p for p in SOURCES.rglob("*.*") if p.suffix in (".cpp", ".cu", ".h") and p.stat().st_mtime > built]
    if not newer:
        return []
    return [("compiled parts", f"older than {newer[0].relative_to(SOURCES.parent)}. Hint: {MEND}")]
