"""The entry point of `ray job submit`: `python jobs/embed.py JOB.yaml [--set k=v]...`."""

import sys
from pathlib import Path

# Python looks beside this file, and embedjob lies a folder above, installed or not.
sys.path.append(str(Path(__file__).parents[1]))
from embedjob.errors import lacking_module

if __name__ == "__main__":
    try:
        from embedjob.cli import program

        program(["run", *sys.argv[1:]])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("embedjob."):
            raise  # a fault of ours
        sys.stderr.write(f"{lacking_module(error)}\n")
        sys.exit(2)
