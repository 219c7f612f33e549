"""The vLLM plugin: hooks, attention backend, slots, scheduler and telemetry of the quantized cache."""
