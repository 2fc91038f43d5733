"""A run's folder: archive, journals of islands, job records; how a run is resumed."""
