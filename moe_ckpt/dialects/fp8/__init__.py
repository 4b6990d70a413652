"""DeepSeek's dialect, ``quant_method: fp8``."""
