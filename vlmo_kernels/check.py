"""`vlmo-kernels check`: every op and implementation against fp64 on this machine."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from .bench import eager, probe
from .bench.display import each_reason_once, progress, table
from .bench.error import FLOOR_EPS, MAX_FACTOR, RMS_FACTOR, Verdict, error_of, judge, rms, worst
from .runtime.dispatch import IMPLEMENTATIONS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DRAWS = 3


@dataclass(frozen=True)
class Case:
    """A batch with the reason it is here.

    Attributes:
        runs: for every sample its runs of modalities.
        width: of the model.
        strided: activations are views, neither contiguous nor at the start of their storage.
    """

    name: str
    runs: tuple[tuple[tuple[str, int], ...], ...]
    width: int = 64
    strided: bool = False


_PAIR = (("text", 5), ("image", 9))
CASES = {
    case.name: case
    for case in (
        Case("no tokens", ((),)),
        Case("1 token: the image expert is empty", ((("text", 1),),)),
        Case("63 tokens: below every tile", ((("text", 23), ("image", 40)),)),
        Case("237 tokens: a padded VLMo pair", ((("text", 40), ("image", 197)),)),
        Case("all tokens to one expert", ((("image", 17),), (("image", 9),))),
        Case("single modalities in one batch", ((("text", 7),), (("image", 9),), _PAIR)),
        Case("an empty sample among others", (_PAIR, (), _PAIR)),
        Case("one-token alternation", ((("text", 1), ("image", 1)) * 12,)),
        Case("width 34: no multiple of 16", (_PAIR, _PAIR[::-1]), width=34),
        Case("strided input with an offset", (_PAIR, _PAIR), strided=True),
    )
}


def run(device: str = "", ops: Sequence[str] = (), dtypes: Sequence[str] = (), cases: Sequence[str] = ()) -> int:
    """Check, print a table, and answer 1 if anything failed, else 0."""
    for kind, names, known in (("op", ops, probe.OPS), ("case", cases, CASES), ("dtype", dtypes, DTYPES)):
        for name in names:
            if name not in known:
                raise ValueError(f"check: {kind} must be one of {', '.join(known)}, got {name!r}")
    devices = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if not set(devices) <= {"cpu", "cuda"}:
        raise ValueError(f"check: device must be cpu or cuda, got {device!r}")
    if "cuda" in devices and not torch.cuda.is_available():
        raise RuntimeError("check: device cuda needs a GPU that torch can use, none was found")
    chosen = {name: DTYPES[name] for name in dtypes or DTYPES}
    plan = [
        (d, op, impl, name) for d in devices for op in ops or probe.OPS for impl in IMPLEMENTATIONS for name in chosen
    ]
    lines, not_here, failures, checks = [], [], [], 0
    with progress("check", len(plan)) as bar:
        for device_, op, impl, name in plan:
            bar.step(f"{op}, {impl}, {name}, {device_}")
            why = _why_not(op, impl, device_, chosen[name])
            where = [op, impl, name, device_]
            if why:
                not_here.append((f"not tried: {impl} on {device_}", f"{op} {name}", why))
                continue
            tried = [CASES[case] for case in cases or CASES]
            found = check_op(op, impl, chosen[name], tried, device_)
            bad = {result: v for result, v in found.items() if not v.ok}
            checks += len(found)
            failures += [f"{op} {impl} {name} {device_}, {result}: {v.why}" for result, v in bad.items()]
            closest = worst(list(found.values()))
            share = closest.max_err / closest.max_allowed if closest.max_allowed else 0.0
            said = f"{len(bad)} of {len(found)} FAILED" if bad else f"{len(found)} ok"
            lines.append([*where, f"{closest.max_err:.1e}", f"{share:.0%}", said])
    notes = each_reason_once(not_here, len(ops or probe.OPS) * len(chosen))
    columns = ["op", "implementation", "dtype", "device", "max error", "of allowed", "results"]
    rule = f"{MAX_FACTOR:g}x (largest) and {RMS_FACTOR:g}x (RMS) of the error of eager torch in the same dtype"
    table("check: output and every gradient against fp64", columns, lines, f"allowed: {rule}", notes)
    print("\n".join(failures) if failures else f"{checks} checks, all passed")
    return int(bool(failures) or not checks)


def _why_not(op: str, impl: str, device: str, dtype: torch.dtype) -> str:
    """Why an implementation cannot run, or nothing."""
    parts = probe.EXPLAINED_OPS if op == "mome_block" else (op,)
    for part in parts:
        found = probe.explain_op(part, device, dtype, impl)
        if found.chosen is None:
            return found.rejected.get(impl, "no reason given")
    return ""


def check_op(op: str, impl: str, dtype: torch.dtype, cases: Sequence[Case], device: str) -> dict[str, Verdict]:
    """The output and every gradient, each judged over all cases and draws; an exception is a failure like any other.

    The largest of the few errors of a small result is chance, eager's as well as ours: hence together. Every tensor
    is first brought to magnitude one by a power of two, which rounds nothing.
    """
    pools: dict[str, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
    for case, seed in product(cases, range(DRAWS)):
        try:
            call, expected, forms = _measure(op, dtype, case, device, seed)
            actual = _results(call.to(dtype), impl)
        except Exception as error:  # the table must go on to the other ops
            nan = float("nan")
            return {case.name: Verdict(nan, nan, nan, nan, f"{type(error).__name__}: {error}")}
        for name, right in expected.items():
            # The fused form gives the bias no gradient: eager has only one way to it.
            grants = [form[name] for which, form in forms.items() if (which, name) != ("sdpa", "grad of bias")]
            one = judge(actual[name], right, grants[0])
            if math.isnan(one.max_err):
                return {f"{case.name}, {name}": one}
            factor = _to_magnitude_one(right)
            pools[name.rstrip("01")].append([(t * factor).flatten() for t in (actual[name], right, *grants)])
    found = {}
    for name, pool in pools.items():
        actual, right, *grants = (torch.cat(parts) for parts in zip(*pool, strict=True))
        found[name] = judge(actual, right, grants[0], [error_of(g, right) for g in grants[1:]])
    return found


@cache
def _measure(op: str, dtype: torch.dtype, case: Case, device: str, seed: int):
    """A call, its results in fp64, and what eager torch makes of it in each of its forms."""
    layout = probe.make_layout([list(sample) for sample in case.runs], device)
    call = probe.make_call(op, layout, case.width, dtype, case.strided, seed)
    forms = {f: _results(call.to(dtype), f"eager {f}") for f in eager.FORMS.get(op, ("scores",))}
    return call, _results(call.to(torch.float64), "reference"), forms


def _to_magnitude_one(expected: torch.Tensor) -> float:
    """A power of two; 1 for what fp64 cannot tell from zero."""
    finite = expected[torch.isfinite(expected)]
    size = rms(finite)
    zero = FLOOR_EPS[torch.float64][0] * torch.finfo(torch.float64).eps
    return 2.0 ** -round(math.log2(size)) if size > zero else 1.0


def _results(call: probe.Call, impl: str) -> dict[str, torch.Tensor]:
    form = impl.removeprefix("eager ")
    y = call(impl) if form == impl else eager.run(call, form)
    generator = torch.Generator().manual_seed(4)
    # Drawn in 16 bits, so that every dtype gets the same gradient.
    dy = torch.randn(y.shape, generator=generator).to(y.device, torch.bfloat16).to(y.dtype)
    y.backward(dy)
    grads = {f"grad of {n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in call.tensors.items()}
    return {"output": y.detach(), **grads}
