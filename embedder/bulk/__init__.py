"""Embed a whole data set with Ray Data: `python -m embedder.bulk INPUT OUTPUT`. Needs the extra `bulk`.

The modules, in the order in which a row passes them:

    formats     input files -> parts, the same in every run; a part -> its records
    source      records and column names -> rows to embed
    pages       a folder -> a row for each picture, clip, and page of a document
    segments    a clip -> its segments
    thumbnails  small pictures of rows, an optional column
    worker      the rows of a part through the engine of `Embedder`; one worker per device
    writer      the vectors of a part -> one Parquet file or Lance fragment, complete or absent
    plan        which rows each part has, brought up to date when the input has changed
    state       the options and the plan of an output, kept for the next run
    progress    rows that are finished, from the workers to the command
    actors      the missing parts, distributed over Ray actors
    command     all of it, from the options to the exit status
    __main__    the command line; `options` has its constants

A run that was killed resumes with the parts whose file is missing. A worker reads, embeds and writes a part by itself,
so no rows pass through Ray's object store, and a small /dev/shm is enough.
"""
