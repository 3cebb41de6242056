"""Real clients of other servers' APIs, unchanged, against the running service."""
