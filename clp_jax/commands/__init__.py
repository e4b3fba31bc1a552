"""One module per command: a frozen dataclass whose fields are the flags, and ``run``."""
