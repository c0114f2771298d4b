"""The build of csrc: what may include what, symbols, loading, and what happens when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from vlmo_kernels.runtime import compiled

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HEADERS = sorted((CSRC / "include").rglob("*.h"))
GXX = shutil.which("g++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
TORCH = Path(torch.__file__).parent
needs_gxx = pytest.mark.skipif(GXX is None, reason="g++ is not installed")
PARTS = ("vlmo_kernels_cpu", "host_planner")


def run(*command, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "VLMO_KERNELS_COMPILED": "", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


# ---------------------------------------------------------------------------- headers


@pytest.mark.parametrize("header", HEADERS, ids=lambda p: p.name)
def test_headers_know_no_torch(header: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', header.read_text(), re.M)
    assert not [name for name in included if name.split("/")[0] in ("torch", "ATen", "c10", "pybind11")]


@needs_gxx
@pytest.mark.parametrize("header", HEADERS, ids=lambda p: p.name)
def test_headers_compile_alone(header: Path) -> None:
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}/include"]
    done = run(GXX, *flags, "-x", "c++", "-include", header, "/dev/null")
    assert done.returncode == 0, done.stderr


@needs_gxx
@pytest.mark.parametrize("name", ("attention", "dense", "norm"))
def test_portable_kernels_need_no_x86(name: str, tmp_path: Path) -> None:
    """An Arm machine compiles them too: here with the name of this processor family taken away."""
    system = "#include <stddef.h>\n#include <stdint.h>\n#undef __x86_64__\n"
    source = tmp_path / "elsewhere.cpp"
    source.write_text(f'{system}#include "{CSRC}/cpu/{name}_portable.cpp"\n')
    done = run(GXX, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}/include", source)
    assert done.returncode == 0, done.stderr


def test_sources_keep_to_the_stable_interface() -> None:
    """ATen and c10 tie a build to one torch; the stable headers do not."""
    for source in (p for p in CSRC.rglob("*.*") if p.suffix in (".cpp", ".cu", ".h")):
        for name in re.findall(r"^\s*#\s*include\s*<([^>]+)", source.read_text(), re.M):
            torch_header = name.split("/")[0] in ("torch", "ATen", "c10")
            stable = name.startswith(("torch/csrc/stable/", "torch/headeronly/"))
            assert not torch_header or (stable and source.parent.name == "torch"), f"{source.name}: {name}"


# ---------------------------------------------------------------------------- what was built


@pytest.mark.skipif(
    GXX is None or os.environ.get("VLMO_KERNELS_COMPILED") == "0", reason="no g++, or VLMO_KERNELS_COMPILED=0"
)
@pytest.mark.parametrize("part", PARTS)
def test_a_compiler_means_compiled_parts(part: str) -> None:
    assert compiled.why_not(part) is None


def built(part: str) -> Path:
    found = [p for p in compiled.FOLDER.glob(f"{part}.*") if p.suffix == ".so"]
    if not found:
        pytest.skip(f"{part} is not built")
    return found[0]


def stable_functions() -> set[str]:
    """The C functions that torch promises to keep, as its headers show them to a build for torch 2.10."""
    source = "#include <torch/csrc/stable/c/shim.h>\n"
    flags = ["-E", "-P", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", f"-I{TORCH}/include"]
    done = subprocess.run([GXX, *flags, "-x", "c++", "-"], input=source, capture_output=True, text=True, check=True)
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", done.stdout))


def assert_stable(library: Path) -> None:
    undefined = run("nm", "-D", "--undefined-only", library).stdout.splitlines()
    names = {line.split()[-1] for line in undefined}
    ours = {name for name in names if "torch" in name or re.match(r"_Z.*(2at|3c10|5torch)", name)}
    assert ours and ours <= stable_functions(), ours - stable_functions()


@needs_gxx
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_ops_use_nothing_but_the_stable_interface_of_2_10() -> None:
    assert_stable(built("vlmo_kernels_cpu"))


@pytest.mark.slow
@needs_gxx
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_the_cuda_part_builds_without_a_gpu_or_a_cuda_torch(tmp_path: Path) -> None:
    asked = {"VLMO_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ""}
    done = run(sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--build-lib", tmp_path, **asked)
    assert done.returncode == 0, done.stderr
    library = tmp_path / "vlmo_kernels" / "lib" / "vlmo_kernels_cuda.so"
    assert_stable(library)
    code = library.read_bytes()
    for arch in (80, 90, 100, 120):
        assert b"sm_%d" % arch in code, arch
    needed = run("readelf", "-d", library).stdout
    assert "[libtorch_cpu.so]" in needed and "[libtorch_cuda.so]" in needed, "loads under a CUDA torch"


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_no_function_is_compiled_for_two_instruction_sets() -> None:
    """The linker keeps one of several equal inline functions: AVX-512 code in a function that every CPU calls."""
    objects = list((ROOT / "build").glob("temp*/vlmo_kernels_cpu/*.o"))
    if not objects:
        pytest.skip("the CPU part was not built in this tree")
    sets = defaultdict(set)
    for path in objects:
        isa = re.search(r"_(avx2|avx512|avx512bf16|amx)\.cpp\.o$", path.name)
        for line in run("nm", "--defined-only", path).stdout.splitlines():
            _, kind, name = line.split()[-3:]
            if kind == "W":
                sets[name].add(isa.group(1) if isa else "baseline")
    shared = {name: found for name, found in sets.items() if len(found) > 1}
    assert not shared, shared


def test_isa_can_be_lowered() -> None:
    built("vlmo_kernels_cpu")
    program = "from vlmo_kernels.runtime import compiled; print(compiled.cpu_ops().isa())"
    done = run(sys.executable, "-c", program, VLMO_KERNELS_ISA="portable")
    assert done.returncode == 0 and done.stdout == "0\n", done.stderr


# ---------------------------------------------------------------------------- when something is wrong


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder in place of the compiled parts, and nothing remembered."""
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    monkeypatch.delenv("VLMO_KERNELS_COMPILED", raising=False)
    for function in (compiled._ops, compiled._host_planner):
        function.cache_clear()
    yield tmp_path
    for function in (compiled._ops, compiled._host_planner):
        function.cache_clear()


def test_what_is_not_built_is_said_with_the_command_that_mends_it(elsewhere) -> None:
    assert compiled.cpu_ops() is None and compiled.host_planner() is None and compiled.cuda_ops() is None
    mend = "not built. Hint: python setup.py build_ext --inplace"
    expected = {"compiled CPU ops": mend, "host planner": mend, "compiled CUDA ops": mend}
    if not torch.version.cuda:
        expected["compiled CUDA ops"] = "they need a CUDA build of torch"
    assert dict(compiled.report()) == expected


def test_what_does_not_load_is_said(elsewhere) -> None:
    for name in ("vlmo_kernels_cpu.so", "vlmo_kernels_cuda.so"):
        (elsewhere / name).write_bytes(b"no library")
    assert compiled.cpu_ops() is None
    assert re.match(r"vlmo_kernels_cpu.so does not load: .+ Hint: python", compiled.why_not("vlmo_kernels_cpu"))
    if not torch.version.cuda:
        assert compiled.why_not("vlmo_kernels_cuda") == "they need a CUDA build of torch"


def test_every_op_is_listed() -> None:
    built("vlmo_kernels_cpu")
    assert compiled.cpu_ops() is not None
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    assert {op for space, _, op in names if space == "vlmo_kernels_cpu"} == set(compiled.OPS["vlmo_kernels_cpu"])


def test_a_build_without_an_op_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update the old library may still lie there: the slower path, not an AttributeError in a forward."""
    built("vlmo_kernels_cpu")
    monkeypatch.setitem(compiled.OPS, "vlmo_kernels_cpu", ("isa", "op_of_tomorrow"))
    compiled._ops.cache_clear()
    try:
        assert compiled.cpu_ops() is None
        assert "older sources, without op_of_tomorrow. Hint: python setup.py" in compiled.why_not("vlmo_kernels_cpu")
    finally:
        compiled._ops.cache_clear()


def test_a_build_older_than_its_sources_is_said(elsewhere) -> None:
    (elsewhere / "vlmo_kernels_cpu.so").write_bytes(b"no library")
    os.utime(elsewhere / "vlmo_kernels_cpu.so", (0, 0))
    assert re.match(r"older than csrc/\S+\. Hint: python", dict(compiled.report())["compiled parts"])


def test_no_compiler_is_no_obstacle() -> None:
    done = run(sys.executable, "-W", "ignore", "setup.py", "--name", CXX="/bin/false")
    assert done.returncode == 0 and done.stdout.split()[-1] == "vlmo_kernels"
    assert "the compiled parts need a C++ compiler" in done.stderr and "Going on without them" in done.stderr


def test_no_compiler_is_an_error_for_who_asks_to_build() -> None:
    for command, environment in ((("build_ext", "--inplace"), {}), (("--name",), {"VLMO_KERNELS_COMPILED": "1"})):
        done = run(sys.executable, "-W", "ignore", "setup.py", *command, CXX="/bin/false", **environment)
        assert done.returncode == 1, done.stdout
        assert "vlmo_kernels: the compiled parts need a C++ compiler (g++, or CXX=...)" in done.stderr
        assert "Traceback" not in done.stderr


def test_cuda_that_was_asked_for_needs_nvcc(tmp_path: Path) -> None:
    asked = {"VLMO_KERNELS_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    done = run(sys.executable, "-W", "ignore", "setup.py", "--name", **asked)
    assert done.returncode == 1 and "nvcc (on PATH, or CUDA_HOME=...)" in done.stderr


# ---------------------------------------------------------------------------- sanitizers


@pytest.mark.slow
@needs_gxx
def test_planners_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source, program = ROOT / "tests" / "compiled" / "planner_test.cpp", tmp_path / "planner_test"
    compiling = run(GXX, *flags, "-Wall", "-Wextra", f"-I{CSRC}/include", source, "-o", program)
    assert compiling.returncode == 0, compiling.stderr
    done = run(program, "5000")
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr
