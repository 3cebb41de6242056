"""PackedBatch -> hidden states: the forward pass of Qwen3-VL over transformers' weights.

memory        checkpoint folder -> whether its weights can fit the device
weights       checkpoint folder -> transformers' Qwen3VLModel on the device
positions     coordinates -> rotary angles and the resampled position grid
attention     one function over packed sequences, three back ends
fusion        what stands between the products of a layer -> fewer passes, by torch.compile
vision        patches -> visual tokens and deepstack features
language      tokens -> the state of each item's last token
forward       the two in order
graphs        a few texts at once through CUDA graphs of the language tower
faults        what torch raises -> our errors: a full device, a lost one

The loop over the layers is ours: packed, without padding, KV cache or lm_head, and with the last layer computed only
where it is read. The oracle of every step is transformers' own forward (tests/model/test_parity.py).
"""
