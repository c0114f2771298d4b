"""The C++ tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vlmo_kernels.runtime import compiled

ROOT = Path(__file__).resolve().parents[2]
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
FLAGS = {  # ascending, as csrc/include/vlmo_kernels/cpu_isa.h
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
OPS = compiled.cpu_ops()
HERE = tuple(FLAGS)[: OPS.isa() + 1] if OPS else ("portable",)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("level", sorted({"portable", *HERE[1:2], *HERE[-1:]}))
@pytest.mark.parametrize("kernels", ["attention", "dense"])
def test_clean(kernels: str, level: str, tmp_path: Path) -> None:
    """Every buffer of a C++ test is exactly as large as it must be; AddressSanitizer sees one step outside."""
    if kernels == "dense" and level == "amx":
        level = "avx512bf16"  # the dense kernels that are used there
    program = tmp_path / kernels
    command = [
        "g++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        f"-I{ROOT}/csrc/include", *FLAGS[level].split(), f"-DVLMO_LEVEL={level}",
        str(ROOT / f"tests/compiled/{kernels}_test.cpp"), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
