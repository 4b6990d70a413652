"""The dialect of llm-compressor and the compressed-tensors library."""
