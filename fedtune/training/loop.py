"""The one training loop: clients, simulations and `fedtune train` all call `train`, and nothing is added to a step."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedtune.config.schema import TrainingConfig
from fedtune.errors import TrainingError, problem
from fedtune.training.packing import Batch
from fedtune.training.scoring import Scorer
from fedtune.worker import OnStep


def train(
    scorer: Scorer,
    weights: Iterable[nn.Parameter],
    batches: tuple[int, Iterable[list[Batch]]],
    config: TrainingConfig,
    seed: int,
    on_step: OnStep | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
    faster: Iterable[nn.Parameter] = (),
) -> dict[str, float]:
    """Trains `weights` in place with AdamW.

    A step's loss is the mean over all its learned tokens, however the batch is cut into parts. With `prox_mu` the step
    goes down that loss plus mu/2 |w - w0|^2 (FedProx: Li et al. 2020, arXiv 1812.06127, equation 2), w0 being `weights`
    as they came; the losses reported are without it, and without `penalty`, which is added to the loss likewise.

    Args:
        scorer: the model's losses.
        weights: what is trained; all else stays as it is.
        batches: number of steps, and the batch of each, in parts.
        config: hyper-parameters.
        seed: of dropout. The process's own random state is left as it was.
        on_step: told of every step.
        penalty: a function of `weights`.
        faster: those of `weights` that take `lora_plus` times the learning rate.

    Returns:
        `loss` (mean over the steps), `loss_first`, `loss_last` in nats a learned token; `steps`; `tokens` read;
        `answer_tokens` learned; `seconds`.

    Raises:
        TrainingError: a loss is not finite.
    """
    steps, stream = batches
    trained = list(weights)
    optimizer = torch.optim.AdamW(
        _groups(trained, faster, config), betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    came = [weight.detach().clone() for weight in trained] if config.prox_mu else []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(config, step, steps))
    device, start = scorer.model.device, time.monotonic()
    losses: list[float] = []
    tokens = learned = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _training(scorer, config):
        torch.manual_seed(seed)
        for number, parts in enumerate(stream, 1):
            losses.append(_step(scorer, parts, config))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    problem(f"loss of step {number}", "a finite number", losses[-1], "Lower training.learning_rate")
                )
            if penalty:
                penalty().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            if config.prox_mu:
                _pull(trained, came, config.prox_mu)
            if config.clip_norm:
                nn.utils.clip_grad_norm_(trained, config.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tokens += sum(part.tokens for part in parts)
            learned += sum(len(part.at) for part in parts)
            if on_step:
                on_step(number, steps, losses[-1])
    return {
        "loss": sum(losses) / len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "steps": float(len(losses)),
        "tokens": float(tokens),
        "answer_tokens": float(learned),
        "seconds": time.monotonic() - start,
    }


def rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Returns the factor on the learning rate at `step` (0, 1, ...) of `steps`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """Returns the context in which a forward pass runs: bfloat16 where the configuration and the hardware say so."""
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(
        device.type, torch.bfloat16, enabled=config.autocast == "on" or (config.autocast == "auto" and capable)
    )


def _groups(
    trained: list[nn.Parameter], faster: Iterable[nn.Parameter], config: TrainingConfig
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Weights by their learning rates; none is without weights."""
    few = {id(weight) for weight in faster}
    slow, quick = ([w for w in trained if (id(w) in few) is which] for which in (False, True))
    rates = ((slow, config.learning_rate), (quick, config.learning_rate * config.lora_plus))
    return [{"params": weights, "lr": lr} for weights, lr in rates if weights]


def _step(scorer: Scorer, parts: list[Batch], config: TrainingConfig) -> float:
    """Forward and backward over all parts; gradients are those of the mean over the step's learned tokens."""
    learned = sum(len(part.at) for part in parts)
    total = 0.0
    for part in parts:
        with autocast(config, scorer.model.device):
            loss = scorer(part).sum() / learned
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += float(loss.detach())
    return total


def _pull(weights: list[nn.Parameter], to: list[torch.Tensor], mu: float) -> None:
    """Adds mu (w - w0), the gradient of mu/2 |w - w0|^2, to the gradients."""
    for weight, start in zip(weights, to, strict=True):
        if weight.grad is not None:
            weight.grad.add_(weight.detach() - start, alpha=mu)


@contextmanager
def _training(scorer: Scorer, config: TrainingConfig) -> Iterator[None]:
    """Puts the model in training mode, with checkpointing if asked for; afterwards as it was."""
    model = scorer.model.train()
    try:
        if config.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        yield
    finally:
        if config.checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()
