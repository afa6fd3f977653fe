#!/bin/sh
# PPO with LLaMA-Factory 0.9.3 over one base, tiny and on a CPU: examples/hosts/llamafactory/run.sh FOLDER [more, name=value]
# In your own command change one setting, reward_model, and put the patch on PYTHONPATH.
set -eu
folder=$1
shift
here=$(cd "$(dirname "$0")" && pwd)

python "$here/make_inputs.py" "$folder"
hydra-ppo sft --model.name_or_path "$folder/base" --model.dtype fp32 --data.train "$folder/pairs.jsonl" \
    --run.output "$folder/sft" --epochs 1 --batch_size 8 --optimizer.learning_rate 1e-3

patch=$(python -m hydra_ppo.patches.llamafactory)
PYTHONPATH=$patch${PYTHONPATH:+:$PYTHONPATH} llamafactory-cli train "$here/ppo.yaml" \
    model_name_or_path="$folder/base" reward_model="$folder/sft" dataset_dir="$folder/data" output_dir="$folder/ppo" \
    use_cpu=true "$@"
