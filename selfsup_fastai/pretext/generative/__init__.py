"""Tasks that paint: what was taken from the image (its color, a part, its sharpness) is to be put back."""
"""Tasks that paint: what was hidden, spoiled or left out of the image."""
