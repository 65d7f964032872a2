"""Measurement operators, one file per physics."""
