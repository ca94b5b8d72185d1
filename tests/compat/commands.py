"""Command lines of the original's documentation, of its scripts and of the two articles that presented it, as they are printed."""

README_70B = r"""
python train.py \
--model_name meta-llama/Llama-2-70b-hf \
--batch_size 2 \
--context_length 512 \
--precision bf16 \
--train_type qlora \
--use_gradient_checkpointing true \
--use_cpu_offload true \
--dataset alpaca \
--reentrant_checkpointing true
"""
README_FULL = r"""
python train.py \
--world_size 2 \
--master_port 12356 \
--model_name meta-llama/Llama-2-7b-hf \
--gradient_accumulation_steps 4 \
--batch_size 8 \
--context_length 512 \
--precision bf16 \
--train_type full \
--use_gradient_checkpointing true \
--use_cpu_offload false \
--use_activation_cpu_offload false \
--log_to wandb \
--dataset alpaca
"""
README_HQQ = r"""
python train.py \
--world_size 4 \
--master_port 12356 \
--model_name meta-llama/Llama-2-70b-hf \
--gradient_accumulation_steps 4 \
--batch_size 2 \
--context_length 512 \
--precision bf16_buffers_autocast \
--train_type hqq_lora \
--use_gradient_checkpointing true \
--use_cpu_offload false \
--log_to stdout \
--dataset alpaca
"""
COMPARISON = (
    "train.py --train_type qlora --dataset guanaco --batch_size 8 --lr_scheduler cosine --log_to wandb --save_model True "
    "--output_dir guanaco_7B --gradient_accumulation_steps 2 --lr 2e-4"
)
SQL = r"""
python train.py \
--context_length 256 \
--model_name codellama/CodeLlama-34b-hf \
--train_type qlora \
--batch_size 4 \
--gradient_accumulation_steps 4 \
--dataset sql \
--save_model True \
--output_dir sql_model_qlora \
--apply_gradient_clipping True \
--project_name fsdp_qlora_sql \
--precision bf16_buffers_autocast \
--log_to wandb
"""
QDORA = r"""
python fsdp_qlora/train.py \
--train_type bnb_dora \
--model_name meta-llama/Llama-2-7b-hf \
--dataset orca_math \
--dataset_samples 10000 \
--batch_size 4 \
--context_length 2048 \
--gradient_accumulation_steps 2 \
--sharding_strategy full_shard \
--use_gradient_checkpointing true \
--reentrant_checkpointing true \
--use_cpu_offload false \
--use_activation_cpu_offload false \
--log_to wandb \
--project_name "fsdp-quantized-ft-exps" \
--save_model true \
--output_dir models/llama-7b-orca-math-10k-bnb-QDoRA
"""
EXPANSION = r"""
python fsdp_qlora/scripts/block_expansion.py \
--model_name meta-llama/Llama-2-7b-hf \
--output_dir /path/to/llama_pro_weights_directory \
--expansion_rate 0.1
"""
LLAMA_PRO = r"""
python fsdp_qlora/train.py \
--train_type bnb_llama_pro \
--llama_pro_path /path/to/llama_pro_weights_directory \
--model_name meta-llama/Llama-2-7b-hf \
--dataset orca_math \
--dataset_samples 10000 \
--batch_size 4 \
--context_length 2048 \
--gradient_accumulation_steps 2 \
--sharding_strategy full_shard \
--use_gradient_checkpointing true \
--reentrant_checkpointing true \
--use_cpu_offload false \
--use_activation_cpu_offload false \
--log_to wandb \
--project_name "fsdp-quantized-ft-exps" \
--save_model true \
--output_dir models/llama-7b-orca-math-10k-bnb-qdora
"""
MULTI_NODE = r"""
srun python train.py \
--world_size=8 \
--master_addr=node-1 \
--master_port=12342 \
--model_name meta-llama/Llama-2-70b-hf \
--dataset dummy \
--batch_size 4 \
--context_length 4096 \
--gradient_accumulation_steps 2 \
--train_type hqq_lora \
--sharding_strategy full_shard \
--use_gradient_checkpointing true \
--reentrant_checkpointing false \
--use_cpu_offload true \
--use_activation_cpu_offload false \
--log_to wandb \
--verbose true
"""
