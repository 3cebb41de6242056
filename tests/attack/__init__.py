"""A campaign of random attacks on a running service, while quiet callers measure what it does to them.

campaign      starts the attackers and the quiet callers, and measures the service
connections   connections in every state, chunkings, heads, dropped requests
bodies        bombs, and strings, structures, forms and floods that cost much for their size
media         pictures, clips and documents with random tables, packets and damage

The scripts that found the first faults, and the tests that hold what they showed:

clip_hang     tests/inputs/test_isolation.py, tests/inputs/test_decoder_process.py, `cut_off_at_the_deadline`
clip_memory   tests/inputs/test_decoder_process.py, `takes_gigabytes`
http_memory   tests/server/test_connection.py, `pipelined`
http_idle     tests/server/test_connection.py, `every_idle_connection`
h2c           tests/server/test_connection.py, `offer_of_another_protocol`
room          tests/inputs/test_isolation.py, `small_picture_passes`, tests/engine/test_media_queue.py
chunks        tests/server/test_connection.py, `costly_bodies`, `fast_senders`
trailer       tests/server/test_connection.py, `trailers_are_dropped`
cancel_storm  `dropped` in `connections`, next to callers whose vectors are compared
"""
