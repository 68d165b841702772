"""What an exported adapter says of its base model: a name that transformers can load, and how to load both."""

from fedtune.errors import ModelError
from fedtune.locate import BUILT_IN, locate_model

_CARD = """---
library_name: peft
base_model: {base}
---

# LoRA adapter trained with fedtune

Base model: `{base}`. {about}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}
base = {expression}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained(base)
```
"""


def loadable(name: str) -> str:
    """Returns the folder of a built-in model, which only fedtune knows by its name; any other name as it is."""
    try:
        return str(locate_model(name).resolve()) if name in BUILT_IN else name
    except ModelError:  # it was not made on this machine
        return name


def card(name: str) -> str:
    """Returns the README of an adapter on the base model `name`."""
    if name not in BUILT_IN:
        return _CARD.format(base=name or "unknown", about="", imports="", expression=repr(name or "YOUR BASE MODEL"))
    about = f"fedtune makes it: `adapter_config.json` names its folder on the machine that wrote this; {_OTHERS}"
    imports = "\nfrom fedtune.training.models import resolve_model\n"
    return _CARD.format(base=name, about=about, imports=imports, expression=f"resolve_model({name!r})")


_OTHERS = "on others `resolve_model` makes it."
