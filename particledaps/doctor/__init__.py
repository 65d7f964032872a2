"""Room particledaps/doctor."""
