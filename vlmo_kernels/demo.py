"""`vlmo-kernels demo`: swap the kernels into a real model, check, time, draw.

What belongs to the model lives in `vlmo.demo`, imported by name at run time: the library does not depend on it.
"""

from __future__ import annotations

import copy
import importlib
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .bench import environment, rows
from .bench.display import megabytes, milliseconds, progress, table
from .bench.error import MAX_FACTOR, RMS_FACTOR, Verdict, hint, judge
from .bench.harness import interleave, saved_bytes

SUITE = "demo"
BASELINE = "published"


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    config: str = "base"
    checkpoint: str | None = None
    vocab: str | None = None
    device: str = "cpu"
    rounds: int = 5
    budget_s: float = 20.0
    out: Path = Path("out/demo")
    dtypes: tuple[str, ...] = ()


@dataclass
class Outcome:
    """One contestant in one dtype; `skipped` says why there are no times."""

    name: str
    dtype: torch.dtype
    verdict: Verdict | None = None
    saved: int | None = None
    times_ms: list[float] = field(default_factory=list)
    skipped: str = ""


def run(options: Options) -> int:
    """The whole demo; 0 where all contestants agree, else 1."""
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"demo: device must be cpu or cuda, got {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("demo: device cuda needs a GPU that torch can use, none was found. Hint: vlmo-kernels info")
    model_part = _model_part()
    dtypes = _dtypes(options)
    names = list(model_part.CONTESTANTS)
    begun = time.perf_counter()
    outcomes: list[Outcome] = []
    with progress("demo", total=2 + len(dtypes) * (len(names) + options.rounds + 2)) as bar:
        bar.step("photographs and captions")
        inputs = model_part.load_inputs(options.config, options.vocab, options.device)
        bar.step(f"VLMo {options.config}, {'random weights' if options.checkpoint is None else options.checkpoint}")
        for dtype in dtypes:
            model = model_part.build_model(options.config, inputs.vocab_size, options.checkpoint, options.device, dtype)
            outcomes += _one_dtype(model_part, model, inputs, dtype, options, bar)
            del model
    _report(model_part, outcomes, inputs, options, time.perf_counter() - begun)
    return 1 if any(o.verdict is not None and not o.verdict.ok for o in outcomes) else 0


def _model_part() -> Any:
    try:
        return importlib.import_module("vlmo.demo")
    except ModuleNotFoundError as error:
        if error.name not in ("vlmo", "vlmo.demo"):
            raise
        raise RuntimeError(
            "demo: the package vlmo must be importable; it comes with vlmo_kernels. "
            "Hint: pip install 'vlmo_kernels[demo]', or in a source tree PYTHONPATH=.:python."
        ) from error


def _dtypes(options: Options) -> list[torch.dtype]:
    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name in options.dtypes:
        if name not in known:
            raise ValueError(f"demo: dtype must be one of {', '.join(known)}, got {name!r}.")
    if options.dtypes:
        return [known[name] for name in options.dtypes]
    if options.device == "cpu" and not environment.cpu_supports_bf16():
        return [torch.float32]
    return [torch.float32, torch.bfloat16]


def _one_dtype(model_part, model, inputs, dtype, options: Options, bar) -> list[Outcome]:
    short = str(dtype).removeprefix("torch.")
    models = model_part.make_contestants(model)
    bar.step(f"{short}: the published model in fp64, two samples")
    samples = [0, len(inputs.captions) - 1]  # the shortest and the longest caption
    expected = _fp64(model_part, model, model_part.first_samples(inputs, samples), dtype)
    outcomes, reference = [], None
    for name, contestant in models.items():
        bar.step(f"{short}: {name}, first run" + (" (compiles)" if name == "compile" else ""))
        outcome = Outcome(name, dtype)
        outcomes.append(outcome)
        try:
            with torch.inference_mode():
                output = model_part.fusion_call(contestant, inputs, dtype)()
                values = model_part.valid_values(output, inputs)
        except Exception as error:  # torch.compile needs a compiler, which may be missing
            reason = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:120]}"
            if name in (BASELINE, "ours"):
                raise RuntimeError(_must_run(name, short, reason, options)) from error
            outcome.skipped = f"failed: {reason}"
            continue
        reference = values if name == BASELINE else reference
        outcome.verdict = _agreement(values, reference, expected, samples)
        if not outcome.verdict.ok:
            outcome.skipped = f"wrong, so not timed: {outcome.verdict.why}"
    bar.step(f"{short}: bytes kept for backward")
    _saved(model_part, models, outcomes, inputs, dtype)
    calls = {o.name: model_part.fusion_call(models[o.name], inputs, dtype) for o in outcomes if not o.skipped}
    with torch.inference_mode():
        times = interleave(
            calls, options.device, options.rounds, warmup=0, budget_s=options.budget_s,
            on_round=lambda text: bar.step(f"{short}: {text}, all contestants in turn"),
        )  # fmt: skip
    left_out = options.rounds - len(times[BASELINE])
    if left_out:
        bar.skip(left_out, f"{short}: {left_out} of {options.rounds} rounds left out, their time is over (--budget)")
    for outcome in outcomes:
        outcome.times_ms = times.get(outcome.name, [])
    if options.device != "cpu":
        torch.cuda.empty_cache()
    return outcomes


def _must_run(name: str, dtype: str, reason: str, options: Options) -> str:
    """What is said when the run cannot go on without a contestant."""
    if name == BASELINE:
        advice = "Hint: --config small or tiny needs less memory, --dtype fp32 or bf16 runs one of them alone."
    else:
        advice = hint(options.device)
    return f"demo: contestant {name} must run in {dtype}, it failed with {reason}. {advice}"


def _fp64(model_part, model, inputs, dtype) -> list[torch.Tensor]:
    """The published model on fp64 copies of the very same weights and inputs."""
    rounded = replace(inputs, image=inputs.image.to(dtype))
    double = copy.deepcopy(model).double()
    with torch.inference_mode():
        return model_part.valid_values(model_part.fusion_call(double, rounded, torch.float64)(), rounded)


def _agreement(values, reference, expected, samples) -> Verdict:
    """Against fp64 where that was computed; elsewhere against the published model in the same dtype.

    By the triangle inequality two results that keep the rule are at most three times the published error apart.
    """
    verdict = judge(
        *(torch.cat(list(v)) for v in ([values[i] for i in samples], expected, [reference[i] for i in samples]))
    )
    if not verdict.ok:
        return verdict
    apart = max(float((a.double() - b.double()).abs().max()) for a, b in zip(values, reference))
    bound = verdict.max_allowed * (MAX_FACTOR + 1) / MAX_FACTOR * 1.5  # other samples err a little more or less
    if not apart <= bound:
        why = f"another sample differs from the published model by {apart:.2e} (allowed {bound:.2e})"
        return Verdict(verdict.max_err, verdict.rms_err, verdict.max_allowed, verdict.rms_allowed, why)
    return verdict


def _saved(model_part, models, outcomes: list[Outcome], inputs, dtype) -> None:
    """Bytes kept for backward by one training forward pass of every contestant."""
    parameters = list(models[BASELINE].parameters())
    for p in parameters:
        p.requires_grad_(p.is_floating_point())
    for outcome in outcomes:
        # Compiled blocks would have to be compiled once more for training: `bench block` has that number.
        if outcome.skipped or outcome.name == "compile":
            continue
        loss = model_part.loss_for_training(models[outcome.name], inputs, dtype)
        outcome.saved = saved_bytes(loss, parameters)
    for p in parameters:
        p.requires_grad_(False)


def _report(model_part, outcomes: list[Outcome], inputs, options: Options, seconds: float) -> None:
    found = []
    lengths = inputs.text_mask.sum(1).tolist()
    case = f"vlmo_{options.config} fusion, {len(lengths)} pairs"
    print(
        f"{environment.device_name(options.device)}; torch {torch.__version__}; F.linear: {environment.gemm_library()}"
    )
    print(
        f"{case}; captions of {min(lengths)} to {max(lengths)} tokens padded to {inputs.text_mask.shape[1]}, plus image"
    )
    for name, what in model_part.CONTESTANTS.items():
        print(f"  {name}: {what}")
    for dtype in dict.fromkeys(o.dtype for o in outcomes):
        group = [o for o in outcomes if o.dtype == dtype]
        base = next(o for o in group if o.name == BASELINE)
        lines = []
        for o in group:
            if not o.times_ms:
                lines.append([o.name, *"-----"])
                continue
            median = statistics.median(o.times_ms)
            ratio = statistics.median(base.times_ms) / median if base.times_ms else float("nan")
            lines.append([
                o.name, milliseconds(median), milliseconds(min(o.times_ms)), f"{ratio:.2f}x",
                f"{o.verdict.max_err:.1e}", megabytes(o.saved),
            ])  # fmt: skip
            found.append(
                rows.make_row(
                    suite=SUITE,
                    case=case,
                    contestant=o.name,
                    pass_="forward",
                    dtype=o.dtype,
                    times_ms=o.times_ms,
                    max_err=o.verdict.max_err,
                    rms_err=o.verdict.rms_err,
                    saved_bytes=o.saved,
                    gflop=None,
                    ceiling_gflops=None,
                    device=options.device,
                )  # fmt: skip
            )
        table(
            f"VLMo {options.config}, {str(dtype).removeprefix('torch.')}, fusion pass, "
            f"{max((len(o.times_ms) for o in group), default=0)} interleaved rounds",
            ["contestant", "median", "fastest", "speed", "max error", "saved for backward"],
            lines,
            f"error: against the published model in fp64 on valid tokens; accepted within {MAX_FACTOR:g}x "
            f"(largest) and {RMS_FACTOR:g}x (RMS) of the published model's own. "
            "Saved: one training pass, without parameters (for compile see `bench block`).",
            [(o.name, o.skipped) for o in group if o.skipped],
        )
    rows.write(options.out / "results.json", found)
    written = [options.out / "results.json"]
    try:
        chart = importlib.import_module("vlmo_kernels.bench.chart")
        chart.draw(options.out / "demo.png", found, inputs.photos, inputs.captions)
        written.append(options.out / "demo.png")
    except ImportError as error:
        print(f"no chart: {error.name} is not installed. Hint: pip install 'vlmo_kernels[demo]'.")
    verdict, advice = _conclusion(outcomes, options.device)
    print(f"{verdict}; {seconds:.0f} s; wrote {' and '.join(map(str, written))}")
    for line in advice:
        print(line)


def _conclusion(outcomes: list[Outcome], device: str) -> tuple[str, list[str]]:
    """Who agrees and who does not, and what to do about it."""
    failed = [o for o in outcomes if o.verdict is None]
    wrong = [o for o in outcomes if o.verdict is not None and not o.verdict.ok]

    def named(some: list[Outcome]) -> str:
        return ", ".join(f"{o.name} in {str(o.dtype).removeprefix('torch.')}" for o in some)

    said = [f"wrong: {named(wrong)}"] if wrong else ["all that ran agree" if failed else "all contestants agree"]
    advice = []
    if failed:
        said.append(f"failed: {named(failed)}")
        if device == "cpu" and any(o.name == "compile" for o in failed):
            advice.append("Hint: torch.compile on a CPU needs a C++ compiler: g++ on the PATH, or CXX=/path/to/one.")
    if any(o.name == "ours" for o in wrong):
        advice.append(hint(device))
    elif wrong:
        advice.append("Hint: what is wrong here is torch's own; `make demo TORCH=torch==X.Y.Z` tries another one.")
    return "; ".join(said), advice
