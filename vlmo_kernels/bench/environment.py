"""What this machine is: versions, CPU, GEMM library, GPU, implementations. Nothing here raises."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from itertools import product
from pathlib import Path

import torch

from .display import each_reason_once

_PACKAGES = ("torch", "triton", "xformers", "torchscale")


def version_of(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@cache
def cpu_name() -> str:
    """Model name of the CPU."""
    try:
        fields = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        fields = []
    return fields[0].strip() if fields else platform.processor() or platform.machine() or "unknown"


@cache
def _cpu_vendor() -> str:
    try:
        found = re.search(r"^vendor_id\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1).strip() if found else "unknown vendor"


def cpu_supports_bf16() -> bool:
    """Whether oneDNN has bf16 arithmetic on this CPU."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


@cache
def gemm_library() -> str:
    """Which library `F.linear` calls on the CPU, as far as torch's build tells."""
    config = torch.__config__.show()
    mkl = re.search(r"(?:oneAPI )?Math Kernel Library Version ([\d.]+)", config)
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", config)
    blas = re.search(r"BLAS_INFO=(\w+)", config)
    if torch.backends.mkl.is_available():
        fp32 = f"MKL {mkl.group(1) if mkl else ''}".strip()
    else:
        fp32 = blas.group(1) if blas else "an unknown BLAS"
    low = f"oneDNN {onednn.group(1) if onednn else ''}".strip()
    low = low if torch.backends.mkldnn.is_available() else fp32
    return f"fp32 {fp32}, bf16 {low}, on {_cpu_vendor()}"


def versions() -> dict[str, str]:
    """What a benchmark row records."""
    from vlmo_kernels import __version__

    found = {"vlmo_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found["triton"] = version_of("triton")
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found | {"gemm": gemm_library(), "threads": str(torch.get_num_threads())}


@cache
def commit() -> str | None:
    """Commit of the source tree, with "-dirty" for local changes other than results; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", *args], cwd=root, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return f"{head}-dirty" if head and git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results") else head


def device_name(device: torch.device | str) -> str:
    """Name of the GPU, or of the CPU with its instruction set."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def _line(function) -> str:
    try:
        return str(function())
    except Exception as error:  # a report that stops halfway helps nobody
        return f"could not be told ({type(error).__name__}: {error})"


def _cpu_flags() -> str:
    flags = set(re.findall(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
    return ", ".join(f for f in known if f in flags) or "none of " + ", ".join(known)


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return ", ".join(found)


def _compiler() -> str:
    path = shutil.which(os.environ.get("CXX", "g++"))
    return path or "none found; torch.compile on the CPU needs one"


def _compiled_parts() -> list[tuple[str, str]]:
    from vlmo_kernels.runtime import compiled

    try:
        return compiled.report()
    except Exception as error:  # a report that stops halfway helps nobody
        return [("compiled parts", f"could not be told ({type(error).__name__}: {error})")]


def report() -> list[tuple[str, str]]:
    """(what, value) lines of `vlmo-kernels info`."""
    lines = [("python", _line(platform.python_version)), ("platform", _line(platform.platform))]
    lines += [(name, _line(lambda name=name: version_of(name))) for name in _PACKAGES]
    lines += [
        ("vlmo_kernels", _line(lambda: versions()["vlmo_kernels"])),
        ("commit", _line(lambda: commit() or "not a source tree")),
        ("CPU", _line(cpu_name)),
        ("torch's CPU kernels", _line(torch.backends.cpu.get_cpu_capability)),
        ("CPU instructions", _line(_cpu_flags)),
        ("bf16 in oneDNN", _line(lambda: "yes" if cpu_supports_bf16() else "no")),
        ("F.linear", _line(gemm_library)),
        ("threads", _line(torch.get_num_threads)),
        ("C++ compiler", _line(_compiler)),
        *_compiled_parts(),
        ("GPU", _line(_gpus)),
        ("CUDA of torch", _line(lambda: torch.version.cuda or "none, a CPU build")),
    ]
    return lines


def implementations() -> tuple[list[tuple[str, str, str, str]], list[tuple[str, str]]]:
    """(op, device, dtypes, implementation) for every op, and notes: which do not run there, and why."""
    from vlmo_kernels.bench.probe import EXPLAINED_OPS, explain_op

    devices = ["cpu"] + (["cuda"] if _line(torch.cuda.is_available) == "True" else [])
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    runs, reasons = defaultdict(list), []
    for op, device, dtype in product(EXPLAINED_OPS, devices, dtypes):
        short = str(dtype).removeprefix("torch.")
        try:
            found = explain_op(op, device, dtype)
            chosen, rejected = found.chosen or "none", found.rejected
            reasons += [(f"not {name} on {device}", f"{op} {short}", why) for name, why in rejected.items()]
        except Exception as error:  # a report that stops halfway helps nobody
            chosen = "unknown"
            reasons.append((f"{chosen} on {device}", f"{op} {short}", f"{type(error).__name__}: {error}"))
        runs[op, device, chosen].append(short)
    rows = [(op, device, ", ".join(names), chosen) for (op, device, chosen), names in runs.items()]
    return rows, each_reason_once(reasons, len(EXPLAINED_OPS) * len(dtypes))
