"""A whole finetuning by TRL's SFTTrainer, for `finetuning.py` and `memory.py`: NF4 base (bitsandbytes), DoRA or LoRA (peft), fp32.

It runs on a CPU, in an environment of its own, and imports nothing of burnish:

    python3.11 -m venv TRL && TRL/bin/pip install torch==2.13.0
    TRL/bin/pip install "transformers==5.23.*" trl==1.16.0 peft==0.21.2 bitsandbytes==0.50.2 datasets==5.2.0 accelerate==1.15.0

As TRL's documentation has it: rows as `prompt` and `completion` messages, so that the completion alone is trained; its own padding and
packing. Otherwise than its defaults, so that both sides do the same: fp32 instead of bf16 (adapters too: SFTTrainer casts those of a
quantized base to bf16, and they are cast back), the learning rate and its schedule, no checkpoints on disk.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import resident

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder of transformers")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL with `question` and `answer`")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--method", choices=["dora", "lora"], default="dora")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--alpha", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(asked, folder)
        watch = Watch()
        trainer.add_callback(watch.callback())
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    counted = [label for batch in trainer.get_train_dataloader() for label in batch["labels"][:, 1:].flatten().tolist()]
    print(
        json.dumps(
            {
                "seconds": watch.seconds,
                "supervised": sum(label != -100 for label in counted),
                "places": len(counted),
                "steps": trainer.state.global_step,
                "losses": [losses[0], losses[-1]],
                "weights_bytes": watch.before,
                "peak_bytes": max(watch.peak, watch.peak_before),
                "above_bytes": watch.peak - watch.before,
                "versions": {name: version(name) for name in ("trl", "transformers", "peft", "bitsandbytes", "torch")},
            }
        )
    )


class Watch:
    """Remembers when training began and ended, and what memory it took."""

    def __init__(self) -> None:
        self.seconds = self.started = 0.0
        self.before = self.peak = self.peak_before = 0

    def callback(self) -> Any:
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                watch.peak_before = resident.peak()
                watch.before = resident.start()
                watch.started = time.perf_counter()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                watch.seconds = time.perf_counter() - watch.started
                watch.peak = resident.peak()

        return Callback()


def trainer_of(asked: argparse.Namespace, folder: str) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(asked.model, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"})
    rows = [json.loads(line) for line in asked.rows.read_text(encoding="utf-8").splitlines()[: asked.count]]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"].strip()}],
                "completion": [{"role": "assistant", "content": row["answer"].strip()}],
            }
            for row in rows
        ]
    )
    settings = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=1 if asked.packing else asked.batch,
        packing=asked.packing,
        max_length=asked.context,
        gradient_checkpointing=asked.checkpointing,
        learning_rate=asked.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=1,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    adapter = LoraConfig(
        r=asked.rank, lora_alpha=asked.alpha, target_modules=TARGETS, use_dora=asked.method == "dora", task_type="CAUSAL_LM"
    )
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


if __name__ == "__main__":
    main()
