"""Settings that hold for the whole suite."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, and of each of pytest's own
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and a name that is no folder fails at once

import torch

# The models are tiny: a second thread costs more than it brings, and much more where another process wants the core.
torch.set_num_threads(1)
