"""Negative log-likelihoods of the learned places of a batch, and nothing computed for the others.

The output head is the largest product of a small model with a large vocabulary: 49,152 logits a token for
SmolLM2-135M. It is applied only where something is learned. Some architectures change the logits after the head, and
some ignore masks; so both shortcuts are tried on a few tokens first, and used only when they give the model's own
numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from fedtune.training.encoding import Encoded
from fedtune.training.packing import Batch, collate

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Scorer:
    """The model as a function from batches to losses.

    Attributes:
        model: the model.
        short_head: the head may be applied to chosen places only.
        packs: rows may share a sequence.
    """

    model: PreTrainedModel
    short_head: bool = False
    packs: bool = False

    @classmethod
    def probe(cls, model: PreTrainedModel) -> "Scorer":
        """Finds out what this architecture allows, with two forward passes over 12 tokens."""
        ids = np.arange(3, 15) % model.config.get_text_config().vocab_size
        rows = [Encoded.plain(part, [True] * len(part)) for part in (ids[:7].tolist(), ids[7:].tolist())]
        with torch.no_grad():
            apart = torch.cat([cls(model)(collate(rows, [[i]])) for i in range(2)])
            short = _agrees(cls(model, short_head=True), collate(rows, [[0]]), apart[:6])
            packs = _agrees(cls(model, short_head=short, packs=True), collate(rows, [[0, 1]]), apart)
        return cls(model, short, packs)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Returns the negative log-likelihood of every target of `batch`, in nats, float32 (M,)."""
        device = self.model.device
        at = torch.from_numpy(batch.at).to(device)
        inputs = {"input_ids": torch.from_numpy(batch.ids).to(device), "use_cache": False}
        if self.packs:
            inputs["position_ids"] = torch.from_numpy(batch.positions).to(device)
            inputs["attention_mask"] = visible(batch).to(device)
        else:
            inputs["attention_mask"] = torch.from_numpy((batch.blocks != 0).astype(np.int64)).to(device)
        if self.short_head:
            hidden = self.model.base_model(**inputs)[0]
            logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[at])
        else:
            logits = self.model(**inputs).logits.flatten(0, 1)[at]
        targets = torch.from_numpy(batch.targets).to(device)
        return functional.cross_entropy(logits.float(), targets, reduction="none")


def visible(batch: Batch) -> torch.Tensor:
    """Says which tokens a token sees (N, 1, T, T): earlier ones, of its own block or of those above.

    Padding sees earlier padding, so no line of the mask is empty.
    """
    blocks = batch.blocks
    line = np.arange(len(blocks))[:, None, None]
    return torch.from_numpy(batch.sees[line, blocks[:, :, None], blocks[:, None, :]]).tril()[:, None]


def _agrees(scorer: Scorer, batch: Batch, expected: torch.Tensor) -> bool:
    try:
        got = scorer(batch)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    limit = TOLERANCE.get(scorer.model.dtype, 0.05)
    return got.shape == expected.shape and bool(torch.allclose(got, expected, rtol=limit, atol=limit))
