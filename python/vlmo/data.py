"""From a source of image-text pairs to batches: decoding, shuffling, division over processes, resumption."""

from __future__ import annotations

import io
import math
import os
import random
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .devices import move
from .sources import DamagedShard, Record, Source
from .tokenizer import Tokenizer

USES = ("pairs", "images", "texts")
# What Pillow's decoders raise on bytes that are no image, or only the beginning of one.
CORRUPT = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass
class Batch:
    """B samples; None where they have no image or no text.

    image: float32 [B, 3, S, S] in [-1, 1] (mean 0.5, std 0.5). text_ids: int64 [B, max_text_len].
    text_mask: bool [B, max_text_len], true on tokens. index: int64 [B], the number of each sample in its data set,
    the same for every division over processes. word_starts: bool [B, max_text_len], see `Tokenizer.encode_batch`.
    """

    image: Tensor | None
    text_ids: Tensor | None
    text_mask: Tensor | None
    index: Tensor
    word_starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Batch:
        values = (getattr(self, f.name) for f in fields(self))
        return Batch(*(None if v is None else move(v, device) for v in values))

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        columns = ([getattr(batch, f.name) for batch in batches] for f in fields(Batch))
        return Batch(*(None if column[0] is None else torch.cat(column) for column in columns))


@dataclass
class Report:
    """What was read. Samples: `good`; skipped: `corrupt_images`, `empty_captions`. Of the good ones
    `converted_images` were not RGB and `truncated_captions` were cut to the model's length. `damaged_shards`: those
    that could not be read to their end, with the reason. `examples`: the first few of what was skipped, and why.
    """

    good: int = 0
    corrupt_images: int = 0
    empty_captions: int = 0
    converted_images: int = 0
    truncated_captions: int = 0
    damaged_shards: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        del self.examples[_EXAMPLES:]

    @classmethod
    def sum(cls, reports: Iterable[Report]) -> Report:
        total = cls()
        for report in reports:
            total.add(report)
        return total

    def take(self) -> Report:
        """What was counted so far; counting begins anew."""
        taken = replace(self)
        self.__init__()
        return taken

    def skip(self, reason: str, name: str, why: str) -> None:
        """Count a sample under the field `reason`."""
        setattr(self, reason, getattr(self, reason) + 1)
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{name}: {why}")

    def lines(self) -> list[str]:
        """For the user, most important first; one line if all went well."""
        out = [f"{self.good} samples read"]
        for name in ("corrupt_images", "empty_captions"):
            if getattr(self, name):
                out.append(f"{getattr(self, name)} skipped: {name.replace('_', ' ')}")
        for name in ("converted_images", "truncated_captions"):
            if getattr(self, name):
                out.append(f"{getattr(self, name)} {name.replace('_', ' ')}")
        out += [f"damaged shard: {reason}" for reason in self.damaged_shards]
        return out + [f"for example {example}" for example in self.examples]


_EXAMPLES = 5


def load_image(image: bytes | os.PathLike[str] | Image.Image) -> tuple[Image.Image, bool]:
    """Decoded, in RGB, and whether it was in another mode. Transparent pixels become white. Raises one of `CORRUPT`."""
    if not isinstance(image, Image.Image):
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.load()
            image = opened
    if image.mode == "RGB":
        return image, False
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    return image.convert("RGB"), True


def image_tensor(image: Image.Image, size: int, crop: random.Random | None = None) -> Tensor:
    """RGB image to float32 [3, size, size] in [-1, 1], resized to the square without cropping, as published: what is
    at the border may be what the caption is about. `crop` (for training): first cut out half to all of the area,
    drawn from it. Nothing is mirrored: captions tell left from right.
    """
    if crop is not None:
        width, height = image.size
        side = math.sqrt(crop.uniform(0.5, 1.0))
        w, h = max(1, round(width * side)), max(1, round(height * side))
        left, top = crop.randint(0, width - w), crop.randint(0, height - h)
        image = image.crop((left, top, left + w, top + h))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(127.5).sub_(1.0)


def read_records(source: Source, shards: Iterable[int], report: Report) -> Iterator[Record]:
    """The records of some shards; where one is damaged, those before the damage, and a note in `report`."""
    for shard in shards:
        try:
            yield from source.read(shard)
        except DamagedShard as damage:
            report.damaged_shards[str(damage)] += 1


def decode(
    record: Record, use: str, image_size: int, report: Report, crop: random.Random | None = None
) -> tuple[int, Tensor | None, str | None] | None:
    """(number, image, caption) of a record, or None if it lacks what `use` asks for; counted in `report`."""
    image = None
    if use != "images" and not (record.caption or "").strip():
        report.skip("empty_captions", record.name, "the caption is empty")
        return None
    if use != "texts":
        try:
            if record.image is None:
                raise ValueError("there is no image")
            picture, converted = load_image(record.image)
            image = image_tensor(picture, image_size, crop)
        except CORRUPT as error:
            report.skip("corrupt_images", record.name, str(error) or type(error).__name__)
            return None
        report.converted_images += converted
    report.good += 1
    return record.index, image, record.caption


def collate(
    images: Sequence[Image.Image] | None,
    captions: Sequence[str] | None,
    index: Sequence[int],
    tokenizer: Tokenizer | None,
    image_size: int,
    max_text_len: int,
) -> Batch:
    """RGB images and captions (either may be None) as a batch. `image_size` and `max_text_len` are the model's."""
    image = None if images is None else torch.stack([image_tensor(picture, image_size) for picture in images])
    ids = mask = starts = None
    if captions is not None:
        ids, mask, starts = tokenizer.encode_batch(captions, max_text_len)
    return Batch(image, ids, mask, torch.tensor(index, dtype=torch.int64), starts)


class Loader:
    """Batches of this process from a source; iterate over it.

    batch_size: samples of one step over all processes. image_size, max_text_len: the model's. use: "pairs", "images"
    (captions are not looked at) or "texts". seed and the source fix everything: `shuffle` permutes the shards, and
    blocks of `block` samples within. epochs: passes over the source; None: endless, every batch full.
    crop: random crops, see `image_tensor`. num_workers: processes that decode.

    The source is dealt out to `lanes` streams, and every step takes batch_size / lanes samples of each, in the order
    of the lanes. A process (a worker in it) owns an equal share of neighbouring lanes. So the batches of a step,
    put together in the order of the ranks, are the same for every `world_size` and `num_workers` that divides
    `lanes`, and a position saved by one can be resumed by another. By default the largest power of two up to 16 that
    divides batch_size, where that suits the processes, else up to 16 for each that decodes. (With epochs given, a
    process reads one lane after the other instead, and every sample is read exactly once an epoch; the last batch may
    be short.)

    `report` counts what the batches given so far contained and what was skipped on the way. A sample that cannot be
    used is skipped and the next one takes its place.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        image_size: int,
        max_text_len: int,
        use: str = "pairs",
        seed: int = 0,
        shuffle: bool = True,
        block: int = 256,
        epochs: int | None = None,
        crop: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        lanes: int | None = None,
    ) -> None:
        readers = world_size * max(1, num_workers)
        if lanes is None:
            lanes = math.gcd(batch_size, 16)
            lanes = lanes if lanes % readers == 0 else math.gcd(batch_size, 16 * readers)
        if use not in USES:
            raise ValueError(f"Loader: use must be one of {USES}, got {use!r}.")
        if use != "images" and tokenizer is None:
            raise ValueError(f"Loader: with use={use!r} there must be a tokenizer. Hint: Tokenizer.load('vocab.txt').")
        if batch_size < 1 or lanes < 1 or batch_size % lanes:
            raise ValueError(f"Loader: batch_size must be a multiple of lanes, got {batch_size} and {lanes}.")
        if lanes % readers:
            raise ValueError(
                f"Loader: lanes must be a multiple of world_size times num_workers, got {lanes} lanes, "
                f"{world_size} and {num_workers}. Hint: a batch_size that {readers} divides, it is {batch_size}."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"Loader: rank must lie in 0..{world_size - 1}, got {rank}.")
        self.source, self.tokenizer = source, tokenizer
        self.batch_size, self.image_size, self.max_text_len, self.use = batch_size, image_size, max_text_len, use
        self.seed, self.shuffle, self.block, self.epochs, self.crop = seed, shuffle, block, epochs, crop
        self.rank, self.world_size, self.num_workers, self.lanes = rank, world_size, num_workers, lanes
        share = lanes // world_size
        self.own_lanes = range(rank * share, (rank + 1) * share)
        self.report = Report()
        # Of every lane of this process: (epoch, samples of it that are behind us).
        self.positions: dict[int, tuple[int, int]] = {lane: (0, 0) for lane in self.own_lanes}

    def __iter__(self) -> Iterator[Batch]:
        """Goes on where the last batch ended, also after `load_state_dict`; after the last epoch, from the start."""
        if all(position == (0, 0) for position in self.positions.values()):
            self.report = Report()
        workers = DataLoader(
            _Parts(self),
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=_start_worker,
            collate_fn=_as_it_is,
        )
        # Endless batches are put together from one part of every worker; DataLoader takes them in turns.
        together = max(1, self.num_workers) if self.epochs is None else 1
        parts = []
        for part, report, positions in workers:
            self.report.add(report)
            self.positions.update(positions)
            if part is not None:
                parts.append(part)
            if len(parts) == together:
                yield Batch.cat(parts) if together > 1 else parts[0]
                parts = []
        self.positions = dict.fromkeys(self.own_lanes, (0, 0))  # the passes are over: the next one starts anew

    def state_dict(self) -> dict[str, object]:
        """The position after the last batch given, of this process. Plain numbers and strings."""
        positions = {str(lane): list(position) for lane, position in self.positions.items()}
        return {"seed": self.seed, "lanes": self.lanes, "block": self.block, "positions": positions}

    @staticmethod
    def merge_states(states: Iterable[dict[str, object]]) -> dict[str, object]:
        """One state from those of all processes; any number of processes can resume from it."""
        states = list(states)
        return {**states[0], "positions": {k: v for state in states for k, v in state["positions"].items()}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a position. Raises ValueError if it belongs to another order or lacks a lane of this process."""
        for name in ("seed", "lanes", "block"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"Loader.load_state_dict: {name} must be what the state was saved with, {state[name]}, "
                    f"got {getattr(self, name)}."
                )
        missing = [lane for lane in self.own_lanes if str(lane) not in state["positions"]]
        if missing:
            raise ValueError(
                f"Loader.load_state_dict: the state must hold the lanes of this process, it lacks {missing}. "
                "Hint: merge_states of the states of all processes."
            )
        self.positions = {lane: tuple(state["positions"][str(lane)]) for lane in self.own_lanes}


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork


def _as_it_is(part: object) -> object:
    return part


class _Parts(IterableDataset):
    """In a worker: (batch or None, what was met since the last one, positions after it)."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.truncated = 0

    def __iter__(self) -> Iterator[tuple[Batch | None, Report, dict[int, tuple[int, int]]]]:
        loader = self.loader
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        share = len(loader.own_lanes) // workers
        lanes = {lane: _Lane(loader, lane) for lane in loader.own_lanes[worker * share : (worker + 1) * share]}
        streams = {lane: iter(state) for lane, state in lanes.items()}
        if loader.epochs is None:
            each = loader.batch_size // loader.lanes
            groups = iter(lambda: [s for lane in lanes for s in islice(streams[lane], each)], None)
        else:
            size = loader.batch_size // loader.world_size
            samples = chain.from_iterable(streams.values())
            groups = iter(lambda: list(islice(samples, size)), [])
        for group in groups:
            batch = self._batch(group)
            yield batch, *self._news(lanes)
        yield None, *self._news(lanes)  # what was skipped after the last sample

    def _batch(self, group: list[tuple[int, Tensor | None, str | None]]) -> Batch:
        loader = self.loader
        index = torch.tensor([number for number, _, _ in group], dtype=torch.int64)
        image = None if loader.use == "texts" else torch.stack([image for _, image, _ in group])
        ids = mask = starts = None
        if loader.use != "images":
            texts = [text for _, _, text in group]
            before = loader.tokenizer.num_truncated
            ids, mask, starts = loader.tokenizer.encode_batch(texts, loader.max_text_len)
            self.truncated += loader.tokenizer.num_truncated - before
        return Batch(image, ids, mask, index, starts)

    def _news(self, lanes: dict[int, _Lane]) -> tuple[Report, dict[int, tuple[int, int]]]:
        report = Report()
        for lane in lanes.values():
            report.add(lane.report.take())
        report.truncated_captions, self.truncated = self.truncated, 0
        return report, {number: lane.position for number, lane in lanes.items()}


class _Lane:
    """One stream of decoded samples (number, image, caption), with its position and what it met."""

    def __init__(self, loader: Loader, number: int) -> None:
        self.loader, self.number = loader, number
        self.position = loader.positions[number]
        self.report = Report()

    def __iter__(self) -> Iterator[tuple[int, Tensor | None, str | None]]:
        loader = self.loader
        while loader.epochs is None or self.position[0] < loader.epochs:
            epoch, behind = self.position
            good = behind > 0
            for offset, record in enumerate(self._epoch(epoch)):
                if offset < behind:
                    continue
                crop = random.Random(f"crop {loader.seed} {epoch} {record.index}") if loader.crop else None
                sample = decode(record, loader.use, loader.image_size, self.report, crop)
                self.position = (epoch, offset + 1)
                if sample is not None:
                    good = True
                    yield sample
            if not good and loader.epochs is None:
                raise RuntimeError(
                    f"Loader: every lane must hold a good sample, lane {self.number} of {loader.lanes} has none: "
                    f"{'; '.join(self.report.lines())}. Hint: a small source wants a small batch_size, or fewer lanes."
                )
            self.position = (epoch + 1, 0)

    def _epoch(self, epoch: int) -> Iterator[Record]:
        """The records of this lane, in the order of this epoch."""
        loader = self.loader
        shards = list(range(loader.source.num_shards))
        if loader.shuffle:
            random.Random(f"shards {loader.seed} {epoch}").shuffle(shards)
        if len(shards) >= loader.lanes:
            records = read_records(loader.source, shards[self.number :: loader.lanes], self.report)
        else:  # every lane reads all and keeps its share
            records = islice(read_records(loader.source, shards, self.report), self.number, None, loader.lanes)
        if not loader.shuffle:
            yield from records
            return
        # Shuffled by blocks, so that a position is a number and no buffer has to be saved.
        rng = random.Random(f"blocks {loader.seed} {epoch} {self.number}")
        while block := list(islice(records, loader.block)):
            rng.shuffle(block)
            yield from block
