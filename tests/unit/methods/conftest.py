"""What tests of the LoRA methods share: drawn replies, rounds on toy workers, products in float64."""

import numpy as np
import pytest

from fedtune.lora import key_a, key_b, lora_scale
from fedtune.method import BaseModel, Member
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import Manifest, TensorSpec, digest
from fedtune.testing import ToyWorker


class Family:
    """Helpers, as one fixture."""

    @staticmethod
    def base(shapes):
        """A base with one `q_proj` of (outputs, inputs) each."""
        specs = (TensorSpec(f"m.{i}.q_proj.weight", shape, "float32") for i, shape in enumerate(shapes))
        return BaseModel("toy", Manifest(tuple(specs)), "digest")

    @staticmethod
    def state(method, base, seed=0):
        """The first state in float64, so that rounding hides nothing."""
        return {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in method.init(base, seed).items()}

    @staticmethod
    def replies(method, state, clients, seed=0):
        """Float64 updates of clients given as (rank, alpha, weight)."""
        rng = np.random.Generator(np.random.Philox(key=seed))
        found = []
        for i, (rank, alpha, weight) in enumerate(clients):
            member = method.admit(Member(f"c{i:02d}", rank, alpha))
            specs = method.template(state, member).specs
            found.append((member, {s.name: rng.normal(size=s.shape) for s in specs}, weight))
        return found

    @staticmethod
    def close(method, state, replies):
        total = None
        for member, update, weight in replies:
            total = method.fold(total, update, member, weight)
        return method.finish(state, total, sum(weight for *_, weight in replies))

    @staticmethod
    def product(factors, layer):
        return factors[key_b(layer)].astype(np.float64) @ factors[key_a(layer)].astype(np.float64)

    @classmethod
    def mean_product(cls, method, replies, layer, held=None):
        """sum_k p_k s_k B_k A_k; `held` has the factors that are not in the updates."""
        weights = sum(weight for *_, weight in replies)
        return sum(
            weight / weights * lora_scale(m.rank, m.alpha, method.rslora) * cls.product({**(held or {}), **u}, layer)
            for m, u, weight in replies
        )

    @staticmethod
    def play(method, base, folder, members, rounds, absent=()):
        """Plays rounds with persistent workers; `absent` holds (round, id)."""
        members = [method.admit(member) for member in members]
        workers = {m.id: ToyWorker(folder, examples=3 + i) for i, m in enumerate(members)}
        replicas = {m.id: Replica() for m in members}
        states = [method.init(base, 0)]
        for number in range(1, rounds + 1):
            current = Round(method, states[-1], number)
            for member in (m for m in members if (number, m.id) not in absent):
                worker, replica = workers[member.id], replicas[member.id]
                task = current.task(member, replica.version)
                payload = b"".join(work(method, task, worker.job(method, member, number), replica))
                assert replica.digest == digest(states[-1])
                current.add(member, payload, worker.examples)
            states.append(current.close())
        return states, workers, replicas


@pytest.fixture(scope="session")
def family():
    return Family()
