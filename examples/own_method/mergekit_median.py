"""A merge method in ten lines: each element is the median of the models' elements."""

import torch
from mergekit.merge_methods import TensorGroup, merge_method


@merge_method(name="median", pretty_name="Median")
def median(group: TensorGroup, quantile: float = 0.5) -> torch.Tensor:
    """Return the quantile of the models' tensors, element by element."""
    stacked = torch.stack(group.tensors).float()
    return stacked.quantile(quantile, dim=0).to(group.tensors[0].dtype)
