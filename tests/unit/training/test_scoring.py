import numpy as np
import torch
from torch.nn import functional
from transformers import CohereConfig, CohereForCausalLM, MambaConfig, MambaForCausalLM

from fedtune.training.encoding import Encoded
from fedtune.training.packing import Batch, collate
from fedtune.training.scoring import Scorer


def _batch() -> Batch:
    ids = np.random.default_rng(0).integers(5, 250, (3, 20)).tolist()
    return collate([Encoded.plain(row, [False] * 15 + [True] * 5) for row in ids], [[0], [1], [2]])


def test_head_on_learned_places_gives_the_full_logits_loss(llama):
    batch = _batch()
    scorer = Scorer.probe(llama)
    assert scorer.short_head
    logits = llama(input_ids=torch.from_numpy(batch.ids)).logits
    labels = torch.full_like(torch.from_numpy(batch.ids), -100)
    labels[:, 15:] = torch.from_numpy(batch.ids)[:, 15:]
    want = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(scorer(batch).mean(), want, atol=1e-5)


def test_logits_changed_after_the_head_turn_the_short_way_off():
    config = CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = CohereForCausalLM(config).eval()
    model.logit_scale = 4.0
    scorer = Scorer.probe(model)
    assert not scorer.short_head
    assert scorer.packs


def test_a_model_that_remembers_past_the_mask_is_not_packed():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    assert not Scorer.probe(MambaForCausalLM(config).eval()).packs


def test_every_way_gives_the_same_losses(llama):
    batch = _batch()
    with torch.no_grad():
        ways = [Scorer(llama, head, packs)(batch) for head in (False, True) for packs in (False, True)]
    for other in ways[1:]:
        assert torch.allclose(ways[0], other, atol=1e-5)
