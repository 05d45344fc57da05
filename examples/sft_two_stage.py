"""
UniAttn post-training in two stages with TRL: plan, calibrate, train W_c alone, train everything, save, reload.

    python examples/sft_two_stage.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name data.jsonl --output_dir qwen2.5-0.5b-uniattn \
        --max_length 1024 --per_device_train_batch_size 8 --learning_rate 1e-5 --num_train_epochs 1 \
        --stage1_learning_rate 1e-4 --stage1_max_steps 200

The same arguments work behind `accelerate launch`, `torchrun --nproc-per-node N` and `peft-uniattn train`, and in a
YAML file given by `--config`. Run it again after an interruption, and it continues. `--help` lists all of them.
"""

from peft_uniattn.training.main import main

if __name__ == "__main__":
    receipt = main()
    if receipt is not None:  # in the main process
        for name, value in receipt.rows():
            print(f"{name}: {value}")
