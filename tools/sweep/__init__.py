"""A sweep over all causal-LM architectures that transformers knows; `python -m tools.sweep -h`."""
