"""Sources and the loader: every format, what is damaged, division over processes, order and resumption."""

import io
import json
import random
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from vlmo import shapes
from vlmo.data import Batch, Loader, collate, image_tensor, load_image
from vlmo.sources import (
    ArrowSource,
    FolderSource,
    KarpathySource,
    ShapesSource,
    WebDatasetSource,
    open_source,
)
from vlmo.tokenizer import Tokenizer

CAPTIONS = [shapes.dataset(40).caption(i) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 400)


def png(number: int, mode: str = "RGB") -> bytes:
    """An image of one colour that tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (number, 2 * number, 255 - number)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def load(source, tokenizer, **options) -> tuple[Batch, Loader]:
    """Everything in a source, in order, as one batch."""
    options = {
        "batch_size": 4,
        "epochs": 1,
        "shuffle": False,
        "image_size": 8,
        "max_text_len": 20,
        "lanes": 1,
    } | options
    loader = Loader(source, tokenizer, **options)
    return Batch.cat(list(loader)), loader


def write_tar(path, samples) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_tars(folder, count: int = 12, shards: int = 3) -> list[str]:
    each = count // shards
    for shard in range(shards):
        samples = []
        for i in range(shard * each, (shard + 1) * each):
            samples += [(f"{i:04d}.png", png(i)), (f"{i:04d}.txt", CAPTIONS[i].encode())]
        write_tar(folder / f"pairs-{shard:03d}.tar", samples)
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def table(count: int) -> pa.Table:
    images = [{"bytes": png(i), "path": None} for i in range(count)]
    return pa.table({"key": list(range(count)), "image": images, "caption": CAPTIONS[:count]})


def write_arrow(path, count: int, file_format: bool) -> None:
    new = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with new(str(path), table(count).schema) as writer:
        writer.write_table(table(count), max_chunksize=4)


def write_images(folder, count: int) -> None:
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i))


def make_parquet(folder):
    parquet.write_table(table(12).slice(0, 5), folder / "a.parquet", row_group_size=2)
    parquet.write_table(table(12).slice(5), folder / "b.parquet")
    return folder


def make_arrow(folder):
    write_arrow(folder / "a.arrow", 12, True)
    return folder / "a.arrow"


def make_arrow_stream(folder):
    write_arrow(folder / "a.arrow", 12, False)
    return folder / "a.arrow"


def make_paths_in_parquet(folder):
    write_images(folder, 12)
    columns = {"jpg": [f"{i}.png" for i in range(12)], "text": CAPTIONS[:12]}
    parquet.write_table(pa.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def make_tars(folder):
    write_tars(folder)
    return folder / "pairs-{000..002}.tar"


def make_json(folder):
    write_images(folder, 12)
    content = {f"{i}.png": CAPTIONS[i] for i in range(12)}
    (folder / "captions.json").write_text(json.dumps(content))
    return folder


def make_jsonl(folder):
    write_images(folder, 12)
    rows = [{"file_name": f"{i}.png", "text": CAPTIONS[i]} for i in range(12)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def make_tsv(folder):
    write_images(folder, 12)
    (folder / "captions.tsv").write_text("".join(f"{i}.png\t{CAPTIONS[i]}\n" for i in range(12)))
    return folder


def make_karpathy(folder):
    write_images(folder, 12)
    images = [
        {
            "filepath": "",
            "filename": f"{i}.png",
            "split": ("train", "restval")[i % 2],
            "sentences": [{"raw": CAPTIONS[i]}],
        }
        for i in range(12)
    ]
    images.append({"filename": "none.png", "split": "test", "sentences": [{"raw": "of the test"}]})
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return folder / "dataset.json"


FORMATS = [
    make_parquet,
    make_arrow,
    make_arrow_stream,
    make_paths_in_parquet,
    make_tars,
    make_json,
    make_jsonl,
    make_tsv,
    make_karpathy,
]


@pytest.mark.parametrize("make", FORMATS)
def test_every_format_gives_the_same_pairs(make, tmp_path, tokenizer):
    batch, loader = load(open_source(str(make(tmp_path))), tokenizer)
    ids, mask, starts = tokenizer.encode_batch(CAPTIONS[:12], 20)
    assert torch.equal(batch.text_ids, ids) and torch.equal(batch.text_mask, mask)
    assert torch.equal(batch.word_starts, starts)
    expected = torch.stack([image_tensor(load_image(png(i))[0], 8) for i in range(12)])
    assert torch.equal(batch.image, expected)
    assert len(set(batch.index.tolist())) == 12
    assert loader.report.lines() == ["12 samples read"]


def test_shapes_through_the_loader(tokenizer):
    batch, _ = load(open_source("shapes:40", image_size=32), tokenizer, image_size=32)
    pictures = shapes.dataset(40, image_size=32)
    expected = collate([p.image for p in pictures], [p.caption for p in pictures], range(40), tokenizer, 32, 20)
    assert torch.equal(batch.image, expected.image) and torch.equal(batch.text_ids, expected.text_ids)
    assert torch.equal(batch.index, expected.index)
    assert open_source("shapes:7:heldout").read(0).__next__().caption == shapes.dataset(7, split="heldout").caption(0)


def test_photographs_through_the_loader(tokenizer):
    batch, loader = load(open_source("photos"), tokenizer)
    assert batch.image.shape == (8, 3, 8, 8) and loader.report.good == 8


def test_several_captions_of_one_image(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "captions.json").write_text(json.dumps({"0.png": ["one", "two"], "1.png": ["three"]}))
    records = list(FolderSource(tmp_path, tmp_path / "captions.json").read(0))
    assert [(r.index, r.picture, r.caption) for r in records] == [(0, 0, "one"), (1, 0, "two"), (2, 1, "three")]


def test_a_split_of_karpathy(tmp_path):
    source = open_source(f"{make_karpathy(tmp_path)}:test")
    assert [record.caption for record in source.read(0)] == ["of the test"]
    with pytest.raises(ValueError, match="splits dev. must hold at least one sample"):
        open_source(f"{tmp_path}/dataset.json:dev")


# What is not as it should be


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_images_of_another_mode_are_converted_and_counted(mode, tmp_path, tokenizer):
    image = Image.new("L", (10, 10), 200).convert("RGB" if mode != "I;16" else "L").convert(mode.replace("I;16", "I"))
    if mode == "I;16":
        image = Image.fromarray(np.full((10, 10), 200 * 257, dtype=np.uint16))
    file = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(file)
    assert Image.open(file).mode == mode
    (tmp_path / "captions.json").write_text(json.dumps({file.name: "a gray square"}))
    batch, loader = load(open_source(str(tmp_path)), tokenizer)
    assert loader.report.converted_images == 1 and loader.report.good == 1
    level = round((batch.image.mean().item() + 1) * 127.5)
    # Two levels or a palette are dithered: what remains of the gray is that it is light, and not white.
    assert 127 < level < 255 if mode in ("1", "P") else level == 200


def test_transparent_pixels_become_white():
    image, converted = load_image(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    assert converted and image.getpixel((0, 0)) == (255, 255, 255)


def test_corrupt_images_and_empty_captions_are_counted_and_skipped(tmp_path, tokenizer):
    good = png(1)
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(whole, "JPEG")
    bad = [b"", b"no image", good[: len(good) // 2], whole.getvalue()[:400], good[:-20] + b"\0" * 20, None]
    content = [{"bytes": image} for image in [good, *bad, good, good, good]]
    captions = ["good", *("bad" for _ in bad), "", "  ", None]
    parquet.write_table(pa.table({"image": content, "caption": captions}), tmp_path / "a.parquet")
    batch, loader = load(open_source(str(tmp_path / "a.parquet")), tokenizer)
    assert batch.index.tolist() == [0]
    assert (loader.report.corrupt_images, loader.report.empty_captions) == (len(bad), 3)
    lines = loader.report.lines()
    assert f"{len(bad)} skipped: corrupt images" in lines and "3 skipped: empty captions" in lines
    assert any("a.parquet row 2" in line for line in lines)


def test_a_missing_image_file_is_skipped(tmp_path, tokenizer):
    write_images(tmp_path, 1)
    (tmp_path / "captions.json").write_text(json.dumps({"gone.png": "gone", "0.png": "there"}))
    batch, loader = load(open_source(str(tmp_path)), tokenizer)
    assert batch.index.tolist() == [1] and "gone.png" in loader.report.examples[0]


def test_use_decides_what_must_be_there(tmp_path, tokenizer):
    write_images(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"broken")
    (tmp_path / "captions.json").write_text(json.dumps({"0.png": "", "1.png": "a circle"}))
    source = open_source(str(tmp_path))
    images, _ = load(source, None, use="images")
    assert images.index.tolist() == [0] and images.text_ids is None
    texts, _ = load(source, tokenizer, use="texts")
    assert texts.index.tolist() == [1] and texts.image is None


def test_long_captions_are_cut_and_counted(tmp_path, tokenizer):
    write_images(tmp_path, 2)
    (tmp_path / "captions.json").write_text(json.dumps({"0.png": "a small circle", "1.png": " ".join(CAPTIONS)}))
    batch, loader = load(open_source(str(tmp_path)), tokenizer)
    assert loader.report.truncated_captions == 1 and "1 truncated captions" in loader.report.lines()
    assert batch.text_mask[1].all() and batch.text_ids[1, -1] == tokenizer.sep_id


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("kind", ["tar", "arrow", "arrow_stream", "parquet"])
def test_a_shard_cut_in_half(kind, keep, tmp_path, tokenizer):
    """The good samples before the cut, the other shards whole, and the report names the file."""
    if kind == "tar":
        files = write_tars(tmp_path, 24, 2)
    else:
        files = [str(tmp_path / f"{name}.{kind.partition('_')[0]}") for name in "ab"]
        for file in files:
            if kind == "parquet":
                parquet.write_table(table(12), file)
            else:
                write_arrow(file, 12, kind == "arrow")
    with open(files[0], "r+b") as stream:
        stream.truncate(int(keep * stream.seek(0, io.SEEK_END)))
    batch, loader = load(open_source(str(tmp_path)), tokenizer)
    numbers = Counter(int(index) >> 32 for index in batch.index)
    assert numbers[1] == 12
    if kind == "parquet":
        assert numbers[0] == 0
    else:
        assert 12 * keep - 5 <= numbers[0] < 12
    assert len(loader.report.damaged_shards) == 1
    assert any(f"damaged shard: {files[0]}" in line for line in loader.report.lines())


def test_a_tar_cut_between_two_members(tmp_path, tokenizer):
    file = write_tars(tmp_path, 12, 1)[0]
    with tarfile.open(file) as tar:
        cut = tar.getmembers()[6].offset
    with open(file, "r+b") as stream:
        stream.truncate(cut)
    batch, loader = load(open_source(file), tokenizer)
    assert len(batch) == 3 and "cut off" in loader.report.lines()[1]


def test_tar_members_of_other_kinds(tmp_path, tokenizer):
    samples = [("a.png", png(1)), ("a.json", json.dumps({"caption": "in a json"}).encode())]
    samples += [("b.jpg", png(2)), ("c.txt", b"no image"), ("d.png", png(3)), ("d.json", b"{broken")]
    write_tar(tmp_path / "a.tar", samples)
    batch, loader = load(open_source(str(tmp_path / "a.tar")), tokenizer)
    assert batch.index.tolist() == [0]
    assert (loader.report.corrupt_images, loader.report.empty_captions) == (1, 2)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: open_source(str(d / "none.tar")), "the file must exist"),
        (lambda d: open_source(str(d / "a.zip")), "the file must exist"),
        (lambda d: open_source(str(d)), "must hold at least one sample"),
        (lambda d: open_source("shapes:many"), "shapes:N"),
        (lambda d: open_source("shapes:3:test"), "split must be one of"),
        (lambda d: open_source(str(d / "dataset.json")), "the file must exist"),
        (lambda d: KarpathySource(_write(d / "a.json", "[]")), "an object with a list 'images'"),
        (lambda d: KarpathySource(_write(d / "a.json", "{")), "an object with a list 'images'"),
        (lambda d: FolderSource(d, _write(d / "captions.json", "{")), "must be JSON"),
        (lambda d: FolderSource(d, _write(d / "captions.txt", "a")), "must be .json, .jsonl or .tsv"),
        (lambda d: FolderSource(d, _write(d / "captions.jsonl", '{"caption": "a"}')), "row 0 of"),
        (lambda d: FolderSource(d / "none"), "the folder must exist"),
        (lambda d: WebDatasetSource([]), "at least one file"),
        (lambda d: next(ArrowSource(_table_without_image(d)).read(0)), "it has picture_url, caption"),
    ],
)
def test_bad_sources(prepare, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(tmp_path)


def _write(path, text):
    path.write_text(text)
    return path


def _table_without_image(folder):
    parquet.write_table(pa.table({"picture_url": ["a"], "caption": ["b"]}), folder / "a.parquet")
    return folder / "a.parquet"


# Division over processes, order, resumption


SHAPES = ShapesSource(shapes.dataset(150, image_size=16))


def loader_of(tokenizer, source=SHAPES, **options) -> Loader:
    options = {"batch_size": 8, "image_size": 16, "max_text_len": 20, "block": 16} | options
    return Loader(source, tokenizer, **options)


@pytest.mark.parametrize("kind", ["shapes", "tars", "parquet"])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1)])
def test_every_sample_exactly_once_an_epoch(kind, world, workers, tmp_path, tokenizer):
    source = SHAPES
    if kind == "tars":
        source = WebDatasetSource(write_tars(tmp_path, 36, 9))  # more shards than lanes, and not a multiple
    if kind == "parquet":
        source = open_source(str(make_parquet(tmp_path)))  # fewer shards than lanes
    seen = Counter()
    for rank in range(world):
        for batch in loader_of(tokenizer, source, epochs=2, rank=rank, world_size=world, num_workers=workers):
            seen.update(batch.index.tolist())
    expected = {"shapes": 150, "tars": 36, "parquet": 12}[kind]
    assert len(seen) == expected and set(seen.values()) == {2}


def indices(loader: Loader, steps: int) -> list[list[int]]:
    return [batch.index.tolist() for batch in islice(loader, steps)]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_a_step_is_the_same_for_every_division(world, workers, tokenizer):
    """60 steps are three epochs and a bit."""
    alone = indices(loader_of(tokenizer), 60)
    ranks = [
        indices(loader_of(tokenizer, rank=rank, world_size=world, num_workers=workers), 60) for rank in range(world)
    ]
    assert [sum(parts, []) for parts in zip(*ranks)] == alone
    assert all(len(step) == 8 for step in alone)


def test_order_follows_from_the_seed_and_changes_every_epoch(tokenizer):
    first = sum(indices(loader_of(tokenizer), 18), [])
    assert first == sum(indices(loader_of(tokenizer), 18), [])
    assert first != sum(indices(loader_of(tokenizer, seed=1), 18), [])
    one, two = ([], [])
    for epoch, out in enumerate((one, two)):
        loader = loader_of(tokenizer, epochs=2, lanes=1)
        out += [i for batch in loader for i in batch.index.tolist()][epoch * 150 :][:150]
    assert sorted(one) == sorted(two) == list(range(150)) and one != two != sorted(two)


@pytest.mark.parametrize("stop", [1, 19, 45])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 4)])
def test_resumption_also_on_another_number_of_processes(stop, before, after, tokenizer):
    expected = indices(loader_of(tokenizer), stop + 12)[stop:]
    states = []
    for rank in range(before):
        loader = loader_of(tokenizer, rank=rank, world_size=before)
        indices(loader, stop)
        states.append(json.loads(json.dumps(loader.state_dict())))
    parts = []
    for rank in range(after):
        loader = loader_of(tokenizer, rank=rank, world_size=after)
        loader.load_state_dict(Loader.merge_states(states))
        parts.append(indices(loader, 12))
    assert [sum(step, []) for step in zip(*parts)] == expected


def test_resumption_with_workers_counts_batches_given_not_read_ahead(tokenizer):
    expected = indices(loader_of(tokenizer), 15)
    loader = loader_of(tokenizer, num_workers=2)
    got, iterator = [], iter(loader)
    for _ in range(5):
        got.append(next(iterator).index.tolist())
    again = loader_of(tokenizer, num_workers=2)
    again.load_state_dict(loader.state_dict())
    assert got + indices(again, 10) == expected


def test_skipped_samples_do_not_disturb_resumption(tmp_path, tokenizer):
    random.seed(0)
    content = [{"bytes": png(i) if random.random() < 0.6 else b"bad"} for i in range(40)]
    parquet.write_table(pa.table({"image": content, "caption": CAPTIONS}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path))
    expected = indices(loader_of(tokenizer, source), 10)
    loader = loader_of(tokenizer, source)
    got = indices(loader, 4)
    again = loader_of(tokenizer, source)
    again.load_state_dict(loader.state_dict())
    assert got + indices(again, 6) == expected
    assert loader.report.good == 32 and loader.report.corrupt_images > 5


def test_a_finite_loader_can_be_iterated_again(tokenizer):
    loader = loader_of(tokenizer, epochs=1)
    assert indices(loader, 100) == indices(loader, 100)
    assert loader.report.good == 150


def test_crops_follow_from_seed_and_epoch(tokenizer):
    batch, _ = load(SHAPES, tokenizer, image_size=16, crop=True)
    again, _ = load(SHAPES, tokenizer, image_size=16, crop=True)
    plain, _ = load(SHAPES, tokenizer, image_size=16)
    assert torch.equal(batch.image, again.image) and not torch.equal(batch.image, plain.image)
    assert batch.image.shape == plain.image.shape and batch.image.abs().max() <= 1


def test_a_source_without_a_good_sample_ends_with_a_message(tmp_path, tokenizer):
    (tmp_path / "a.png").write_bytes(b"broken")
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": "a circle"}))
    loader = loader_of(tokenizer, open_source(str(tmp_path)))
    with pytest.raises(RuntimeError, match="1 skipped: corrupt images"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": "both"}, "use must be one of"),
        ({"tokenizer": None}, "there must be a tokenizer"),
        ({"lanes": 3}, "batch_size must be a multiple of lanes"),
        ({"world_size": 3}, "lanes must be a multiple of world_size.* Hint: a batch_size that 3 divides"),
        ({"rank": 1}, "rank must lie in 0..0"),
    ],
)
def test_bad_loader_arguments(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        loader_of(options.pop("tokenizer", tokenizer), **options)


@pytest.mark.parametrize(("batch_size", "world", "lanes"), [(48, 2, 16), (48, 3, 48), (60, 3, 12), (96, 32, 32)])
def test_there_are_lanes_for_every_process(batch_size, world, lanes, tokenizer):
    assert loader_of(tokenizer, batch_size=batch_size, world_size=world).lanes == lanes


def test_a_state_of_another_order_is_refused(tokenizer):
    state = loader_of(tokenizer).state_dict()
    with pytest.raises(ValueError, match="seed must be what the state was saved with, 0, got 1"):
        loader_of(tokenizer, seed=1).load_state_dict(state)
    half = loader_of(tokenizer, world_size=2).state_dict()
    with pytest.raises(ValueError, match="merge_states"):
        loader_of(tokenizer).load_state_dict(half)


def test_batch_to_keeps_none():
    batch = Batch(None, torch.ones(1, 2, dtype=torch.int64), None, torch.tensor([3])).to("cpu")
    assert batch.image is None and batch.index.tolist() == [3] and len(batch) == 1


def test_tokenizer_round_trip_and_word_starts(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "vocab.txt")
    again = Tokenizer.load(tmp_path / "vocab.txt")
    texts = ["a small red circle", "zebra", "circles"]
    ids, mask, starts = tokenizer.encode_batch(texts, 12)
    assert all(map(torch.equal, again.encode_batch(texts, 12), (ids, mask, starts)))
    assert again.vocab_size == tokenizer.vocab_size
    assert mask.dtype == starts.dtype == torch.bool and ids.dtype == torch.int64
    assert ids[:, 0].eq(tokenizer.cls_id).all() and not starts[:, 0].any()
    assert starts[0].sum() == 4 and starts[2].sum() == 1
    assert not (starts & ((ids == tokenizer.sep_id) | (ids == tokenizer.pad_id))).any()
    assert tokenizer.decode(ids[0]) == "a small red circle"
    with pytest.raises(FileNotFoundError, match="the vocabulary must exist, got .*none.txt"):
        Tokenizer.load(tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="lacks"):
        Tokenizer.load(tmp_path / "bad.txt")
    with pytest.raises(ValueError, match="at least 3"):
        tokenizer.encode_batch(["a"], 2)
