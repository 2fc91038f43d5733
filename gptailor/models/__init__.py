"""Models as they lie on disk: safetensors, layer structure, families."""
