"""How far ahead the main loops of compiled code load, read off its PTX."""

from __future__ import annotations

import re

LABEL = re.compile(r"^(\$L__BB\w+):")
BRANCH = re.compile(r"^\s*(@\S+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+);")  # a spin on a barrier has labels of its own
COPY = re.compile(r"\bcp\.async\.c[ag]\.")
COMMIT = re.compile(r"\bcp\.async\.commit_group\b")
WAIT = re.compile(r"\bcp\.async\.wait_group\s+(\d+)")
BULK_COPY = re.compile(r"\bcp\.async\.bulk\.tensor\.\d+d\.shared")
BARRIER_WAIT = re.compile(r"\bmbarrier\.try_wait\b")


def steps_ahead(ptx: str) -> int | None:
    """Steps whose copies are still under way when a main loop has waited for its own; None: nothing is copied so.

    A main loop is an innermost loop with asynchronous copies to shared memory; of several, the worst counts. With
    cp.async a wait names the groups of copies that may be left. TMA waits on barriers, which name nothing: there, what
    is copied before the loop is what runs ahead.
    """
    loops = innermost_loops(ptx)
    groups = [loop for loop in loops if COPY.search(loop)]
    bulk = [loop for loop in loops if BULK_COPY.search(loop) and BARRIER_WAIT.search(loop)]
    found = []
    for loop in groups:
        waits = [int(count) for count in WAIT.findall(loop)]
        found.append(min(waits, default=0) // max(len(COMMIT.findall(loop)), 1))
    if bulk:
        inside = sum(len(BULK_COPY.findall(loop)) for loop in bulk)
        found.append((len(BULK_COPY.findall(ptx)) - inside) // inside - 1)
    return max(min(found), 0) if found else None


def innermost_loops(ptx: str) -> list[str]:
    """The text of every loop that holds no other. Its blocks need not be neighbours, so branches are followed."""
    blocks, after = _blocks(ptx)
    before: list[list[int]] = [[] for _ in blocks]
    for block, targets in enumerate(after):
        for target in targets:
            before[target].append(block)
    loops: dict[int, set[int]] = {}
    for source, header in _back_edges(after):
        body, open_blocks = {header}, [source]
        while open_blocks:
            block = open_blocks.pop()
            if block not in body:
                body.add(block)
                open_blocks += before[block]
        loops.setdefault(header, set()).update(body)
    return [
        "\n".join(blocks[block] for block in sorted(body))
        for header, body in loops.items()
        if not any(other in body for other in loops if other != header)
    ]


def _blocks(ptx: str) -> tuple[list[str], list[list[int]]]:
    """Basic blocks, and for each the blocks that may follow it."""
    blocks: list[list[str]] = [[]]
    at: dict[str, int] = {}
    targets: list[list[str]] = [[]]
    falls: list[bool] = [True]

    def begin() -> None:
        blocks.append([]), targets.append([]), falls.append(True)

    for line in ptx.splitlines():
        label, branch = LABEL.match(line), BRANCH.match(line)
        if label:
            begin()
            at[label[1]] = len(blocks) - 1
        blocks[-1].append(line)
        if branch:
            targets[-1].append(branch[2])
            falls[-1] = branch[1] is not None
            begin()
        elif re.match(r"\s*ret;", line):
            falls[-1] = False
            begin()
    after = [
        [at[name] for name in targets[i]] + ([i + 1] if falls[i] and i + 1 < len(blocks) else [])
        for i in range(len(blocks))
    ]
    return ["\n".join(block) for block in blocks], after


def _back_edges(after: list[list[int]]) -> list[tuple[int, int]]:
    """Edges to a block that is still open in a walk in depth from the first."""
    found, seen, path = [], {0}, [(0, iter(after[0]))]
    open_blocks = {0}
    while path:
        block, targets = path[-1]
        for target in targets:
            if target in open_blocks:
                found.append((block, target))
            elif target not in seen:
                seen.add(target)
                open_blocks.add(target)
                path.append((target, iter(after[target])))
                break
        else:
            path.pop()
            open_blocks.discard(block)
    return found
