"""Room particledaps/settings."""
