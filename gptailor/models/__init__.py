"""Models on disk: safetensors files, layer structure, families."""
