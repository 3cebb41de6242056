"""What the vectors are worth: each command prints a table and writes a report to benchmarks/results/quality/.

    python -m benchmarks.quality colors      949 color names and their swatches, on any services of the `local` schema
    python -m benchmarks.quality mteb        mteb's tasks, and small ones of our own that need no hub
    python -m benchmarks.quality ablations   what sizes, types, instructions, pixels and neighbors change
    python -m benchmarks.quality report      all three, of one model; starts the service by itself

Everything goes through the running service or the library, as a user's requests do. For the published models, on a GPU
(`EMBEDDER_MODEL=Qwen/Qwen3-VL-Embedding-8B bentoml serve` in another terminal; the same with 2B):

    python -m benchmarks.quality colors --url 8B=http://localhost:3000
    python -m benchmarks.quality mteb --url http://localhost:3000 --benchmark "MTEB(Multilingual, v2)" --output runs/8B
    python -m benchmarks.quality ablations --model Qwen/Qwen3-VL-Embedding-8B

Behind them: `targets` embed by service or library; `local_schema` speaks to services of the first user's schema;
`mteb_model` is what mteb calls, over `vectors`, which keeps every vector that was paid for; `tasks` are our own;
`published` are others' figures.
"""
