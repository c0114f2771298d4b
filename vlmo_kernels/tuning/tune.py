"""The tuner: races a few configurations of every kernel on this GPU and keeps the fastest that is right.

Runs on request only, needs nothing but torch and Triton, ends within its budget, and writes after every launch it
has settled, so a run that is cut short keeps what it has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmo_kernels.bench import environment
from vlmo_kernels.bench.baselines import attend_published
from vlmo_kernels.bench.display import milliseconds, table
from vlmo_kernels.bench.error import judge
from vlmo_kernels.bench.harness import interleave
from vlmo_kernels.layout import ModalityLayout
from vlmo_kernels.tuning import tables

# Widths of what people run: D, heads, F of VLMo and BEiT-3 base and large.
MODELS = {"base": (768, 12, 3072), "large": (1024, 16, 4096), "tiny": (64, 2, 96)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDS = 30
# A configuration must beat the heuristics by this factor, or the difference is noise.
MARGIN = 1.02

# In the order of `gemm.Config`: rows, columns, steps of a tile, warps, stages, parts of the epilogue, register cap, and
# whether operands come through tensor descriptors (from sm_90 on; IEEE fp32 has no tensor core to feed, and spills).
GEMM = (
    (128, 128, 64, 8, 3, 2, 128), (128, 128, 64, 8, 4, 2, None), (128, 128, 64, 4, 3, 4, None),
    (128, 128, 32, 8, 4, 2, 128), (128, 256, 64, 8, 3, 4, None), (256, 128, 64, 8, 3, 4, None),
    (128, 64, 64, 4, 4, 2, None), (64, 128, 64, 4, 4, 2, None), (64, 256, 64, 8, 3, 4, None),
)  # fmt: skip
GATED = (
    (128, 128, 64, 8, 3, 4, None), (128, 64, 64, 8, 4, 4, None), (128, 64, 64, 4, 3, 4, None),
    (64, 128, 64, 8, 3, 4, None), (128, 128, 32, 8, 4, 4, None),
)  # fmt: skip
GEMM_TMA = (
    (128, 128, 64, 8, 3, 2, 128, True), (128, 128, 64, 8, 4, 2, None, True), (128, 256, 64, 8, 4, 4, None, True),
    (256, 128, 64, 8, 3, 4, None, True), (64, 128, 64, 4, 4, 2, None, True),
)  # fmt: skip
GATED_TMA = ((128, 128, 64, 8, 3, 4, None, True), (128, 64, 64, 8, 4, 4, None, True))
WEIGHT = (
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 4),
)  # fmt: skip
# In the order of `shared_attention.Config`: query rows, key rows, warps, stages.
ATTENTION = {
    "fwd": ((128, 64, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (128, 32, 8, 3)),
    "dq": ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3), (64, 64, 4, 3)),
    "dkdv": ((64, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 1), (32, 64, 4, 2)),
    "short": (tables.LONG, (256, 16, 8, 2), (256, 32, 8, 1), (256, 32, 16, 2), (256, 64, 16, 1)),
    "dbias": ((64, 64, 4, 2), (64, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2)),
}
SMALL = {name: ((16, 16, 4, 1),) for name in ATTENTION}  # for the interpreter, which proves the tuner itself


@dataclass
class Job:
    """One launch to settle.

    Attributes:
        problem: as the tables know it.
        run: the call, whose outputs are compared.
        plain: the same by eager torch in a dtype: in fp64 what is right, in the launch's what may be erred.
        candidates: what is raced against the heuristics.
        without: further kernels and their forced routes, so that `run` reaches this one.
        flops: of the products.
        product: torch's products of the same shape and nothing else, where there are any.
    """

    problem: tables.Problem
    run: Callable[[], tuple[torch.Tensor, ...]]
    plain: Callable[[torch.dtype], tuple[torch.Tensor, ...]]
    candidates: tuple[Any, ...]
    without: dict[str, Any]
    flops: float
    product: Callable[[], object] | None = None


def run(
    model: str = "base", pairs: int = 64, dtype: str = "bf16", budget: float = 300.0, out: Path | None = None,
    device: str = "cuda",
) -> int:  # fmt: skip
    """Tune the kernels of one model and batch on this GPU.

    Args:
        model: of `MODELS`.
        pairs: text-image pairs in the batch; texts of 20 tokens, images of 197.
        dtype: of `DTYPES`.
        budget: seconds; what is not settled by then stays with the heuristics.
        out: the table to write into; by default the user's cache of this architecture.
        device: "cpu" runs the tuner in Triton's interpreter, for tests: such times mean nothing.

    Raises:
        ValueError: an unknown model or dtype.
        RuntimeError: no GPU.
    """
    if model not in MODELS:
        raise ValueError(f"tune: model must be one of {', '.join(MODELS)}, got {model!r}")
    if dtype not in DTYPES:
        raise ValueError(f"tune: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise RuntimeError("tune: there must be a GPU that torch can use, none was found. Hint: vlmo-kernels info")
    arch = "interpreter" if device == "cpu" else tables.architecture(torch.device(device).index)
    path = out or tables.user_file(arch)
    begun = time.perf_counter()
    lines, settled = [], {}
    todo = jobs(*MODELS[model], pairs, DTYPES[dtype], device)
    for i, job in enumerate(todo):
        left = budget - (time.perf_counter() - begun)
        if left <= 0:
            lines.append([str(job.problem), "-", "-", "-", "not settled: the budget is spent"])
            continue
        # Twice an even share: what one launch does not need is left to those after it.
        entry, remark = settle(job, device, time.perf_counter() + min(left, 2 * left / (len(todo) - i)))
        settled[key_of(job.problem)] = entry
        save(path, arch, device, settled)
        lines.append(_line(job, entry, remark))
        print(f"[{time.perf_counter() - begun:5.1f} s] {job.problem}: {lines[-1][1]}", flush=True)
    table(f"{environment.device_name(device)}", ["launch", "configuration", "time", "heuristics", "remark"], lines)
    print(f"wrote {path}" if settled else "nothing was settled, nothing is written")
    return 0 if settled else 1


def key_of(problem: tables.Problem) -> tuple[str, str, tuple[int, ...]]:
    return problem.kernel, tables.short(problem.dtype), tables.buckets(problem.sizes)


def settle(job: Job, device: str, deadline: float) -> tuple[dict[str, Any] | None, str]:
    """Gate and race one launch's candidates; the entry for the table, and what was left out."""
    name = job.problem.kernel
    exact, eager = job.plain(torch.float64), job.plain(job.problem.dtype)
    racing: dict[Any, dict[str, Any]] = {None: job.without | {name: None}}  # an older entry must not race as them
    wrong = failed = late = 0
    for candidate in job.candidates:
        if time.perf_counter() > deadline:
            late += 1
            continue
        choices = job.without | {name: candidate}
        try:
            with tables.forced(choices):
                found = job.run()
        except Exception:  # a tile that this GPU has no room for, or that the compiler refuses
            failed += 1
            continue
        if all(judge(f, e, m).ok for f, e, m in zip(found, exact, eager, strict=True)):
            racing[candidate] = choices
        else:
            wrong += 1
    calls = {candidate: _forced(choices, job.run) for candidate, choices in racing.items()}
    rounds = 2 if device == "cpu" else ROUNDS
    times = interleave(calls, device, rounds, budget_s=max(deadline - time.perf_counter(), 1.0))
    medians = {candidate: statistics.median(t) for candidate, t in times.items()}
    best = min(medians, key=medians.get)
    remark = ", ".join(
        f"{count} {what}" for count, what in ((wrong, "wrong"), (failed, "failed"), (late, "not tried")) if count
    )
    if best is None or medians[None] < MARGIN * medians[best]:
        return None, remark or "the heuristics are as fast"
    kernel, dtype, sizes = key_of(job.problem)
    entry = dict(
        kernel=kernel, dtype=dtype, sizes=list(sizes), config=best if isinstance(best, str) else list(best),
        ms=medians[best], heuristic_ms=medians[None],
    )  # fmt: skip
    return entry, remark


def save(path: Path, arch: str, device: str, settled: dict[tuple, dict[str, Any] | None]) -> None:
    """Write what was settled into a table, in the place of older entries; None: the heuristics are to be taken."""
    try:
        old = tables.read(path)["entries"] if path.exists() else []
    except ValueError:
        old = []
    kept = {(e["kernel"], e["dtype"], tuple(e["sizes"])): e for e in old} | settled
    head = dict(
        format=tables.FORMAT, arch=arch, device=environment.device_name(device), versions=environment.versions(),
        commit=environment.commit(),
    )  # fmt: skip
    tables.write(path, head | {"entries": [kept[key] for key in sorted(kept) if kept[key] is not None]})


def _forced(choices: dict[str, Any], call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with tables.forced(choices):
            call()

    return run


def _line(job: Job, entry: dict[str, Any] | None, remark: str) -> list[str]:
    if entry is None:
        return [str(job.problem), tables.HEURISTIC, "-", "-", remark]
    config = entry["config"] if isinstance(entry["config"], str) else "x".join(map(str, entry["config"]))
    return [str(job.problem), config, milliseconds(entry["ms"]), milliseconds(entry["heuristic_ms"]), remark]


# ---------------------------------------------------------------- the launches


def jobs(dim: int, heads: int, hidden: int, pairs: int, dtype: torch.dtype, device: str) -> list[Job]:
    """The launches of a block, those first that take the most time; one for every key of the tables."""
    text, image = (20, 197) if device != "cpu" else (5, 12)
    layout = ModalityLayout.from_lengths({"text": [text] * pairs, "image": image}, device=device)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    made = [
        *_gemm_jobs(layout, draw, hidden, dim, device),
        *_attention_jobs(layout, draw, heads, dim // heads, device),
    ]
    first: dict[tuple, Job] = {}
    for job in made:
        first.setdefault((job.problem.kernel, tables.buckets(job.problem.sizes)), job)
    return list(first.values())


def _gemm_jobs(layout: ModalityLayout, draw, hidden: int, dim: int, device: str) -> list[Job]:
    from vlmo_kernels.kernels import gemm, gemm_grad

    route, rows = layout.route({"text": 0, "image": 1}, 2), layout.tokens
    small = device == "cpu"
    tma = not small and draw(0).dtype != torch.float32 and gemm.capability(torch.device(device)) >= (9, 0)
    tiles = ((32, 32, 16, 4, 2, 2, None), (32, 32, 32, 4, 2, 2, None, True)) if small else GEMM + GEMM_TMA * tma
    gated_tiles = ((32, 32, 16, 4, 2, 4, None),) if small else GATED + GATED_TMA * tma
    weight_tiles = ((32, 16, 32, 4, 2),) if small else WEIGHT
    ends = route.ranges()

    def by_expert(function, operand: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`function(expert, its rows)` over all rows."""
        return torch.cat([function(e, operand[a:b].to(dtype)) for a, b, e in ends])

    def flops(n: int, k: int) -> float:
        return 2.0 * route.live_rows() * n * k

    def products(left: torch.Tensor, right: list[torch.Tensor]) -> Callable[[], object]:
        return lambda: [left[a:b] @ right[e] for a, b, e in ends]

    def weights(n: int, k: int) -> list[torch.Tensor]:
        return [draw(n, k, scale=k**-0.5) for _ in range(2)]

    def forward(n: int, k: int, last: bool) -> Job:
        x, w, b = draw(rows, k), weights(n, k), [draw(n) for _ in range(2)]
        gamma, residual = ([draw(n)] * 2, draw(rows, n)) if last else (None, None)
        options = dict(gamma=gamma, residual=residual) if last else dict(activation="gelu", save=True)

        def plain(d):
            z = by_expert(lambda e, rows: torch.addmm(b[e].to(d), rows, w[e].to(d).T), x, d)
            return (residual.to(d) + gamma[0].to(d) * z,) if last else (torch.nn.functional.gelu(z), z)

        def call():
            return tuple(t for t in gemm.gemm(x, w, b, route, **options) if t is not None)

        candidates, bare = (*tiles, tables.CUBLAS), products(x, [t.T for t in w])
        return Job(gemm.problem(x.dtype, rows, n, k, False), call, plain, candidates, {}, flops(n, k), bare)

    def gated(n: int, k: int) -> Job:
        x, w, up = draw(rows, k), weights(n, k), weights(n, k)

        def plain(d):
            gate, other = (by_expert(lambda e, rows, w=w: rows @ w[e].to(d).T, x, d) for w in (w, up))
            return (torch.nn.functional.silu(gate) * other,)

        def call():
            return gemm.gemm(x, w, [None] * 2, route, activation="silu", up_weights=up)[:1]

        candidates, bare = (*gated_tiles, tables.CUBLAS), products(x, [torch.cat(pair).T for pair in zip(w, up)])
        return Job(gemm.problem(x.dtype, rows, n, k, True), call, plain, candidates, {}, flops(2 * n, k), bare)

    def input_grad(n: int, k: int, activation: str, is_gated: bool = False) -> Job:
        dy, w = draw(rows, k), [draw(k, n, scale=k**-0.5) for _ in range(2)]
        pre = draw(rows, n) if activation != "none" else None
        up = draw(rows, n) if is_gated else None
        function = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}.get(activation)
        save = dict(activation=activation, pre=pre, up=up, save_hidden=True) if function else {}

        def plain(d):
            product = by_expert(lambda e, rows: rows @ w[e].to(d), dy, d)
            if function is None:
                return (product,)
            z = pre.detach().to(d).requires_grad_()
            u = up.detach().to(d).requires_grad_() if is_gated else None
            h = function(z) * u if is_gated else function(z)
            return (*torch.autograd.grad(h, [z, u] if is_gated else [z], product), h.detach())

        def call():
            found = gemm_grad.input_grad(dy, w, route, **save)
            return tuple(t for t in found[:3] if t is not None)

        problem = gemm_grad.input_problem(dy.dtype, rows, n, k, function is not None, is_gated)
        candidates = (*(gated_tiles if is_gated else tiles), tables.CUBLAS)
        return Job(problem, call, plain, candidates, {}, flops(n, k), products(dy, w))

    def weight_grad(n: int, k: int, summed: bool) -> Job:
        dy, x, w = draw(rows, n, scale=rows**-0.5), draw(rows, k), weights(n, k)
        gamma = [draw(n)] * 2 if summed else None

        def plain(d):
            products = [dy[a:b].to(d).T @ x[a:b].to(d) for a, b, _ in ends]
            return tuple(gamma[0].to(d)[:, None] * u for u in products) if summed else tuple(products)

        def call():
            return tuple(gemm_grad.weight_grad(dy, x, w, route, [True] * 2, gamma=gamma)[0])

        def bare():
            return [dy[a:b].T @ x[a:b] for a, b, _ in ends]

        problem = gemm_grad.weight_problem(dy.dtype, rows, n, k, summed)
        candidates = weight_tiles if summed else (*weight_tiles, tables.CUBLAS)
        return Job(problem, call, plain, candidates, {}, flops(n, k), bare)

    return [
        forward(hidden, dim, False), forward(dim, hidden, True), forward(dim, dim, True),
        input_grad(hidden, dim, "gelu"), input_grad(dim, hidden, "none"), input_grad(dim, dim, "none"),
        weight_grad(hidden, dim, False), weight_grad(dim, hidden, True), weight_grad(dim, dim, False),
        gated(hidden, dim), input_grad(hidden, dim, "silu", True),
    ]  # fmt: skip


def _attention_jobs(layout: ModalityLayout, draw, heads: int, head_dim: int, device: str) -> list[Job]:
    from vlmo_kernels.kernels import shared_attention

    seqs, scale = layout.sequences(), head_dim**-0.5
    q, k, v, do = (draw(layout.tokens, heads, head_dim) for _ in range(4))
    table = draw(heads, layout.max_seqlen, layout.max_seqlen).float()
    candidates = SMALL if device == "cpu" else ATTENTION

    order, samples = seqs.rows.long(), (layout.batch, -1, heads, head_dim)
    where = layout.positions[order[: layout.max_seqlen]].long()  # all samples are alike

    def plain(kernel: str, bias: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        split = (t[order].view(samples).transpose(1, 2) for t in leaves)
        wide = torch.promote_types(dtype, torch.float32)
        # a bias of zeros where there is none: published attention adds one always
        added = torch.zeros_like(table, dtype=wide) if bias is None else bias.detach().to(wide).requires_grad_()
        mask = torch.ones(layout.batch, layout.max_seqlen, dtype=torch.bool, device=device)
        o = attend_published(*split, mask, added[:, where[:, None], where], scale)
        packed = torch.empty_like(leaves[0]).index_copy(0, order, o.transpose(1, 2).reshape(-1, heads, head_dim))
        if kernel == "fwd":
            return (packed.detach(),)
        return torch.autograd.grad(packed, leaves + [added] * (kernel == "dbias"), do.to(dtype))

    def make(kernel: str, bias: torch.Tensor | None) -> Job:
        o, lse = shared_attention.forward(q, k, v, seqs, bias, False, None, scale)
        outs = tuple(torch.empty_like(t) for t in (q, k, v))

        def call():
            if kernel == "fwd":
                return shared_attention.forward(q, k, v, seqs, bias, False, None, scale)[:1]
            masks = (bias, False, None, scale, kernel == "dbias")
            dbias = shared_attention.backward(do, q, k, v, o, lse, seqs, *masks, outs)
            return outs if dbias is None else (*outs, dbias)

        problem = shared_attention.problem(kernel, q.dtype, seqs.max_seqlen, head_dim, bias is not None, False)
        masks = " bias" * (bias is not None)
        without = {f"attention short{masks}": tables.LONG} if kernel in ("dq", "dkdv") else {}
        pairs = float((layout.cu_seqlens.diff().double() ** 2).sum())
        # the whole forward or backward: the kernels of a backward are not timed apart
        flops = 4 * heads * head_dim * pairs * (1 if kernel == "fwd" else 2.5)
        return Job(problem, call, partial(plain, kernel, bias), candidates[kernel], without, flops)

    return [make(kernel, bias) for bias in (table, None) for kernel in candidates if kernel != "dbias" or bias is table]
