"""Two gloo processes on the CPU train as one does: DDP and FSDP2, and resuming across world sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.common.numerics import assert_close_as_eager
from tests.vlmo.training import CONFIG, loader, tokenizer
from vlmo.pretrain import Run, run
from vlmo.stages import stage_config
from vlmo.train import Recipe, build_stage, stage_trainer

ROOT = Path(__file__).resolve().parents[2]
STEPS, LR, DROP = 6, 1e-3, 0.1


def vlmo(processes: int, arguments: str, out: Path, *more: str) -> str:
    """A command of `vlmo`, with torchrun if there are several processes. Returns what it wrote to stderr."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = f"vlmo.cli {arguments} --batch-size 8 --steps {STEPS} --lr {LR} --log-every 1 --save-every 3"
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", *arguments.split(), "--out", str(out), *more],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def pretrain(out: Path, processes: int, *more: str) -> str:
    common = f"pretrain --config tiny --data shapes:400 --max-text-len 20 --drop-path {DROP}"
    return vlmo(processes, common, out, *more)


def curve(out: Path) -> torch.Tensor:
    """fp32 [steps, values], losses and gradient norms by step."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = [name for name in lines[0] if name not in ("step", "lr", "seconds_per_step")]
    return torch.tensor([[line[name] for name in names] for line in lines])


def one_process(dtype: torch.dtype) -> torch.Tensor:
    """The same run in this process."""
    config = replace(CONFIG, drop_path=DROP)
    model, _ = build_stage(config, "vision-language", None, 0)
    ours = stage_trainer(model.to(dtype), "vision-language", Recipe(steps=STEPS, lr=LR), tokenizer())
    stream, rows = iter(loader("vision-language", 8, stage_config(config, "vision-language"))), []
    for _ in range(STEPS):
        given = next(stream)
        given.image = given.image.to(dtype)
        rows.append(torch.stack([value.to(dtype) for value in ours.run_step([given]).values()]))
    return torch.stack(rows)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_and_one_resumes_from_two(strategy: str, tmp_path: Path) -> None:
    """Masks, negatives and DropPath follow seed, step and sample number; contrast is over the global batch."""
    said = pretrain(tmp_path / "two", 2, "--stage", "vision-language", "--strategy", strategy)
    assert "2 process(es) on cpu" in said and f"{8 * STEPS} samples read" in said
    expected, eager, two = one_process(torch.float64), one_process(torch.float32), curve(tmp_path / "two")
    scale = 1.0 / expected.abs().mean(0)
    assert_close_as_eager(two * scale.float(), expected * scale, eager * scale.float(), "two processes")

    # The last snapshot away: one process goes on from the third step that two processes wrote.
    (tmp_path / "two/snapshots" / f"step-{STEPS:08d}").rename(tmp_path / "gone")
    again = Run(
        "vision-language", tmp_path / "two", data="shapes:400", config="tiny", max_text_len=20, batch_size=8,
        drop_path=DROP, resume=True,
    )  # fmt: skip
    run(again, Recipe(steps=STEPS, lr=LR, log_every=1, save_every=3))
    resumed = curve(tmp_path / "two")
    assert torch.equal(resumed[:3], two[:3])
    assert_close_as_eager(resumed * scale.float(), expected * scale, eager * scale.float(), "resumed by one")


@pytest.mark.slow
def test_two_processes_in_the_other_stages(tmp_path: Path) -> None:
    """Masked losses are means over all processes' masked tokens, of which each has another number."""
    start: list[str] = []
    for stage in ("vision", "language"):
        out = [tmp_path / f"{stage}-{n}" for n in (1, 2)]
        for n in (1, 2):
            pretrain(out[n - 1], n, "--stage", stage, "--strategy", "fsdp", "--accumulate", "2", *start)
        one, two = (curve(folder) for folder in out)
        torch.testing.assert_close(one, two)
        start = ["--from", str(out[1])]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "vqa", "nlvr2"])
def test_two_processes_fine_tune_as_one_and_one_resumes_from_two(task: str, tmp_path: Path) -> None:
    """Without DropPath, which every process draws for itself here."""
    pretrain(tmp_path / "start", 1, "--stage", "vision-language", "--drop-path", "0")
    finetune = f"finetune --task {task} --model {tmp_path / 'start'} --data shapes:40"
    for processes in (1, 2):
        vlmo(processes, finetune, tmp_path / str(processes))
    torch.testing.assert_close(curve(tmp_path / "1"), curve(tmp_path / "2"))
    (tmp_path / "2/snapshots" / f"step-{STEPS:08d}").rename(tmp_path / "gone")
    vlmo(1, finetune, tmp_path / "2", "--resume")
    torch.testing.assert_close(curve(tmp_path / "1"), curve(tmp_path / "2"))
