"""The formats in which clients ask for embeddings, one file per family of clients: body -> items, embeddings -> body.

dialect     what a dialect defines
messages    content parts and input types that dialects share
local, embed, openai, cohere    the dialects
"""
