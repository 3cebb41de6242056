"""A whole data set -> a data set of vectors, on Ray Data: `python -m embedder.bulk INPUT OUTPUT`. Extra: `bulk`.

    source      the operator's files -> parts, the same in every run; a part -> its rows
    writer      a part's vectors -> one Parquet file or Lance fragment, there whole or not at all
    worker      a part's rows through the engine of `Embedder`; one worker a device
    __main__    the command: what is left to do -> Ray Data's actors, and what they say -> a progress bar

What is finished is told by the files that are there, so a run that was killed at any moment goes on where it stood, and
the part a row goes to, and its place there, are those of the input. Rows never travel through Ray's object store: a
worker reads, embeds and writes a part by itself, so a small /dev/shm will do.
"""
