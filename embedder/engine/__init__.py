"""Takes items, decides which run together on the device, and returns their embeddings. No torch, no HTTP.

The files, in the order in which an item meets them:

    aio                 awaits the embeddings of a request's items in an event loop, within a time limit
    timers              the time limits of requests, by one timer for each delay
    engine              the queue and the device thread: the whole way of an item, step by step
    admission           which items and requests are accepted, and when a refused caller should retry
    callers             who sends requests, and how callers share a capacity
    job                 one admitted item, with its future
    priority            how much later the items of a request run that lets others go first
    observer            what the engine reports: traces of items, and batches
    preprocess_workers  the threads that fetch, decode, resize and tokenize
    media_queue         which item is decoded next in a process, within the memory for all
    hang_watch          notices a thread that does not finish an item or a batch
    cache               content keys, and rows of earlier items
    coalescing          that cache, together with the jobs that wait for the same content
    scheduler           which jobs run next, within a token budget
    starter             lets items that are submitted together run together
    batch_limits        the token budget after an out-of-memory error
    device              launches batches, waits for them, and measures them
    postprocess         a pooled row to the vector that the caller asked for
    ranking             log-odds to scores, and their order
"""
