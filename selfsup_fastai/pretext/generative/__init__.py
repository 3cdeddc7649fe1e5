"""Tasks that paint: what was hidden, spoiled or left out of the image."""
