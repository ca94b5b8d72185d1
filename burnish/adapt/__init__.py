"""What is trained: `adapter.py` is the arithmetic of LoRA and DoRA, `attach.py` puts it on layers, `disk.py` reads and writes PEFT's format."""
