"""The formats in which clients ask for embeddings, one file per family of clients: body -> items, embeddings -> body.

dialect             what a dialect defines
messages            content parts, input types and modalities that dialects share
local, embed        this service's own routes
document            `/embed` with a document: its pages
rows                BentoML's adaptive-batching APIs
openai, openai_response
                    `/v1/embeddings`; its options `vllm` and `synonyms` (Voyage's, Jina's, NVIDIA's); `openai_models`
pooling             vLLM's `/pooling`
cohere, cohere_response
                    Cohere's two versions
tei, voyage, ollama, dashscope, kserve, infinity, vertex
                    one file each
tokens, detokenize  `/tokenize`, `/detokenize`, `/decode`: routes without vectors
rerank, rerank_response, tei_rerank, score
                    the routes that score documents; `scoring` is what they have in common
"""
