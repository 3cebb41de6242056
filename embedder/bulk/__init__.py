"""Embed a whole data set with Ray Data: `python -m embedder.bulk INPUT OUTPUT`. Needs the extra `bulk`.

The modules, in the order in which a row passes them:

    formats     input files -> parts, the same in every run; a part -> its records
    source      records and column names -> rows to embed
    pages       a folder with documents -> a row for each page
    thumbnails  small pictures of rows, an optional column
    worker      the rows of a part through the engine of `Embedder`; one worker per device
    writer      the vectors of a part -> one Parquet file or Lance fragment, complete or absent
    __main__    the command: distributes the missing parts over Ray actors and shows the progress

The output files are the only state: a run that was killed resumes with the parts whose file is missing. A worker reads,
embeds and writes a part by itself, so no rows pass through Ray's object store, and a small /dev/shm is enough.
"""
