from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from fedtune.training.tiny import byte_tokenizer, make_tiny, tiny_llama


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def llama() -> PreTrainedModel:
    """Four layers, grouped attention (v_proj is 32 x 64), 250,000 random weights."""
    return tiny_llama(257, seed=1).requires_grad_(False).eval()


@pytest.fixture
def gpt2() -> PreTrainedModel:
    """Two layers of Conv1D, absolute positions, dropout in training mode."""
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=257, n_positions=256, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model that has learned a little: 40 steps."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder, steps=40)
    return folder
