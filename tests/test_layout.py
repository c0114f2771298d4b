"""The plan of a batch: constructors against a plain-Python twin, the rows they move, and the life of a plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmo_kernels as vk
from tests.common.cases import CASES, MODALITIES, Case

NAMES = ("text", "image", "audio", "video")
TABLES = ("cu_seqlens", "rows", "positions", "sample_of_row", "group_offsets", "row_of_token")
EXACT = ("rows", "positions", "sample_of_row")  # tables that dead rows lengthen


@st.composite
def batches(draw) -> tuple[tuple[str, ...], list[list[tuple[str, int]]]]:
    """Names of one to four modalities and the runs of up to four samples, any interleaving."""
    names = NAMES[: draw(st.integers(1, 4))]
    run = st.tuples(st.sampled_from(names), st.integers(0, 4))
    return names, draw(st.lists(st.lists(run, max_size=5), max_size=4))


def twin(ids: list[list[int]], modalities: int) -> dict[str, list[int]]:
    """The tables of a plan, token by token: the same words as in the docs, none of the package's code."""
    length = len(ids[0]) if ids else 0
    groups: list[list[tuple[int, int]]] = [[] for _ in range(2 * modalities)]
    for b, sample in enumerate(ids):
        mixed = len({i for i in sample if i >= 0}) > 1
        for position, i in enumerate(sample):
            if i >= 0:
                second = mixed if i == 0 else not mixed
                groups[2 * i + second].append((b, position))
    packed = [token for group in groups for token in group]
    row = {token: r for r, token in enumerate(packed)}
    in_order = sorted(packed)
    counts = [sum(b == sample for b, _ in packed) for sample in range(len(ids))]
    return {
        "cu_seqlens": [sum(counts[:b]) for b in range(len(ids) + 1)],
        "rows": [row[token] for token in in_order],
        "positions": [position for _, position in packed],
        "sample_of_row": [b for b, _ in packed],
        "group_offsets": [sum(len(g) for g in groups[:k]) for k in range(len(groups) + 1)],
        "row_of_token": [row.get((b, p), -1) for b in range(len(ids)) for p in range(length)],
    }


def assert_is_twin(layout: vk.ModalityLayout, ids: list[list[int]]) -> None:
    expected = twin(ids, len(layout.modalities))
    live = expected["group_offsets"][-1]
    for name in TABLES:
        table = getattr(layout, name)
        assert table.dtype == torch.int32 and table.is_contiguous(), name
        assert (table[:live] if name in EXACT else table).tolist() == expected[name], name
    assert layout.sample_of_row[live:].tolist() == [-1] * (layout.tokens - live)
    assert torch.equal(layout.rows.long().sort().values, torch.arange(layout.tokens)), "no permutation"
    assert layout.batch == len(ids) and layout.max_seqlen == (len(ids[0]) if ids else 0)


def ids_of(names: tuple[str, ...], runs) -> list[list[int]]:
    samples = [[names.index(m) for m, n in sample for _ in range(n)] for sample in runs]
    length = max((len(s) for s in samples), default=0)
    return [s + [-1] * (length - len(s)) for s in samples]


def tensor(ids: list[list[int]]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64).reshape(len(ids), len(ids[0]) if ids else 0)


# ---------------------------------------------------------------------------- constructors


@settings(max_examples=60, deadline=None)
@given(batches())
def test_runs_are_the_twin(batch) -> None:
    names, runs = batch
    ids = ids_of(names, runs)
    layout = vk.ModalityLayout.from_runs(runs, modalities=names)
    assert_is_twin(layout, ids)
    assert layout.tokens == layout.group_offsets[-1], "exact capacity"
    assert torch.equal(layout.host_offsets, layout.group_offsets)


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_static_capacity_is_the_twin(batch, padding: int, random) -> None:
    names, runs = batch
    ids = [row + [-1] * padding for row in ids_of(names, runs)]
    for row in ids:
        random.shuffle(row)  # padding anywhere
    layout = vk.ModalityLayout.from_modality_ids(tensor(ids), modalities=names)
    assert_is_twin(layout, ids)
    assert layout.tokens == tensor(ids).numel() and layout.host_offsets is None
    mask = torch.tensor([[random.random() < 0.7 for _ in row] for row in ids]).reshape(tensor(ids).shape)
    for kind in (torch.bool, torch.int64, torch.float32):
        masked = vk.ModalityLayout.from_modality_ids(tensor(ids), mask.to(kind), modalities=names)
        assert_is_twin(masked, torch.where(mask.bool(), tensor(ids), -1).tolist())


@pytest.mark.parametrize("name", CASES)
def test_cases_are_the_twin(name: str) -> None:
    case = CASES[name]
    for static in (False, True):
        assert_is_twin(case.layout(static), case.token_ids())


def assert_same(a: vk.ModalityLayout, b: vk.ModalityLayout) -> None:
    assert (a.modalities, a.batch, a.max_seqlen) == (b.modalities, b.batch, b.max_seqlen)
    for name in TABLES:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4))
def test_constructors_agree(lengths) -> None:
    text, image = (list(column) for column in zip(*lengths))
    by_lengths = vk.ModalityLayout.from_lengths({"text": text, "image": torch.tensor(image)})
    runs = [[("text", t), ("image", i)] for t, i in lengths]
    assert_same(by_lengths, vk.ModalityLayout.from_runs(runs, modalities=MODALITIES))
    ids = tensor(ids_of(MODALITIES, runs))
    static = vk.ModalityLayout.from_modality_ids(ids, modalities=MODALITIES)
    for name in set(TABLES) - set(EXACT):
        assert torch.equal(getattr(static, name), getattr(by_lengths, name))


@pytest.mark.parametrize("split", [0, 2, 5, -1])
def test_split_is_ids(split: int) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 0, 1]]).bool()
    ids = (torch.arange(5) >= (5 if split == -1 else split)).long().expand(2, 5)
    for m in (None, mask):
        assert_same(
            vk.ModalityLayout.from_split(2, 5, split, m),
            vk.ModalityLayout.from_modality_ids(ids, m, modalities=("image", "text")),
        )


def test_xformers_mask_is_lengths() -> None:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = {"text": [3, 0, 2], "image": [4, 5, 0]}
    ids = torch.tensor([0] * 3 + [1] * 9 + [0] * 2)
    mask = BlockDiagonalMask.from_seqlens([7, 5, 2])
    layout = vk.ModalityLayout.from_xformers(mask, ids, modalities=MODALITIES)
    assert_same(layout, vk.ModalityLayout.from_lengths(lengths))
    with pytest.raises(ValueError, match=r"`ids` must be \[14\], got \[13\]"):
        vk.ModalityLayout.from_xformers(mask, ids[1:], modalities=MODALITIES)
    cross = BlockDiagonalMask.from_seqlens([7, 5, 2], [1, 5, 2])
    with pytest.raises(ValueError, match="queries and keys must be the same sequences"):
        vk.ModalityLayout.from_xformers(cross, ids, modalities=MODALITIES)
    with pytest.raises(TypeError, match="must be a BlockDiagonalMask, got int"):
        vk.ModalityLayout.from_xformers(3, ids, modalities=MODALITIES)


def test_lengths_may_be_numpy_integers() -> None:
    import numpy as np

    lengths = {"text": np.array([2, 1]), "image": np.int64(3)}
    assert_same(
        vk.ModalityLayout.from_lengths(lengths), vk.ModalityLayout.from_lengths({"text": [2, 1], "image": 3})
    )


def test_starts_leave_gaps() -> None:
    layout = vk.ModalityLayout.from_lengths({"text": [2, 3], "image": 2}, starts={"text": 0, "image": 4})
    assert layout.max_seqlen == 6
    assert layout.unpack(torch.ones(layout.tokens)).tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1]]


# ---------------------------------------------------------------------------- moving rows


@settings(max_examples=40, deadline=None)
@given(batches(), st.booleans())
def test_rows_move_there_and_back(batch, static: bool) -> None:
    names, runs = batch
    ids = tensor(ids_of(names, runs))
    layout = vk.ModalityLayout.from_runs(runs, modalities=names)
    if static:
        layout = vk.ModalityLayout.from_modality_ids(ids, modalities=names)
    for shape in ((), (3,), (2, 3)):
        x = torch.randn(*ids.shape, *shape)
        expected = torch.where((ids >= 0).reshape(*ids.shape, *[1] * len(shape)), x, 0.0)
        packed = layout.pack_padded(x)
        assert packed.shape == (layout.tokens, *shape)
        assert torch.equal(layout.unpack(packed), expected)
        live = int(layout.group_offsets[-1])
        assert not packed[live:].any(), "dead rows are zero"
        by_hand = [x[b, p] for b, p in zip(layout.sample_of_row[:live], layout.positions[:live])]
        assert all(torch.equal(row, right) for row, right in zip(packed, by_hand))
    # The modalities one by one, in sample order, and back.
    packed = layout.pack_padded(torch.randn(*ids.shape, 3))
    parts = layout.unpack_modalities(packed)
    assert torch.equal(layout.pack(parts), packed)
    for m, name in enumerate(names):
        assert torch.equal(parts[name], layout.unpack(packed)[ids == m])


def test_pack_takes_padded_parts() -> None:
    layout = vk.ModalityLayout.from_lengths({"text": [2, 0, 1], "image": [1, 2, 0]})
    text, image = torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    flat = {"text": torch.cat([text[0, :2], text[2, :1]]), "image": torch.cat([image[0, :1], image[1, :2]])}
    assert torch.equal(layout.pack({"image": image, "text": text}), layout.pack(flat))


def test_split_is_a_view() -> None:
    layout = CASES["mixed_kinds"].layout()
    x = torch.randn(layout.tokens, 4)
    parts = layout.split(x)
    assert torch.equal(torch.cat(list(parts.values())), x)
    assert parts["text"].data_ptr() == x.data_ptr()
    assert parts["image"].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("static", [False, True])
def test_moving_rows_has_gradients(static: bool) -> None:
    case = CASES["mixed_kinds"]
    layout = case.layout(static)
    x = torch.randn(*case.ids().shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pack_padded, (x,), fast_mode=True)
    packed = layout.pack_padded(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(layout.unpack, (packed,), fast_mode=True)
    (grad,) = torch.autograd.grad(layout.unpack(packed).sum(), packed)
    live = int(layout.group_offsets[-1])
    assert torch.equal(grad[live:], torch.zeros_like(grad[live:])) and bool((grad[:live] == 1).all())


# ---------------------------------------------------------------------------- experts


def test_neighbours_with_one_expert_are_one_range() -> None:
    layout = CASES["mixed_kinds"].layout()
    assert layout.groups == ("text.alone", "text.mixed", "image.mixed", "image.alone")
    one = layout.route({"text": 0, "image": 0}, 1)
    assert one.segments == ((0, 4, 0),) and one.ranges() == [(0, layout.tokens, 0)]
    assert layout.route(None, 1).segments == one.segments
    assert layout.route(None, 2).segments == ((0, 2, 0), (2, 4, 1))
    top = layout.route({"text.alone": 0, "text.mixed": 2, "image.mixed": 2, "image.alone": 1}, 3)
    assert top.segments == ((0, 1, 0), (1, 3, 2), (3, 4, 1))
    assert top.ranges() == [(0, 8, 0), (8, 37, 2), (37, 48, 1)] and top.live_rows() == 48


@settings(max_examples=40, deadline=None)
@given(batches(), st.data())
def test_ranges_cover_every_row_once(batch, data) -> None:
    names, runs = batch
    layout = vk.ModalityLayout.from_runs(runs, modalities=names)
    experts = {m: data.draw(st.integers(0, 2)) for m in names}
    experts |= {g: data.draw(st.integers(0, 2)) for g in layout.groups if data.draw(st.booleans())}
    ranges = layout.route(experts, 3).ranges()
    at = 0
    for start, end, _ in ranges:
        assert start == at < end
        at = end
    assert at == layout.tokens
    assert all(a[2] != b[2] or a[1] != b[0] for a, b in zip(ranges, ranges[1:])) or not all(
        layout.group_offsets.diff() > 0
    ), "neighbours with one expert are merged"


# ---------------------------------------------------------------------------- life of a plan


def test_copy_takes_over_another_plan() -> None:
    ids = CASES["mixed_kinds"].ids()
    target = vk.ModalityLayout.from_modality_ids(ids, modalities=MODALITIES)
    pointers = [getattr(target, name).data_ptr() for name in TABLES]
    other = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5, ids, -1)
    other[:, -1] = 1  # keeps the padded length
    exact = vk.ModalityLayout._from_host_ids(other, MODALITIES, "cpu")
    for source in (vk.ModalityLayout.from_modality_ids(other, modalities=MODALITIES), exact):
        assert target.copy_(source) is target
        assert [getattr(target, name).data_ptr() for name in TABLES] == pointers, "in place"
        x = torch.randn(*ids.shape, 3)
        assert torch.equal(target.unpack(target.pack_padded(x)), torch.where((other >= 0)[..., None], x, 0.0))


def test_exact_cuts_the_dead_rows_off() -> None:
    ids = torch.full((2, 6), -1)
    ids[0, [0, 1, 4]], ids[1, 1:4] = torch.tensor([0, 0, 1]), 1
    static = vk.ModalityLayout.from_modality_ids(ids, modalities=("text", "image"))
    exact = static.exact()
    assert exact.tokens == 6 < static.tokens == 12 and exact.host_offsets.tolist() == [0, 0, 2, 3, 6]
    for name in TABLES:
        assert torch.equal(getattr(exact, name), getattr(static, name)[: len(getattr(exact, name))])
    assert exact.exact() is exact and (exact.row_of_token >= 0).sum() == 6


def test_to_moves_the_tables_alone() -> None:
    layout = CASES["pair"].layout()
    meta = layout.to("meta")
    assert all(getattr(meta, name).device.type == "meta" for name in TABLES)
    assert meta.host_offsets.device.type == "cpu" and meta.device.type == "meta"
    assert_same(layout.to("cpu"), layout)
    assert meta.split(torch.empty(layout.tokens, 2, device="meta"))["text"].shape == (40, 2)


def test_to_waits_for_the_copies_unless_told_not_to(monkeypatch) -> None:
    layout, asked, to = CASES["pair"].layout(), [], torch.Tensor.to

    def spy(t, device, non_blocking=False):
        asked.append(non_blocking)
        return to(t, device, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    for non_blocking in (False, True):
        asked.clear()
        assert_same(layout.to("cpu", non_blocking=non_blocking), layout)
        assert asked == [non_blocking] * len(TABLES)


def test_repr_is_readable() -> None:
    case = CASES["mixed_kinds"]
    assert repr(case.layout()) == (
        "ModalityLayout(5 samples of up to 16 tokens, cpu, 48 of 48 rows: "
        "text.alone 8, text.mixed 7, image.mixed 22, image.alone 11)"
    )
    assert "48 of 80 rows" in repr(case.layout(static=True))
    assert repr(Case("", "", ()).layout()).endswith("0 of 0 rows: empty)")
    assert repr(case.layout(static=True).to("meta")).endswith("meta, capacity 80 rows)")


def test_plan_with_host_lengths_does_not_read_the_device() -> None:
    route = CASES["pair"].layout().to("meta").route({"text": 0, "image": 1}, 2)
    assert route.ranges() == [(0, 40, 0), (40, 237, 1)]


def test_a_modality_without_tokens_need_not_be_packed() -> None:
    layout = vk.ModalityLayout.from_lengths({"text": [2, 1], "image": 0})
    text = torch.randn(3, 4)
    assert torch.equal(layout.pack({"text": text}), layout.pack({"text": text, "image": torch.empty(0, 4)}))
    for parts in ({"image": torch.empty(0, 4)}, {}, {"text": text, "audio": text}):
        with pytest.raises(ValueError, match=r"`parts` must have \('text', 'image'\), each that has tokens, got"):
            layout.pack(parts)


def test_a_mask_that_is_added_to_scores_is_refused() -> None:
    """Its zeros are the real tokens: read as a bool it would be turned round."""
    mask = torch.tensor([[0.0, 0.0, -1e4]])
    with pytest.raises(ValueError, match="`mask` must be bool or 0/1, true for real tokens, got torch.float32"):
        vk.ModalityLayout.from_split(1, 3, 1, mask)
    assert vk.ModalityLayout.from_split(1, 3, 1, mask == 0).exact().tokens == 2
