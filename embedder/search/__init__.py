"""Search what `python -m embedder.bulk` has embedded: `python -m embedder.search OUTPUT "a question"`.

collection  an output -> the rows whose vectors are nearest to a query
snippet     a page's text layer and a question -> the line to show
__main__    the command: embeds the query, searches, reranks, prints
"""
