"""Codegen audit: compile every shipped kernel for GPUs that are not there and read what came out.

Needs Triton, no GPU: `triton.compile` takes a target, and ptxas, cuobjdump and nvdisasm come inside Triton's
own package. Must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .audit_loops import steps_ahead
from .bench.display import progress
from .runtime.audit_case import AuditCase

ARCHS = (80, 90, 100, 120)

# Most shared memory of one program, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
SHARED_RESERVED = 1024  # of every program, taken from the SM's, not from the program's own
REGISTERS = 64 * 1024  # of an SM

# ptxas' advisories that wgmma was serialised: C7510 to C7515, each for another cause.
SERIALISED = re.compile(r"C751[0-5]")
MATRIX_INSTRUCTIONS = ("HGMMA", "UTCHMMA", "HMMA")


class AuditRow(NamedTuple):
    """One configuration on one architecture, sizes in bytes; `breach` is empty where all is well.

    `ahead`: steps that the main loops load ahead, None where nothing is copied asynchronously; see `audit_loops`.
    """

    kernel: str
    name: str
    arch: int
    registers: int
    spill: int
    shared: int
    hgmma: int
    utchmma: int
    hmma: int
    ahead: int | None
    warnings: str
    breach: str
    note: str


def kernel_modules() -> list[str]:
    """Names of the kernel modules that have `audit_cases`."""
    package = importlib.import_module("vlmo_kernels.kernels")
    names = sorted(f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(importlib.import_module(name), "audit_cases")]


def audit(
    modules: Sequence[str], archs: Sequence[int] = ARCHS, workers: int | None = None, brief: bool = False
) -> list[AuditRow]:
    """Compile every case of the given modules (brief: one of every kernel) for every architecture it ships for."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("audit: nothing is compiled under TRITON_INTERPRET=1. Hint: unset it.")
    jobs = [
        (module, index, arch) for module in modules for arch in archs for index, _ in _cases(module, arch, brief)
    ]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        return [_audit_job(job) for job in jobs]
    # processes, for Triton compiles under the interpreter lock; spawned, for torch's threads survive no fork
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn) as pool, progress("audit", len(jobs)) as bar:
        found = pool.map(_audit_job, jobs)
        for module, _, arch in jobs:
            bar.step(f"{module.rpartition('.')[2]} for sm_{arch}")
            rows.append(next(found))
    return rows


def _cases(module: str, arch: int, brief: bool) -> list[tuple[int, AuditCase]]:
    cases = importlib.import_module(module).audit_cases()
    ships = [(index, case) for index, case in enumerate(cases) if arch in case.archs]
    if not brief:
        return ships
    return list({_kernel_name(case): (index, case) for index, case in reversed(ships)}.values())


def audit_case(case: AuditCase, arch: int) -> AuditRow:
    """Compile one case and hold it against the limits."""
    try:
        compiled = _compile(case, arch)
    except Exception as error:  # whatever a compiler raises is a finding, and the other cases still count
        text = " ".join(str(error).split())[:200]
        breach = f"does not compile: {type(error).__name__}: {text}"
        return AuditRow(_kernel_name(case), case.name, arch, 0, 0, 0, 0, 0, 0, None, "", breach, "")
    registers, log, sass = _inspect(compiled, arch)
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in MATRIX_INSTRUCTIONS}
    row = AuditRow(
        kernel=_kernel_name(case),
        name=case.name,
        arch=arch,
        registers=registers,
        spill=sum(int(size) for size in re.findall(r"(\d+) bytes spill", log)),
        shared=compiled.metadata.shared,
        hgmma=counts["HGMMA"],
        utchmma=counts["UTCHMMA"],
        hmma=counts["HMMA"],
        ahead=steps_ahead(compiled.asm["ptx"]),
        warnings=" ".join(sorted(set(SERIALISED.findall(log)))),
        breach="",
        note="",
    )
    row = row._replace(note=case.reason if row.spill or not (case.wgmma and case.pipelined) else "")
    return row._replace(breach="; ".join(_breaches(row, case, compiled.asm["ttir"])))


def _breaches(row: AuditRow, case: AuditCase, ttir: str) -> Iterable[str]:
    if row.spill > case.allowed_spill:
        yield f"{row.spill} bytes spilled, {case.allowed_spill} allowed"
    if (case.allowed_spill or not case.wgmma or not case.pipelined) and not case.reason:
        yield "an exception without a reason"
    if row.shared > SHARED_LIMIT[row.arch]:
        yield f"{row.shared} bytes of shared memory, sm_{row.arch} has {SHARED_LIMIT[row.arch]}"
    if case.blocks > 1:
        yield from _does_not_share(row, case)
    if row.warnings:
        yield f"wgmma serialised ({row.warnings})"
    has_dot, has_16_bit_dot = "tt.dot" in ttir, re.search(r"tt\.dot .*:\s*tensor<[0-9x]+x(bf16|f16)\b", ttir)
    wide = {90: ("HGMMA", row.hgmma), 100: ("UTCHMMA", row.utchmma)}
    if row.arch in wide and has_16_bit_dot and case.wgmma:
        name, count = wide[row.arch]
        if not count or row.hmma:
            yield f"16-bit tl.dot with {count} {name} and {row.hmma} HMMA"
    if has_dot and case.num_stages >= 3 and case.pipelined and not row.ahead:
        yield f"nothing is loaded ahead in a main loop of {case.num_stages} stages"


def _does_not_share(row: AuditRow, case: AuditCase) -> Iterable[str]:
    """Why as many programs as are meant to do not fit on one SM."""
    registers = REGISTERS // (case.blocks * 32 * case.num_warps)
    shared = (SHARED_LIMIT[row.arch] + SHARED_RESERVED) // case.blocks - SHARED_RESERVED
    if row.registers > registers:
        yield f"{row.registers} registers, {registers} for {case.blocks} blocks an SM"
    if row.shared > shared:
        yield f"{row.shared} bytes of shared memory, {shared} for {case.blocks} blocks an SM"


def _audit_job(job: tuple[str, int, int]) -> AuditRow:
    module, index, arch = job
    return audit_case(importlib.import_module(module).audit_cases()[index], arch)


def _kernel_name(case: AuditCase) -> str:
    return case.kernel.fn.__name__.strip("_")


def _compile(case: AuditCase, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def describe(path: tuple[int, ...], kind: str | None, divisible: bool) -> str:
        """The type Triton knows one argument by; None is a pointer that is not given."""
        if kind is None:
            constants[path] = None
            return "constexpr"
        if divisible or kind.startswith("*"):
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for i, name in enumerate(case.kernel.arg_names):
        kind = case.signature.get(name)
        if name in case.constants:
            types[name] = "constexpr"
            constants[(i,)] = case.constants[name]
        elif isinstance(kind, tuple):
            types[name] = tuple(describe((i, j), k, False) for j, k in enumerate(kind))
        elif name in case.signature:
            types[name] = describe((i,), kind, name in case.divisible)
        else:
            raise KeyError(f"neither a type nor a value for argument {name!r}")
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    source = ASTSource(case.kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _inspect(compiled: Any, arch: int) -> tuple[int, str, str]:
    """Registers a thread, ptxas' log and the machine code of a compiled kernel."""
    from triton.backends.nvidia import compiler

    assembler = Path(compiler.get_ptxas(arch).path)  # Triton brings two, and which is for what has changed
    tools = Path(compiler.__file__).parent / "bin"
    # Triton 3.7 and newer ask for it, and it decides what is spilled
    options = ["--regAllocOptLevel=2"] if "regAllocOptLevel" in inspect.getsource(compiler) else []
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target\s+(\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        cubin, text = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        text.write_text(ptx)
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin).stdout
        sass = _run(tools / "nvdisasm", "-c", cubin).stdout
        # Triton keeps no log of its own run, so the same PTX goes through the same assembler again
        log = _run(assembler, "-v", *options, "--gpu-name", target, text, "-o", Path(folder, "again.cubin")).stderr
    return int(re.search(r"REG:(\d+)", usage).group(1)), log, sass


def _run(*command: Any) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)


def table(rows: Sequence[AuditRow]) -> str:
    """The rows as plain text, breaches marked at the end of their line."""
    head = ("configuration", "sm", "regs", "spill", "shared", "HGMMA", "UTCHMMA", "HMMA", "ahead", "remark")
    lines = [head]
    for row in rows:
        remark = f"BREACH: {row.breach}" if row.breach else row.note
        ahead = "-" if row.ahead is None else row.ahead
        counts = (row.registers, row.spill, row.shared, row.hgmma, row.utchmma, row.hmma, ahead)
        lines.append((row.name, str(row.arch), *(str(count) for count in counts), remark))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, 9)), line[9]]).rstrip()
        for line in lines
    )


def main(archs: Sequence[int] = (), modules: Sequence[str] = (), brief: bool = False) -> int:
    """Print the table (default: of everything); 0 where every kernel is within its limits, else 1."""
    for arch in archs:
        if arch not in ARCHS:
            raise ValueError(f"audit: arch must be one of {', '.join(map(str, ARCHS))}, got {arch}")
    rows = audit(modules or kernel_modules(), archs or ARCHS, brief=brief)
    print(table(rows))
    breaches = sum(bool(row.breach) for row in rows)
    print(f"{len(rows)} compiled, {breaches} in breach of a limit")
    return 1 if breaches or not rows else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="vlmo-kernels audit", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--module", nargs="+", default=(), help="modules with audit_cases (default: all)")
    parser.add_argument("--brief", action="store_true", help="one configuration of every kernel")
    arguments = parser.parse_args()
    sys.exit(main(arguments.arch, arguments.module, arguments.brief))
