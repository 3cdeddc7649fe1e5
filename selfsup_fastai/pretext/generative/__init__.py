"""Tasks that paint: what was taken from the image (its color, a part, its sharpness) is to be put back."""
