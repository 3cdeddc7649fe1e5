"""Tasks that paint: what was taken from the image (a part, its color, its sharpness) is to be put back."""
