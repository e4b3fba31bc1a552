"""Folders of safetensors files: read, cut without a model, and written tensor by tensor."""
