#!/bin/sh
# PPO with ms-swift 4.6 over one base, tiny and on a CPU: examples/hosts/swift/run.sh FOLDER [more settings of swift]
# In your own command change two settings: --reward_model and --external_plugins.
set -eu
folder=$1
shift
here=$(cd "$(dirname "$0")" && pwd)

python "$here/make_inputs.py" "$folder"
hydra-ppo sft --model.name_or_path "$folder/base" --model.dtype fp32 --data.train "$folder/pairs.jsonl" \
    --run.output "$folder/sft" --epochs 4 --batch_size 8 --optimizer.learning_rate 1e-3

swift rlhf --rlhf_type ppo \
    --model "$folder/base" --model_type qwen3 --template chatml --use_hf true --check_model false \
    --reward_model "$folder/sft" \
    --external_plugins "$(python -m hydra_ppo.patches.swift)" \
    --tuner_type lora --torch_dtype float32 --attn_impl sdpa \
    --dataset "$folder/prompts.jsonl" --split_dataset_ratio 0 --dataset_num_proc 1 --dataloader_num_workers 0 \
    --max_length 128 --max_completion_length 16 --temperature 1.0 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_mini_batches 1 --num_ppo_epochs 2 \
    --local_rollout_forward_batch_size 8 --num_train_epochs 1 --num_sample_generations 0 \
    --learning_rate 1e-3 --logging_steps 1 --save_steps 4 --eval_strategy no --report_to none \
    --add_version false --output_dir "$folder/ppo" "$@"
