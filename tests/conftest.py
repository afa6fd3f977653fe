"""Settings that hold for the whole suite."""

import torch

# The models are tiny: a second thread costs more than it brings, and much more where another process wants the core.
torch.set_num_threads(1)
