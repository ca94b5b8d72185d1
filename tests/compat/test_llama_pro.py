"""The original's expansion rates and folder names mean here what they meant there, where they meant something."""

import json
import shlex
from pathlib import Path

import pytest
import transformers

from burnish.compat.llama_pro import expansion, new_blocks_of
from burnish.errors import UserError
from tests.compat import commands


@pytest.mark.parametrize(
    ("path", "blocks"),
    [
        ("x_blk_exp-32-35", 3),
        ("/models/meta-llama/Llama-2-7b-hf_blk_exp-32-35/", 3),
        ("x_blk_exp-80-88", 8),
        ("a_blk_exp-1-2_blk", 1),
    ],
)
def test_a_folders_name_tells_its_new_blocks(path, blocks):
    assert new_blocks_of(path) == blocks


def test_the_only_such_folder_inside_is_found(tmp_path):
    (tmp_path / "owner" / "model_blk_exp-8-10").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    assert new_blocks_of(str(tmp_path)) == 2


@pytest.mark.parametrize(
    ("inside", "asked", "message"),
    [
        ([], None, r"--llama_pro_path is missing: .*scripts/block_expansion\.py"),
        ([], "", r"its name does not end in _blk_exp-OLD-NEW, and there is none such in it"),
        (["a_blk_exp-2-3", "b_blk_exp-2-4"], "", r"and there are several such folders in it"),
        ([], "x_blk_exp-8-8", r"its name says that it has no new blocks"),
    ],
)
def test_a_folder_that_tells_nothing_is_refused(tmp_path, inside, asked, message):
    for name in inside:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=message):
        new_blocks_of(asked and f"{tmp_path}/{asked}" if asked != "" else str(tmp_path))


def model(folder: Path, layers: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(transformers.LlamaConfig(num_hidden_layers=layers).to_dict()))
    return folder


@pytest.mark.parametrize(("layers", "rate", "blocks"), [(32, 0.1, 3), (80, 0.1, 8), (32, 0.3, 9), (10, 0.1, 1), (4, 1.0, 4), (22, 0.1, 2)])
def test_a_rate_is_a_number_of_blocks_rounded_down(tmp_path, layers, rate, blocks):
    folder = model(tmp_path / "m", layers)
    found = expansion(["--model_name", str(folder), "--output_dir", str(tmp_path / "out"), "--expansion_rate", str(rate)])
    assert found == (str(folder), tmp_path / "out" / f"m_blk_exp-{layers}-{layers + blocks}", blocks)


def test_the_articles_command_makes_the_folder_that_the_original_made(tmp_path, monkeypatch):
    model(tmp_path / "meta-llama" / "Llama-2-7b-hf", 32)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(commands.EXPANSION.replace("\\\n", " "))[2:]
    name, folder, blocks = expansion(words)
    assert (name, blocks) == ("meta-llama/Llama-2-7b-hf", 3)
    assert folder == Path("/path/to/llama_pro_weights_directory/meta-llama/Llama-2-7b-hf_blk_exp-32-35")
    assert new_blocks_of(str(folder)) == blocks


@pytest.mark.parametrize(
    ("layers", "rate", "message"),
    [
        (8, 0.1, r"--expansion_rate 0\.1: that is no whole block of 8 layers\. Give at least 0\.125"),
        (8, 0.0, r"no whole block"),
        (8, -1.0, r"no whole block"),
        (8, 1.5, r"there are 8 layers to copy, and that would be 12"),
    ],
)
def test_a_rate_that_makes_no_block_or_too_many_is_refused(tmp_path, layers, rate, message):
    with pytest.raises(UserError, match=message):
        expansion(["--model_name", str(model(tmp_path / "m", layers)), f"--expansion_rate={rate}"])


def original_places(layers: int, blocks: int) -> tuple[int, ...]:
    """Where the original's train.py looks for new blocks."""
    split = layers // blocks
    return tuple(split + (split + 1) * number for number in range(blocks))


@pytest.mark.parametrize("layers", [16, 22, 28, 32, 40, 48, 80])
def test_at_a_tenth_new_blocks_stand_where_the_original_put_them(layers):
    growth = pytest.importorskip("burnish.adapt.expand", reason="block expansion is not there yet").growth
    blocks = int(layers * 0.1)
    assert growth(layers, blocks).new == original_places(layers, blocks)
