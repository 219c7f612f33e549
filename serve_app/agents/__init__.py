"""The API that agents use beside chat completions: Anthropic's Messages.

Requests become chat completions, whose deltas are rendered as the protocol's events.
"""
