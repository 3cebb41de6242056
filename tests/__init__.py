import embedder  # noqa: F401 - before torch, whose OpenMP reads the wait policy that it sets
