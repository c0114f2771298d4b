"""The demo's photographs, captions and tokenizer."""

import pytest
import torch
from PIL import Image

from vlmo_kernels import demo_data


@pytest.fixture(scope="module")
def captions():
    return [record["caption"] for record in demo_data.photo_records()]


@pytest.fixture(scope="module")
def tokenizer(captions):
    return demo_data.train_wordpiece(captions, 600)


def test_photos_are_eight_distinct_pictures_with_captions():
    photos = demo_data.load_photos()
    assert len(photos) == 8
    assert all(img.mode == "RGB" and max(img.size) == 320 for img, _ in photos)
    assert len({img.tobytes() for img, _ in photos}) == 8


def test_captions_differ_in_length(captions):
    words = [len(caption.split()) for caption in captions]
    assert min(words) == 4 and max(words) <= 30
    assert len(set(words)) >= 6
    assert words == sorted(words)


def test_every_photo_is_credited():
    records = demo_data.photo_records()
    assert len({record["file"] for record in records}) == 8
    for record in records:
        assert set(record) == {"file", "caption", "title", "author", "source", "licence", "changes"}
        assert all(record.values())
        assert record["licence"].startswith(("CC0", "CC BY 2.0", "public domain"))


def test_photos_stay_small():
    sizes = [path.stat().st_size for path in (demo_data._HERE / "photos").iterdir()]
    assert max(sizes) < 40_000 and sum(sizes) < 300_000


@pytest.mark.parametrize("size", [(320, 213), (213, 320), (32, 32), (7, 500)], ids=str)
def test_image_tensor(size):
    out = demo_data.image_tensor(Image.new("RGB", size, (255, 0, 51)), 48)
    assert out.shape == (3, 48, 48) and out.dtype == torch.float32 and out.is_contiguous()
    expected = torch.tensor([1.0, -1.0, -0.6]).view(3, 1, 1).expand(3, 48, 48)
    torch.testing.assert_close(out, expected)


def test_image_tensor_keeps_the_centre_and_the_orientation():
    img = Image.new("RGB", (60, 20))
    img.paste((255, 255, 255), (20, 0, 40, 10))  # the upper half of the central square
    out = demo_data.image_tensor(img, 20)
    assert (out[:, :10] == 1).all() and (out[:, 10:] == -1).all()


def test_encode(captions, tokenizer):
    ids, mask = demo_data.encode(tokenizer, captions, 40)
    assert ids.shape == mask.shape == (8, 40)
    assert ids.dtype == mask.dtype == torch.int64
    cls, sep, pad, unk = (tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "[PAD]", "[UNK]"))
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) >= 6 and lengths.max() <= 40
    for row, length in enumerate(lengths.tolist()):
        assert mask[row, :length].all() and not mask[row, length:].any()
        assert ids[row, 0] == cls and ids[row, length - 1] == sep
        assert (ids[row, length:] == pad).all() and not (ids[row] == unk).any()
    assert tokenizer.decode(ids[0].tolist()) == "a tabby cat ' s face."


def test_encode_cuts_and_keeps_the_separator(captions, tokenizer):
    ids, mask = demo_data.encode(tokenizer, captions, 5)
    assert ids.shape == (8, 5) and mask.all()
    assert (ids[:, -1] == tokenizer.token_to_id("[SEP]")).all()


def test_training_twice_gives_the_same_ids(captions, tokenizer):
    again = demo_data.train_wordpiece(captions, 600)
    assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("vocab_size", [80, 200])
def test_a_small_vocabulary_spells_words_without_losing_them(captions, vocab_size):
    tokenizer = demo_data.train_wordpiece(captions, vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    for caption, encoding in zip(captions, tokenizer.encode_batch(captions), strict=True):
        letters = "".join(piece.removeprefix("##") for piece in encoding.tokens)
        assert letters == caption.lower().replace(" ", "")


def test_vocabulary_file_round_trip(captions, tokenizer, tmp_path):
    path = tmp_path / "vocab.txt"
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    path.write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")
    ids, mask = demo_data.encode(demo_data.load_vocab(path), captions, 40)
    expected_ids, expected_mask = demo_data.encode(tokenizer, captions, 40)
    assert torch.equal(ids, expected_ids) and torch.equal(mask, expected_mask)


def test_missing_vocabulary_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must exist, given '.*nowhere\.txt'\. Hint: "):
        demo_data.load_vocab(tmp_path / "nowhere.txt")


def test_bad_vocabularies(tmp_path):
    with pytest.raises(ValueError, match="must be a file"):
        demo_data.load_vocab(tmp_path)
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        demo_data.load_vocab(path)
    path.write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(ValueError, match=r"lacks \[SEP\], \[MASK\]"):
        demo_data.load_vocab(path)


def test_bad_arguments(captions, tokenizer):
    with pytest.raises(ValueError, match="vocab_size must hold"):
        demo_data.train_wordpiece(captions, 10)
    with pytest.raises(ValueError, match="max_len must have room"):
        demo_data.encode(tokenizer, captions, 2)
    with pytest.raises(TypeError, match="sequence of strings"):
        demo_data.encode(tokenizer, "one caption", 40)
    with pytest.raises(ValueError, match="must not be empty"):
        demo_data.encode(tokenizer, [], 40)
    with pytest.raises(TypeError, match="PIL image"):
        demo_data.image_tensor(torch.zeros(3), 32)
    with pytest.raises(ValueError, match="size must be positive"):
        demo_data.image_tensor(Image.new("RGB", (4, 4)), 0)
