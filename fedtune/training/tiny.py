"""A language model of 250,000 weights over bytes, for tests and first tries: made on this machine in half a minute.

It is a Llama of four layers with grouped attention, trained on the help texts that come with Python, so that
fine-tuning it changes something. Its bits depend on the machine's arithmetic: programs on several machines should copy
the folder.
"""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from fedtune.config.schema import DataConfig, TrainingConfig
from fedtune.training.encoding import encode_rows
from fedtune.training.loop import train
from fedtune.training.packing import Plan
from fedtune.training.scoring import Scorer
from fedtune.weights import make_all_readable

END = "<|end|>"
_LENGTH = 128


def make_tiny(folder: Path, steps: int = 400, seed: int = 0) -> None:
    """Writes the model and its tokenizer into `folder`; with 0 `steps` the weights are random."""
    logging.disable_progress_bar()
    tokenizer = byte_tokenizer()
    model = tiny_llama(len(tokenizer), seed)
    if steps:
        _pretrain(model, tokenizer, steps, seed)
    model.save_pretrained(folder)
    make_all_readable(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a tokenizer with a token for each byte, and one for the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, END])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, model_max_length=512)


def tiny_llama(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Returns the untrained model; the process's own random state is left as it was."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    config._attn_implementation = "sdpa"  # transformers takes it from nowhere else when a model is built anew
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> None:
    text = "".join(topics[name] for name in sorted(topics))
    rows = [{"text": text[i : i + _LENGTH]} for i in range(0, len(text), _LENGTH)]
    encoded = encode_rows(rows, tokenizer, DataConfig(text="text"), _LENGTH)
    config = TrainingConfig(
        steps=steps, batch_size=16, learning_rate=4e-3, schedule="cosine", warmup_steps=20, autocast="off"
    )
    plan = Plan(encoded, _LENGTH, False, config.batch_size, steps)
    train(Scorer.probe(model), model.parameters(), plan.batches(seed), config, seed)
