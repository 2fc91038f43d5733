"""Turns a recipe into tensors, and tensors into a model folder."""
