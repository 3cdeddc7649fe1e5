"""Tasks that predict something known about the image: how it was turned, cut or shuffled."""
