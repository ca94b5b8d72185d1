"""docs/not_run.md names every path of the code that cannot run on a machine without a GPU."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ONLY_ON_A_GPU = re.compile(r"cuda|nccl|pin_memory", re.IGNORECASE)


def found() -> set[str]:
    """`file: function` of each function or module body that speaks of CUDA, NCCL or pinned memory."""
    places = set()
    for file in sorted((ROOT / "burnish").rglob("*.py")):
        scope = "module"
        for line in file.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"(?:class|def) (\w+)", line):
                scope = match.group(1)
            elif line and not line.startswith((" ", ")", "]", "}", '"', "@", "#")):
                scope = "module"
            code = line.split("#")[0]
            if ONLY_ON_A_GPU.search(re.sub(r'""".*', "", code)):
                places.add(f"{file.relative_to(ROOT)}: {scope}")
    return places


def test_every_path_that_needs_a_gpu_is_listed_as_not_run():
    listed = set(re.findall(r"^\* `(.+?)`", (ROOT / "docs" / "not_run.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == found(), "docs/not_run.md is stale"
