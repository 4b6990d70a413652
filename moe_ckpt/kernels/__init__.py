"""Faster ways to the bytes of `moe_ckpt.formats`, each imported only where it can run."""
