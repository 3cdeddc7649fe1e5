"""Tasks that pull the embeddings of two views of one image together."""
