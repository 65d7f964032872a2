"""Room particledaps/data."""
