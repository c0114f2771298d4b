"""Attention over packed rows as a test problem: a batch, its masks, the fp64 result and eager torch's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from tests.common import eager
from tests.common.numerics import assert_close_as_eager
from vlmo_kernels import ModalityLayout
from vlmo_kernels.reference import shared_attention as reference


@dataclass(frozen=True)
class Case:
    """A batch of samples (text tokens, image tokens) and an attention.

    Attributes:
        text_room: position of the first image token: text is padded in mid-sample up to it.
        bound: the `max_seqlen` the launcher is told, None for the exact one.
        shuffled: the row table lists a sample's tokens in random order.
    """

    samples: tuple[tuple[int, int], ...]
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    bias: str | None = None
    causal: bool = False
    prefix: bool = False
    text_room: int | None = None
    bound: int | None = None
    shuffled: bool = False
    dtype: torch.dtype = torch.float32


class Problem:
    """Inputs of a case, packed with static capacity: NaN in the dead rows."""

    def __init__(self, case: Case) -> None:
        self.case = case
        room = max((t for t, _ in case.samples), default=0) if case.text_room is None else case.text_room
        length = max(room + max(i for _, i in case.samples), 1)
        ids = torch.full((len(case.samples), length), -1)
        for b, (text, image) in enumerate(case.samples):
            ids[b, :text] = 0
            ids[b, room : room + image] = 1
        self.valid = ids >= 0
        self.layout = ModalityLayout.from_modality_ids(ids, modalities=("text", "image"))
        self.seqs = self.layout.sequences()
        if case.shuffled:
            self.seqs = replace(self.seqs, rows=self._shuffled_rows())
        if case.bound is not None:
            self.seqs = replace(self.seqs, max_seqlen=case.bound)
        self.live = int(self.seqs.cu_seqlens[-1])
        kinds = (case.heads, case.kv_heads, case.kv_heads, case.heads)
        self.q, self.k, self.v, self.do = (self._rows(heads) for heads in kinds)
        self.bias = None if case.bias is None else self._bias(length)
        self.prefix = torch.randint(0, length, (len(ids),), dtype=torch.int32) if case.prefix else None
        self.scale = 1.3 * case.head_dim**-0.5

    def _shuffled_rows(self) -> torch.Tensor:
        rows, at = self.seqs.rows.clone(), self.seqs.cu_seqlens.tolist()
        for start, end in zip(at[:-1], at[1:], strict=True):
            rows[start:end] = rows[start:end][torch.randperm(end - start)]
        return rows

    def _rows(self, heads: int) -> torch.Tensor:
        t = torch.randn(self.layout.tokens, heads, self.case.head_dim).to(self.case.dtype)
        t[self.live :] = torch.nan
        return t

    def _bias(self, length: int) -> torch.Tensor:
        bias = torch.randn(self.case.heads, length, length)
        if self.case.bias == "hiding":
            bias[:, :, ::3] = -torch.inf
            bias[0, 1] = -torch.inf  # a query that sees nothing
        return bias.to(self.case.dtype if self.case.bias == "same" else torch.float32)

    def forward(self, module, dtype: torch.dtype | None = None, **changed):
        q, k, v = (changed.get(n, getattr(self, n)) for n in ("q", "k", "v"))
        if dtype is not None:
            q, k, v = (t.to(dtype) for t in (q, k, v))
        return module.forward(q, k, v, self.seqs, self.bias, self.case.causal, self.prefix, self.scale)

    def backward(self, module, o, lse, out, dtype: torch.dtype | None = None, **changed):
        do, q, k, v = (changed.get(n, getattr(self, n)) for n in ("do", "q", "k", "v"))
        if dtype is not None:
            do, q, k, v = (t.to(dtype) for t in (do, q, k, v))
        masks = (self.bias, self.case.causal, self.prefix, self.scale, self.bias is not None)
        return module.backward(do, q, k, v, o, lse, self.seqs, *masks, out)

    @cache  # noqa: B019 - as short-lived as the test's problem
    def expected(self):
        """o, lse, dq, dk, dv, dbias of the reference in fp64."""
        o, lse = self.forward(reference, torch.float64)
        out = tuple(torch.empty(t.shape, dtype=torch.float64) for t in (self.q, self.k, self.v))
        with_fp64_bias = replace_bias(self, torch.float64)
        dbias = with_fp64_bias.backward(reference, o, lse, out, torch.float64)
        return o, lse, *out, dbias

    @cache  # noqa: B019
    def eager(self):
        """The same from eager torch in the case's dtype, on padded tensors; lse from the reference."""
        leaves = [self.layout.unpack(t).requires_grad_() for t in (self.q, self.k, self.v)]
        bias = None if self.bias is None else self.bias.clone().requires_grad_()
        o = eager.shared_attention(*leaves, self.valid, bias, self.case.causal, self.prefix, self.scale)
        wanted = leaves if bias is None else [*leaves, bias]
        grads = torch.autograd.grad(o, wanted, self.layout.unpack(self.do))
        packed = [self.layout.pack_padded(t.detach()) for t in (o, *grads[:3])]
        return packed[0], self.forward(reference)[1], *packed[1:], grads[3] if bias is not None else None


def replace_bias(problem: Problem, dtype: torch.dtype) -> Problem:
    other = object.__new__(Problem)
    other.__dict__.update(problem.__dict__)
    other.bias = None if problem.bias is None else problem.bias.to(dtype)
    return other


NAMES = ("o", "lse", "dq", "dk", "dv", "dbias")


def results(problem: Problem, got) -> dict[str, tuple[torch.Tensor, ...]]:
    """Result name to (ours, fp64, eager), live rows alone; asserts that gradients of dead rows are zero."""
    live, found = problem.live, {}
    for name, mine, right, plain in zip(NAMES, got, problem.expected(), problem.eager(), strict=True):
        if mine is None:
            assert right is None
        elif name == "dbias":
            found[name] = mine, right, plain
        elif name == "lse":
            found[name] = tuple(t[:, :live] for t in (mine, right, plain))
        else:
            found[name] = tuple(t[:live] for t in (mine, right, plain))
            assert name in ("o", "lse") or not mine[live:].any(), f"{name}: dead rows must be zero"
    return found


def check(problem: Problem, got) -> None:
    for name, three in results(problem, got).items():
        assert_close_as_eager(*three, name)
