"""The engine: scheduler, paged KV cache, runner, sampling."""
