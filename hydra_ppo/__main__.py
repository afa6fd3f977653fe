"""`python -m hydra_ppo`, which torchrun and `accelerate launch` start as a module."""

import sys

from hydra_ppo.cli.main import main

sys.exit(main())
