"""The methods, one short file per paper, found by the name they carry in a configuration."""

from fedtune.method import Method
from fedtune.methods.fedavg_lora import FedAvgLoRA
from fedtune.methods.fedkseed import FedKSeed
from fedtune.methods.flora import FLoRA

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (FLoRA, FedAvgLoRA, FedKSeed)}

__all__ = ["METHODS", "FLoRA", "FedAvgLoRA", "FedKSeed"]
