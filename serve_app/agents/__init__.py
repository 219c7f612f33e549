"""The APIs that agents use beside chat completions: Anthropic's Messages and OpenAI's Responses.

Requests become chat completions, whose deltas are rendered as the protocol's events.
"""
