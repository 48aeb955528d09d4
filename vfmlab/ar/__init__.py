"""The autoregressive generator: a transformer over a tokenizer's codes, and how tokens are drawn from it."""
