"""The servers that the service is compared with, each in its own process: `python -m benchmarks.apps.NAME`.

They use the same bodies as the service: `{"input": ..}` with a text, a data URI of an image, or a list of them. The
response has the field `embedding`.
"""
