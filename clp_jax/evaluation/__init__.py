"""Closed-loop evaluation in simulators; nothing here imports JAX, for simulators live in environments of their own.

statistics   how sure a success rate is
rendering    small pictures of a MuJoCo scene in a few milliseconds on a CPU
metaworld    MetaWorld's tasks with a picture, a state of four numbers and an instruction; their scripted experts
"""
