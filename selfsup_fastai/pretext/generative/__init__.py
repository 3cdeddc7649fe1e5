"""Tasks that paint an image: the whole of it, a hole, its colors."""
