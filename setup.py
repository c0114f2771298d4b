"""Packages and the optional compiled parts; everything else is in pyproject.toml. See csrc/README.md.

Environment:
    VLMO_KERNELS_COMPILED  unset: build the compiled parts where torch, ninja and a C++ compiler are found, and go on
                           without them where they are not or the build fails; 0: never; 1: they must be built.
    VLMO_KERNELS_CUDA      unset: the CUDA part with a CUDA build of torch and nvcc; 0: never; 1: it must be built.
    TORCH_CUDA_ARCH_LIST   architectures of the CUDA part, by default "8.0;9.0;10.0;12.0"; never the local GPU's.
    CXX, CUDA_HOME         the C++ compiler, by default g++, and where nvcc is, by default on PATH or /usr/local/cuda.
    MAX_JOBS               compiler processes at a time, by default what processors and free memory allow.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WANTED = os.environ.get("VLMO_KERNELS_COMPILED", "")
CUDA_WANTED = os.environ.get("VLMO_KERNELS_CUDA", "")
# `python setup.py build_ext` asks for the compiled parts; an installation merely likes to have them.
REQUIRED = "1" in (WANTED, CUDA_WANTED) or (WANTED != "0" and "build_ext" in sys.argv)
GIB = 1 << 30

CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -fno-math-errno -Wall -Wextra"
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of 2.10 and of every later torch
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# By the end of a file's name; such a file is left out on other processors than x86-64.
ISA_FLAGS = {
    "_avx2": AVX2,
    "_avx512": AVX512,
    "_avx512bf16": f"{AVX512} -mavx512bf16",
    "_amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}


class Part(NamedTuple):
    """One shared library.

    Attributes:
        module: dotted name of the file it becomes.
        sources: C++ and CUDA files.
        flags: for every source of it.
        link: for the linker, after the objects.
        python: whether it is a Python module (the others are loaded by torch).
    """

    module: str
    sources: list[Path]
    flags: str
    link: str
    python: bool = False


def torch_folder() -> Path | None:
    """Where torch is installed. It is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


@cache
def cxx() -> str | None:
    """The C++ compiler, if it compiles anything."""
    command = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <cstdint>\nint main() { return 0; }\n")
        try:
            subprocess.run(
                [*shlex.split(command), "-std=c++17", "-c", source, "-o", f"{folder}/probe.o"],
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError):
            return None
    return command


def ninja() -> str | None:
    beside = Path(sys.executable).with_name("ninja")  # installed in a virtual environment that is not activated
    return shutil.which("ninja") or (str(beside) if beside.exists() else None)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    known = Path(home or "/usr/local/cuda", "bin", "nvcc")
    return str(known) if known.exists() else (None if home else shutil.which("nvcc"))


def cuda_torch(torch: Path) -> bool:
    return any((torch / "lib").glob("*torch_cuda*"))


def what_is_missing() -> list[str]:
    found = {"torch": torch_folder(), "ninja (pip install ninja)": ninja(), "a C++ compiler (g++, or CXX=...)": cxx()}
    if CUDA_WANTED == "1":
        found["nvcc (on PATH, or CUDA_HOME=...)"] = nvcc()
    return [name for name, path in found.items() if path is None]


def cuda_flags() -> str:
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0;12.0"
    flags = ["-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"]
    for arch in archs.replace(" ", ";").split(";"):
        number, _, ptx = arch.partition("+")
        sm = number.replace(".", "")
        code = f"[compute_{sm},sm_{sm}]" if ptx else f"sm_{sm}"
        flags.append(f"-gencode=arch=compute_{sm},code={code}")
    return " ".join(flags)


def by_isa(folder: str) -> list[Path]:
    """The C++ files of a folder of csrc that this processor family can compile."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    files = sorted((CSRC / folder).glob("*.cpp"))
    return [f for f in files if x86 or not any(f.stem.endswith(isa) for isa in ISA_FLAGS)]


def parts() -> list[Part]:
    torch = torch_folder()
    headers = f"{TORCH_FLAGS} -isystem {torch}/include"
    registration = by_isa("torch")
    of_cuda = [f for f in registration if f.stem.endswith("_cuda")]
    cpu = [*by_isa("cpu"), *(f for f in registration if f not in of_cuda)]
    link = f"-L{torch}/lib -ltorch_cpu -Wl,-z,defs"
    found = [Part("vlmo_kernels.lib.vlmo_kernels_cpu", cpu, headers, link)]
    host = by_isa("host")
    if host:
        include = f"-isystem {torch}/include -isystem {sysconfig.get_path('include')}"  # pybind11 comes with torch
        found.append(Part("vlmo_kernels.lib.host_planner", host, include, "", python=True))
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    if kernels and CUDA_WANTED != "0" and (CUDA_WANTED == "1" or (cuda_torch(torch) and nvcc())):
        home = Path(nvcc() or "nvcc").parent.parent
        headers += f" -DUSE_CUDA -isystem {home}/include"
        # "." is the build folder, with the stand-in of libtorch_cuda that a CPU build of torch does not have.
        link = f"-L{torch}/lib -L. -Wl,--no-as-needed -ltorch_cpu -ltorch_cuda -L{home}/lib64 -lcudart_static"
        link += " -lpthread -ldl -lrt"
        found.append(Part("vlmo_kernels.lib.vlmo_kernels_cuda", [*kernels, *of_cuda], headers, link))
    return found


def jobs(per_job: int) -> int:
    """Compiler processes at a time: one a processor, as far as the free memory goes."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = 4 * GIB
    try:  # a container may have less than the machine
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(1, min(processors, free // per_job))


def ninja_file(part: Part, folder: Path, target: Path) -> str:
    def path(p: Path | str) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    include = f"-I{CSRC}/include"
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {cxx()} {CXX_FLAGS} {include} {part.flags} $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in",
        f"rule link\n  command = {cxx()} -shared -o $out $in {part.link}\n  description = link $out",
    ]
    if any(source.suffix == ".cu" for source in part.sources):
        compiler = f"{nvcc()} -ccbin {shlex.split(cxx())[0]} {cuda_flags()}"
        lines.append(f"rule nvcc\n  command = {compiler} {include} {part.flags} -MMD -MF $out.d -c $in -o $out")
        lines.append("  depfile = $out.d\n  deps = gcc\n  description = nvcc $in")
    objects = []
    for source in part.sources:
        objects.append(path(folder / f"{source.parent.name}_{source.name}.o"))
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {path(source)}")
        isa = next((flags for end, flags in ISA_FLAGS.items() if source.stem.endswith(end)), "")
        lines.append(f"  isa = {isa}")
    lines.append(f"build {path(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildWithNinja(build_ext):
    """Compile `parts()` with ninja, which also knows what is up to date."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2].startswith("vlmo_kernels_"):  # no Python module: one file for all versions
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        for part in parts():
            try:
                self.build_part(part)
            except (OSError, subprocess.CalledProcessError) as error:
                note = f"{part.module} could not be built: {error}. The command that tries again and shows everything: "
                note += "python setup.py build_ext --inplace"
                if REQUIRED:
                    sys.exit(f"vlmo_kernels: {note}")
                say(f"{note}. Going on without it: the library is complete, on slower paths")

    def build_part(self, part: Part) -> None:
        folder = (Path(self.build_temp) / part.module.rpartition(".")[2]).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(part.module)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.module.endswith("_cuda") and not cuda_torch(torch_folder()):
            # An empty library of that name: what is built against it loads under a CUDA build of torch.
            stand_in = f"{cxx()} -shared -Wl,-soname,libtorch_cuda.so -o libtorch_cuda.so -x c++ /dev/null"
            subprocess.run(stand_in, shell=True, check=True, cwd=folder)
        (folder / "build.ninja").write_text(ninja_file(part, folder, target))
        per_job = 3 * GIB if any(s.suffix == ".cu" for s in part.sources) else GIB
        subprocess.run([ninja(), "-C", str(folder), f"-j{jobs(per_job)}"], check=True, stdout=sys.stderr)


def say(note: str) -> None:
    print(f"vlmo_kernels: {note}", file=sys.stderr)


def extensions() -> list[Extension]:
    if WANTED == "0" or not CSRC.is_dir():
        return []
    missing = what_is_missing()
    if missing:
        note = f"the compiled parts need {' and '.join(missing)}"
        if torch_folder() is None:
            note += ". Hint: pip install --no-build-isolation lets the build see the torch that is installed"
        if REQUIRED:
            sys.exit(f"vlmo_kernels: {note}")
        say(f"{note}. Going on without them: the library is complete, on slower paths")
        return []
    return [Extension(part.module, [], optional=True) for part in parts()]


setup(
    packages=[
        *find_packages(include=["vlmo_kernels", "vlmo_kernels.*"]),
        *find_packages(where="python", include=["vlmo", "vlmo.*"]),
    ],
    package_dir={"vlmo": "python/vlmo"},
    package_data={
        "vlmo_kernels.demo_data": ["captions.json", "photos/*.jpg"],
        "vlmo_kernels.tuning": ["measured/*"],
    },
    include_package_data=False,
    zip_safe=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildWithNinja},
)
