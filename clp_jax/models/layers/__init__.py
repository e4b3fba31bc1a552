"""Parts that families share: the image encoder, masks and positions, gates, scanned blocks, PyTorch's names."""
