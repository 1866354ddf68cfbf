"""`python -m bayesdl` is the command line of `bayesdl`."""

import sys

from bayesdl.cli import main

sys.exit(main())
