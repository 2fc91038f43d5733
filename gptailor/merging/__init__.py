"""The merge methods: their registry and a slow reference implementation."""
