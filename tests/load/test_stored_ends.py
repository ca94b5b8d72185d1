"""`model.ends = "stored"`: embeddings and head are the file's own blocks, whatever holds the layers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn

from burnish.adapt.disk import about_adapter
from burnish.config import AdaptConfig, ExportConfig
from burnish.data.template import choose_template
from burnish.errors import UserError
from burnish.export.tuned import Tuned
from burnish.export.writers import export
from burnish.load.pretrained import find_model, read_tokenizer
from burnish.load.weights import open_weights
from burnish.plan.decide import check
from burnish.plan.machine import this_machine
from burnish.toml import parse_config
from tests.layers import dense
from tests.load.conftest import tiny_network, write_gguf
from tests.tiny import a_plan, asked, built_from

Q = gguf.GGMLQuantizationType
IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """By the types of embeddings and head; a tied file holds no head."""
    root, found = tmp_path_factory.mktemp("stored-ends"), {}
    kinds = {
        "tied": {"embed": Q.Q8_0},
        "own": {"embed": Q.Q8_0, "lm_head": Q.Q4_0},
        "plain head": {"embed": Q.Q8_0, "lm_head": Q.F16},
        "odd head": {"embed": Q.Q8_0, "lm_head": Q.Q5_0},
    }
    for name, own in kinds.items():
        found[name] = root / f"{name}.gguf"
        write_gguf(found[name], "llama", tiny_network("llama", tied=name == "tied"), Q.Q4_1, kinds=own)
    return found


@pytest.mark.parametrize("form", ["stored", "nf4"])
@pytest.mark.parametrize("name", ["tied", "own", "plain head"])
def test_they_are_the_files_values_bit_for_bit(files, name, form):
    built = built_from(files[name], {"format": form, "block": 32, "ends": "stored"})
    plain = built_from(files[name], {"format": form, "block": 32})
    embeddings, head = built.model.get_input_embeddings(), built.model.get_output_embeddings()
    assert embeddings.table.format_name == "q8_0"
    assert torch.equal(dense(embeddings.table), plain.model.get_input_embeddings().weight)
    if name == "plain head":
        assert isinstance(head, nn.Linear), "the file holds numbers there, and so does the model"
    else:
        assert head.format_name == {"tied": "q8_0", "own": "q4_0"}[name]
    with torch.no_grad():
        assert torch.equal(built.model(IDS).logits, plain.model(IDS).logits)


def test_a_second_start_reads_them_from_the_cache_of_the_quantized_layers(files):
    first, second = (built_from(files["own"], {"format": "nf4", "block": 32, "ends": "stored", "cache": True}) for _ in range(2))
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_a_type_that_no_format_holds_is_refused_by_the_tensors_name(files):
    with pytest.raises(UserError, match=r"model.ends = 'stored': (?s:.*)Q5_0: lm_head\.weight\nSet model.ends=none, which decodes them"):
        built_from(files["odd head"], {"format": "none", "ends": "stored"})


# --- export


def tuned_from(path: Path, ends: str) -> Tuned:
    section, plan = asked(path, {"format": "stored", "ends": ends}), a_plan()
    built = built_from(path, {"format": "stored", "ends": ends})
    template = choose_template(read_tokenizer(find_model(section)), "alpaca")
    said = {"name": template.name, "jinja": template.jinja, "system": template.system}
    about = about_adapter(section, plan, open_weights(find_model(section)).fingerprint(), said, 64)
    return Tuned(built, template, AdaptConfig(rank=8, alpha=16.0), about)


def test_the_file_is_written_back_with_its_own_embeddings(files, tmp_path):
    tuned = tuned_from(files["own"], "stored")
    export(tuned, ExportConfig(writers=("gguf",)), tmp_path / "export")
    written = tmp_path / "export" / "gguf" / "model.gguf"
    again = built_from(written, {"format": "stored", "ends": "stored"})
    assert torch.equal(dense(again.model.get_output_embeddings()), dense(tuned.built.model.get_output_embeddings()))
    assert "embeddings and head: `stored`" in (written.parent / "README.md").read_text()


def test_a_file_with_other_embeddings_than_were_trained_on_is_not_written(files, tmp_path):
    with pytest.raises(UserError, match=r"gguf writes the file's own embeddings, and this run trained on others \(model.ends = 'int8'\)"):
        export(tuned_from(files["tied"], "int8"), ExportConfig(writers=("gguf",)), tmp_path / "export")
    sections: dict[str, Any] = {"model": {"path": str(files["tied"]), "format": "stored", "ends": "int8"}, "data": {"context": 64}}
    config = parse_config({"name": "x", "export": {"writers": ["gguf"]}} | sections)
    with pytest.raises(UserError, match=r"export\.writers = 'gguf': the file's own embeddings are written, and model\.ends = 'int8'"):
        check(config, find_model(config.model), this_machine())
    check(replace(config, model=replace(config.model, ends="stored")), find_model(config.model), this_machine())
