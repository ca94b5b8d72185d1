"""What the tests of evaluation share: a template, and a tiny model whose adapters were trained a little."""

import pytest
import torch

from burnish.data.template import choose_template
from tests.tiny import built_from, tiny_folder, tiny_tokenizer, train_a_little


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For the fixtures of a module too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def template():
    return choose_template(tiny_tokenizer(), "chatml")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    built = built_from(tiny_folder(tmp_path_factory.mktemp("model")))
    train_a_little(built)
    return built
