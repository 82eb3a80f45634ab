"""Quality of a quantized model against its base: KL divergence, top-1 agreement, perplexity."""
