"""Stages, schedules, snapshots and resumption, and `vlmo pretrain` from the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.common.numerics import assert_close_as_eager
from tests.vlmo.training import CONFIG, batch, loader, objective, step_inputs, tokenizer
from vlmo import VLMo
from vlmo.data import Batch
from vlmo.pretrain import Run, run
from vlmo.snapshots import load_config, newest_extra, snapshots, write_atomically
from vlmo.stages import set_trainable, stage_config, start_from
from vlmo.train import Recipe, Trainer, build_stage, decays, parameter_groups, stage_trainer

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("vision", "language", "vision-language")


def trainer(stage: str, recipe: Recipe, config=CONFIG, start: Path | None = None) -> Trainer:
    model, _ = build_stage(config, stage, start, recipe.seed)
    return stage_trainer(model, stage, recipe, tokenizer())


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------ what trains


def test_the_language_stage_trains_what_was_published_and_nothing_else() -> None:
    model = VLMo(stage_config(CONFIG, "language"))
    names = set_trainable(model, "language")
    blocks = [rf"transformer.blocks.{i}.{part}" for i in range(CONFIG.depth) for part in ("mlp_text.", "norm2_text.")]
    published = ("text_embeddings.", "token_type_embeddings.", "mlm_score.", "transformer.norm.", *blocks)
    for name, p in model.named_parameters():
        expected = name == "relative_position_bias_table" or name.startswith(tuple(published))
        # With a bias table the text's absolute positions are not used.
        expected &= name != "text_embeddings.position_embeddings.weight"
        assert p.requires_grad == expected == (name in names), name
    assert not any("mlp_vl" in name for name, _ in model.named_parameters())


def test_the_other_stages() -> None:
    vision = VLMo(stage_config(CONFIG, "vision"))
    names = set_trainable(vision, "vision")
    assert not [n for n in names if re.search("text|token_type|pooler|vl", n)]
    assert {"transformer.cls_token", "relative_position_bias_table", "transformer.norm.weight"} <= set(names)
    assert all(f"transformer.blocks.{i}.{p}" in names for i in range(4) for p in ("mlp_imag.fc1.weight", "gamma_1"))
    model = VLMo(stage_config(CONFIG, "vision-language"))
    everything = {name for name, _ in model.named_parameters()} - {"text_embeddings.position_embeddings.weight"}
    assert set(set_trainable(model, "vision-language")) == everything


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_stay_and_all_others_move(stage: str) -> None:
    recipe = Recipe(steps=2, lr=1e-2)
    ours = trainer(stage, recipe)
    before = {name: p.detach().clone() for name, p in ours.module.named_parameters()}
    stream = iter(loader(stage, 8))
    for _ in range(2):
        ours.run_step([next(stream)])
    for name, p in ours.module.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_weight_decay_and_layer_decay() -> None:
    module = objective("vision-language")
    groups, scales = parameter_groups(module, Recipe(steps=1, layer_decay=0.5, weight_decay=0.1), CONFIG.depth)
    names = {id(p): name for name, p in module.named_parameters()}
    found = {}
    for group, scale in zip(groups, scales):
        found |= {names[id(p)].removeprefix("model."): (group["weight_decay"], scale) for p in group["params"]}
    assert len(found) == sum(p.requires_grad for p in module.parameters())
    # Five levels above the embeddings: four blocks and the heads.
    assert found["text_embeddings.word_embeddings.weight"] == (0.1, 0.5**5)
    assert found["transformer.blocks.0.mlp_imag.fc1.weight"] == (0.1, 0.5**4)
    assert found["transformer.blocks.3.norm2_vl.weight"] == (0.0, 0.5)
    assert found["itm_score.fc.weight"] == (0.1, 1.0) and found["mlm_score.bias"] == (0.0, 1.0)
    assert not decays("relative_position_bias_table", torch.zeros(3, 3))
    assert not decays("transformer.cls_token", torch.zeros(1, 1, 3))


def test_learning_rate() -> None:
    recipe = Recipe(steps=100, warmup=10)
    factors = [recipe.lr_factor(step) for step in range(101)]
    assert factors[:10] == [pytest.approx((i + 1) / 10) for i in range(10)] and factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5) and factors[99] == pytest.approx(1 / 90) and factors[100] == 0.0


# ------------------------------------------------------------------ the optimizer step


def test_accumulated_batches_are_one_batch_for_losses_that_do_not_compare_samples() -> None:
    """The vision stage, where every sample has as many hidden patches: two halves are the whole."""
    given = batch(8, "vision")
    whole, halves = trainer("vision", Recipe(steps=1)), trainer("vision", Recipe(steps=1, accumulate=2))
    first, second = (Batch(given.image[rows], None, None, given.index[rows]) for rows in (slice(4), slice(4, 8)))
    a, b = whole.run_step([given]), halves.run_step([first, second])
    torch.testing.assert_close(a["loss"], b["loss"])
    torch.testing.assert_close(a["grad_norm"], b["grad_norm"])


def test_clipping_scales_the_step_and_reports_the_norm_before() -> None:
    free, clipped = trainer("language", Recipe(steps=1)), trainer("language", Recipe(steps=1, clip=1e-3))
    given = batch(8, "language")
    captured, trained = [], [p for p in clipped.module.parameters() if p.requires_grad]
    clipped.optimizer.step = lambda: captured.extend(p.grad.clone() for p in trained)
    norms = [t.run_step([given])["grad_norm"] for t in (free, clipped)]
    torch.testing.assert_close(*norms)
    assert norms[0] > 1e-3
    torch.testing.assert_close(torch.nn.utils.get_total_norm(captured), torch.tensor(1e-3))


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"recompute": True}], ids=["bf16", "recompute"])
def test_autocast_and_recomputation(change: dict) -> None:
    given = batch(8)
    plain, other = trainer("vision-language", Recipe(steps=1)), trainer("vision-language", Recipe(steps=1, **change))
    a, b = plain.run_step([given]), other.run_step([given])
    if "recompute" in change:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    else:  # bf16 has 8 bits: losses of order 1 agree to a few of its steps, and are not the very same
        assert all(p.dtype == torch.float32 for p in other.model.parameters())
        assert 0 < abs(float(a["loss"] - b["loss"])) < 8 * torch.finfo(torch.bfloat16).eps * float(a["loss"])


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones() -> None:
    recipe = Recipe(steps=3, lr=1e-3)
    plain, compiled = trainer("vision-language", recipe), trainer("vision-language", replace(recipe, compile=True))
    for step in range(3):
        given = batch(8)
        given.index += step
        a, b = plain.run_step([given]), compiled.run_step([given])
        torch.testing.assert_close(a["loss"], b["loss"])


@pytest.mark.slow
def test_batches_of_other_lengths_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives up on a function after 8 graphs, and all blocks are one function."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="eager", **options))
    torch._dynamo.reset()
    graphs, config = torch._dynamo.utils.counters["stats"], replace(CONFIG, drop_path=0.1)
    compiled = trainer("vision-language", Recipe(steps=4, compile=True), config)
    stream = iter(loader("vision-language", 8))
    before = graphs["unique_graphs"]  # of other tests in this process: a reset does not take them away
    compiled.run_step([next(stream)])
    made = graphs["unique_graphs"] - before
    for _ in range(2):
        compiled.run_step([next(stream)])
    assert 0 < made < 8 and graphs["unique_graphs"] - before == made
    torch._dynamo.reset()


# ------------------------------------------------------------------ stage after stage


def test_three_stages_end_to_end(tmp_path: Path) -> None:
    """Each starts from the last one's checkpoint, and every loss falls."""
    start, reports = None, {}
    for stage, steps in (("vision", 24), ("language", 24), ("vision-language", 24)):
        out = tmp_path / stage
        recipe = Recipe(steps=steps, lr=3e-3, warmup=5, log_every=1, save_every=1000, clip=1.0)
        model, reports[stage] = build_stage(CONFIG, stage, start, 0)
        stage_trainer(model, stage, recipe, tokenizer()).fit(loader(stage, 8), out)
        log = log_of(out)
        assert [line["step"] for line in log] == list(range(1, steps + 1))
        for name in {"mim", "mlm", "itc", "itm"} & log[0].keys():
            first, last = (sum(line[name] for line in part) / 8 for part in (log[:8], log[-8:]))
            assert last < first, (stage, name, first, last)
        config, of = load_config(out)
        assert of == stage and config == stage_config(CONFIG, stage)
        start = out / "model.safetensors"
    assert reports["vision"] is None
    assert all(name.startswith("mlm_score.") for name in reports["language"].new)
    new = reports["vision-language"].new
    assert all(re.search(r"(mlp|norm2)_vl\.|^(itm|itc|logit)_", name) for name in new)
    assert sum("mlp_vl" in name for name in new) == 4 * (CONFIG.depth - CONFIG.vlffn_start)


def beit_state(config) -> dict[str, torch.Tensor]:
    """A BEiT's names and shapes, made from a VLMo of one modality."""
    model = VLMo(stage_config(config, "vision"))
    torch.manual_seed(1)
    state = {}
    for name, p in model.state_dict().items():
        if name.startswith("transformer.") and not re.search("text", name):
            state[re.sub("_imag", "", name.removeprefix("transformer."))] = torch.randn_like(p)
    rows, heads = (2 * config.window - 1) ** 2 + 3, config.num_heads
    for layer in range(config.depth):
        state[f"blocks.{layer}.attn.relative_position_bias_table"] = torch.randn(rows, heads)
        state[f"blocks.{layer}.attn.relative_position_index"] = torch.zeros(2, 2, dtype=torch.int64)
    return state | {"mask_token": torch.zeros(1, 1, config.dim), "lm_head.weight": torch.zeros(8192, config.dim)}


@pytest.mark.parametrize("stage", ["vision", "language"])
def test_a_beit_becomes_the_image_expert(stage: str) -> None:
    state = beit_state(CONFIG)
    model = VLMo(stage_config(CONFIG, stage))
    text = model.transformer.blocks[0].mlp_text.fc1.weight.detach().clone()
    report = start_from(model, {"model": state}, stage)
    block = model.transformer.blocks[2]
    assert torch.equal(block.mlp_imag.fc1.weight, state["blocks.2.mlp.fc1.weight"])
    assert torch.equal(block.norm2_imag.bias, state["blocks.2.norm2.bias"])
    assert torch.equal(model.transformer.blocks[0].mlp_text.fc1.weight, text)
    table, heads = model.relative_position_bias_table, CONFIG.num_heads
    rows = (2 * CONFIG.window - 1) ** 2 + 3
    for layer in range(CONFIG.depth):
        columns = table[:rows, layer * heads : (layer + 1) * heads]
        assert torch.equal(columns, state[f"blocks.{layer}.attn.relative_position_bias_table"])
    assert not table[rows:].any()
    assert len(report.converted) == 3 and not report.missing and not report.unexpected
    assert any("text_embeddings" in name for name in report.new)


def test_a_beit_before_fine_tuning_shares_one_bias_table() -> None:
    state = {key: value for key, value in beit_state(CONFIG).items() if "relative_position" not in key}
    rows, heads = (2 * CONFIG.window - 1) ** 2 + 3, CONFIG.num_heads
    shared = torch.randn(rows, heads)
    state["rel_pos_bias.relative_position_bias_table"] = shared
    state["rel_pos_bias.relative_position_index"] = torch.zeros(2, 2, dtype=torch.int64)
    model = VLMo(stage_config(CONFIG, "vision"))
    start_from(model, state, "vision")
    assert torch.equal(model.relative_position_bias_table[:rows], shared.repeat(1, CONFIG.depth))


def test_starting_is_strict() -> None:
    state = VLMo(stage_config(CONFIG, "language")).state_dict()
    model = VLMo(stage_config(CONFIG, "vision-language"))
    lacking = {k: v for k, v in state.items() if k != "transformer.blocks.1.attn.qkv.weight"}
    with pytest.raises(ValueError, match=r"missing: transformer.blocks.1.attn.qkv.weight; foreign: none"):
        start_from(model, {k: v + 1 for k, v in lacking.items()}, "vision-language")
    assert torch.equal(model.transformer.norm.weight, torch.ones(CONFIG.dim))  # nothing was copied
    with pytest.raises(ValueError, match="foreign: adapter.weight"):
        start_from(model, state | {"adapter.weight": torch.zeros(1)}, "vision-language")
    with pytest.raises(ValueError, match="of the model's size, width 64 in 4 layers, it has 32 in 4. Hint: --config"):
        start_from(VLMo(stage_config(replace(CONFIG, dim=64), "vision-language")), state, "vision-language")
    later = VLMo(stage_config(CONFIG, "vision-language")).state_dict()
    with pytest.raises(ValueError, match="foreign: .*mlp_vl"):
        start_from(VLMo(stage_config(CONFIG, "language")), later, "language")


# ------------------------------------------------------------------ snapshots


def curve(out: Path) -> list[tuple[float, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in log_of(out)]


def test_a_resumed_run_continues_the_same_curve(tmp_path: Path) -> None:
    recipe = Recipe(steps=8, lr=1e-3, warmup=2, log_every=1, save_every=3)
    config = replace(CONFIG, drop_path=0.1)
    trainer("vision-language", recipe, config).fit(loader("vision-language", 8), tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(line: dict[str, float]) -> None:
        if line["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        trainer("vision-language", recipe, config).fit(loader("vision-language", 8), tmp_path / "part", progress=stop)
    assert [path.name for path in snapshots(tmp_path / "part")] == ["step-00000003"]
    # What a run killed while it was writing leaves behind is never read.
    (tmp_path / "part/snapshots/step-00000004.writing").mkdir()
    other = trainer("vision-language", replace(recipe), config)
    with torch.no_grad():  # nothing of the initial state may matter
        for p in other.model.parameters():
            p.add_(1.0)
    other.fit(loader("vision-language", 8), tmp_path / "part", resume=True)
    assert curve(tmp_path / "part") == curve(tmp_path / "whole")
    assert len(snapshots(tmp_path / "part")) == 2


def test_a_snapshot_of_another_run_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(steps=1)
    trainer("language", recipe).fit(loader("language", 8), tmp_path)
    with pytest.raises(ValueError, match="resumed with its own seed, 0 in the snapshot, got 1"):
        trainer("language", replace(recipe, seed=1)).fit(loader("language", 8), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"its own configuration, the snapshot has max_text_len 20 \(now 10\)"):
        trainer("language", recipe, replace(CONFIG, max_text_len=10)).fit(loader("language", 8), tmp_path, resume=True)
    # Its snapshots would outlive those of a run that is at an earlier step.
    with pytest.raises(ValueError, match="must not hold snapshots of another run"):
        trainer("language", recipe).fit(loader("language", 8), tmp_path)
    assert newest_extra(tmp_path / "nothing") is None


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path) -> None:
    data = loader("vision", 8)
    stream = iter(data)

    class Broken:
        state_dict, merge_states = data.state_dict, staticmethod(data.merge_states)

        def __iter__(self):
            for step in range(4):
                given = next(stream)
                given.image *= float("nan") if step == 3 else 1.0
                yield given

    with pytest.raises(RuntimeError, match="must be finite, they are nan and nan at step 4"):
        trainer("vision", Recipe(steps=9, save_every=2, log_every=100)).fit(Broken(), tmp_path)
    assert [path.name for path in snapshots(tmp_path)] == ["step-00000002"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_save_that_fails_halfway_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(steps=2, save_every=2, lr=1e-3)
    trainer("language", recipe).fit(loader("language", 8), tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()

    def half(path: Path) -> None:
        path.write_bytes(good[: len(good) // 2])
        raise OSError("no space left on device")

    for name, fail in (
        ("torch.distributed.checkpoint.save", lambda state, checkpoint_id: half(checkpoint_id / "__0_0.distcp")),
        ("safetensors.torch.save_file", lambda state, path: half(path)),
    ):
        with monkeypatch.context() as context, pytest.raises(OSError, match="no space left"):
            context.setattr(name, fail)
            trainer("language", replace(recipe, steps=4)).fit(loader("language", 8), tmp_path, resume=True)
        assert (tmp_path / "model.safetensors").read_bytes() == good
        # The second time all snapshots are written, and the model is not.
        assert newest_extra(tmp_path)["step"] == (2 if "checkpoint" in name else 4)
    trainer("language", replace(recipe, steps=4)).fit(loader("language", 8), tmp_path, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() != good


@pytest.mark.parametrize("damaged", ["__0_0.distcp", ".metadata", "extra.json"])
def test_a_damaged_snapshot_is_named_and_can_be_removed(damaged: str, tmp_path: Path) -> None:
    recipe = Recipe(steps=4, save_every=2)
    trainer("language", recipe).fit(loader("language", 8), tmp_path)
    newest = snapshots(tmp_path)[-1]
    (newest / damaged).write_bytes((newest / damaged).read_bytes()[:50])
    with pytest.raises(ValueError, match="step-00000004' cannot be read: .*Hint: remove it"):
        trainer("language", recipe).fit(loader("language", 8), tmp_path, resume=True)
    shutil.rmtree(newest)
    trainer("language", recipe).fit(loader("language", 8), tmp_path, resume=True)
    assert newest_extra(tmp_path)["step"] == 4


def options(out: Path, **changes: object) -> tuple[Run, Recipe]:
    """What the command below means."""
    given = Run("vision-language", out, data="shapes:400", config="tiny", max_text_len=20, drop_path=0.1, batch_size=8)
    return replace(given, **changes), Recipe(steps=12, lr=1e-3, log_every=1, save_every=2)


def command(out: Path) -> list[str]:
    arguments = (
        "pretrain --stage vision-language --config tiny --data shapes:400 --max-text-len 20 --steps 12 --batch-size 8 "
        "--log-every 1 --save-every 2 --lr 0.001 --drop-path 0.1"
    )
    return [sys.executable, "-m", "vlmo.cli", *arguments.split(), "--out", str(out)]


@pytest.mark.slow
def test_kill_9_in_mid_step_loses_at_most_the_steps_since_the_last_snapshot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    threads = torch.get_num_threads()
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": str(threads)
    }  # fmt: skip
    process = subprocess.Popen(command(killed), env=environment, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (killed / "log.jsonl").exists() or len((killed / "log.jsonl").read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reached = int(snapshots(killed)[-1].name.removeprefix("step-"))
    assert 4 <= reached < 12
    with pytest.raises(ValueError, match="holds a run. Hint: --resume"):
        run(*options(killed))
    run(*options(killed, resume=True))
    run(*options(whole))
    said = capsys.readouterr().err
    assert "12/12" in said and "0.1 M parameters" in said
    assert curve(killed) == curve(whole)


def test_bad_calls_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there must be a vocabulary. Hint: --vocab"):
        run(Run("language", tmp_path / "a", data=str(tmp_path)), Recipe(steps=1))
    with pytest.raises(ValueError, match="--config must be one of base"):
        run(Run("vision", tmp_path / "b", config="huge"), Recipe(steps=1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--from must hold|config.json must be there"):
        run(Run("language", tmp_path / "c", config="tiny", start=tmp_path / "empty"), Recipe(steps=1))
    with pytest.raises(ValueError, match="precision must be one of"):
        Recipe(steps=1, precision="fp8")
    with pytest.raises(ValueError, match="impl must be one of"):
        Recipe(steps=1, impl="fast")
    with pytest.raises(ValueError, match="clip must not be negative, got -1"):
        Recipe(steps=1, clip=-1.0)
    with pytest.raises(FileNotFoundError, match="--from must exist, got .*nowhere"):
        run(Run("language", tmp_path / "d", start=tmp_path / "nowhere"), Recipe(steps=1))
    with pytest.raises(FileNotFoundError, match="the vocabulary must exist, got .*nowhere.txt'. Hint: --vocab"):
        run(Run("language", tmp_path / "e", data=str(tmp_path), vocab=tmp_path / "nowhere.txt"), Recipe(steps=1))
    with pytest.raises(ValueError, match="device: it must be cpu or cuda, got 'gpu'"):
        run(Run("vision", tmp_path / "e", device="gpu"), Recipe(steps=1))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device: 'cuda' must be usable"):
            run(Run("vision", tmp_path / "e", device="cuda"), Recipe(steps=1))


def test_a_run_that_failed_before_its_first_line_can_be_called_again(tmp_path: Path) -> None:
    bad, good = (Run("vision", tmp_path, data=f"shapes:{n}", config="tiny", batch_size=8) for n in (3, 40))
    with pytest.raises(RuntimeError, match="lane 3 of 8 has none.*small batch_size"):
        run(bad, Recipe(steps=1))
    assert run(good, Recipe(steps=1))["step"] == 1
    with pytest.raises(ValueError, match="--out must be a new folder"):
        run(good, Recipe(steps=1))


def test_from_takes_the_folder_of_a_run_and_the_model_in_it(tmp_path: Path) -> None:
    given = Run("vision", tmp_path / "1", data="shapes:40", config="tiny", batch_size=8, max_text_len=20)
    run(given, Recipe(steps=1))
    curves = []
    for name, start in (("folder", tmp_path / "1"), ("file", tmp_path / "1/model.safetensors")):
        run(replace(given, stage="language", out=tmp_path / name, start=start), Recipe(steps=1))
        curves.append(curve(tmp_path / name))
    assert curves[0] == curves[1]


# ------------------------------------------------------------------ implementations


@pytest.mark.slow
def test_kernels_and_reference_train_alike_for_50_steps() -> None:
    """fp32 losses of both against the same run in fp64, step by step."""

    def losses(dtype: torch.dtype, impl: str) -> torch.Tensor:
        recipe = Recipe(steps=50, lr=1e-3, warmup=5, impl=impl)
        model, _ = build_stage(CONFIG, "vision-language", None, 0)
        ours = stage_trainer(model.to(dtype), "vision-language", recipe, tokenizer())
        stream, values = iter(loader("vision-language", 8)), []
        for _ in range(50):
            given = next(stream)
            given.image = given.image.to(dtype)
            values.append(ours.run_step([given])["loss"])
        return torch.stack(values)

    expected, reference = losses(torch.float64, "reference"), losses(torch.float32, "reference")
    assert_close_as_eager(losses(torch.float32, "cpu"), expected, reference, "50 steps")


def test_a_step_does_not_depend_on_the_implementation() -> None:
    inputs = step_inputs("vision-language")
    a, b = (objective("vision-language", impl=impl)(inputs)["loss"] for impl in ("cpu", "reference"))
    torch.testing.assert_close(a, b)


def test_a_refused_global_is_named_with_the_safe_way(tmp_path: Path) -> None:
    path = tmp_path / "lightning.ckpt"
    model = VLMo(stage_config(CONFIG, "language"))
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": Fraction(1, 2)}, path)
    with pytest.raises(ValueError, match=r"wants fractions.Fraction. Nothing of it was executed. Hint: .*torch.save"):
        start_from(model, path, "language")
