import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)                # the networks here are small, and the machine may be busy
torch.backends.cudnn.deterministic = True    # equal work gives equal bits on a GPU, too
settings.register_profile("house", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("house")
