"""openpi's checkpoints: Orbax PyTree items of zarr arrays, read, cut and written chunk by chunk."""
