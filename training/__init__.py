"""How the embedded default model was made: `prepare` the data, `train`, `evaluate`. Never needed to serve."""

from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()  # before any file here imports transformers' models
