"""Training of the bundled model: `prepare` the data, `train`, `evaluate`. The service does not use this package."""

from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()  # before any file here imports transformers' models
