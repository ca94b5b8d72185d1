"""The block expansion of AnswerDotAI/fsdp_qlora, done by burnish: --model_name, --output_dir, --expansion_rate."""

import sys

from burnish.cli import main

if __name__ == "__main__":
    main(["block-expansion", *sys.argv[1:]])
