"""A sweep over all causal-LM architectures of transformers; see `python -m tools.sweep -h`."""
