"""lerobot's SmolVLA."""
