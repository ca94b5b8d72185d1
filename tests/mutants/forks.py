"""Runs pytest in forks of one process that has imported the heavy libraries: a mutant then costs its tests, and no start of torch.

Reads one JSON list of pytest's arguments a line, the folder to run in as its first item; answers each with one line, the exit code and
what pytest printed.
"""

import json
import os
import sys
import tempfile


def main() -> None:
    """Until its input ends. Imports nothing of burnish: each fork finds it in its own folder."""
    import bitsandbytes  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers
    import transformers.models.llama.modeling_llama
    import transformers.models.mistral.modeling_mistral

    torch.set_num_threads(1)  # no thread of torch's may exist in a process that forks
    assert not any(name.partition(".")[0] == "burnish" for name in sys.modules)
    assert transformers.AutoModelForCausalLM is not None
    for line in sys.stdin:
        folder, *arguments = json.loads(line)
        print(json.dumps(forked(folder, arguments)), flush=True)


def forked(folder: str, arguments: list[str]) -> tuple[int, str]:
    """(exit code, output) of pytest in a copy of this process."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            code = 99
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.chdir(folder)
                sys.path.insert(0, folder)
                import pytest

                code = int(pytest.main(arguments))
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


if __name__ == "__main__":
    main()
