"""The LoRA methods through PEFT's layers: grouped attention, MLP and Conv1D, on random models of both kinds."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from fedtune.base import open_base
from fedtune.errors import ModelError
from fedtune.lora import load_peft
from fedtune.method import Member
from fedtune.methods import METHODS
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import digest
from fedtune.training.lora import injected, linear
from fedtune.training.merging import MergedBase, _Beside
from fedtune.training.own import OwnWorker

LORA = sorted(METHODS.keys() - {"fedkseed", "fedavg"})
MIXED = {"flora", "flexlora", "florist", "hetlora"}
_IDS = torch.arange(40).reshape(2, 20)


def _step(model, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 250, (2, 12), generator=generator)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight -= 0.5 * weight.grad
                weight.grad = None
    return {"loss": loss.item()}


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tmp_path):
    model = request.getfixturevalue(request.param)
    model.save_pretrained(tmp_path / "base")
    return model


def _logits(model):
    with torch.no_grad():
        return model(input_ids=_IDS).logits


TABLES = {"llama": ("embed_tokens", "q_proj"), "gpt2": ("wte", "wpe", "c_attn")}  # heads are tied to them in both


@pytest.mark.parametrize("targets", ["all-linear", "tables"])
@pytest.mark.parametrize("name", LORA)
def test_what_is_exported_is_what_clients_hold(name, targets, model, tmp_path):
    """Two rounds; then the exported adapter in PEFT beside a client that has installed the state.

    The client has the largest rank, so that a slice of the state is all of it.
    """
    if targets == "tables" and name in ("fedsa-lora", "ffa-lora", "rolora"):
        pytest.skip("refuses embeddings")
    method = METHODS[name](
        rank=4, target_modules=TABLES[model.config.model_type] if targets == "tables" else (targets,)
    )
    base = open_base(tmp_path / "base")
    ranks = {"a": 4, "b": 2 if name in MIXED else 4}
    members = [method.admit(Member(n, rank)) for n, rank in ranks.items()]
    worker, before = OwnWorker(model, tmp_path / "base", 3, _step, seed=5), _logits(model)
    state = method.init(base, 5)
    for number in (1, 2):  # one model for all: each turn starts from the base
        current = Round(method, state, number)
        for member in members:
            worker.reset()
            payload = work(method, current.task(member), worker.job(method, member, number), Replica())
            current.add(member, b"".join(payload), 3)
        state = current.close()
    worker.reset()
    replica = Replica()
    replica.install(method, Round(method, state, 3).task(members[0]), worker.job(method, members[0], 3))
    assert replica.digest == digest(state)
    if name == "fedsa-lora":
        return  # no model is everybody's
    if worker.attached is None:
        held = _logits(model)
    else:
        with injected(model, *worker.attached):
            held = _logits(model)
    worker.reset()
    method.export(state, tmp_path / "out", "")
    loaded = _logits(PeftModel.from_pretrained(model, tmp_path / "out"))
    assert torch.allclose(loaded, held, atol=1e-4)
    assert not torch.allclose(loaded, before, atol=1e-3)


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_a_model_with_embeddings_merged_in_is_the_same_after_saving(name, model, tmp_path):
    """Its head was its embedding: what is saved has both, and the original is as before after a reset."""
    method = METHODS[name](rank=4, target_modules=TABLES[model.config.model_type])
    state, before = method.init(open_base(tmp_path / "base"), 5), _logits(model)
    worker = OwnWorker(model, tmp_path / "base", 3, _step, seed=5)
    current = Round(method, state, 1)
    for member in [method.admit(Member(n)) for n in "ab"]:
        worker.reset()
        current.add(member, b"".join(work(method, current.task(member), worker.job(method, member, 1), Replica())), 3)
    worker.reset()
    method.export(current.close(), tmp_path / "out", "")
    merged = MergedBase(model)
    merged.merge(load_peft(tmp_path / "out"))
    head, held = model.get_output_embeddings().weight, _logits(model)
    model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(_logits(loaded), held)
    assert not torch.allclose(held, before, atol=1e-3)
    assert torch.equal(head, loaded.get_output_embeddings().weight)
    merged.reset()
    assert torch.equal(_logits(model), before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_a_token_nobody_trained_on_stays_where_it_is(llama, tmp_path):
    """Clients see tokens below 250; the last ones have no gradient, and A began at zero."""
    llama.save_pretrained(tmp_path / "base")
    method = METHODS["flora"](rank=4, target_modules=("embed_tokens",))
    state = method.init(open_base(tmp_path / "base"), 5)
    worker, member = OwnWorker(llama, tmp_path / "base", 3, _step, seed=5), method.admit(Member("a"))
    current = Round(method, state, 1)
    current.add(member, b"".join(work(method, current.task(member), worker.job(method, member, 1), Replica())), 3)
    stack = current.close()
    change = (stack["000001/model.embed_tokens/B"] @ stack["000001/model.embed_tokens/A"]).T
    assert change.shape == llama.model.embed_tokens.weight.shape
    assert not change[250:].any()
    assert change[:250].any()


@pytest.mark.parametrize("scaled", [False, True])
def test_merging_beside_a_quantised_embedding_adds_what_merging_into_it_would(llama, scaled):
    rng = np.random.Generator(np.random.Philox(key=1))
    factors = {
        "model.embed_tokens/A": rng.normal(0, 0.1, (2, 257)).astype(np.float32),
        "model.embed_tokens/B": rng.normal(0, 0.1, (64, 2)).astype(np.float32),
    }
    if scaled:
        llama.model.embed_tokens = Gemma3TextScaledWordEmbedding(257, 64, 0, embed_scale=8.0)
    table = llama.model.embed_tokens
    base = MergedBase(llama)
    base.merge(factors)
    want = table(_IDS).detach()
    base.reset()
    beside = _Beside(table)
    beside.add(factors["model.embed_tokens/A"], factors["model.embed_tokens/B"])
    assert torch.allclose(table(_IDS), want, atol=1e-5)
    beside.hook.remove()


def test_a_layer_that_is_called_like_an_embedding_and_is_none_is_refused(llama):
    llama.model.layers[0].embed_more = torch.nn.Linear(3, 3)
    with pytest.raises(ModelError, match=r"layer model.layers.0.embed_more: expected an embedding, got Linear"):
        linear(llama, "model.layers.0.embed_more")


def test_a_table_that_takes_more_than_indices_is_refused(llama):
    """OPT finds its positions by the attention mask; PEFT's layer would look them up by that."""
    llama.model.embed_positions = OPTLearnedPositionalEmbedding(8, 4)
    with pytest.raises(ModelError, match=r"model.embed_positions: expected an embedding that takes indices, got OPTL"):
        linear(llama, "model.embed_positions")
