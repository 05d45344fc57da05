"""
The `transformers` command with standalone models: `python -m peft_uniattn.serving.transformers_command serve DIR`.

`transformers serve` looks a checkpoint's class up in transformers itself, whatever the auto classes know, and so finds
no class that comes from elsewhere.
"""

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..families import FAMILIES
from ..standalone_modeling import standalone_class_of


def main() -> None:
    """Run transformers' command line with this process's arguments."""
    from transformers.cli.transformers import main as transformers_main

    for model_type in FAMILIES.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        model_class = standalone_class_of(model_type)
        setattr(transformers, model_class.__name__, model_class)
    transformers_main()


if __name__ == "__main__":
    main()
