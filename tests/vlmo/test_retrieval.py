"""Recall, search and re-ranking against their definitions, and embeddings on disk."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vlmo import CONFIGS, VLMo, shapes
from vlmo.data import collate
from vlmo.retrieval import (
    RANKS,
    Embeddings,
    embed,
    embed_images,
    match_scores,
    read_gallery,
    recall,
    rerank,
    search,
    to_float,
)
from vlmo.sources import FolderSource, ShapesSource
from vlmo.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(shapes.vocabulary_captions(), 1000)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = VLMo(replace(CONFIGS["tiny"], max_text_len=18, text_only_len=18, vocab_size=tokenizer.vocab_size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def gallery(tokenizer):
    return read_gallery(ShapesSource(shapes.dataset(30, image_size=32, split="heldout")), tokenizer, 32, 18)[0]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute_force(images, texts, picture_of_text) -> dict[str, float]:
    """Recall written out: sort everything for one query at a time."""
    result = {}
    scores = images.double() @ texts.double().T
    for k in RANKS:
        hits = [
            int(picture_of_text[t]) in scores[:, t].argsort(descending=True)[:k].tolist() for t in range(len(texts))
        ]
        result[f"t2i_r{k}"] = sum(hits) / len(hits)
        hits = []
        for i in range(len(images)):
            own = {t for t in range(len(texts)) if picture_of_text[t] == i}
            if own:
                hits.append(bool(own & set(scores[i].argsort(descending=True)[:k].tolist())))
        result[f"i2t_r{k}"] = sum(hits) / len(hits)
    return result


@pytest.mark.parametrize(
    ("images", "per_image"),
    [(1, [1]), (7, [1] * 7), (40, [5] * 40), (40, [0, 1, 3] * 13 + [2])],
    ids=["one", "fewer than ten", "five captions each", "unequal, some images without a text"],
)
def test_recall_is_its_definition(images, per_image, monkeypatch):
    monkeypatch.setattr("vlmo.retrieval._CHUNK", 16)  # several pieces, the last one short
    owner = torch.tensor([i for i, n in enumerate(per_image) for _ in range(n)])
    vectors = unit(images, 8)
    # Near their images, so that recall is neither 0 nor 1.
    texts = torch.nn.functional.normalize(vectors[owner] + 1.4 * unit(len(owner), 8, seed=1), dim=-1)
    got, expected = recall(vectors, texts, owner), brute_force(vectors, texts, owner)
    assert got == pytest.approx(expected)
    if images == 40:
        assert 0.05 < got["t2i_r1"] < got["t2i_r10"] < 1 and 0.05 < got["i2t_r1"] <= got["i2t_r10"]


def test_a_collapsed_model_has_no_recall():
    same = torch.ones(20, 4) / 2
    assert set(recall(same, same, torch.arange(20)).values()) == {0.0}
    assert set(recall(same * float("nan"), same, torch.arange(20)).values()) == {0.0}
    with pytest.raises(ValueError, match="there must be images and texts, got 20 and 0"):
        recall(same, same[:0], torch.arange(0))


def test_search_is_a_sort(monkeypatch):
    monkeypatch.setattr("vlmo.retrieval._CHUNK", 3)
    queries, index = unit(10, 6), unit(25, 6, seed=1)
    scores, found = search(queries, index, 7)
    order = (queries @ index.T).argsort(1, descending=True)[:, :7]
    assert torch.equal(found, order)
    torch.testing.assert_close(scores, (queries @ index.T).gather(1, order))
    assert search(queries, index[:4], 7)[1].shape == (10, 4)
    assert search(queries[:0], index, 7)[1].shape == (0, 7)
    with pytest.raises(ValueError, match="must be .Q, D. and .N, D."):
        search(queries, index[:, :3], 7)


def test_gallery_has_every_image_once(tmp_path, tokenizer):
    for i in range(3):
        Image.new("RGB", (40, 20), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    captions = {"0.png": ["a circle", "", "a red circle"], "3.png": ["x", "y"], "1.png": ["a star"], "2.png": []}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    source = FolderSource(tmp_path, tmp_path / "captions.json")
    gallery, report = read_gallery(source, tokenizer, 16, 18)
    assert gallery.names == ["0.png", "1.png"] and gallery.captions == ["a circle", "a red circle", "a star"]
    assert gallery.picture_of_text.tolist() == [0, 0, 1]
    assert (report.good, report.corrupt_images, report.empty_captions) == (3, 2, 2)
    alone, _ = read_gallery(source, tokenizer, 16, 18, texts=False)
    assert alone.names == ["0.png", "1.png", "2.png"] and len(alone.text_ids) == 0


def test_pixels_lose_nothing(tokenizer, gallery):
    pictures = shapes.dataset(30, image_size=32, split="heldout")
    batch = collate([p.image for p in pictures], [p.caption for p in pictures], range(30), tokenizer, 32, 18)
    assert torch.equal(to_float(gallery.pixels), batch.image)


def test_embeddings_are_the_dual_encoder_s(model, gallery):
    embeddings = embed(model, gallery, batch_size=7)
    with torch.no_grad():
        image = model.infer_image_ft(to_float(gallery.pixels)).itc_feats
        text = model.infer_text_ft(gallery.text_ids, gallery.text_mask).itc_feats
    torch.testing.assert_close(embeddings.images, image)
    torch.testing.assert_close(embeddings.texts, text)
    assert embed_images(model, gallery.pixels[:0]).shape == (0, 32)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_embeddings_on_disk(suffix, tmp_path):
    names, captions = ["a.png", "ü.png"], ["one", "two", "three"]
    made = Embeddings(unit(2, 4), unit(3, 4), torch.tensor([0, 1, 1]), names, captions)
    made.save(tmp_path / f"e{suffix}")
    again = Embeddings.load(tmp_path / f"e{suffix}")
    assert torch.equal(again.images, made.images) and torch.equal(again.texts, made.texts)
    assert torch.equal(again.picture_of_text, made.picture_of_text)
    assert (again.names, again.captions) == (names, captions)
    with pytest.raises(ValueError, match="must be .safetensors or .npz"):
        made.save(tmp_path / "e.pt")
    with pytest.raises(FileNotFoundError, match="the file must exist"):
        Embeddings.load(tmp_path / f"none{suffix}")
    (tmp_path / f"other{suffix}").write_text("no embeddings at all")
    with pytest.raises(ValueError, match="must be of `vlmo embed`, .*other"):
        Embeddings.load(tmp_path / f"other{suffix}")


def test_tensors_that_are_no_embeddings_are_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must be of `vlmo embed`"):
        Embeddings.load(tmp_path / "model.safetensors")


def test_match_scores_are_the_fusion_encoder_s(model, gallery):
    images, texts = torch.tensor([0, 5, 5]), torch.tensor([0, 0, 7])
    scores = match_scores(model, gallery, images, texts, batch_size=2)
    with torch.no_grad():
        out = model.infer(to_float(gallery.pixels[images]), gallery.text_ids[texts], gallery.text_mask[texts])
        log_probability = model.itm_score(out.cls_feats).log_softmax(1)
    torch.testing.assert_close(scores, log_probability[:, 1] - log_probability[:, 0])
    bare = VLMo(replace(model.config, heads=("itc",)))
    with pytest.raises(ValueError, match="must have 'itm'"):
        match_scores(bare, gallery, images, texts)


def test_reranking_is_its_definition(model, gallery):
    """The ten best of the dual encoder, sorted by the fusion encoder, query by query."""
    embeddings, k = embed(model, gallery), 12
    got = rerank(model, gallery, embeddings, k, batch_size=50)
    similarity, count = embeddings.images @ embeddings.texts.T, len(gallery.pixels)
    ranks = {"t2i": [], "i2t": []}
    for q in range(count):
        best = similarity[:, q].argsort(descending=True)[:k]
        scores = match_scores(model, gallery, best, torch.full_like(best, q))
        ordered = best[scores.argsort(descending=True)].tolist()
        ranks["t2i"].append(ordered.index(q) if q in ordered else count)
        best = similarity[q].argsort(descending=True)[:k]
        scores = match_scores(model, gallery, torch.full_like(best, q), best)
        ordered = best[scores.argsort(descending=True)].tolist()
        ranks["i2t"].append(ordered.index(q) if q in ordered else count)
    expected = {f"{way}_r{n}": sum(r < n for r in ranks[way]) / count for way in ranks for n in RANKS}
    assert got == pytest.approx(expected)
    assert 0 < got["t2i_r10"] < 1, "a random model, so that the order matters"
    with pytest.raises(ValueError, match="at least 10"):
        rerank(model, gallery, embeddings, 5)


def test_reranking_everything_with_a_perfect_matcher_is_perfect(gallery, model, monkeypatch):
    monkeypatch.setattr("vlmo.retrieval.match_scores", lambda m, g, i, t, b: (g.picture_of_text[t] == i).float())
    assert set(rerank(model, gallery, embed(model, gallery), len(gallery.pixels)).values()) == {1.0}
