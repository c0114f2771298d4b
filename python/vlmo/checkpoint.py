"""Read published VLMo checkpoints, and our own, into a model."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import VLMo
from .position import num_extra_rows

WRAPPERS = ("state_dict", "module", "model")
# What DeepSpeed, Lightning wrappers and torch.compile put before a name. No parameter of VLMo starts so.
PREFIXES = ("module.", "model.", "_forward_module.", "_orig_mod.")
# Index buffers: they follow from the configuration.
IGNORED = (
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
    "text_embeddings.position_ids",
)
BIAS_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class CheckpointReport:
    """What `load_checkpoint` did, by parameter name.

    missing: parameters the checkpoint does not have; they keep their values. unexpected: keys the model does
    not have. converted: parameters whose values were adapted, with a word on how. ignored: index buffers.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    converted: tuple[str, ...]
    ignored: tuple[str, ...]


def load_checkpoint(
    model: VLMo, path_or_dict: str | os.PathLike[str] | Mapping[str, object], strict: bool = True
) -> CheckpointReport:
    """Copy a checkpoint into `model`, in the model's dtypes and on its devices.

    path_or_dict: a .safetensors file, a torch file (read with weights_only=True), or a loaded dict. It may
    wrap the parameters under "state_dict", "module" or "model", and prefix their names as DeepSpeed,
    Lightning or torch.compile do. Another image size, a longer text length and a missing third token type are
    converted as published; the checkpoint is not modified.

    Raises ValueError, before anything is copied, if a shape does not fit, and with strict=True if a parameter
    is missing or a key is foreign.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "load_checkpoint: the model must hold memory, its parameters are on the meta device. "
            "Hint: model.to_empty(device=...), then model.init_weights()."
        )
    state = read_state(path_or_dict)
    ignored = tuple(sorted(key for key in state if key in IGNORED))
    state = {key: value for key, value in state.items() if key not in IGNORED}
    converted = _convert(state, model)

    expected = model.state_dict()
    missing = tuple(key for key in expected if key not in state)
    unexpected = tuple(key for key in state if key not in expected)
    misfits = [
        f"{key}: {list(expected[key].shape)} wanted, {list(state[key].shape)} given"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if misfits:
        raise ValueError(
            f"load_checkpoint: shapes must be the model's; {_some(misfits)}. "
            "Hint: build the model with the checkpoint's size, vocab_size and text_only_len."
        )
    if strict and (missing or unexpected):
        raise ValueError(
            "load_checkpoint: names must be the model's; "
            f"missing in the checkpoint: {_some(missing)}; foreign to the model: {_some(unexpected)}. "
            "Hint: choose config.heads and vlffn_start as the checkpoint has them, or pass strict=False."
        )
    # A model that came from meta by `to_empty` has garbage there, and no checkpoint to take it from.
    model.reset_position_indices()
    model.load_state_dict({key: state[key] for key in state if key in expected}, strict=False)
    return CheckpointReport(missing, unexpected, tuple(converted), ignored)


def _some(names: tuple[str, ...] | list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_state(path_or_dict: str | os.PathLike[str] | Mapping[str, object]) -> dict[str, Tensor]:
    """Load a checkpoint, unwrap it and strip prefixes: a fresh dict of tensors. See `load_checkpoint`."""
    if isinstance(path_or_dict, (str, os.PathLike)):
        content = _read_file(os.fspath(path_or_dict))
    else:
        content = path_or_dict
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise TypeError(
            f"load_checkpoint: the checkpoint must be a path or a dict, got {type(content).__name__}."
        )
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"load_checkpoint: values must be tensors, {key!r} is {type(value).__name__}. "
                f"Hint: pass the dict of parameters itself, or wrap it under one of {WRAPPERS}."
            )
        name = _strip(key)
        if name in state:
            raise ValueError(
                f"load_checkpoint: names must be unique without their prefixes, {name!r} occurs twice. "
                "Hint: pass the dict of one model."
            )
        state[name] = value
    return state


def _read_file(path: str) -> object:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"load_checkpoint: the file must exist, got {path!r}.")
    if path.endswith(".safetensors"):
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise RuntimeError(
                "load_checkpoint: reading .safetensors needs the package safetensors. "
                "Hint: pip install safetensors."
            ) from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(_broken(path, error)) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:  # a zip archive without its end
        raise ValueError(_broken(path, error)) from error
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|global:|class|function) `?([\w]+\.[\w.]+)", str(error))
        if refused is None:  # nothing that could be wanted: no checkpoint, or a part of one
            reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
            raise ValueError(_broken(path, reason)) from error
        raise ValueError(
            "load_checkpoint: a torch file must hold tensors and plain containers only, "
            f"{path!r} does not: it wants {refused[1]}. "
            "Nothing of it was executed. Hint: if you trust whoever made it, convert it once in a process of its "
            f"own: torch.save(torch.load({path!r}, map_location='cpu', weights_only=False)['state_dict'], 'new.pt')."
        ) from error


def _broken(path: str, reason: object) -> str:
    first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    return (
        f"load_checkpoint: a whole torch or safetensors file must be there, {path!r} cannot be read: {first}. "
        "Hint: it may have been cut off; copy or download it again."
    )


def _strip(key: str) -> str:
    while True:
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            return key
        key = key[len(prefix) :]


def _convert(state: dict[str, Tensor], model: VLMo) -> list[str]:
    """Adapt values of `state` to the model's configuration, replacing entries of the dict."""
    config = model.config
    converted = []

    key = "text_embeddings.position_embeddings.weight"
    if key in state and state[key].shape[0] > config.max_text_len:
        converted.append(f"{key} (first {config.max_text_len} of {state[key].shape[0]} positions)")
        state[key] = state[key][: config.max_text_len]

    key = "token_type_embeddings.weight"
    if key in state and state[key].shape[0] == 2 and config.num_token_types == 3:
        # NLVR2: the second image starts as the first.
        converted.append(f"{key} (second image type copied from the first)")
        state[key] = state[key][[0, 1, 1]]

    key = "transformer.pos_embed"
    if key in state and model.transformer.pos_embed is not None:
        source = _side(key, state[key].shape[1] - 1)
        if source != config.window:
            converted.append(f"{key} (interpolated from {source} to {config.window} patches a side)")
            state[key] = _resize_positions(state[key], source, config.window)

    if BIAS_TABLE in state and model.relative_position_bias_table is not None:
        extra = num_extra_rows(config.text_only_len)
        source, target = _side(BIAS_TABLE, state[BIAS_TABLE].shape[0] - extra), 2 * config.window - 1
        if source % 2 == 0:
            raise ValueError(
                f"load_checkpoint: {BIAS_TABLE} must have (2w-1)^2 + {extra} rows for a whole w, it has "
                f"{state[BIAS_TABLE].shape[0]}. Hint: config.text_only_len must be the checkpoint's."
            )
        if source != target:
            converted.append(f"{BIAS_TABLE} (interpolated from {source} to {target} differences a side)")
            state[BIAS_TABLE] = _resize_bias_table(state[BIAS_TABLE], extra, source, target)
    return converted


def _side(key: str, count: int) -> int:
    side = round(max(count, 0) ** 0.5)
    if count < 1 or side * side != count:
        raise ValueError(
            f"load_checkpoint: {key} must have a square number of image rows, it has {count}. "
            "Hint: only square images are supported, and config.text_only_len must be the checkpoint's."
        )
    return side


def _resize_positions(positions: Tensor, source: int, target: int) -> Tensor:
    """[1, source^2 + 1, dim] to [1, target^2 + 1, dim], bicubic; the [CLS] position is kept."""
    grid = positions[:, 1:].double().unflatten(1, (source, source)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def _resize_bias_table(table: Tensor, extra: int, source: int, target: int) -> Tensor:
    """Bicubic spline over the image differences, as published; the `extra` last rows are kept.

    The source rows lie on a geometric grid reaching as far as the target: fine near 0, where the bias varies
    most, and coarse far out.
    """
    steps, reach = source // 2, target // 2
    low, high = 1.01, 1.5
    # Bisection to the published width, so that the grid is the published one.
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    distances = list(accumulate(ratio**step for step in range(steps)))
    knots = torch.tensor([-d for d in reversed(distances)] + [0.0] + distances, dtype=torch.float64)
    points = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = _cubic_spline_weights(knots, points).to(table.device)
    image = table[:-extra].double().unflatten(0, (source, source))
    image = torch.einsum("yi,xj,ijc->yxc", weights, weights, image).flatten(0, 1)
    return torch.cat([image.to(table.dtype), table[-extra:]])


def _cubic_spline_weights(knots: Tensor, points: Tensor) -> Tensor:
    """Matrix [points, knots] that evaluates the not-a-knot cubic spline through values at `knots`.

    Points beyond the knots take the value of the nearest end. Both arguments fp64.
    """
    count = len(knots)
    if count < 4:
        raise NotImplementedError(
            "load_checkpoint: to be interpolated, a bias table must be of at least 3 patches a side, "
            f"it has {(count + 1) // 2}. Hint: use the checkpoint's image_size."
        )
    h = knots.diff()
    # Second derivatives M at the knots solve A M = B y: continuous slopes inside, and a continuous third
    # derivative at the second and the last but one knot.
    a, b = torch.zeros(2, count, count, dtype=torch.float64)
    for i in range(1, count - 1):
        a[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]]) / 6
        b[i, i - 1 : i + 2] = torch.stack([1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]])
    a[0, :3] = torch.stack([-1 / h[0], 1 / h[0] + 1 / h[1], -1 / h[1]])
    a[-1, -3:] = torch.stack([-1 / h[-2], 1 / h[-2] + 1 / h[-1], -1 / h[-1]])
    curvature = torch.linalg.solve(a, b)
    points = points.clamp(knots[0], knots[-1])
    left = torch.searchsorted(knots, points, right=True).sub(1).clamp(0, count - 2)
    width = h[left]
    t = (points - knots[left]) / width
    s = 1 - t
    unit = torch.eye(count, dtype=torch.float64)
    linear = s[:, None] * unit[left] + t[:, None] * unit[left + 1]
    bend = (s**3 - s)[:, None] * curvature[left] + (t**3 - t)[:, None] * curvature[left + 1]
    return linear + bend * (width**2 / 6)[:, None]
