"""`python -m hydra_ppo.profiling.validate`."""

import sys

from hydra_ppo.profiling.validate.run import main

sys.exit(main())
