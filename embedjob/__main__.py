"""`python -m embedjob` is the console script."""

from embedjob.cli import program

program()
