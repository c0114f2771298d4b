"""The training loop of the three stages and of fine-tuning: one process, DDP or FSDP2, fp32 or bf16, resumable."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from . import counter
from .config import VLMoConfig
from .data import Batch
from .distributed import gather, gather_object, rank, world_size
from .model import VLMo
from .objectives import Inputs, Pretraining, prepare
from .snapshots import load_snapshot, newest_extra, save_model, save_snapshot, snapshots, write_atomically
from .stages import StageReport, set_trainable, stage_config, start_from
from .tokenizer import Tokenizer

STRATEGIES = ("ddp", "fsdp")
PRECISIONS = ("fp32", "bf16")
IMPLS = ("auto", "triton", "cpu", "reference")
# New classifiers learn this much faster than the pre-trained rest, as in ViLT's fine-tuning (Kim et al. 2021).
HEAD_LR = 10.0


class Data(Protocol):
    """Endless batches of this process; `vlmo.data.Loader` and `vlmo.downstream.ExampleBatches` are some."""

    def __iter__(self) -> Iterator[object]: ...

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state: dict[str, object]) -> None: ...

    @staticmethod
    def merge_states(states: Iterable[dict[str, object]]) -> dict[str, object]: ...


@dataclass(frozen=True)
class Recipe:
    """How a stage or a task is trained.

    steps: optimizer steps. lr: the peak, reached after `warmup` steps and falling linearly to 0 at `steps`.
    weight_decay: of matrices; norms, biases, embeddings of positions and types, and LayerScale have none.
    layer_decay: learning rate of layer i is lr * layer_decay ** (layers above it). clip: largest gradient norm, 0
    for none. accumulate: batches per step; contrast and negatives stay within one batch, of all processes, as is
    usual, so only a larger batch gives more of them. precision: "fp32" or "bf16" (autocast; parameters stay fp32).
    recompute: activation checkpointing. compile: torch.compile of every block. strategy: "ddp" or "fsdp", of
    several processes. impl: see `vlmo_kernels`. save_every, log_every: in steps.
    """

    steps: int
    lr: float = 2e-4
    warmup: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    layer_decay: float = 1.0
    clip: float = 0.0
    accumulate: int = 1
    precision: str = "fp32"
    recompute: bool = False
    compile: bool = False
    strategy: str = "ddp"
    impl: str = "auto"
    seed: int = 0
    save_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        for name, allowed in (("strategy", STRATEGIES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Recipe: {name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.steps < 1 or self.accumulate < 1 or self.save_every < 1 or self.log_every < 1:
            raise ValueError("Recipe: steps, accumulate, save_every and log_every must be at least 1.")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"Recipe: warmup must lie in 0..{self.steps - 1}, got {self.warmup}.")
        if self.impl not in IMPLS:
            raise ValueError(f"Recipe: impl must be one of {IMPLS}, got {self.impl!r}.")
        for name in ("lr", "weight_decay", "layer_decay", "clip"):
            if not getattr(self, name) >= 0.0:  # a negative limit would turn the gradients round
                raise ValueError(f"Recipe: {name} must not be negative, got {getattr(self, name)}.")

    def lr_factor(self, step: int) -> float:
        """Learning rate of step 0, 1, ... over the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return max(0.0, (self.steps - step) / (self.steps - self.warmup))


def initialise_distributed(device: str) -> torch.device:
    """Join the processes torchrun started, if any; returns the device of this process."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: it must be cpu or cuda, got {device!r}.")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device: {device!r} must be usable, torch sees no GPU here. Hint: --device cpu.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device != "cuda":
        return torch.device(device)
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(local)
    return local


class Trainer:
    """Trains one module. After `__init__` everything is on its device and wrapped; see `stage_trainer` and
    `downstream.task_trainer`.

    Args:
        module: gives the losses of a step; has the VLMo as `model`. What is frozen has requires_grad False, all else
            must take part in every step.
        name: of the stage or task, for the model's config.json.
        recipe: how.
        prepare: (batch, number of the step) to what `module` takes, on the device.
        device: of this process.
    """

    def __init__(
        self, module: nn.Module, name: str, recipe: Recipe, prepare: Callable[[object, int], object],
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.model, self.name, self.recipe, self.prepare = module.model, name, recipe, prepare
        self.device = torch.device(device)
        self.module = module.to(self.device).train()
        self.alone: list[nn.Parameter] = []  # what FSDP does not handle
        self.wrapped = self._wrap()
        groups, self.lr_scales = parameter_groups(self.module, recipe, self.model.config.depth)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=1e-8, fused=True)
        self.step = 0

    def _wrap(self) -> nn.Module:
        if world_size() == 1:
            return self.module
        if self.recipe.strategy == "ddp":
            ids = None if self.device.type == "cpu" else [self.device]
            return DistributedDataParallel(self.module, device_ids=ids, broadcast_buffers=False)
        # Scalars (the temperatures) cannot be sharded.
        self.alone = [p for p in self.module.parameters() if p.ndim == 0]
        for block in self.model.transformer.blocks:
            fully_shard(block)
            register_fsdp_forward_method(block, "forward_packed")
        return fully_shard(self.module, ignored_params=set(self.alone))

    # ------------------------------------------------------------------ one step

    def run_step(self, batches: list[object]) -> dict[str, Tensor]:
        """One optimizer step over `recipe.accumulate` batches of this process; losses, and "grad_norm"."""
        # What modules draw by themselves, in fine-tuning, follows from seed and step as well: also after a restart.
        torch.manual_seed(counter.key(self.recipe.seed, self.step, f"process {rank()}"))
        totals: dict[str, Tensor] = {}
        share = 1.0 / len(batches)
        for i, batch in enumerate(batches):
            inputs = self.prepare(batch, self.step)
            with self._synchronised(i == len(batches) - 1):
                losses = self._forward(inputs)
                (losses["loss"] * share).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.detach() * share
        if world_size() > 1:
            for parameter in self.alone:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world_size()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.recipe.clip or math.inf
        norm = clip_norm(parameters, limit)
        factor = self.recipe.lr_factor(self.step)
        for group, scale in zip(self.optimizer.param_groups, self.lr_scales, strict=True):
            group["lr"] = self.recipe.lr * scale * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return totals | {"grad_norm": norm}

    def _forward(self, inputs: object) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return self.wrapped(inputs)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients cross processes in the last batch of a step only."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        elif isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    # ------------------------------------------------------------------ a run

    def fit(
        self, data: Data, out: Path, resume: bool = False, progress: Callable[[dict[str, float]], None] | None = None,
        beside: Callable[[], None] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Train to `recipe.steps`; returns the last line of the log.

        out: gets `log.jsonl`, `snapshots/`, and at the end `model.safetensors` and `config.json`. resume: go on
        from the newest snapshot, if there is one. progress: called with every line of the log. beside: called by
        process 0 when nothing speaks against the run any more, to write what else belongs into `out`.
        """
        out.mkdir(parents=True, exist_ok=True)
        log = out / "log.jsonl"
        if snapshots(out) and not resume:
            # They would pass for newer than this run's own, and a resumed run would start from them.
            raise ValueError(f"train: out must not hold snapshots of another run, {out} does. Hint: resume=True.")
        if resume:
            extra = newest_extra(out)
            if extra is not None:
                self._check_same_run(extra)
                data.load_state_dict(extra["data"])
                load_snapshot(out, self.module, self.optimizer)
                self.step = extra["step"]
        if rank() == 0:
            kept = [line for line in _lines(log) if resume and json.loads(line)["step"] <= self.step]
            write_atomically(log, "".join(line + "\n" for line in kept))
            if beside is not None:
                beside()
        stream, line = iter(data), {}
        started, since = time.perf_counter(), self.step
        while self.step < self.recipe.steps:
            batches = [next(stream) for _ in range(self.recipe.accumulate)]
            losses = self.run_step(batches)
            last = self.step == self.recipe.steps
            to_log = last or self.step % self.recipe.log_every == 0
            to_save = last or self.step % self.recipe.save_every == 0
            if not (to_log or to_save):
                continue
            values = averaged(losses)
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise RuntimeError(
                    f"train: loss and gradients must be finite, they are {values['loss']} and {values['grad_norm']} at "
                    f"step {self.step}. Hint: a smaller learning rate, a longer warm-up, or gradient clipping; "
                    "snapshots from before are kept."
                )
            if to_log:
                now = time.perf_counter()
                line = {"step": self.step, **values, "lr": self.recipe.lr * self.recipe.lr_factor(self.step - 1)}
                line["seconds_per_step"] = (now - started) / (self.step - since)
                started, since = now, self.step
                if rank() == 0:
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                if progress is not None:
                    progress(line)
            if to_save:
                self.save(out, data)
        save_model(out, self.module, self.model.config, self.name)
        return line

    def save(self, out: Path, data: Data) -> None:
        """A snapshot of now."""
        states = gather_object(data.state_dict())
        extra = {
            "stage": self.name,
            "seed": self.recipe.seed,
            "config": asdict(self.model.config),
            "data": data.merge_states(states),
        }
        save_snapshot(out, self.step, self.module, self.optimizer, extra)

    def _check_same_run(self, extra: dict[str, object]) -> None:
        for name, value in (("stage", self.name), ("seed", self.recipe.seed)):
            if extra[name] != value:
                raise ValueError(
                    f"train: a run is resumed with its own {name}, {extra[name]!r} in the snapshot, got {value!r}. "
                    "Hint: another folder for another run."
                )
        config = json.loads(json.dumps(asdict(self.model.config)))  # tuples become lists
        saved = extra.get("config", config)
        changed = [f"{k} {saved.get(k)!r} (now {value!r})" for k, value in config.items() if saved.get(k) != value]
        if changed:
            raise ValueError(
                f"train: a run is resumed with its own configuration, the snapshot has {', '.join(changed)}. "
                "Hint: the options of the first call again, and --resume."
            )


def stage_trainer(
    model: VLMo, stage: str, recipe: Recipe, tokenizer: Tokenizer | None, device: torch.device | str = "cpu"
) -> Trainer:
    """For one stage of one model with the configuration of `stage_config`, trained in place.

    stage: one of `objectives.STAGES`. tokenizer: of the texts; None in the vision stage.
    """
    set_trainable(model, stage)
    module = Pretraining(model, stage, recipe.recompute, recipe.impl)
    if recipe.compile:
        for block in model.transformer.blocks:
            # All blocks share one cache of 8 graphs: with row counts fixed it would be full after one step.
            block.forward_packed = torch.compile(block.forward_packed, dynamic=True)

    def ready(batch: Batch, step: int) -> Inputs:
        return prepare(stage, batch, model.config, tokenizer, recipe.seed, step, device)

    return Trainer(module, stage, recipe, ready, device)


def build_stage(
    config: VLMoConfig, stage: str, start: str | os.PathLike[str] | None, seed: int
) -> tuple[VLMo, StageReport | None]:
    """A freshly initialised model of a stage, with the parameters of an earlier one if `start` names a file."""
    torch.manual_seed(seed)
    model = VLMo(stage_config(config, stage))
    return model, None if start is None else start_from(model, start, stage)


def parameter_groups(module: nn.Module, recipe: Recipe, depth: int) -> tuple[list[dict], list[float]]:
    """AdamW's groups of what trains, and the learning rate of each over the recipe's."""
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = recipe.weight_decay if decays(name, parameter) else 0.0
            scale = recipe.layer_decay ** (depth + 1 - _layer(name, depth))
            scale *= HEAD_LR if "_classifier." in name else 1.0
            grouped.setdefault((decay, scale), []).append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for (decay, _), parameters in grouped.items()]
    return groups, [scale for _, scale in grouped]


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls at a parameter: matrices and word embeddings."""
    position = re.search(r"position|token_type|cls_token|pos_embed|mask_token", name)
    return parameter.ndim >= 2 and position is None


def _layer(name: str, depth: int) -> int:
    """0 for embeddings, 1..depth for blocks, depth + 1 for what comes after them."""
    block = re.search(r"transformer\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    embedding = re.search(r"embeddings|patch_embed|cls_token|pos_embed|mask_token", name)
    return 0 if embedding else depth + 1


def clip_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to the norm `limit` over all processes; returns the norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if math.isfinite(limit):
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(factor)
    return norm


def averaged(losses: dict[str, Tensor]) -> dict[str, float]:
    """Numbers, averaged over processes; waits for the device."""
    names = list(losses)
    values = gather(torch.stack([losses[name].float() for name in names])[None]).mean(0)
    return dict(zip(names, values.tolist(), strict=True))


def check_out(who: str, out: Path, resume: bool) -> None:
    """Refuse a folder that holds a run, unless that is to go on."""
    log = out / "log.jsonl"  # empty if the run failed before its first line
    begun = log.is_file() and log.stat().st_size > 0 or bool(snapshots(out))
    if begun and not resume:
        raise ValueError(f"{who}: --out must be a new folder, {out} holds a run. Hint: --resume goes on with it.")


def _lines(path: Path) -> list[str]:
    """Complete lines; a killed run may have left a piece of one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text.split("\n")[:-1]
