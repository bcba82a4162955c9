"""Two checkpoints over the same text, block by block: what quantization did to the model and to its draft."""
