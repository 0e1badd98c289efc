"""`python -m locvlm` is the command `locvlm`."""

import sys

from locvlm.cli import main

sys.exit(main())
