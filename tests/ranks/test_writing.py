"""What several ranks read and write is what one does, byte for byte: adapters and exports of a sharded model."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from burnish.adapt.disk import about_adapter, load_adapter, save_adapter
from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, ExportConfig, ModelConfig
from burnish.data.template import choose_template
from burnish.export.tuned import Tuned
from burnish.export.writers import export
from burnish.parallel.world import alone, world
from tests.tiny import METHOD_SECTIONS, a_plan, built_from, tiny_folder, tiny_tokenizer, train_a_little

pytestmark = pytest.mark.ranks
PROMPTS = [[(7 * position) % 320 for position in range(48)]]


def write_job(root: str, ranks: int, strategy: str, adapter: str | None, method: str = "dora") -> dict[str, Any]:
    """Builds, takes the values of `adapter` (or trains a little), and writes all there is to write below `root/STRATEGY`."""
    plan, folder = a_plan(ranks=ranks, strategy=strategy), Path(root) / f"{strategy}{ranks}"
    model, asked = METHOD_SECTIONS[method]
    section = AdaptConfig(**({"rank": 8, "alpha": 16.0, "method": method} | asked))
    writers = ("peft", "transformers") if METHODS[method].adapts else ("transformers",)
    with world("cpu", ranks) if ranks > 1 else _one() as here:
        built = built_from(Path(root) / "model", {"format": "nf4"} | model, {"method": method} | asked, plan, here)
        template = choose_template(tiny_tokenizer(), "alpaca")
        about = about_adapter(
            ModelConfig(path="model"), a_plan(), "f" * 32, {"name": "alpaca", "jinja": template.jinja, "system": None}, 64
        )
        if adapter is None:
            train_a_little(built)
        else:
            load_adapter(built.adapters, Path(adapter), "f" * 32)
        save_adapter(built.adapters, section, folder / "adapter", about)
        config = ExportConfig(writers=writers, dtype="fp32", shard_gb=0.0003)  # pyright: ignore[reportArgumentType]
        return export(Tuned(built, template, section, about), config, folder / "export", PROMPTS)


def _one() -> Any:
    return nullcontext(alone("cpu"))


def files_of(folder: Path) -> dict[str, bytes]:
    """All but the card of the merged folder, which says what was measured."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path != folder / "export/transformers/README.md")
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


CELLS = [(2, "fsdp", "dora"), (4, "fsdp", "dora"), (2, "ddp", "dora"), (2, "fsdp", "full"), (4, "fsdp", "expand")]


@pytest.mark.parametrize(("ranks", "strategy", "method"), CELLS)
def test_several_ranks_read_and_write_the_files_that_one_does(tmp_path: Path, pool: Any, ranks: int, strategy: str, method: str):
    tiny_folder(tmp_path / "model", "qwen2")
    alone = write_job(str(tmp_path), 1, "single", None, method)
    reports = pool.run(ranks, write_job, str(tmp_path), ranks, strategy, str(tmp_path / "single1/adapter"), method)
    single, many = files_of(tmp_path / "single1"), files_of(tmp_path / f"{strategy}{ranks}")
    assert {name for name in single if single[name] != many.get(name)} == set()
    assert many.keys() == single.keys()
    assert len([name for name in single if name.startswith("export/transformers/model-")]) > 2
    assert alone["transformers"]["distance"]["max"] < 1e-4
    assert reports[0]["transformers"]["distance"]["max"] < 1e-4
    assert all(report["transformers"]["distance"] == {} for report in reports[1:])
