"""Whether the service would start here, and with what: `python -m embedder.doctor [MODEL] [--port PORT]`.

report    the checks and what they found
__main__  the command line
"""
