"""Search what `python -m embedder.bulk` has embedded: `python -m embedder.search OUTPUT "a question"`.

collection  an output -> the rows whose vectors are nearest to a query
index       the same for many searches, in two stages
documents   its rows -> what a reranker judges
records     rows that were read from files, read from them again
rerank      results -> the same in the order of a reranker
snippet     a page's text layer and a question -> the lines to show
serve       the playground on an output; `page_images` makes its pictures
command     embeds the query, searches, reranks, prints
__main__    the command line; `options` has its constants
"""
