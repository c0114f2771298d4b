"""Fine-tuning and evaluation: VQA, NLVR2, retrieval (paper section 3.4)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VLMoConfig
from .data import CORRUPT, Batch, Report, image_tensor, load_image
from .devices import move
from .distributed import rank, world_size
from .model import VLMo
from .objectives import contrastive_loss
from .tasks import Example, Examples
from .tokenizer import Tokenizer
from .train import Recipe, Trainer

TASKS = ("retrieval", "vqa", "nlvr2")
# Parameters that the loss of a task does not depend on: everywhere, and in the layers from `vlffn_start` on.
_UNUSED = {
    "retrieval": (r"^pooler\.|^mlm_score\.|^itm_score\.|^itc_vl_|^logit_vl_", r"_vl\."),
    "vqa": (r"^mlm_score\.|^itm_score\.|^itc_|^logit_", r"_(text|imag)\."),
    "nlvr2": (r"^mlm_score\.|^itm_score\.|^itc_|^logit_", r"_(text|imag)\."),
}
_HEAD_STD = 0.02  # as published


class VLMoForVQA(VLMo):
    """VLMo and a classifier over `num_answers` answers on the pooled fusion features, under the published names."""

    def __init__(self, config: VLMoConfig, num_answers: int) -> None:
        super().__init__(config)
        self.vqa_classifier = classifier(config.dim, 2 * config.dim, num_answers)

    def classify(self, images: tuple[Tensor, ...], text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """One image [B, 3, S, S] in a tuple, and questions, to logits [B, num_answers]."""
        return self.vqa_classifier(self.infer(images[0], text_ids, text_mask).cls_feats)


class VLMoForNLVR2(VLMo):
    """VLMo and a classifier false/true on two fusion passes, (left, text) and (right, text), under published names."""

    def __init__(self, config: VLMoConfig) -> None:
        if config.num_token_types < 3:
            raise ValueError(
                f"VLMoForNLVR2: config.num_token_types must be 3, got {config.num_token_types}. "
                "Hint: dataclasses.replace(config, num_token_types=3); load_checkpoint fills the third."
            )
        super().__init__(config)
        self.nlvr2_classifier = classifier(2 * config.dim, 2 * config.dim, 2)

    def classify(self, images: tuple[Tensor, ...], text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Two images [B, 3, S, S], and statements, to logits [B, 2]."""
        sides = [self.infer(image, text_ids, text_mask, i + 1).cls_feats for i, image in enumerate(images)]
        return self.nlvr2_classifier(torch.cat(sides, dim=1))


def classifier(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    classifier = nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))
    for linear in (classifier[0], classifier[3]):
        nn.init.normal_(linear.weight, std=_HEAD_STD)
        nn.init.zeros_(linear.bias)
    return classifier


@dataclass
class TaskBatch:
    """images: one or two fp32 [B, 3, S, S]. text_ids, text_mask: [B, L]. target: fp32 [B, classes], scores."""

    images: tuple[Tensor, ...]
    text_ids: Tensor
    text_mask: Tensor
    target: Tensor

    def to(self, device: torch.device | str) -> TaskBatch:
        values = [getattr(self, f.name) for f in fields(self)[1:]]
        return TaskBatch(tuple(move(image, device) for image in self.images), *(move(v, device) for v in values))


class FineTuning(nn.Module):
    """A model and the loss of one task; `forward(batch)` gives "loss" and "accuracy" of this process's samples.

    "vqa": binary cross-entropy with soft targets, times the number of answers (so the sum over answers, as
    published). "nlvr2": cross-entropy. "retrieval": contrast of the modality experts' features over the batches of
    all processes.
    """

    def __init__(self, model: VLMo, task: str) -> None:
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"FineTuning: task must be one of {TASKS}, got {task!r}.")
        self.model, self.task = model, task

    def forward(self, batch: TaskBatch | Batch) -> dict[str, Tensor]:
        if self.task == "retrieval":
            image = self.model.infer_image_ft(batch.image).itc_feats
            text = self.model.infer_text_ft(batch.text_ids, batch.text_mask).itc_feats
            loss, to_text, _ = contrastive_loss(image, text, self.model.logit_scale)
            own = torch.arange(len(image), device=image.device) + rank() * len(image)
            return {"loss": loss, "accuracy": (to_text.argmax(1) == own).float().mean()}
        logits = self.model.classify(batch.images, batch.text_ids, batch.text_mask).float()
        accuracy = batch.target.gather(1, logits.argmax(1, keepdim=True)).mean()
        if self.task == "nlvr2":
            return {"loss": F.cross_entropy(logits, batch.target.argmax(1)), "accuracy": accuracy}
        loss = F.binary_cross_entropy_with_logits(logits, batch.target) * batch.target.shape[1]
        return {"loss": loss, "accuracy": accuracy}


class ExampleBatches:
    """Batches of VQA or NLVR2 examples.

    batch_size: examples of one step over all processes. Every epoch is a permutation that follows from `seed`;
    an example whose image cannot be read is counted in `report` and the next one takes its place.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: Tokenizer,
        image_size: int,
        max_text_len: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or batch_size % world_size():
            raise ValueError(f"ExampleBatches: batch_size must be a multiple of {world_size()}, got {batch_size}.")
        self.examples, self.tokenizer, self.seed = examples, tokenizer, seed
        self.image_size, self.max_text_len, self.batch_size = image_size, max_text_len, batch_size
        self.report = Report()
        self.taken = 0  # examples that are behind us, of all processes

    def state_dict(self) -> dict[str, object]:
        """The position after the last batch given. Plain numbers; the same on every process."""
        return {"taken": self.taken, **self._order()}

    @staticmethod
    def merge_states(states: Iterable[dict[str, object]]) -> dict[str, object]:
        """One state from those of all processes; any number of processes can resume from it."""
        return next(iter(states))

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a position. Raises ValueError if it belongs to other examples or another order."""
        for name, value in self._order().items():
            if state[name] != value:
                raise ValueError(
                    f"ExampleBatches.load_state_dict: {name} must be what the state was saved with, {state[name]}, "
                    f"got {value}. Hint: the data of the first call again."
                )
        self.taken = state["taken"]

    def _order(self) -> dict[str, int]:
        """What fixes the order of the examples."""
        return {"seed": self.seed, "examples": len(self.examples), "classes": len(self.examples.classes)}

    def __iter__(self) -> Iterator[TaskBatch]:
        """Endless; the rows of this process. Goes on where the last batch ended, also after `load_state_dict`."""
        share, numbers = self.batch_size // world_size(), self._numbers()
        while True:
            step = [next(numbers) for _ in range(self.batch_size)]
            self.taken += self.batch_size
            loaded = [self._good(i) for i in step[rank() * share :][:share]]
            for example, _ in loaded:
                if not example.target:
                    raise ValueError(
                        f"ExampleBatches: every example to train on must have its answer, {example.key!r} has none. "
                        "Hint: a test set can only be evaluated."
                    )
            yield self.collate(loaded)

    def once(self) -> Iterator[tuple[TaskBatch, list[Example]]]:
        """Every readable example once, in order, on this process alone, with the examples themselves."""
        for start in range(0, len(self.examples), self.batch_size):
            numbers = range(start, min(start + self.batch_size, len(self.examples)))
            loaded = [pair for pair in map(self._load, numbers) if pair is not None]
            if loaded:
                yield self.collate(loaded), [example for example, _ in loaded]

    def collate(self, loaded: Sequence[tuple[Example, tuple[Tensor, ...]]]) -> TaskBatch:
        before = self.tokenizer.num_truncated
        ids, mask, _ = self.tokenizer.encode_batch([example.text for example, _ in loaded], self.max_text_len)
        self.report.truncated_captions += self.tokenizer.num_truncated - before
        target = torch.zeros(len(loaded), len(self.examples.classes))
        for row, (example, _) in enumerate(loaded):
            for number, score in example.target.items():
                target[row, number] = score
        return TaskBatch(tuple(map(torch.stack, zip(*(images for _, images in loaded)))), ids, mask, target)

    def _numbers(self) -> Iterator[int]:
        epoch, behind = divmod(self.taken, len(self.examples))
        while True:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            yield from torch.randperm(len(self.examples), generator=generator).tolist()[behind:]
            epoch, behind = epoch + 1, 0

    def _good(self, i: int) -> tuple[Example, tuple[Tensor, ...]]:
        for step in range(len(self.examples)):
            loaded = self._load((i + step) % len(self.examples))
            if loaded is not None:
                return loaded
        raise RuntimeError(f"ExampleBatches: no example can be read: {'; '.join(self.report.lines())}.")

    def _load(self, i: int) -> tuple[Example, tuple[Tensor, ...]] | None:
        example = self.examples[i]
        try:
            opened = [load_image(image) for image in example.images]
            images = tuple(image_tensor(image, self.image_size) for image, _ in opened)
        except CORRUPT as error:
            self.report.skip("corrupt_images", str(example.key), str(error))
            return None
        self.report.good += 1
        self.report.converted_images += sum(converted for _, converted in opened)
        return example, images


def uses(task: str, config: VLMoConfig, name: str) -> bool:
    """Whether the loss of a task depends on the parameter of this name."""
    anywhere, on_top = _UNUSED[task]
    layer = re.match(r"transformer\.blocks\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.vlffn_start:
        return re.search(on_top, name) is None
    if name == "text_embeddings.position_embeddings.weight":
        return not config.relative_position_bias
    return re.search(anywhere, name) is None


def task_trainer(model: VLMo, task: str, recipe: Recipe, device: torch.device | str = "cpu") -> Trainer:
    """To fine-tune a model in place; the recipe's precision, strategy and schedule are used, `recompute`, `compile`
    and `impl` are not: how the blocks are computed is the model's affair.

    Freezes what the task does not use: neither DDP nor a snapshot can wait for gradients that never come.
    """
    module = FineTuning(model, task)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(uses(task, model.config, name))
    return Trainer(module, task, recipe, lambda batch, step: batch.to(device), device)


@torch.no_grad()
def evaluate(model: VLMoForVQA | VLMoForNLVR2, batches: ExampleBatches) -> tuple[dict[str, float], list[tuple]]:
    """Figures, and for every example its key and the class chosen.

    "accuracy": mean score of the chosen class (in VQA v2 an answer is worth what `tasks.VQA_SCORES` says), over
    examples with a known answer. "majority": the accuracy of always choosing the best single class.
    """
    device = model.transformer.cls_token.device
    model.eval()
    scores, targets, chosen = [], [], []
    for batch, examples in batches.once():
        there = batch.to(device)
        best = model.classify(there.images, there.text_ids, there.text_mask).argmax(1).cpu()
        known = batch.target.sum(1) > 0
        scores.append(batch.target.gather(1, best[:, None])[known, 0])
        targets.append(batch.target[known].sum(0))
        chosen += [(example.key, batches.examples.classes[i]) for example, i in zip(examples, best.tolist())]
    count = sum(map(len, scores))
    if count == 0:
        return {"examples": len(chosen)}, chosen
    return {
        "accuracy": torch.cat(scores).mean().item(),
        "majority": (sum(targets).max() / count).item(),
        "examples": len(chosen),
    }, chosen
