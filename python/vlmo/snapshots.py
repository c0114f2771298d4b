"""Files of a training run: snapshots to resume from, and the finished model.

A snapshot is a folder `snapshots/step-00001000` written by torch.distributed.checkpoint, so that any number of
processes can read what any other number wrote. It appears under its name only when all of it is on the disk: a
killed run leaves at most a `.writing` folder behind, which nobody reads. Its metadata is a pickle: resume your own
runs only. What is handed on is `model.safetensors` with `config.json`, which execute nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from .config import VLMoConfig
from .distributed import rank, world_size

KEPT = 2


def write_atomically(path: Path, text: str) -> None:
    """The file is the old one or all of the new one, whatever happens in between."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def save_snapshot(out: Path, step: int, module: nn.Module, optimizer: Optimizer, extra: dict[str, object]) -> None:
    """Write snapshot `step`, by all processes together, and drop all but the newest KEPT.

    extra: plain values for JSON, such as the position in the data.
    """
    folder = out / "snapshots" / f"step-{step:08d}"
    writing = folder.with_suffix(".writing")
    if rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    _barrier()
    model_state, optimizer_state = get_state_dict(module, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=writing)
    if rank() == 0:
        (writing / "extra.json").write_text(json.dumps({"step": step, **extra}), encoding="utf-8")
        for path in writing.iterdir():
            _sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(writing, folder)
        _sync(folder.parent)
        for old in snapshots(out)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier()


def snapshots(out: Path) -> list[Path]:
    """Complete snapshots, oldest first."""
    found = (out / "snapshots").glob("step-*")
    return sorted(path for path in found if path.suffix != ".writing" and (path / "extra.json").exists())


def newest_extra(out: Path) -> dict[str, object] | None:
    """What was given to `save_snapshot` as `extra`, and "step", of the newest snapshot; None if there is none."""
    found = snapshots(out)
    if not found:
        return None
    try:
        return json.loads((found[-1] / "extra.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_damaged(found[-1], error)) from error


def load_snapshot(out: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Restore the newest snapshot, which must be there, in place, on any number of processes."""
    found = snapshots(out)
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        try:
            dcp.load(state, checkpoint_id=found[-1])
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
            raise ValueError(_damaged(found[-1], error)) from error
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _damaged(snapshot: Path, error: BaseException) -> str:
    reason = (str(error).strip().splitlines() or [""])[-1] or type(error).__name__
    return (
        f"snapshots: the newest one must be whole, '{snapshot}' cannot be read: {reason}. "
        "Hint: remove it, and --resume goes on from the one before."
    )


def save_model(out: Path, module: nn.Module, config: VLMoConfig, stage: str) -> None:
    """`model.safetensors` and `config.json`, called by all processes. module: has the VLMo as `model`."""
    from safetensors.torch import save_file

    options = StateDictOptions(full_state_dict=True, cpu_offload=world_size() > 1)
    state = get_model_state_dict(module, options=options)
    if rank() == 0:
        model: dict[str, Tensor] = {
            key.removeprefix("model."): value.detach().cpu().contiguous()
            for key, value in state.items()
            if key.startswith("model.")
        }
        temporary = out / "model.safetensors.writing"
        save_file(model, temporary)
        _sync(temporary)
        os.replace(temporary, out / "model.safetensors")
        write_atomically(out / "config.json", json.dumps({"stage": stage, **asdict(config)}, indent=1) + "\n")
    _barrier()


def load_config(out: Path) -> tuple[VLMoConfig, str]:
    """Configuration and stage of a finished model's folder."""
    path = out / "config.json"
    if not path.is_file():
        raise ValueError(f"load_config: {path} must be there. Hint: the folder of a finished `vlmo pretrain`.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stage = values.pop("stage")
        return VLMoConfig(**{**values, "heads": tuple(values["heads"])}), stage
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"load_config: '{path}' must be as `vlmo pretrain` writes it: {error!r}.") from error
