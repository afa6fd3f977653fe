"""`python -m hydra_ppo.cli`."""

import sys

from hydra_ppo.cli.main import main

sys.exit(main())
