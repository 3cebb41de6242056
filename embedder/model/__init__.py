"""The model: a checkpoint's weights and their packed forward pass. The files, in the order data meets them:

checkpoint     settings to a checkpoint folder, downloaded from the hub if needed
gpus           the number of GPUs, without torch where there is none
devices        which device a worker uses, and in which data type
progress       downloads and loads in log lines
weight_files   which safetensors files are read, and whether their shapes are those of config.json
memory         check that the weights fit the device, before they are loaded
architecture   the sizes of both towers in config.json
modules        the layers of both towers, by the names of their weights
eight_bit      linear layers whose weights have 8 bits
compact_table  token embeddings in 12 bits, without loss
weights        checkpoint folder to both towers on the device
time_ratio     which of two ways to compute something is faster here
onednn         oneDNN's matrix product for any number of rows
int8_digits    products of int8 weights by the CPU's instructions for integers
products       linear layers of one input joined, and packed for oneDNN where that is faster
packing        preprocessed items to one packed batch (no padding) on the device
positions      coordinates to rotary angles and interpolated position embeddings
attention      attention over packed sequences: onednn, sdpa, varlen or flash_attn
sdpa           the same by torch's scaled_dot_product_attention
onednn_attention  the same by oneDNN's matrix products, on a CPU
execution      how the layers run: eager, by torch.compile, as CUDA graphs, or both
vision         patches to visual tokens and DeepStack features
vision_cache   features of images and clips that occur again
language       tokens to the final hidden state of each item's last token
forward        both towers, in order
halves         two halves of a batch at the same time on a CPU
cuda_graphs    CUDA graphs of the language tower for small batches of text
score_head     the direction of a reranker's log-odds
pooling        hidden states to float32 rows on the host
speed          how long the largest items take on a CPU
memory_budget  the largest batch that fits the GPU's memory
device_errors  torch's errors to DeviceOutOfMemory and DeviceFailed

The forward pass computes packed sequences without padding, KV cache or lm_head, and the last layer only for the pooled
tokens. Each step is tested against transformers' own forward pass (tests/model/test_parity.py). The service does not
import transformers, which takes seconds.
"""
