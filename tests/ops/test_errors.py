"""Bad input: the kind of exception, and a text that names the argument, what must hold and what was given."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vlmo_kernels as vk

L = vk.ModalityLayout.from_lengths({"text": [2, 1], "image": 3})  # 9 rows, positions 0 to 4
LAYOUT = vk.ModalityLayout
TEXT = LAYOUT.from_lengths({"text": [2, 1]})


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


LAYOUT_ERRORS = {
    "a name no string": (lambda: LAYOUT.from_lengths({0: [1]}), TypeError, r"names must be strings, got \(0,\)"),
    "parts no mapping": (
        lambda: L.pack(t(2, 5, 4)), TypeError, "`parts` must map modalities to tensors, got Tensor. Hint: pack_padded"),
    "parts of two widths": (
        lambda: L.pack({"text": t(3, 4), "image": t(6, 5)}), ValueError, r"rows of one shape, got \{'text': \(4,\)"),
    "lengths without values": (
        lambda: LAYOUT.from_lengths({"text": t(2, device="meta").long()}), ValueError,
        "lengths of 'text' must have values, got a tensor on meta. Hint"),
    "device unknown": (
        lambda: LAYOUT.from_lengths({"text": 1}, device="gpu"), ValueError, "one that torch knows, got 'gpu'. Hint"),
    "device no name": (lambda: L.to(1.5), TypeError, "`device` must be a torch.device or its name, got 1.5"),
    "device not here": (lambda: L.to("cuda:99"), RuntimeError, "this torch can use here, got 'cuda:99'. Hint"),
    "device of runs not here": (
        lambda: LAYOUT.from_runs([[("text", 1)]], device="cuda:99"), RuntimeError, "got 'cuda:99'"),
    "device of a split not here": (
        lambda: LAYOUT.from_split(2, 5, 1, device="cuda:99"), RuntimeError, "got 'cuda:99'"),
    "ids no tensor": (
        lambda: LAYOUT.from_modality_ids([[0]], modalities=["a"]), TypeError, "`ids` must be a tensor, got list"),
    "mask no tensor": (
        lambda: LAYOUT.from_modality_ids(ids([0]), [[1]], modalities=["a"]), TypeError,
        "`mask` must be a tensor, got list"),
    "no modality": (lambda: LAYOUT.from_lengths({}), ValueError, "`lengths` must name at least one modality"),
    "negative length": (
        lambda: LAYOUT.from_lengths({"text": [2, -1]}), ValueError, "lengths of 'text' must not be negative, got -1"),
    "unequal samples": (
        lambda: LAYOUT.from_lengths({"text": [1], "image": [1, 2]}), ValueError,
        r"one length per sample, got \{'text': 1, 'image': 2\}"),
    "length no integer": (
        lambda: LAYOUT.from_lengths({"text": [1.5]}), TypeError, "lengths of 'text' must be integers, got 1.5"),
    "length a bool": (lambda: LAYOUT.from_lengths({"text": True}), TypeError, "must be integers, got True"),
    "run no integer": (
        lambda: LAYOUT.from_runs([[("text", "3")]]), TypeError, "lengths of 'text' must be integers, got '3'"),
    "negative run": (lambda: LAYOUT.from_runs([[("text", -3)]]), ValueError, "must not be negative, got -3"),
    "unknown run": (
        lambda: LAYOUT.from_runs([[], [("audio", 1)]], modalities=["text"]), ValueError,
        r"runs must use \('text',\), got 'audio' in sample 1"),
    "no names": (lambda: LAYOUT.from_runs([]), ValueError, r"`modalities` must be distinct and not empty, got \(\)"),
    "equal names": (
        lambda: LAYOUT.from_modality_ids(ids([0]), modalities=["a", "a"]), ValueError, "must be distinct"),
    "name with a dot": (
        lambda: LAYOUT.from_lengths({"text.mixed": 1}), ValueError, "must not contain a dot, got .*text.mixed"),
    "names a string": (
        lambda: LAYOUT.from_modality_ids(ids([0]), modalities="text"), TypeError, "sequence of names, .*'text'"),
    "starts collide": (
        lambda: LAYOUT.from_lengths({"text": [2, 5], "image": 2}, starts={"text": 0, "image": 3}), ValueError,
        "make positions collide in sample 1"),
    "negative start": (
        lambda: LAYOUT.from_lengths({"text": 2}, starts={"text": -1}), ValueError, "`starts` must not be negative"),
    "unknown start": (
        lambda: LAYOUT.from_lengths({"text": 2}, starts={"txt": 1}), ValueError, r"`starts` must use .*\['txt'\]"),
    "ids of floats": (
        lambda: LAYOUT.from_modality_ids(t(2, 3), modalities=["a"]), ValueError,
        r"`ids` must be integer \[B, N\], got torch.float32 \[2, 3\]"),
    "ids of one dimension": (
        lambda: LAYOUT.from_modality_ids(torch.zeros(3).long(), modalities=["a"]), ValueError, r"got .* \[3\]"),
    "ids beyond int32": (
        lambda: LAYOUT.from_modality_ids(torch.zeros(2, 2**30, dtype=torch.int8, device="meta"), modalities=["a"]),
        ValueError, r"fewer than 2\*\*31 - 1 entries, got \[2, 1073741824\]"),
    "ids out of range": (
        lambda: LAYOUT.from_modality_ids(ids([0, 2]), modalities=["a", "b"]), ValueError,
        "ids must be below 2 .*'a', 'b'.*got 2"),
    "mask of another shape": (
        lambda: LAYOUT.from_modality_ids(ids([0, 0]), t(1, 3), modalities=["a"]), ValueError,
        r"`mask` must match `ids` \[1, 2\] on cpu, got \[1, 3\]"),
    "mask on another device": (
        lambda: LAYOUT.from_modality_ids(ids([0, 0]), t(1, 2, device="meta"), modalities=["a"]), ValueError,
        "on cpu, got .* on meta"),
    "split too long": (
        lambda: LAYOUT.from_split(2, 5, 6), ValueError, "`split` must be -1 or 0 to 5, got 6"),
    "split negative": (lambda: LAYOUT.from_split(2, 5, -2), ValueError, "`split` must be -1 or 0 to 5, got -2"),
    "copy into host lengths": (lambda: L.copy_(L), ValueError, "must be known on the device only.*Hint"),
    "copy of another shape": (
        lambda: LAYOUT.from_split(2, 5, 1).copy_(LAYOUT.from_split(2, 6, 1)), ValueError,
        "equal modalities, batch and length"),
    "unpack of other rows": (lambda: L.unpack(t(8, 2)), ValueError, r"`x` must have 9 rows, got \[8, 2\]"),
    "pack_padded of another batch": (
        lambda: L.pack_padded(t(3, 5, 2)), ValueError, r"`x` must start with \[2, 5\], got \[3, 5, 2\]"),
    "pack without a modality": (
        lambda: L.pack({"text": t(3, 2)}), ValueError,
        r"must have \('text', 'image'\), each that has tokens, got \('text',\)"),
    "pack of too few rows": (
        lambda: L.pack({"text": t(2, 4), "image": t(6, 4)}), ValueError, "`text` must have 3 rows, got 2"),
    "pack of too short a part": (
        lambda: L.pack({"text": t(2, 1, 4), "image": t(2, 3, 4)}), ValueError,
        r"`text` must be \[2, at least 2, ...\], got \[2, 1, 4\]"),
    "split without lengths": (
        lambda: LAYOUT.from_split(2, 5, 1, device="meta").split(t(10, 2)), NotImplementedError,
        "lengths must be known on the host.*Hint: use from_lengths"),
}  # fmt: skip

W, W2, N = [t(6, 4), t(6, 4)], [t(4, 6), t(4, 6)], [t(4), t(4)]


def linear(x=None, w=W, b=None, layout=L, *rest, **options):
    return vk.routed_linear(t(9, 4) if x is None else x, w, b, layout, *rest, **options)


def ffn(w1=W, w2=W2, **options):
    return vk.routed_ffn(t(9, 4), w1, None, w2, None, L, **options)


def attention(q=None, k=None, v=None, **options):
    return vk.shared_attention(t(9, 2, 4) if q is None else q, k, v, L, **options)


def params(heads: int = 2, **changed) -> vk.MoMEBlockParams:
    pair = ([t(4)], [t(4)])
    qkv, proj = ([t(12, 4)], [None]), ([t(4, 4)], [None])
    good = vk.MoMEBlockParams(heads, pair, qkv, proj, pair, [t(6, 4)], [None], [t(4, 6)], [None])
    return dataclasses.replace(good, **changed)


def block(x=None, heads: int = 2, **changed):
    return vk.mome_block(t(9, 4) if x is None else x, params(heads, **changed), L)


KV = {"k": t(9, 2, 4), "v": t(9, 2, 4)}
OP_ERRORS = {
    "x no tensor": (lambda: linear(3), TypeError, "routed_linear: `x` must be a tensor, got int"),
    "x of integers": (lambda: linear(t(9, 4).int()), TypeError, "`x` must be floating point, got torch.int32"),
    "x of other rows": (lambda: linear(t(8, 4)), ValueError, r"`x` must be \[9, ...\] with 2 dim.*got \[8, 4\]"),
    "x of three dimensions": (lambda: linear(t(9, 4, 1)), ValueError, r"with 2 dimensions, got \[9, 4, 1\]"),
    "x on another device": (
        lambda: linear(t(9, 4, device="meta")), ValueError, "on the layout's device cpu, got meta. Hint: layout.to"),
    "no layout": (lambda: linear(layout=None), TypeError, "`layout` must be a ModalityLayout, got NoneType"),
    "weights no list": (lambda: linear(w=t(6, 4)), TypeError, "`weights` must be a list .* got Tensor"),
    "no weights": (lambda: linear(w=[]), ValueError, r"`weights` must have at least one expert, got \[\]"),
    "weight None": (lambda: linear(w=[t(6, 4), None]), TypeError, r"`weights\[1\]` must be a tensor, got NoneType"),
    "weight of another shape": (
        lambda: linear(w=[t(6, 4), t(6, 5)]), ValueError, r"`weights\[1\]` must be \[6, 4\], got \[6, 5\]"),
    "weight of another dtype": (
        lambda: linear(w=[t(6, 4), t(6, 4, dtype=torch.bfloat16)]), ValueError,
        r"`weights\[1\]` must have the dtype of `x`, torch.float32, got torch.bfloat16. Hint"),
    "weight on another device": (
        lambda: linear(w=[t(6, 4), t(6, 4, device="meta")]), ValueError, r"`weights\[1\]` must be on cpu, got meta"),
    "biases too few": (lambda: linear(b=[t(6)]), ValueError, "`biases` must have 2 entries, .* got 1"),
    "bias of another shape": (lambda: linear(b=[t(6), t(5)]), ValueError, r"`biases\[1\]` must be \[6\], got \[5\]"),
    "gamma of another shape": (
        lambda: linear(gamma=[None, t(4)]), ValueError, r"`gamma\[1\]` must be \[6\], got \[4\]"),
    "residual of another shape": (
        lambda: linear(residual=t(9, 4)), ValueError, r"`residual` must be \[9, 6\], got \[9, 4\]"),
    "residual of integers": (
        lambda: linear(residual=t(9, 6).int()), TypeError, "`residual` must be floating point, got torch.int32"),
    "row scale of another shape": (
        lambda: linear(row_scale=t(9, 1)), ValueError, r"`row_scale` must be \[9\], got \[9, 1\]"),
    "row scale of booleans": (
        lambda: linear(row_scale=t(9).bool()), TypeError, "`row_scale` must be floating point, got torch.bool"),
    "row scale trained": (
        lambda: linear(row_scale=t(9).requires_grad_()), NotImplementedError, "`row_scale` has no gradient"),
    "experts miss a modality": (
        lambda: linear(None, W, None, L, {"text": 0}), ValueError,
        r"routed_linear: `experts` must .*\('text', 'image'\) .*got \{'text': 0\}, none for 'image.mixed', .*Hint"),
    "experts too few": (lambda: linear(w=W[:1], experts={"text": 0, "image": 1}), ValueError,
        r"routed_linear: `experts` must map 'image.mixed' to 0..0, got 1"),
    "experts negative": (lambda: linear(experts={"text": 0, "image": -1}), ValueError, r"'image.*' to 0..1, got -1"),
    "experts no mapping": (
        lambda: linear(experts=[0, 1]), TypeError, r"`experts` must map modalities to integers, got \[0, 1\]. Hint"),
    "experts by name": (
        lambda: linear(experts={"text": "a", "image": 1}), TypeError, "`experts` must map modalities to integers, got"),
    "an expert that nobody has": (
        lambda: linear(w=[t(6, 4)] * 3), ValueError,
        r"routed_linear: without `experts` there must be .*\('text', 'image'\), got 3. Hint"),
    "a norm that nobody has": (
        lambda: vk.routed_norm(t(9, 4), [t(4)] * 3, None, L), ValueError, "routed_norm: without `experts` .* got 3"),
    "a network that nobody has": (
        lambda: ffn(w1=[t(6, 4)] * 3, w2=[t(4, 6)] * 3), ValueError, "routed_ffn: without `experts` .* got 3"),
    "two experts for one modality": (
        lambda: linear(t(3, 4), layout=TEXT), ValueError, r"modalities \('text',\), got 2. Hint: .*lengths of 0"),
    "an encoder of other modalities": (
        lambda: vk.MoMEEncoder(1, 4, 2, vl_start=0)(t(3, 4), TEXT), ValueError,
        r"layout's modalities \('text',\) .*got \{'text': 0, 'image': 1, .*unknown: 'image', .*Hint: .*lengths of 0"),
    "experts unknown": (
        lambda: linear(experts={"text": 0, "image": 1, "audio": 0}), ValueError, "no others, got .*, unknown: 'audio'"),
    "norm of another kind": (
        lambda: vk.routed_norm(t(9, 4), N, None, L, kind="batch"), ValueError, "must be one of layer, .*'batch'"),
    "norm weight of another shape": (
        lambda: vk.routed_norm(t(9, 4), [t(5), t(4)], None, L), ValueError, r"`weights\[0\]` must be \[4\], got \[5\]"),
    "norm without experts": (lambda: vk.routed_norm(t(9, 4), [], None, L), ValueError, "at least one expert"),
    "another activation": (
        lambda: ffn(activation="tanh"), ValueError, "`activation` must be one of gelu, .*, got 'tanh'"),
    "another recompute": (lambda: ffn(recompute="all"), ValueError, "one of activation, full, got 'all'"),
    "w1 a vector": (lambda: ffn(w1=[t(6), t(6)]), ValueError, r"`w1\[0\]` must be a matrix, got \[6\]"),
    "w2 of another width": (
        lambda: ffn(w2=[t(4, 5)] * 2), ValueError, r"`w2\[0\]` must be \[4, 6\], got \[4, 5\]"),
    "w2 too few": (lambda: ffn(w2=[t(4, 6)]), ValueError, "`w2` must have 2 entries"),
    "up without gate": (lambda: ffn(w_up=W), ValueError, "`w_up` must be None with activation='gelu'"),
    "up bias without gate": (lambda: ffn(b_up=[t(6)] * 2), ValueError, "`b_up` must be None with activation='gelu'"),
    "up bias without up": (
        lambda: ffn(activation="swiglu", b_up=[t(3)] * 2), ValueError, "`b_up` needs `w_up`"),
    "up of one expert alone": (
        lambda: ffn(activation="swiglu", w_up=[t(6, 4), None]), ValueError, r"`w_up\[1\]` must be a matrix, got None"),
    "stacked gate odd": (
        lambda: ffn(w1=[t(5, 4)] * 2, activation="swiglu"), ValueError, r"stacked, \[12, 4\], .*`w1\[0\]` \[5, 4\]"),
    "gate without up": (
        lambda: ffn(activation="geglu"), ValueError,
        r"activation='geglu' is gated: `w_up` must have one \[6, 4\] per expert.* got `w_up` None and .* \[6, 4\]"),
    "stacked gate with half a bias": (
        lambda: vk.routed_ffn(t(9, 4), [t(12, 4)] * 2, [t(6)] * 2, W2, None, L, activation="swiglu"), ValueError,
        r"`b1\[0\]` must be \[12\], got \[6\]"),
    "w2 of no tensors": (lambda: ffn(w2=None), ValueError, r"`w2\[0\]` must be a matrix, got NoneType"),
    "eps no number": (lambda: ffn(eps="a"), TypeError, "routed_ffn: `eps` must be a number, got str. Hint"),
    "eps a tensor": (lambda: ffn(eps=t(1)), TypeError, "`eps` must be a number, got Tensor"),
    "eps negative": (lambda: ffn(eps=-1e-5), ValueError, "routed_ffn: `eps` must be zero or more, got -1e-05"),
    "norm eps no number": (
        lambda: vk.routed_norm(t(9, 4), N, None, L, eps=None), TypeError, "`eps` must be a number, got NoneType"),
    "scale no number": (lambda: attention(scale="x", **KV), TypeError, "shared_attention: `scale` .* number, got str"),
    "causal no bool": (lambda: attention(causal="x", **KV), TypeError, "`causal` must be True or False, got 'x'"),
    "another implementation": (lambda: linear(impl="cuda"), ValueError, "`impl` must be one of auto, .*, got 'cuda'"),
    "implementation no name": (lambda: linear(impl=[]), ValueError, r"`impl` must be one of auto, .*, got \[\]"),
    "inner norm bias alone": (
        lambda: ffn(inner_norm=([t(6), None], [t(6), t(6)])), ValueError, r"`inner_norm\[1\]\[1\]` needs a weight"),
    "k without v": (lambda: attention(k=t(9, 2, 4)), ValueError, "`k` and `v` must both be given"),
    "packed of two": (lambda: attention(t(9, 2, 2, 4)), ValueError, r"must be \[T, 3, H, Dh\] .*got \[9, 2, 2, 4\]"),
    "packed without heads": (lambda: attention(t(9, 3, 0, 4)), ValueError, r"a head or more, got \[9, 3, 0, 4\]"),
    "k of another dtype": (
        lambda: attention(k=t(9, 2, 4, dtype=torch.float64), v=t(9, 2, 4)), ValueError,
        "`k` must have the dtype of `q`, torch.float32, got torch.float64"),
    "key heads that do not divide": (
        lambda: attention(t(9, 3, 4), **KV), ValueError, r"with Hk dividing 3, got \[9, 2, 4\]"),
    "bias too small": (
        lambda: attention(bias=t(2, 4, 4), **KV), ValueError, r"`bias` must be \[2, N, N\] with N at least 5"),
    "bias of other heads": (lambda: attention(bias=t(3, 5, 5), **KV), ValueError, r"got \[3, 5, 5\]"),
    "bias on another device": (
        lambda: attention(bias=t(2, 5, 5, device="meta"), **KV), ValueError, "`bias` must be on cpu, got meta"),
    "bias index not square": (
        lambda: attention(bias=vk.RelativePositionBias(t(7, 2), t(5, 4).long()), **KV), ValueError,
        r"`index` \[N, N\], got \[7, 2\] and \[5, 4\]"),
    "bias no tensor": (
        lambda: attention(bias=3.0, **KV), TypeError, "a tensor or a RelativePositionBias, got float"),
    "bias index above the table": (
        lambda: attention(bias=vk.RelativePositionBias(t(7, 2), t(5, 5).long() + 9), **KV), ValueError,
        "RelativePositionBias: `index` must name rows of `table`, 0 to 6, got 9 to 9"),
    "bias index negative": (  # torch would count from the end
        lambda: attention(bias=vk.RelativePositionBias(t(7, 2), t(5, 5).long() - 1), **KV), ValueError, "got -1 to -1"),
    "bias index of floats": (
        lambda: attention(bias=vk.RelativePositionBias(t(7, 2), t(5, 5)), **KV), ValueError,
        "`index` must be int32 or int64, got torch.float32"),
    "bias index elsewhere": (
        lambda: attention(bias=vk.RelativePositionBias(t(7, 2), t(5, 5, device="meta").long()), **KV), ValueError,
        "`table` and `index` must be on one device, got cpu and meta"),
    "bias index no tensor": (
        lambda: attention(bias=vk.RelativePositionBias(t(7, 2), [[0]]), **KV), TypeError, "`index` must be a tensor"),
    "prefix without causal": (
        lambda: attention(prefix=t(2).int(), **KV), ValueError, "`prefix` needs causal=True, got causal=False"),
    "prefix of another shape": (
        lambda: attention(prefix=t(3).int(), causal=True, **KV), ValueError, r"`prefix` must be \[2\], got \[3\]"),
    "prefix of int64": (
        lambda: attention(prefix=t(2).long(), causal=True, **KV), ValueError,
        "`prefix` must be int32, got torch.int64"),
    "attention with a mask for a bias": (
        lambda: attention(bias=torch.ones(2, 9, 9, dtype=torch.bool), **KV), TypeError,
        "`bias` must be floating, it is added to the scores, got torch.bool"),
    "block of other rows": (lambda: block(t(8, 4)), ValueError, r"mome_block: `x` must be .* got \[8, 4\]"),
    "block gamma of experts that share a weight": (
        lambda: block(gamma1=[t(4), t(4)], experts={"text": 0, "image": 1}), ValueError,
        "routed_linear: `gamma` must have 1 entries, one per expert, got 2"),
    "block heads": (lambda: block(heads=3), ValueError, "mome_block: `heads` must divide the width 4 .* got 3"),
    "block heads no number": (lambda: block(heads="a"), ValueError, "`heads` must divide the width 4 .* got 'a'"),
    "block without params": (
        lambda: vk.mome_block(t(9, 4), None, L), TypeError, "`params` must be MoMEBlockParams, got NoneType"),
    "block weights no pair": (
        lambda: block(qkv=([t(12, 4)],)), TypeError, "`params.qkv` must be a pair, weights and biases, got tuple of 1"),
    "block weights no list": (
        lambda: block(norm1=(t(4), None)), TypeError, r"`params.norm1\[0\]` must be a list, .* got Tensor"),
    "block without gamma": (lambda: block(gamma1=None), TypeError, "`params.gamma1` must be a list, .* got NoneType"),
    "block with an empty list": (lambda: block(gamma2=[]), TypeError, "`params.gamma2` must be .* got an empty one"),
    "block with a gamma too many": (lambda: block(gamma1=[t(4)] * 2), ValueError, "`gamma` must have 1 entr.* got 2"),
    "block qkv of another shape": (
        lambda: block(qkv=([t(8, 4)], [None])), ValueError, r"`params.qkv\[0\]\[0\]` must be \[12, 4\], got \[8, 4\]"),
}  # fmt: skip

EXPLAIN_ERRORS = {
    "no op": (lambda: vk.explain(3), ValueError, "explain: `op` must be one of mome_block, .*, got 3"),
    "block without params": (
        lambda: vk.explain("mome_block", t(9, 4), None, L), TypeError,
        "mome_block: `params` must be MoMEBlockParams, got NoneType"),
    "block without x": (
        lambda: vk.explain("mome_block", None, params(), L), TypeError, "mome_block: `x` must be a tensor"),
    "block without layout": (
        lambda: vk.explain("mome_block", t(9, 4), params(), None), TypeError, "mome_block: `layout` must be"),
    "x alone": (
        lambda: vk.explain("routed_ffn", t(9, 4)), TypeError,
        "after 'routed_ffn' must come what routed_ffn takes, x, w1, .*; missing a required argument: 'w1'"),
    "block of x alone": (
        lambda: vk.explain("mome_block", t(9, 4)), TypeError, "what mome_block takes, x, params, .*: 'params'"),
    "an option of another op": (
        lambda: vk.explain("routed_linear", t(9, 4), W, None, L, eps=1), TypeError, "unexpected keyword arg.* 'eps'"),
    "weights missing": (
        lambda: vk.explain("routed_linear", t(9, 4), None, None, L), ValueError, "`weights` must have at least one"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLAIN_ERRORS)
def test_explain(name: str) -> None:
    call, kind, text = EXPLAIN_ERRORS[name]
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize("name", LAYOUT_ERRORS)
def test_layout(name: str) -> None:
    call, kind, text = LAYOUT_ERRORS[name]
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize("name", OP_ERRORS)
def test_ops(name: str) -> None:
    call, kind, text = OP_ERRORS[name]
    with pytest.raises(kind, match=text):
        call()


def test_a_good_call_passes() -> None:
    """The errors above come from what they name: without it the same calls run."""
    for call in (linear, ffn, attention_with_kv, block):
        assert call().shape[0] == 9


def attention_with_kv() -> torch.Tensor:
    return attention(bias=t(2, 5, 5), causal=True, prefix=t(2).int(), **KV)


def test_values_on_a_device_are_checked_on_request(monkeypatch) -> None:
    """Reading a device's values waits for it, so that is done on request alone; meta stands for a device."""
    from vlmo_kernels.runtime.check import checks_on_device

    device_ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    assert not checks_on_device(device_ids)
    assert LAYOUT.from_modality_ids(device_ids, modalities=["a"]).tokens == 2
    monkeypatch.setenv("VLMO_KERNELS_CHECK", "1")
    assert checks_on_device(device_ids)
