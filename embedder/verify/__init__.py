"""Check a checkpoint or a running service: `python -m embedder.verify MODEL [--url URL]`.

The checks compare MODEL with properties that every checkpoint must have, with plain transformers on the same
checkpoint, and with the values published for Qwen3-VL-Embedding-2B and Qwen3-VL-Reranker-2B.

    probes                  the items that every check embeds
    results                 one result per check, and the printed table
    http_service            a running service, queried over HTTP only
    transformers_reference  the probes embedded by plain transformers
    published               the values published for the 2B model and its reranker
    examples                their inputs, read from a folder
    published_checks        a model and a reranker compared with these values
    checks                  runs all checks
    __main__                the command line
"""
