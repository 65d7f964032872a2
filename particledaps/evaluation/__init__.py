"""What a result is worth: metrics, modes, and the choice of one answer without the truth."""
