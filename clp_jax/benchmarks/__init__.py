"""Measurements of clp_jax itself."""
