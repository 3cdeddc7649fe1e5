"""What a saved encoder is for."""
