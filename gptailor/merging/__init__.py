"""The merge methods: the registry and the slow reference."""
