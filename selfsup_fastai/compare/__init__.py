"""Did it help? Encoders side by side on the same few labels, and no more said than the figures bear."""
