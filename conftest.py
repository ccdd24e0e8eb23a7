"""Without a GPU, kernels run through Triton's interpreter; it must be chosen before they are first imported."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
