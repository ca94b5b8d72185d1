"""The command line of AnswerDotAI/fsdp_qlora, run by burnish: what becomes of each argument is in docs/from_fsdp_qlora.md."""

import sys

from burnish.cli import main

if __name__ == "__main__":
    main(["compat", "--run", *sys.argv[1:]])
