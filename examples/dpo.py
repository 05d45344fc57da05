"""
Direct preference optimization of a unified model, after the two stages, with TRL's `DPOTrainer`.

    python examples/dpo.py \
        --model_name_or_path qwen2.5-0.5b-uniattn/model --dataset_name trl-lib/ultrafeedback_binarized \
        --learning_rate 5e-7 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --bf16 \
        --output_dir qwen2.5-0.5b-uniattn-dpo

The model is what `peft-uniattn train` leaves in `model/`, or any other standalone model. The data set is a name on the
Hub or a local file, with rows of prompt, chosen and rejected: texts, or lists of messages for the chat template.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser

from peft_uniattn.training.data.sources import read  # importing peft_uniattn is what makes the model load


def make_trainer(argv: Sequence[str] | None = None) -> DPOTrainer:
    """The trainer that the flags (default: the process's) ask for."""
    script, model, training = TrlParser((ScriptArguments, ModelConfig, DPOConfig)).parse_args_and_config(argv)
    data = read(script.dataset_name, config=script.dataset_config, streaming=script.dataset_streaming)
    # The reference model, too, is loaded from the path, so both have the same plan.
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    return DPOTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
    )


if __name__ == "__main__":
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
