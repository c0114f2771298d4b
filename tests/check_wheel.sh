#!/usr/bin/env bash
# Build the wheel without a compiler and, where there is one, with the compiled parts; install each beside torch and
# nothing else, and use it outside the repository.
#
# PYTHON=...       brings torch and builds the wheels; .venv/bin/python by default.
# OTHER_PYTHON=... of the same version with another torch, to use the wheel of the compiled parts with as well.
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
wheel() { # FOLDER: build a wheel into it
  "$python" -m pip wheel -qq --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir "$1" "$tmp/src"
}
CC=/bin/false CXX=/bin/false wheel "$tmp/plain"
wheels=("$tmp"/plain/*.whl)
compiler=${CXX:-g++}
if $compiler --version > /dev/null 2>&1; then
  VLMO_KERNELS_COMPILED=1 VLMO_KERNELS_CUDA=0 wheel "$tmp/compiled"
  wheels+=("$tmp"/compiled/*.whl)
else
  echo "check_wheel: no $compiler, so no wheel with compiled parts"
fi

echo "check_wheel: an environment with torch alone"
"$python" -m venv --without-pip "$tmp/venv"
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

cat > "$tmp/use.py" <<'PY'
import sys
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import torch

import vlmo
import vlmo_kernels

assert "triton" not in sys.modules, "import vlmo_kernels, vlmo must not import triton"
repo, expected = Path(sys.argv[1]), sys.argv[2] == "compiled"
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

# The compiled parts: all there and used, or none.
from vlmo_kernels.runtime import compiled  # noqa: E402

found = {part: compiled.why_not(part) is None for part in ("vlmo_kernels_cpu", "host_planner")}
assert set(found.values()) == {expected}, compiled.report()
if expected:
    ids = torch.randint(-1, 2, (20, 30))
    mask = ids >= 0
    from vlmo_kernels.plan import plan_in_torch

    for a, b in zip(torch.ops.vlmo_kernels_cpu.plan(ids, mask, 2), plan_in_torch(ids, mask, 2)):
        assert torch.equal(a, b)
print(f"check_wheel: fine, compiled parts: {expected}, torch {torch.__version__}")
PY
cd "$tmp"
for found in "${wheels[@]}"; do
  kind=$(basename "$(dirname "$found")")
  echo "check_wheel: install and use $(basename "$found")"
  "$python" -m pip --python "$tmp/venv/bin/python" install -qq --disable-pip-version-check --no-deps --force-reinstall "$found"
  env -u PYTHONPATH "$tmp/venv/bin/python" -W ignore use.py "$repo" "$kind"
  if [[ -n ${OTHER_PYTHON:-} && $kind == compiled ]]; then
    "$python" -m pip install -qq --disable-pip-version-check --no-deps --target "$tmp/other" "$found"
    PYTHONPATH=$tmp/other "$OTHER_PYTHON" -W ignore use.py "$repo" "$kind"
  fi
done
echo "check_wheel: passed"
