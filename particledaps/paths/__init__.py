"""Room particledaps/paths."""
