"""The entry point of `ray job submit`: `python jobs/embed.py JOB.yaml [--set k=v]...`."""

import sys

from embedjob.cli import program

if __name__ == "__main__":
    program(["run", *sys.argv[1:]])
