"""Tasks whose answers are clusters of the data itself."""
