"""Room particledaps/particles."""
