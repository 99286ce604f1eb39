"""The entry point of `ray job submit`: `python jobs/embed.py JOB.yaml [--set k=v]...`."""

import sys

from embedjob.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
