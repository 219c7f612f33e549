"""What a request is: prompts, sampling parameters, constraints, and how it is rejected."""
