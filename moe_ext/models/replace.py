"""A tensor of a module in the place of another."""

from torch import Tensor, nn

from moe_ext.models.blocks import LOADED_LATER


def replace_tensor(module: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer, which stays what it was.

    Args:
        name: the tensor's name below ``module``, dots included.
    """
    path, _, name = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = isinstance(old, nn.Parameter)
    placed = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
    if hasattr(old, LOADED_LATER):
        setattr(placed, LOADED_LATER, getattr(old, LOADED_LATER))
    setattr(owner, name, placed)
    if isinstance(owner, nn.Linear) and name == "weight":
        owner.out_features, owner.in_features = new.shape
