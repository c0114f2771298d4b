"""`vlmo embed`, `retrieve`, `finetune` and `evaluate`, end to end on a tiny model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vlmo import CONFIGS, VLMo, VLMoConfig, shapes
from vlmo.cli import main
from vlmo.downstream import FineTuning
from vlmo.loading import config_of, load_model
from vlmo.retrieval import Embeddings
from vlmo.snapshots import save_model
from vlmo.tokenizer import Tokenizer


def vlmo(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as `vlmo pretrain` leaves it; random weights."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train(shapes.vocabulary_captions(), 1000)
    tokenizer.save(folder / "vocab.txt")
    torch.manual_seed(0)
    size = {"max_text_len": 18, "text_only_len": 18, "vocab_size": tokenizer.vocab_size}
    model = VLMo(replace(CONFIGS["tiny"], **size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(folder, FineTuning(model, "retrieval"), model.config, "vision-language")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of pictures with captions, one of them broken, one without a caption."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures = shapes.dataset(14, image_size=32)
    for i, picture in enumerate(pictures):
        picture.image.save(folder / f"{i:02d}.png")
    (folder / "03.png").write_bytes(b"broken")
    captions = {f"{i:02d}.png": pictures.caption(i) if i != 5 else "" for i in range(14)}
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_embed(suffix, run, folder, tmp_path, capsys):
    out = tmp_path / f"e.{suffix}"
    assert vlmo("embed", "--model", run, "--data", folder, "--out", out) == 0
    made = Embeddings.load(out)
    assert made.images.shape == (12, 32) and made.texts.shape == (12, 32) and len(made.names) == 12
    torch.testing.assert_close(made.images.norm(dim=1), torch.ones(12))
    printed = capsys.readouterr().out
    assert "1 skipped: corrupt images" in printed and "1 skipped: empty captions" in printed


def test_embed_texts_and_plain_torch_agree_with_the_kernels(run, tmp_path):
    (tmp_path / "texts.txt").write_text("a small red circle at the top on white\n\ntwo large blue stars on gray\n")
    for impl in ("auto", "reference"):
        out = tmp_path / f"{impl}.npz"
        assert vlmo("embed", "--model", run, "--texts", tmp_path / "texts.txt", "--out", out, "--impl", impl) == 0
    one, other = (Embeddings.load(tmp_path / f"{impl}.npz") for impl in ("auto", "reference"))
    assert one.texts.shape == (2, 32) and len(one.images) == 0
    torch.testing.assert_close(one.texts, other.texts)


@pytest.mark.parametrize("options", [(), ("--rerank", 10)], ids=["dual encoder", "re-ranked"])
def test_retrieve_prints_a_table_and_draws_a_sheet(options, run, folder, tmp_path, capsys):
    queries = ["a large red star on white", "a small blue circle on black"]
    out = tmp_path / "sheet.png"
    assert vlmo("retrieve", *queries, "--model", run, "--images", folder, "--k", 3, "--out", out, *options) == 0
    printed = capsys.readouterr().out
    assert all(query in printed for query in queries) and printed.count(".png") >= 7
    sheet = Image.open(out)
    assert sheet.size == (8 + 3 * 168, 8 + 2 * (160 + 3 * 18 + 8))
    assert len(sheet.getcolors(10**6)) > 20


def test_retrieve_with_an_index(run, folder, tmp_path, capsys):
    index, query = tmp_path / "i.safetensors", "a large red star on white"
    assert vlmo("embed", "--model", run, "--data", folder, "--out", index) == 0
    retrieve = ("retrieve", query, "--model", run, "--out", tmp_path / "a.png", "--index", index)
    # The picture without a caption is not in the index.
    assert vlmo(*retrieve, "--images", folder) == 2
    assert "embed again" in capsys.readouterr().err
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in Embeddings.load(index).names:
        (plain / name).write_bytes((folder / name).read_bytes())
    assert vlmo(*retrieve, "--images", plain) == 0
    with_index = capsys.readouterr().out
    assert vlmo(*retrieve[:-2], "--images", plain) == 0
    without = capsys.readouterr().out
    table = [line for line in without.splitlines() if "│" in line]
    assert len(table) == 6 and all(line in with_index for line in table)


def test_an_index_of_other_pictures_of_the_same_names_is_refused(run, tmp_path, capsys):
    index = tmp_path / "i.safetensors"
    assert vlmo("embed", "--model", run, "--data", "shapes:12", "--out", index) == 0
    retrieve = ("retrieve", "a red star", "--model", run, "--out", tmp_path / "a.png", "--index", index)
    assert vlmo(*retrieve, "--images", "shapes:12") == 0
    assert vlmo(*retrieve, "--images", "shapes:12:heldout") == 2
    assert "some embedded again must give what it holds" in capsys.readouterr().err.replace("\n", " ")


def test_evaluate_retrieval(run, tmp_path, capsys):
    out = tmp_path / "r.json"
    data = ("--model", run, "--data", "shapes:20:heldout", "--rerank", 12, "--out", out)
    assert vlmo("evaluate", "--task", "retrieval", *data) == 0
    figures = json.loads(out.read_text())
    ways = [f"{prefix}{way}_r{k}" for prefix in ("", "reranked_") for way in ("t2i", "i2t") for k in (1, 5, 10)]
    assert set(figures) == {"task", "data", "images", "texts", *ways}
    assert figures["images"] == 20 and all(0 <= figures[way] <= 1 for way in ways)
    assert "reranked_t2i_r1" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_finetune_then_evaluate(task, run, tmp_path, capsys):
    out, figures, predictions = tmp_path / "tuned", tmp_path / "f.json", tmp_path / "p.json"
    data = ("--task", task, "--data", "shapes:64")
    few = ("--steps", 4, "--batch-size", 8, "--lr", 1e-3, "--log-every", 1, "--save-every", 2)
    assert vlmo("finetune", *data, "--model", run, "--out", out, *few) == 0
    log = (out / "log.jsonl").read_text().splitlines()
    assert len(log) == 4
    # Killed after the second step, it goes on as if nothing had been.
    shutil.rmtree(out / "snapshots" / "step-00000004")
    assert vlmo("finetune", *data, "--model", run, "--out", out, *few) == 2
    assert "must be a new folder" in capsys.readouterr().err
    assert vlmo("finetune", *data, "--model", run, "--out", out, *few, "--resume") == 0
    again = (out / "log.jsonl").read_text().splitlines()
    assert again[:2] == log[:2] and [json.loads(a)["loss"] for a in again] == [json.loads(a)["loss"] for a in log]
    wanted = ("--model", out, "--out", figures, "--predictions", predictions)
    assert vlmo("evaluate", "--task", task, "--data", "shapes:30:heldout", *wanted) == 0
    result = json.loads(figures.read_text())
    rows = json.loads(predictions.read_text())
    if task == "vqa":
        right = [shapes.question(i, image_size=32, split="heldout").answer == rows[i]["answer"] for i in range(30)]
    else:
        right = [str(shapes.statement(i, image_size=32, split="heldout").truth) == rows[i]["label"] for i in range(30)]
    assert result["examples"] == 30 and result["accuracy"] == pytest.approx(sum(right) / 30)
    assert len(rows) == 30 and set(rows[0]) == ({"question_id", "answer"} if task == "vqa" else {"identifier", "label"})
    # Nor does a call for another task touch anything of it.
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    other = ("--task", "nlvr2" if task == "vqa" else "vqa", "--data", "shapes:64", "--model", run, "--out", out)
    assert vlmo("finetune", *other, *few, "--resume") == 2
    assert "resumed with its own stage" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    # A model of another task is refused, and the pre-trained one has no classifier.
    assert vlmo("evaluate", *data, "--model", run) == 2
    assert "must be fine-tuned" in capsys.readouterr().err


def test_the_seed_fixes_fine_tuning(run, tmp_path):
    """The new classifier, the order, and everything after."""
    arguments = ("--task", "vqa", "--data", "shapes:32", "--model", run, "--steps", 2, "--batch-size", 4)
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(states))
        assert vlmo("finetune", *arguments, "--out", tmp_path / name, "--seed", seed) == 0
        states.append(load_model(tmp_path / name, task="vqa").model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["vqa_classifier.0.weight"], states[2]["vqa_classifier.0.weight"])


def test_official_annotation_files(run, tmp_path):
    """VQA v2 and NLVR2 as they are distributed: tune on a few, evaluate, write the answers."""
    questions, answers, lines = [], [], []
    for i in range(10):
        asked, said = shapes.question(i, image_size=32), shapes.statement(i, image_size=32)
        asked.picture.image.save(tmp_path / f"COCO_train2014_{i:012d}.jpg")
        questions.append({"image_id": i, "question": asked.question, "question_id": 100 + i})
        answers.append({"question_id": 100 + i, "answers": [{"answer": ("Yes", "no")[i == 0]}] * 10})
        for number, picture in enumerate((said.left, said.right)):
            picture.image.save(tmp_path / f"train-{i}-0-img{number}.png")
        lines.append(json.dumps({"identifier": f"train-{i}-0-1", "sentence": said.text, "label": str(said.truth)}))
    asked_file, given_file = tmp_path / "v2_train2014_questions.json", tmp_path / "v2_annotations.json"
    asked_file.write_text(json.dumps({"questions": questions}))
    given_file.write_text(json.dumps({"annotations": answers}))
    (tmp_path / "train.json").write_text("\n".join(lines))
    for task, data in {
        "vqa": ("--data", asked_file, "--annotations", given_file),
        "nlvr2": ("--data", tmp_path / "train.json"),
    }.items():
        data += ("--task", task, "--images", tmp_path)
        out, figures = tmp_path / task, tmp_path / f"{task}.json"
        assert vlmo("finetune", *data, "--model", run, "--out", out, "--steps", 2, "--batch-size", 4) == 0
        assert vlmo("evaluate", *data, "--model", out, "--out", figures) == 0
        assert json.loads(figures.read_text())["examples"] == (9 if task == "vqa" else 10)
    # "no" was said once only, so it is no class.
    assert json.loads((tmp_path / "vqa" / "classes.json").read_text())["classes"] == ["yes"]


def test_finetune_retrieval_goes_on_from_the_model_and_can_be_used(run, tmp_path):
    out = tmp_path / "tuned"
    arguments = ("--task", "retrieval", "--data", "shapes:64", "--model", run, "--out", out)
    assert vlmo("finetune", *arguments, "--steps", 2, "--batch-size", 8, "--lr", 1e-6) == 0
    before, after = load_model(run).model.state_dict(), load_model(out).model.state_dict()
    assert set(before) == set(after)
    words = "text_embeddings.word_embeddings.weight"
    moved = (before[words] - after[words]).norm()
    assert 0 < moved < before[words].norm()  # weights drawn anew would be further away than they are long
    assert vlmo("evaluate", "--task", "retrieval", "--data", "shapes:12", "--model", out) == 0


def test_another_image_size_is_interpolated(run, capsys):
    assert vlmo("evaluate", "--task", "retrieval", "--data", "shapes:12", "--model", run, "--image-size", 48) == 0
    assert "interpolated" in capsys.readouterr().out


def test_a_checkpoint_file_alone(run, tmp_path, monkeypatch):
    """As published: wrapped, with index buffers, no configuration beside it. The size must be a known one."""
    model = load_model(run).model
    state = {"relative_position_index": torch.zeros(3), **model.state_dict()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "vlmo.pt")
    file = ("--model", tmp_path / "vlmo.pt", "--vocab", run / "vocab.txt")
    monkeypatch.setitem(CONFIGS, "tiny", replace(CONFIGS["tiny"], text_only_len=18))
    figures = []
    for options in (("--model", run), file):
        data = ("--task", "retrieval", "--data", "shapes:16", "--rerank", 10, "--out", tmp_path / "f.json")
        assert vlmo("evaluate", *data, *options) == 0
        figures.append(json.loads((tmp_path / "f.json").read_text()))
    assert figures[0] == figures[1]
    assert load_model(tmp_path / "vlmo.pt", vocab=run / "vocab.txt").model.config == model.config


@pytest.mark.parametrize("name", ["base", "base_plus", "large"])
@pytest.mark.parametrize("size", [224, 384])
def test_published_configurations_are_told_from_the_parameters(name, size):
    config = replace(CONFIGS[name], image_size=size, num_token_types=3, heads=("mlm", "itm"))
    with torch.device("meta"):
        state = VLMo(config).state_dict()
    assert config_of(state) == config


def test_the_text_length_is_that_of_the_positions():
    config: VLMoConfig = replace(CONFIGS["base"], max_text_len=64, heads=("irtr",))
    with torch.device("meta"):
        assert config_of(VLMo(config).state_dict()) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--task", "retrieval", "--data", "shapes:9", "--model", "none"), "the model must exist"),
        (("evaluate", "--task", "retrieval", "--data", "none.tar", "--model", "RUN"), "the file must exist"),
        (("evaluate", "--task", "retrieval", "--data", "shapes:9", "--model", "RUN", "--impl", "x"), "impl must be"),
        (("evaluate", "--task", "retrieval", "--data", "shapes:20", "--model", "RUN", "--rerank", 3), "at least 10"),
        (("evaluate", "--task", "retrieval", "--data", "shapes:9", "--model", "FILE"), "there must be its vocabulary"),
        (("embed", "--model", "RUN", "--out", "a.npz"), "either --data or --texts"),
        (("embed", "--model", "RUN", "--data", "shapes:9", "--out", "a.pt"), "must be .safetensors or .npz"),
        (("embed", "--model", "RUN", "--texts", "none.txt", "--out", "a.npz"), "--texts must be a file"),
        (("evaluate", "--task", "retrieval", "--data", "PICTURES", "--model", "RUN"), "--data must have captions"),
        (("evaluate", "--task", "retrieval", "--data", "shapes:9", "--model", "CUT"), "load_config: "),
        (("finetune", "--task", "vqa", "--data", "a.json", "--model", "RUN", "--out", "o"), "there must be --images"),
        (("finetune", "--task", "vqa", "--data", "shapes:x", "--model", "RUN", "--out", "o"), "shapes:N"),
        (("finetune", "--task", "nlvr2", "--data", "shapes:0", "--model", "RUN", "--out", "o"), "N at least 1"),
        (("evaluate", "--task", "retrieval", "--data", "shapes:9", "--model", "RUN", "--vocab", "none"), "vocabulary"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run, "FILE": run / "model.safetensors", "PICTURES": tmp_path / "bare", "CUT": tmp_path / "cut"}
    for place in ("PICTURES", "CUT"):
        places[place].mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "bare/a.png")
    (tmp_path / "cut/config.json").write_text('{"dim": 3')
    assert vlmo(*(places.get(argument, argument) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vlmo: ") and message in captured.err and captured.err.count("\n") == 1
