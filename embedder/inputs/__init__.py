"""A caller's input -> what the model computes on. Untrusted bytes are read in this package and nowhere else.

The modules, in the order in which an item passes them:

    items       what a caller asks to embed: texts, images and videos, validated when constructed
    python_items  the same, as Python programs give them
    address     a URL -> where it leads, if the operator allows it
    fetch       the URLs of an item -> bytes, from public addresses only
    limits      what decoding reads of the settings
    formats     the file formats of images and videos, and how to recognize them
    data_uri    data URIs and base64, as clients write them
    jpeg        the segments and scans of a JPEG file
    orientation EXIF orientation and display matrices
    structure   whether a picture can be decoded in a thread in a bounded time
    picture     an encoded image -> its pixels, upright, by Pillow
    avif        whether an AVIF file can be decoded in a bounded time
    heic        a HEIC image -> its pixels, by libheif
    clip        an encoded video -> its frames as RGB values, upright, by FFmpeg's libraries
    decoder     opens and decodes both in the calling thread
    decoder_process, decoder_worker, sandbox
                the same in a process that can be killed: this side, the other side, and what it may do
    process_connection  start and socket of such a process
    shared_memory       memory that both processes map
    regimes     sizes of images and frames, and which frames of a video are used
    resample    resizing with the filters of both regimes
    image       an encoded image -> RGB values, resized
    frames      the sampled frames of one video, resized and collected
    video       an encoded video or a list of frames -> sampled RGB frames, resized, with their times
    json_file         a JSON file of the checkpoint -> its fields
    processor_config  the checkpoint's processor files
    tokenizer_files   the checkpoint's tokenizer, as transformers reads it
    chat_template     the checkpoint's chat template, compared with the prompt that is built here
    prompt      instruction and parts -> the chat prompt, as pieces to tokenize
    word_ids    a short text -> its ids, from the ids of known words
    preprocess  all of these -> `ModelInput`: token ids, positions and patches
    pairs       a query and its documents -> the `ModelInput`s that a reranker scores
    tokens      the tokens of items, for callers that count before they send
"""
