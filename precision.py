"""What dtype is computed in, with and without autocast."""
import torch


def product_dtype(x):
    """What a linear layer computes x in: autocast's dtype, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def exact(x):
    """A context in which operations on x's device compute in the dtype of their inputs, whatever autocast
    says."""
    return torch.autocast(x.device.type, enabled=False)
