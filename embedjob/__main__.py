"""`python -m embedjob` is the console script."""

import sys

from embedjob.cli import main

sys.exit(main())
