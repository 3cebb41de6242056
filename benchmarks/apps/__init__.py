"""What the service is measured against, each an app of its own process: `python -m benchmarks.apps.NAME`.

Bodies are the service's: `{"input": text, data URI of an image, or a list of them}`; answers carry `embedding`.
"""
