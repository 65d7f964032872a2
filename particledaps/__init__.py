"""Room particledaps."""
