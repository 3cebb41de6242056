"""Measure the quality of vectors. Each command prints a table and writes a report to benchmarks/results/quality/.

    python -m benchmarks.quality colors      949 color names and their swatches, on any service of the `local` schema
    python -m benchmarks.quality mteb        tasks of mteb, and small tasks that need no hub
    python -m benchmarks.quality rerank      tasks of mteb in the order of an embedder and of a reranker
    python -m benchmarks.quality ablations   the effect of sizes, types, instructions, pixels and batches
    python -m benchmarks.quality report      colors, mteb and ablations for one model; starts the service

Items are embedded by a running service or by the library. For the published models, on a GPU (start
`EMBEDDER_MODEL=Qwen/Qwen3-VL-Embedding-8B bentoml serve` in another terminal; the same with 2B):

    python -m benchmarks.quality colors --url 8B=http://localhost:3000
    python -m benchmarks.quality mteb --url http://localhost:3000 --benchmark "MTEB(Multilingual, v2)" --output runs/8B
    python -m benchmarks.quality ablations --model Qwen/Qwen3-VL-Embedding-8B
    python -m benchmarks.quality rerank --model Qwen/Qwen3-VL-Embedding-2B --reranker Qwen/Qwen3-VL-Reranker-2B
        --preprocessing reference --tasks AskUbuntuDupQuestions SciDocsRR NFCorpus --candidates 100 --output runs/2B

Modules: `targets` embed with the service or the library; `local_schema` is a client of services with the `local`
schema; `mteb_model` is the model interface of mteb, and `reranking` that of rerankers; `vectors` stores every computed
vector; `tasks` are tasks without downloads; `published` are published scores.
"""
