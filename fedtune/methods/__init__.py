"""The methods, one short file per paper, found by the name they carry in a configuration."""

from fedtune.method import Method
from fedtune.methods.fedavg import FedAvg
from fedtune.methods.fedavg_lora import FedAvgLoRA
from fedtune.methods.fedex_lora import FedExLoRA
from fedtune.methods.fedkseed import FedKSeed
from fedtune.methods.fedsa_lora import FedSALoRA
from fedtune.methods.ffa_lora import FFALoRA
from fedtune.methods.flexlora import FlexLoRA
from fedtune.methods.flora import FLoRA
from fedtune.methods.florist import FLoRIST
from fedtune.methods.hetlora import HetLoRA
from fedtune.methods.rolora import RoLoRA

_ALL = (FLoRA, FedAvgLoRA, FFALoRA, FlexLoRA, FLoRIST, HetLoRA, FedExLoRA, FedSALoRA, RoLoRA, FedAvg, FedKSeed)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _ALL}

__all__ = [
    "METHODS",
    "FFALoRA",
    "FLoRA",
    "FLoRIST",
    "FedAvg",
    "FedAvgLoRA",
    "FedExLoRA",
    "FedKSeed",
    "FedSALoRA",
    "FlexLoRA",
    "HetLoRA",
    "RoLoRA",
]
