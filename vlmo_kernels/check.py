"""`vlmo-kernels check`: every op and implementation against fp64 on this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from .bench import eager, probe
from .bench.display import progress, table
from .bench.error import MAX_FACTOR, RMS_FACTOR, Verdict, error_of, judge, worst
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
    if "cuda" in devices and not torch.cuda.is_available():
        raise RuntimeError("check: device cuda needs a GPU that torch can use, none was found")
    chosen = {name: DTYPES[name] for name in dtypes or DTYPES}
    plan = [
        (d, op, impl, name) for d in devices for op in ops or probe.OPS for impl in IMPLEMENTATIONS for name in chosen
    ]
    lines, failures, checks = [], [], 0
    with progress("check", len(plan)) as bar:
        for device_, op, impl, name in plan:
            bar.step(f"{op}, {impl}, {name}, {device_}")
            why = _why_not(op, impl, device_, chosen[name])
            where = [op, impl, name, device_]
            if why:
                lines.append([*where, "-", "-", f"not here: {why}"])
                continue
            verdicts = {case: check_case(op, impl, chosen[name], CASES[case], device_) for case in cases or CASES}
            bad = {case: v for case, v in verdicts.items() if not v.ok}
            checks += len(verdicts)
            failures += [f"{op} {impl} {name} {device_}, {case}: {v.why}" for case, v in bad.items()]
            closest = worst(list(verdicts.values()))
            share = closest.max_err / closest.max_allowed if closest.max_allowed else 0.0
            said = f"{len(bad)} of {len(verdicts)} FAILED" if bad else f"{len(verdicts)} ok"
            lines.append([*where, f"{closest.max_err:.1e}", f"{share:.0%}", said])
    columns = ["op", "implementation", "dtype", "device", "max error", "of allowed", "cases"]
    rule = f"{MAX_FACTOR:g}x (largest) and {RMS_FACTOR:g}x (RMS) of the error of eager torch in the same dtype"
    table("check: output and every gradient against fp64", columns, lines, f"allowed: {rule}")
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


def check_case(op: str, impl: str, dtype: torch.dtype, case: Case, device: str) -> Verdict:
    """Output and all gradients of one case; an exception is a failure like any other."""
    try:
        call, expected, eager, more = _measure(op, dtype, case, device)
        actual = _results(call.to(dtype), impl)
    except Exception as error:  # the table must go on to the other cases
        nan = float("nan")
        return Verdict(nan, nan, nan, nan, f"{type(error).__name__}: {error}")
    found = []
    for name in expected:
        v = judge(actual[name], expected[name], eager[name], more[name])
        found.append(v if v.ok else replace(v, why=f"{name}: {v.why}"))
    return worst(found)


@cache
def _measure(op: str, dtype: torch.dtype, case: Case, device: str):
    """A call, its fp64 and eager results, and the errors eager makes of other draws and in its other form.

    Eager's error is itself random, and a gradient of few elements may come out well by luck: hence some draws.
    """
    layout = probe.make_layout([list(sample) for sample in case.runs], device)
    first, more = None, defaultdict(list)
    for seed in range(DRAWS):
        call = probe.make_call(op, layout, case.width, dtype, case.strided, seed)
        expected = _results(call.to(torch.float64), "reference")
        forms = {f: _results(call.to(dtype), f"eager {f}") for f in eager.FORMS.get(op, ("scores",))}
        for form, results in forms.items():
            for name in expected:
                if (form, name) != ("sdpa", "grad of bias"):
                    more[name].append(error_of(results[name], expected[name]))
        first = first or (call, expected, forms["scores"])
    return *first, more


def _results(call: probe.Call, impl: str) -> dict[str, torch.Tensor]:
    form = impl.removeprefix("eager ")
    y = call(impl) if form == impl else eager.run(call, form)
    generator = torch.Generator().manual_seed(4)
    # Drawn in 16 bits, so that every dtype gets the same gradient.
    dy = torch.randn(y.shape, generator=generator).to(y.device, torch.bfloat16).to(y.dtype)
    y.backward(dy)
    grads = {f"grad of {n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in call.tensors.items()}
    return {"output": y.detach(), **grads}
