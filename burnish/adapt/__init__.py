"""What is trained: `adapter.py` is the arithmetic of LoRA and DoRA, `attach.py` puts it on layers, `disk.py` is PEFT's format on disk."""
