"""From files to batches of pixels."""
