"""The APIs that agents use beside chat completions: Anthropic's Messages and OpenAI's Responses.

Both translate their requests to chat completions, and render the same deltas.
"""
