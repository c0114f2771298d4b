#!/usr/bin/env bash
# Build the wheel without a compiler, install it beside torch and nothing else, and use it outside the repository.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
python=${PYTHON:-.venv/bin/python}
[[ $python == /* ]] || python=$repo/$python
[[ -x $python ]] || { echo "check_wheel: $python must exist. Hint: make venv, or PYTHON=..." >&2; exit 1; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

echo "check_wheel: build"
mkdir "$tmp/src"
# A copy, so that a stale build/ cannot leak into the wheel.
tar -c --exclude=__pycache__ --exclude='*.so' pyproject.toml setup.py LICENSE README.md vlmo_kernels python csrc | tar -x -C "$tmp/src"
CC=/bin/false CXX=/bin/false "$python" -m pip wheel -qq --disable-pip-version-check \
  --no-build-isolation --no-deps --wheel-dir "$tmp/dist" "$tmp/src"
wheel=$(echo "$tmp"/dist/*.whl)

echo "check_wheel: install $(basename "$wheel") beside torch alone"
"$python" -m venv --without-pip "$tmp/venv"
"$python" -m pip --python "$tmp/venv/bin/python" install -qq --disable-pip-version-check --no-deps "$wheel"
# torch and what torch itself requires, as links: a forgotten dependency on anything else fails here.
"$python" - "$("$tmp/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" <<'PY'
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

site, todo, done = Path(sys.argv[1]), ["torch"], set()
while todo:
    name = todo.pop()
    if name in done:
        continue
    done.add(name)
    dist = distribution(name)
    for top in {file.parts[0] for file in dist.files if ".." not in file.parts}:
        source = Path(dist.locate_file(top))
        if source.exists() and not (site / top).exists() and top != "__pycache__":
            (site / top).symlink_to(source)
    for requirement in map(Requirement, dist.requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            todo.append(requirement.name)
PY

echo "check_wheel: use it"
cd "$tmp"
env -u PYTHONPATH "$tmp/venv/bin/python" -W ignore - "$repo" <<'PY'
import sys
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import torch

import vlmo
import vlmo_kernels

assert "triton" not in sys.modules, "import vlmo_kernels, vlmo must not import triton"
repo = Path(sys.argv[1])
for module in (vlmo_kernels, vlmo):
    assert repo not in Path(module.__file__).parents, f"{module.__name__} came from the repository: {module.__file__}"
data = files("vlmo_kernels.demo_data")
photos = [p for p in (data / "photos").iterdir() if p.name.endswith(".jpg")]
assert (data / "captions.json").is_file() and len(photos) == 8, "demo data is missing from the wheel"
assert any(f.name == "LICENSE" for f in distribution("vlmo_kernels").files), "LICENSE is missing from the wheel"

torch.manual_seed(0)
layout = vlmo_kernels.ModalityLayout.from_lengths({"text": [3, 1], "image": 4})
x, w, b = torch.randn(12, 8), torch.randn(6, 8), torch.randn(6)
# Both experts hold the same weights, so the result does not depend on the order of the rows.
y = vlmo_kernels.routed_linear(x, [w, w.clone()], [b, b.clone()], layout, experts={"text": 0, "image": 1})
torch.testing.assert_close(y, torch.nn.functional.linear(x, w, b))
assert "triton" not in sys.modules, "an op on the CPU must not import triton"
PY
echo "check_wheel: passed"
