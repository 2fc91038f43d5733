"""From a recipe to tensors, and from tensors to a folder."""
