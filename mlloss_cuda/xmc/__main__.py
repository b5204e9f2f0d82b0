"""`python -m mlloss_cuda.xmc`."""

import sys

from mlloss_cuda.xmc.cli import main

sys.exit(main())
