"""`python -m mtp_jax COMMAND …`, the same as `mtp COMMAND …`."""

import sys

from mtp_jax.cli import main

sys.exit(main.main())
