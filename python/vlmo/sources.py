"""Where image-text pairs come from: Parquet, Arrow, WebDataset tars, COCO json, a folder, generated shapes.

A source has a number of shards and reads one shard at a time:

    source.num_shards          -> int
    source.read(shard)         -> iterator of `Record`; may end in `DamagedShard` after the good ones

`open_source` finds the right one for a path. `vlmo.data.Loader` shuffles, divides over processes, decodes and counts.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from vlmo_kernels import demo_data

from . import shapes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "image_bytes", "picture")
CAPTION_COLUMNS = ("caption", "text", "txt", "captions", "sentence")
CAPTIONS_FILES = ("captions.jsonl", "captions.json", "captions.tsv")
_ROWS_PER_SHARD = 64  # of sources that are lists in memory
_SHARD_BITS = 32  # a sample's number is the shard's number, then the row in it


@dataclass(frozen=True)
class Record:
    """One pair before decoding.

    index: number in the data set, whatever the order of reading. picture: number of the image, equal for all captions
    of one image. name: for messages. image: encoded bytes, a file, a PIL image, or None. caption: text or None.
    """

    index: int
    picture: int
    name: str
    image: bytes | Path | Image.Image | None
    caption: str | None


class DamagedShard(Exception):
    """A shard cannot be read to its end. `str()` names the shard and the reason."""


class Source(Protocol):
    num_shards: int

    def read(self, shard: int) -> Iterator[Record]: ...


def open_source(spec: str, image_size: int = 64) -> Source:
    """The source for what a user writes.

    "shapes:N" or "shapes:N:heldout" (generated, `image_size` pixels a side), "photos" (eight that come along), a folder
    with captions.json, .jsonl or .tsv, a folder of images, a Karpathy json with its images beside it ("coco.json", or
    one split of it, "coco.json:test"), .parquet, .arrow, .tar, several of one kind by a glob or braces
    ("train-{000..099}.tar"), a folder of such files.
    """
    if spec.startswith("shapes:"):
        return _open_shapes(spec, image_size)
    if spec == "photos":
        return PhotosSource()
    if os.path.isdir(spec):
        folder = Path(spec)
        for name in CAPTIONS_FILES:
            if (folder / name).is_file():
                return FolderSource(folder, folder / name)
        for suffix in (".parquet", ".arrow", ".tar"):
            files = sorted(str(path) for path in folder.glob(f"*{suffix}"))
            if files:
                return _open_files(files)
        return FolderSource(folder)
    file, _, split = spec.partition(".json:")
    if split:
        return KarpathySource(file + ".json", splits=(split,))
    if spec.endswith(".json"):
        return KarpathySource(spec)
    return _open_files(_expand(spec))


def _open_shapes(spec: str, image_size: int) -> ShapesSource:
    _, number, *split = spec.split(":")
    if not number.isdecimal() or len(split) > 1:
        raise ValueError(f"open_source: shapes must be shapes:N or shapes:N:heldout, got {spec!r}.")
    return ShapesSource(shapes.dataset(int(number), 0, image_size, *split))


def _open_files(files: list[str]) -> Source:
    suffixes = {Path(file).suffix for file in files}
    if suffixes == {".parquet"} or suffixes == {".arrow"}:
        return ArrowSource(files)
    if suffixes == {".tar"}:
        return WebDatasetSource(files)
    raise ValueError(
        "open_source: files must all be .parquet, all .arrow, all .tar or one .json, "
        f"got {', '.join(sorted(suffix or 'none' for suffix in suffixes))}."
    )


def _expand(spec: str) -> list[str]:
    from braceexpand import braceexpand

    files = [file for part in braceexpand(spec) for file in (sorted(glob.glob(part)) or [part])]
    for file in files:
        if not os.path.exists(file) and "://" not in file:
            raise FileNotFoundError(f"open_source: the file must exist, got {file!r}.")
    return files


class _ListSource:
    """Rows in memory, 64 to a shard, so that shuffling the shards shuffles well."""

    def __init__(self, name: str, rows: Sequence) -> None:
        if not rows:
            raise ValueError(f"{type(self).__name__}: {name} must hold at least one sample.")
        self._rows = rows
        self.num_shards = -(-len(rows) // _ROWS_PER_SHARD)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, shard: int) -> Iterator[Record]:
        start = shard * _ROWS_PER_SHARD
        for index in range(start, min(start + _ROWS_PER_SHARD, len(self._rows))):
            yield self._record(index)

    def _record(self, index: int) -> Record:
        return self._rows[index]


class ShapesSource(_ListSource):
    """Generated pictures: `ShapesSource(shapes.dataset(20_000))`."""

    def __init__(self, pictures: shapes.Pictures) -> None:
        super().__init__("the data set", pictures)

    def _record(self, index: int) -> Record:
        picture = self._rows[index]
        return Record(index, index, f"shapes {index}", picture.image, picture.caption)


class PhotosSource(_ListSource):
    """The eight photographs with captions that come with `vlmo_kernels`; see its `demo_data` for their authors."""

    def __init__(self) -> None:
        pairs = demo_data.load_photos()
        super().__init__(
            "demo_data", [Record(i, i, f"photo {i}", image, text) for i, (image, text) in enumerate(pairs)]
        )


class FolderSource(_ListSource):
    """Images in a folder, with a captions file or without.

    The file: .json, {"a.jpg": "caption"} or {"a.jpg": ["one", "two"]} or a list of objects; .jsonl, an object a line
    with the image under "image", "file_name" or "file" and the text under "caption" or "text" (a string or a list);
    .tsv, image, tab, caption. Names are relative to `folder`. Without a file: every image below `folder`, by name.
    """

    def __init__(self, folder: str | os.PathLike[str], captions: str | os.PathLike[str] | None = None) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"FolderSource: the folder must exist, got '{folder}'.")
        if captions is None:
            files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            pairs = [(str(path.relative_to(folder)), [None]) for path in files]
        else:
            pairs = _read_captions(Path(captions))
        records = []
        for picture, (name, texts) in enumerate(pairs):
            for text in texts or [None]:
                records.append(Record(len(records), picture, name, folder / name, text))
        super().__init__(f"'{captions or folder}'", records)
        self.has_captions = captions is not None


def _read_captions(path: Path) -> list[tuple[str, list[str]]]:
    """(image name, its captions) in the order of the file."""
    text = _read_text("FolderSource", path)
    try:
        if path.suffix == ".tsv":
            rows = [line.split("\t") for line in text.splitlines() if line.strip()]
            pairs: dict[str, list[str]] = {}
            for row in rows:
                pairs.setdefault(row[0], []).extend(row[1:2] or [""])
            return list(pairs.items())
        if path.suffix == ".jsonl":
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            content = json.loads(text)
        else:
            raise ValueError(f"FolderSource: captions must be .json, .jsonl or .tsv, got '{path}'.")
    except json.JSONDecodeError as error:
        raise ValueError(f"FolderSource: the captions file must be JSON, '{path}' is not: {error}.") from error
    if isinstance(content, dict):
        return [(name, _texts(value)) for name, value in content.items()]
    return [_image_and_texts(path, number, row) for number, row in enumerate(content)]


def _image_and_texts(path: Path, number: int, row: object) -> tuple[str, list[str]]:
    row = row if isinstance(row, dict) else {}
    name = next((row[key] for key in ("image", "file_name", "file") if key in row), None)
    text = next((row[key] for key in CAPTION_COLUMNS if key in row), None)
    if not isinstance(name, str):
        raise ValueError(
            f"FolderSource: row {number} of '{path}' must name its image under image, file_name or file, "
            f"it has {sorted(row) or 'no keys'}."
        )
    return name, _texts(text)


def _texts(value: object) -> list[str]:
    if isinstance(value, list):
        return [text if isinstance(text, str) else None for text in value]
    return [value if isinstance(value, str) else None]


def _read_text(who: str, path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{who}: the file must exist, got '{path}'.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{who}: the file must be UTF-8 text, '{path}' is not: {error}.") from error


class KarpathySource(_ListSource):
    """COCO and Flickr30k in Karpathy's json (dataset_coco.json): one record a sentence.

    images: the folder that holds the images, by `filepath/filename` or `filename`; by default the json's.
    splits: "train" and "restval" are what models are pre-trained on; "val", "test".
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str] | None = None,
        splits: Sequence[str] = ("train", "restval"),
    ) -> None:
        path = Path(path)
        try:
            content = json.loads(_read_text("KarpathySource", path))
            entries = [entry for entry in content["images"] if entry["split"] in splits]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"KarpathySource: '{path}' must be an object with a list 'images', each with 'split', 'filename' "
                f"and 'sentences': {error!r}."
            ) from error
        folder = Path(images) if images is not None else path.parent
        records = []
        for picture, entry in enumerate(entries):
            name = os.path.join(entry.get("filepath", ""), entry["filename"])
            for sentence in entry.get("sentences") or [{}]:
                records.append(Record(len(records), picture, name, folder / name, sentence.get("raw")))
        super().__init__(f"'{path}' (splits {', '.join(splits)})", records)


class _FileSource:
    """One shard a file. A sample's number is made of the file's number and its row."""

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        if isinstance(files, (str, os.PathLike)):
            files = [files]
        if not files:
            raise ValueError(f"{type(self).__name__}: files must name at least one file.")
        self.files = [os.fspath(file) for file in files]
        self.num_shards = len(self.files)

    def _record(self, shard: int, row: int, name: str, image: object, caption: object) -> Record:
        number = (shard << _SHARD_BITS) + row
        if isinstance(caption, list):
            caption = caption[0] if caption else None
        if isinstance(image, dict):  # as Hugging Face's datasets store images
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = Path(self.files[shard]).parent / image
        return Record(number, number, name, image, caption if isinstance(caption, str) else None)


class ArrowSource(_FileSource):
    """Parquet or Arrow files (IPC file or stream) with a column of images and one of captions.

    Images are encoded bytes, {"bytes", "path"} or names of files beside the table; of a list of captions the first
    is taken. Columns that are not named are looked for under the usual names.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        super().__init__(files)
        self.image_column, self.caption_column = image_column, caption_column

    def read(self, shard: int) -> Iterator[Record]:
        import pyarrow

        file, row = self.files[shard], 0
        try:
            schema, batches = _open_parquet(file) if file.endswith(".parquet") else _open_arrow(file)
            image = _column(file, schema, self.image_column, IMAGE_COLUMNS)
            caption = _column(file, schema, self.caption_column, CAPTION_COLUMNS)
            for batch in batches:
                table = pyarrow.Table.from_batches([batch]).select([image, caption])
                for cell in table.to_pylist():
                    yield self._record(shard, row, f"{file} row {row}", cell[image], cell[caption])
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedShard(f"{file}: {_line(error)} (after {row} rows)") from error


def _open_parquet(file: str) -> tuple[object, Iterator]:
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    return table.schema_arrow, table.iter_batches(batch_size=_ROWS_PER_SHARD)


def _open_arrow(file: str) -> tuple[object, Iterator]:
    """An IPC file is a stream between a magic number and a footer, so a file cut in half is read up to the cut."""
    import pyarrow

    stream = pyarrow.OSFile(file)
    magic = b"ARROW1\0\0"
    if stream.read(len(magic)) != magic:
        stream.seek(0)
    reader = pyarrow.ipc.open_stream(stream)
    return reader.schema, iter(reader)


def _column(file: str, schema, wanted: str | None, usual: tuple[str, ...]) -> str:
    for name in (wanted,) if wanted is not None else usual:
        if name in schema.names:
            return name
    raise ValueError(
        f"ArrowSource: '{file}' must have the column {wanted or ' or '.join(usual)}, it has {', '.join(schema.names)}. "
        "Hint: image_column=..., caption_column=..."
    )


class WebDatasetSource(_FileSource):
    """WebDataset tar shards: in every sample an image (jpg, png, ...) and a caption (txt, or "caption" in a json)."""

    def read(self, shard: int) -> Iterator[Record]:
        import webdataset

        file, errors, row = self.files[shard], [], 0

        def stop(error: Exception) -> bool:
            errors.append(error)
            return False

        for sample in webdataset.tariterators.tarfile_samples([{"url": file}], handler=stop):
            image = next((value for key, value in sample.items() if f".{key}" in IMAGE_SUFFIXES), None)
            yield self._record(shard, row, f"{file} {sample['__key__']}", image, _tar_caption(sample))
            row += 1
        if errors:
            raise DamagedShard(f"{file}: {_line(errors[0])} (after {row} samples)") from errors[0]
        if os.path.isfile(file) and not _tar_ends(file):
            raise DamagedShard(f"{file}: cut off, no end-of-archive mark (after {row} samples)")


def _tar_caption(sample: dict) -> str | None:
    for key in CAPTION_COLUMNS:
        if key in sample:
            return sample[key].decode("utf-8", errors="replace")
    try:
        content = json.loads(sample.get("json", b"{}"))
    except ValueError:
        return None
    return (
        next((content[key] for key in CAPTION_COLUMNS if key in content), None) if isinstance(content, dict) else None
    )


def _tar_ends(file: str) -> bool:
    """A tar ends in two blocks of zeros. Cut exactly between two members, it looks whole but for these."""
    with open(file, "rb") as stream:
        if stream.read(6)[:2] == b"\x1f\x8b":
            return True  # gzip has a check sum of its own
        stream.seek(-min(1024, os.path.getsize(file)), os.SEEK_END)
        return not any(stream.read())


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
