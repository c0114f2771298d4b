"""What `make gpu` runs, stage by stage, on a machine with a GPU: python benchmarks/gpu.py STAGE.

    correctness   tests/gpu in several processes, and a short run under compute-sanitizer where it is installed
    tune          a few configurations of every launch; the table goes into the results and into the user's cache
    bench         every launch alone: rate, share of the GPU's ceiling, beside cuBLAS on the same shape
    peers         block, FFN and attention against eager, SDPA, torch.compile, a cuBLAS loop, F.grouped_mm,
                  FlexAttention and, where it is installed, xformers

Needs torch, Triton, numpy and pytest, no network and no installation. Each stage ends well within ten minutes and
leaves its raw results in benchmarks/results/<gpu>/. `--device cpu` tries the stages themselves on the smallest input.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402

from vlmo_kernels.bench import environment  # noqa: E402

STAGES = ("correctness", "tune", "bench", "peers")
LIMIT_S = 560  # of a stage
SANITIZED = "test_a_small_block_is_clean"


def folder(device: str) -> Path:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu-dry-run"
    return ROOT / "benchmarks" / "results" / "-".join(name.lower().split())


def correctness(out: Path, device: str, processes: int) -> int:
    """Shards of tests/gpu side by side: most of the time goes into compiling kernels, one process a core."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "VLMO_TEST_DEVICE": device}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
    if device == "cpu":
        command.append("--collect-only")
    begun, running = time.perf_counter(), []
    for shard in range(processes):
        log = (out / f"correctness-{shard}.txt").open("w")
        mine = env | {"GPU_SHARD": f"{shard}/{processes}"}
        running.append((subprocess.Popen(command, cwd=ROOT, env=mine, stdout=log, stderr=subprocess.STDOUT), log))
    codes = []
    for process, log in running:
        try:
            codes.append(process.wait(timeout=max(begun + LIMIT_S - time.perf_counter(), 1)))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append("out of time")
        log.close()
    lines = [environment.device_name(device), f"versions {environment.versions()}", f"commit {environment.commit()}"]
    for shard, code in enumerate(codes):
        path = out / f"correctness-{shard}.txt"
        text = path.read_text().strip()
        lines.append(f"shard {shard}: exit {code}: {text.splitlines()[-1] if text else 'no output'}")
        if code == 0:
            path.unlink()
        else:
            lines.append(f"  see {path.name}")
    lines.append(f"{time.perf_counter() - begun:.0f} s")
    lines.append(sanitized(out, env, device))
    (out / "correctness.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any(codes) or "errors" in lines[-1])


def sanitized(out: Path, env: dict[str, str], device: str) -> str:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None or device == "cpu":
        return "compute-sanitizer: not run, it is not installed here"
    test = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu", "-k", SANITIZED]
    command = [tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable, *test]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "compute-sanitizer: errors or none, it ran out of time"
    (out / "sanitizer.txt").write_text(done.stdout[-20000:])
    return "compute-sanitizer: clean" if done.returncode == 0 else "compute-sanitizer: errors, see sanitizer.txt"


def tune(out: Path, device: str) -> int:
    from vlmo_kernels.tuning import tables
    from vlmo_kernels.tuning.tune import run

    if device == "cpu":
        return run("tiny", 1, "fp32", 30.0, out / "tuning" / "interpreter.json", device)
    path = out / "tuning" / f"{tables.architecture(torch.cuda.current_device())}.json"
    code = run("base", 64, "bf16", 240.0, path) | run("large", 64, "bf16", 150.0, path)
    user = tables.user_file(path.stem)
    user.parent.mkdir(parents=True, exist_ok=True)
    tables.write(user, tables.read(path))  # the stages after this one, and the user, take it
    return code


def bench(out: Path, device: str) -> int:
    from vlmo_kernels.bench.launches import run

    if device == "cpu":
        return run(device, out / "launches.json", "tiny", 2, "fp16", 2)
    codes = [run(device, out / f"launches-{model}.json", model) for model in ("base", "large")]
    return int(any(codes))


def peers(out: Path, device: str) -> int:
    from vlmo_kernels.bench.run import SUITES, run

    codes = []
    for suite in SUITES:
        if device == "cpu":
            codes.append(run(suite, device, out / f"{suite}.json", ["fp32"], ["smoke"], 2))
        else:
            codes.append(run(suite, device, out / f"{suite}.json", rounds=30))
    return int(any(codes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="folder of the results; by default benchmarks/results/<gpu>/")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="of the correctness stage")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        print("gpu: there must be a GPU that torch can use, none was found. Hint: --device cpu", file=sys.stderr)
        return 2
    out = a.out or folder(a.device)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    if a.stage == "correctness":
        code = correctness(out, a.device, a.processes)
    else:
        code = {"tune": tune, "bench": bench, "peers": peers}[a.stage](out, a.device)
    print(f"{a.stage}: {'failed' if code else 'done'} in {time.perf_counter() - begun:.0f} s, results in {out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
